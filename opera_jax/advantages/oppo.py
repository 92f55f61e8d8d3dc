"""OPPO (arXiv 2605.21851): every token updates a belief that the completion
succeeds; the advantage is the change of the belief.

    log lambda_t = log p(y_t | x, y*, y_<t) - log p(y_t | x, y_<t)
    l_0 = logit(V_0),  l_{t+1} = l_t + log lambda_t,  V_t = sigmoid(l_t)
    A_t = V_{t+1} - V_t                    sum_t A_t telescopes to V_T - V_0

The oracle is given the known answer y*. The update of the odds is the paper's.
As the denominator is the marginal, exact Bayes is V <- V lambda, which
`belief="probability"` computes. The paper does not specify the bound on the
evidence, V_0 and the oracle's prompt; here V_0 is the group's success rate.
"""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import group
from opera_jax.advantages import inputs as inputs_lib

PROMPT = (
  "{prompt}\n\nThe correct final answer is: {answer}\n\n"
  "Now solve the problem step by step."
)
BELIEFS = ("odds", "probability")
SCALES = ("none", "tokens", "outcome")
_MARGIN = 1e-4  # distance of V_0 from 0 and 1
_MAX_BELIEF = 1 - 1e-6  # bound of V lambda


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """Token advantages from an oracle's log-ratios.

  Attributes:
    oracle: "self", the policy scores with and without the answer; or
      "teacher", the frozen teacher does both.
    belief: "odds" or "probability".
    evidence_clip: bound on |log lambda|, in nats.
    anchor: A_t <- sign(A_seq) |A_t|, where A_seq is GRPO's advantage.
    scale: "none"; "tokens", the standard score over all tokens of a group,
      which can flip anchored signs; "outcome", the advantages of a completion
      sum to R - V_0.
    prompt: the oracle's user turn.
  """

  oracle: str = "self"
  belief: str = "odds"
  evidence_clip: float = 5.0
  anchor: bool = True
  scale: str = "tokens"
  prompt: str = PROMPT

  def __post_init__(self):
    """Refuses unknown names."""
    for name, value, known in (
      ("oracle", self.oracle, ("self", "teacher")),
      ("belief", self.belief, BELIEFS),
      ("scale", self.scale, SCALES),
    ):
      if value not in known:
        raise ValueError(f"Unknown {name} {value!r}. Use one of {known}.")
    if "{prompt}" not in self.prompt or "{answer}" not in self.prompt:
      raise ValueError(
        f"OPPO's prompt is {self.prompt!r}; it must hold {{prompt}} and "
        "{answer}."
      )
    if not self.evidence_clip > 0:
      raise ValueError(
        f"evidence_clip bounds |log lambda|, got {self.evidence_clip}. Use a "
        "positive number of nats."
      )

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """Every completion after the prompt with the answer; a teacher also scores
    it after the prompt alone."""
    tasks = [
      rollouts.prompts[rollouts.prompt_index(r)]
      for r in range(len(rollouts.completions))
    ]
    with_answer = [
      self.prompt.format(prompt=t.prompt, answer=answer(t)) for t in tasks
    ]
    if self.oracle == "self":
      return {"with_answer": inputs_lib.ScoringRequest("policy", with_answer)}
    return {
      "with_answer": inputs_lib.ScoringRequest("teacher", with_answer),
      "without_answer": inputs_lib.ScoringRequest(
        "teacher", [t.prompt for t in tasks]
      ),
    }

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """The changes of belief along each completion."""
    with_answer = inputs.logprobs["with_answer"]
    without_answer = inputs.logprobs.get("without_answer", inputs.logprob)
    evidence = [
      a.astype(np.float64) - b for a, b in zip(with_answer, without_answer)
    ]
    bound = self.evidence_clip
    clipped = [np.clip(e, -bound, bound) for e in evidence]
    start_B = np.clip(inputs.success_BN.mean(axis=1), _MARGIN, 1 - _MARGIN)
    samples = inputs.reward_BN.shape[1]
    start_R = np.repeat(start_B, samples)
    belief = [
      beliefs(e, v, belief=self.belief) for e, v in zip(clipped, start_R)
    ]
    advantage = [np.diff(v) for v in belief]
    if self.anchor:
      sign_R = np.sign(np.asarray(group.grpo(inputs.returns()))).reshape(-1)
      advantage = [s * np.abs(a) for s, a in zip(sign_R, advantage)]
    if self.scale == "tokens":
      advantage = normalised(advantage, samples)
    elif self.scale == "outcome":
      target_R = inputs.success_BN.reshape(-1) - start_R
      advantage = [rescaled(a, t) for a, t in zip(advantage, target_R)]
    all_tokens = np.concatenate(evidence)
    last_R = np.asarray([v[-1] for v in belief])
    return inputs_lib.Advantages(
      [a.astype(np.float32) for a in advantage],
      {
        "clipped": (
          float((np.abs(all_tokens) > bound).mean()) if all_tokens.size else 0.0
        ),
        "evidence": float(all_tokens.mean()) if all_tokens.size else 0.0,
        "drift": float((last_R - start_R).mean()),
      },
    )


def answer(task: structs.Prompt) -> str:
  """The final answer of a maths task, otherwise the reference."""
  return task.reference.rpartition("####")[2].strip() or task.reference


def beliefs(
  evidence_T: np.ndarray, start: float, *, belief: str = "odds"
) -> np.ndarray:
  """V_0 .. V_T, float64 [T + 1], from log lambda [T].

  Args:
    evidence_T: log lambda, in nats.
    start: V_0, inside (0, 1).
    belief: "odds", `logit V += log lambda`; or "probability",
      `V = min(V lambda, 1 - 1e-6)`.
  """
  if belief == "odds":
    logit = np.log(start) - np.log1p(-start) + np.cumsum(evidence_T)
    return np.append(start, 1 / (1 + np.exp(-np.clip(logit, -500, 500))))
  value = [start]
  for step in evidence_T:
    value.append(min(value[-1] * np.exp(step), _MAX_BELIEF))
  return np.asarray(value)


def normalised(
  advantage: list[np.ndarray], samples: int, *, epsilon: float = 1e-6
) -> list[np.ndarray]:
  """Standard score over all tokens of each group of `samples` completions.

  A group whose token advantages are all equal gets zeros.
  """
  out = []
  for begin in range(0, len(advantage), samples):
    group_advantage = advantage[begin : begin + samples]
    tokens = np.concatenate(group_advantage)
    if not tokens.size or np.ptp(tokens) == 0:
      out += [np.zeros_like(a) for a in group_advantage]
      continue
    mean, std = tokens.mean(), tokens.std()
    out += [(a - mean) / (std + epsilon) for a in group_advantage]
  return out


def rescaled(advantage_T: np.ndarray, target: float) -> np.ndarray:
  """Scales `advantage_T` so that it sums to `target`.

  If its sum is 0 or has the opposite sign, `|A_t|` is scaled instead. If all
  advantages are 0, the target is divided equally among the tokens.
  """
  total = advantage_T.sum()
  if not advantage_T.size or total * target > 1e-12:
    return advantage_T * (target / total) if advantage_T.size else advantage_T
  size_T = np.abs(advantage_T)
  if size_T.sum() <= 1e-12:
    return np.full(len(advantage_T), target / len(advantage_T))
  return size_T * (target / size_T.sum())
