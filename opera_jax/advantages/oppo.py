"""OPPO (arXiv 2605.21851): each token's evidence moves a belief in success.

    log lambda_t = log p(y_t | x, y*, y_<t) - log p(y_t | x, y_<t)
    l_0 = logit(V_0),  l_{t+1} = l_t + log lambda_t,  V_t = sigmoid(l_t)
    A_t = V_{t+1} - V_t                    sum_t A_t telescopes to V_T - V_0

The oracle sees the known answer y*. The odds update is the paper's; with the
marginal in the denominator exact Bayes is V <- V lambda, which
`belief="probability"` computes. Unpublished, and chosen here: the bound on
the evidence, V_0 (the group's success rate), the oracle's prompt.
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
_EDGE = 1e-4  # V_0 stays this far from 0 and 1
_TOP = 1 - 1e-6  # V lambda is clipped here


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """Token advantages from an oracle's log-ratios.

  Attributes:
    oracle: "self", the policy scores with and without the answer; or
      "teacher", a frozen model does both.
    belief: "odds" or "probability".
    evidence_clip: bound on |log lambda|, nats.
    anchor: A_t <- sign(A_seq) |A_t|, with A_seq of GRPO.
    scale: "none"; "tokens", standard score over the group's tokens, which can
      flip anchored signs; "outcome", each sequence sums to R - V_0.
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
    """Each completion after the prompt with its answer; and, for a teacher,
    after the prompt alone."""
    tasks = [
      rollouts.prompts[rollouts.prompt_index(r)] for r in _rows(rollouts)
    ]
    told = [
      self.prompt.format(prompt=t.prompt, answer=answer(t)) for t in tasks
    ]
    if self.oracle == "self":
      return {"told": inputs_lib.ScoringRequest("policy", told)}
    return {
      "told": inputs_lib.ScoringRequest("teacher", told),
      "plain": inputs_lib.ScoringRequest("teacher", [t.prompt for t in tasks]),
    }

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """Belief by belief along each completion."""
    told = inputs.logprobs["told"]
    plain = inputs.logprobs.get("plain", inputs.logprob)
    ratio = [a.astype(np.float64) - b for a, b in zip(told, plain)]
    bound = self.evidence_clip
    clipped = [np.clip(r, -bound, bound) for r in ratio]
    start_B = np.clip(inputs.success_BN.mean(axis=1), _EDGE, 1 - _EDGE)
    samples = inputs.reward_BN.shape[1]
    start_R = np.repeat(start_B, samples)
    belief = [
      beliefs(r, v, belief=self.belief) for r, v in zip(clipped, start_R)
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
    every = np.concatenate(ratio)
    last_R = np.asarray([v[-1] for v in belief])
    return inputs_lib.Advantages(
      [a.astype(np.float32) for a in advantage],
      {
        "clipped": float((np.abs(every) > bound).mean()) if every.size else 0.0,
        "evidence": float(every.mean()) if every.size else 0.0,
        "drift": float((last_R - start_R).mean()),
      },
    )


def answer(task: structs.Prompt) -> str:
  """What the oracle is told: the final answer of maths, else the reference."""
  return task.reference.rpartition("####")[2].strip() or task.reference


def beliefs(
  evidence_T: np.ndarray, start: float, *, belief: str = "odds"
) -> np.ndarray:
  """V_0 .. V_T, float64 [T + 1], from log lambda [T].

  Args:
    evidence_T: log lambda, nats.
    start: V_0, inside (0, 1).
    belief: "odds", `logit V += log lambda`; or "probability",
      `V = min(V lambda, 1 - 1e-6)`.
  """
  if belief == "odds":
    logit = np.log(start) - np.log1p(-start) + np.cumsum(evidence_T)
    return np.append(start, 1 / (1 + np.exp(-np.clip(logit, -500, 500))))
  value = [start]
  for step in evidence_T:
    value.append(min(value[-1] * np.exp(step), _TOP))
  return np.asarray(value)


def normalised(
  advantage: list[np.ndarray], samples: int, *, epsilon: float = 1e-6
) -> list[np.ndarray]:
  """Standard score over all tokens of each group of `samples` rows.

  A group whose tokens are all equal gets zeros.
  """
  out = []
  for begin in range(0, len(advantage), samples):
    rows = advantage[begin : begin + samples]
    every = np.concatenate(rows)
    if not every.size or np.ptp(every) == 0:
      out += [np.zeros_like(row) for row in rows]
      continue
    out += [(row - every.mean()) / (every.std() + epsilon) for row in rows]
  return out


def rescaled(advantage_T: np.ndarray, target: float) -> np.ndarray:
  """`advantage_T` scaled so that it sums to `target`.

  Where its own sum is 0, or has the other sign, `|A_t|` is scaled instead; a
  sequence without any advantage gets equal shares.
  """
  total = advantage_T.sum()
  if not advantage_T.size or total * target > 1e-12:
    return advantage_T * (target / total) if advantage_T.size else advantage_T
  size_T = np.abs(advantage_T)
  if size_T.sum() <= 1e-12:
    return np.full(len(advantage_T), target / len(advantage_T))
  return size_T * (target / size_T.sum())


def _rows(rollouts: structs.Rollouts) -> range:
  return range(len(rollouts.completions))
