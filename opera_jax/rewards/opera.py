"""OPERA's reward (arXiv 2606.25757): the policy's own log-probability of the
reference.

With `lp(a | c)` the mean log-probability per token of `a` after `c`,

    P_0   = lp(y_ref | x, <think>)    P_j = lp(y_ref | x, <think>, s_1 .. s_j)
    R_raw = #{ j : step j is reflective and P_j > P_{j-1} }
    R_self = tanh(R_raw / tau)
    L_i   = lp(y_ref | x, z_i, y_i)
    R_ppl_i = #{ k != i : L_k < L_i } / (N - 1)
    R     = alpha R_ppl + (1 - alpha) R_self

`queries` declares the continuations that need a log-probability, `rewards`
turns the log-probabilities into numbers, `step_deltas` into what each step did;
no model in here.

Shape key: B prompts, N samples a prompt, R = B * N rows (prompt-major), J
steps of a thought, S slots of a row (its distinct continuations), Q
continuations in all, M scored tokens of a row.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from opera_jax import structs
from opera_jax.kernels.perplexity_reward import api as perplexity_reward

MODES = ("both", "r_self", "r_ppl", "one_hot")
COMPARED = ("previous", "reflective", "start")
_NONE = -1
# Called outside of a program they would be one a line and shape.
_compared = jax.jit(perplexity_reward.perplexity_reward, static_argnames="tau")
_ranked = jax.jit(perplexity_reward.group_rank)


@dataclasses.dataclass(frozen=True)
class Reward:
  """OPERA as one of a run's rewards; open-ended prompts alone.

  Attributes:
    alpha: see `rewards`.
    tau: see `rewards`.
    mode: see `rewards`.
    bridge_ids: see `queries`.
    compare: see `queries`.
    every_step: any step may count, with or without a keyword.
    all_steps: see `queries`.
  """

  alpha: float = 0.3
  tau: float = 2.0
  mode: str = "both"
  bridge_ids: tuple[int, ...] = ()
  compare: str = "previous"
  every_step: bool = False
  all_steps: bool = False

  def logprob_request(
    self, rollouts: structs.Rollouts
  ) -> structs.LogprobRequest:
    """The continuations of open-ended rows; the aux is their `Layout`."""
    rows = _open_ended(rollouts)
    if not rows:
      return structs.LogprobRequest()
    thoughts = jax.tree.map(lambda x: x[rows], rollouts.thoughts)
    if self.every_step:
      steps = np.arange(thoughts.reflective.shape[1])
      thoughts = thoughts.replace(
        reflective=steps[None] < thoughts.count[:, None]
      )
    owners = [rollouts.prompt_index(r) for r in rows]
    continuations, layout = queries(
      thoughts,
      np.asarray([len(rollouts.prompt_ids[b]) for b in owners]),
      np.asarray([len(rollouts.completions[r].tokens) for r in rows]),
      [rollouts.encode(rollouts.prompts[b].reference) for b in owners],
      bridge_ids=self.bridge_ids,
      all_steps=self.all_steps,
      compare=self.compare,
      prefixes=rows,
    )
    return structs.LogprobRequest(continuations=continuations, aux=layout)

  def rewards(
    self, rollouts: structs.Rollouts, result: structs.LogprobResult
  ) -> dict[str, np.ndarray]:
    """`rewards` of the open-ended prompts, 0 for the others; [B, N] each."""
    shape = (len(rollouts.prompts), rollouts.samples)
    rows = _open_ended(rollouts)
    if not rows:
      return {"total": np.zeros(shape, np.float32)}
    parts = rewards(
      result.continuation_logprob,
      result.aux,
      samples=rollouts.samples,
      alpha=self.alpha,
      tau=self.tau,
      mode=self.mode,
    )
    out = {}
    for name, part in parts.items():
      full_R = np.zeros(np.prod(shape), np.float32)
      full_R[rows] = part.reshape(-1)
      out[name] = full_R.reshape(shape)
    return out


def _open_ended(rollouts: structs.Rollouts) -> list[int]:
  """Rows of open-ended prompts."""
  return [
    r
    for r in range(len(rollouts.completions))
    if rollouts.prompts[rollouts.prompt_index(r)].task == "open_ended"
  ]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which continuation answers which question; host arrays, -1 is "none"."""

  row: np.ndarray  # [Q] int32, row of continuation q
  slot: np.ndarray  # [Q] int32, slot of continuation q in its row
  previous: np.ndarray  # [R, S] int32, slot that slot s must beat to count
  last: np.ndarray  # [R] int32, slot scored after the whole completion
  before: np.ndarray  # [R, J] int32, slot where step j begins
  after: np.ndarray  # [R, J] int32, slot where step j ends


def queries(
  thoughts: structs.Thoughts,
  prompt_length_R: np.ndarray,
  completion_length_R: np.ndarray,
  reference_ids: Sequence[np.ndarray],
  *,
  bridge_ids: Sequence[int] = (),
  all_steps: bool = False,
  compare: str = "previous",
  prefixes: Sequence[int] | None = None,
) -> tuple[list[structs.Continuation], Layout]:
  """The continuations whose log-probabilities the reward needs, each position
  once.

  A prefix is prompt + completion. A row asks at the ends of its reflective
  steps and of their predecessors (the start of the thought is the first
  step's), and once after the whole completion: thought, answer, and the
  end-of-turn token where one was sampled. A row without a closed thought asks
  only the last.

  Args:
    thoughts: where the steps lie, in completion positions.
    prompt_length_R: int, tokens of the prompt, generation prefix included.
    completion_length_R: int, tokens of the completion, stop token included.
    reference_ids: int32 arrays, tokens of y_ref for each row, tokenised apart.
    bridge_ids: tokens put between a partial thought and the reference, seen
      and not scored; never after the whole completion.
    all_steps: ask at the end of every step, for pictures; the reward is the
      same.
    compare: what a reflective step must beat: "previous", the end of the step
      before it, whatever it holds (the paper); "reflective", the end of the
      last reflective step; "start", the thought's start.
    prefixes: index of each row's prefix in the scorer's list; default 0 .. R -
      1.

  Returns:
    The continuations, and the layout that `rewards` needs to read their
    log-probabilities.

  Raises:
    ValueError: rows that do not match, an empty reference, a step outside its
      completion, or an unknown `compare`.
  """
  if compare not in COMPARED:
    raise ValueError(f"Unknown comparison {compare!r}. Use one of {COMPARED}.")
  thoughts = jax.tree.map(np.asarray, thoughts)  # one fetch, not one an entry
  rows = len(prompt_length_R)
  prefixes = range(rows) if prefixes is None else prefixes
  lengths = {
    "thoughts": len(thoughts.count),
    "completion_length_R": len(completion_length_R),
    "reference_ids": len(reference_ids),
    "prefixes": len(prefixes),
  }
  for name, length in lengths.items():
    if length != rows:
      raise ValueError(
        f"{name} has {length} rows, prompt_length_R has {rows}; give one "
        "entry a completion."
      )
  steps = thoughts.step_end.shape[1]
  before_RJ = np.full((rows, steps), _NONE, np.int32)
  after_RJ = np.full((rows, steps), _NONE, np.int32)
  last_R = np.zeros(rows, np.int32)
  continuations: list[structs.Continuation] = []
  row_of: list[int] = []
  slot_of: list[int] = []
  previous: list[list[int]] = []
  for r in range(rows):
    reference = np.asarray(reference_ids[r], np.int32)
    if not reference.size:
      raise ValueError(
        f"The reference of row {r} has no tokens; a reward needs at least 1. "
        "Drop that prompt, or check the tokenizer."
      )
    bridged = np.concatenate([np.asarray(bridge_ids, np.int32), reference])
    slots: dict[int, int] = {}
    end_J, reflective_J = _steps_of_row(thoughts, r, completion_length_R[r])
    start = int(thoughts.start[r])
    base = {"previous": start, "reflective": start, "start": start}
    compared = {}
    for j, end in enumerate(end_J):
      if reflective_J[j] or all_steps:
        before_RJ[r, j] = slots.setdefault(base[compare], len(slots))
        after_RJ[r, j] = slots.setdefault(end, len(slots))
      if reflective_J[j] and end != base[compare]:
        compared[int(after_RJ[r, j])] = int(before_RJ[r, j])
      base["previous"] = end
      if reflective_J[j]:
        base["reflective"] = end
    for position in slots:
      continuations.append(
        structs.Continuation(
          prefix=int(prefixes[r]),
          fork=int(prompt_length_R[r]) + position,
          tokens=bridged,
          skip=len(bridge_ids),
        )
      )
    last_R[r] = len(slots)
    continuations.append(
      structs.Continuation(
        prefix=int(prefixes[r]),
        fork=int(prompt_length_R[r]) + int(completion_length_R[r]),
        tokens=reference,
      )
    )
    row_of += [r] * (len(slots) + 1)
    slot_of += range(len(slots) + 1)
    previous.append([compared.get(s, _NONE) for s in range(len(slots) + 1)])
  slots_max = _bucket(max(map(len, previous), default=1))
  previous_RS = np.full((rows, slots_max), _NONE, np.int32)
  for r, compared_S in enumerate(previous):
    previous_RS[r, : len(compared_S)] = compared_S
  return continuations, Layout(
    row=np.asarray(row_of, np.int32),
    slot=np.asarray(slot_of, np.int32),
    previous=previous_RS,
    last=last_R,
    before=before_RJ,
    after=after_RJ,
  )


def rewards(
  continuation_logprob: Sequence[np.ndarray],
  layout: Layout,
  *,
  samples: int,
  alpha: float = 0.3,
  tau: float = 2.0,
  mode: str = "both",
) -> dict[str, np.ndarray]:
  """Rewards and their parts from the log-probabilities of `queries`'
  continuations.

  Args:
    continuation_logprob: float32, the log-probabilities of each continuation's
      scored tokens, in the order of `queries`' continuations, nats.
    layout: what `queries` returned.
    samples: N, rows a prompt; rows are prompt-major.
    alpha: weight of R_ppl.
    tau: improving reflections that bring R_self to tanh(1).
    mode: "both" is the formula above; "r_self" and "r_ppl" are one part
      alone; "one_hot" puts 1 for the group's strict best and 0 for the rest
      in the place of R_ppl.

  Returns:
    float32 [B, N] each: `total`, `r_ppl` (as used in the total), `r_self`,
    `count` (R_raw) and `score` (L, nats a token).

  Raises:
    ValueError: an unknown mode, alpha outside 0..1, fewer than 2 samples,
      rows that do not divide, a count of continuations that is not `queries`',
      or a log-probability that is not finite.
  """
  rows = len(layout.last)
  if mode not in MODES:
    raise ValueError(f"Unknown reward mode {mode!r}. Use one of {MODES}.")
  if not 0 <= alpha <= 1 or tau <= 0:
    raise ValueError(
      f"The reward needs 0 <= alpha <= 1 and tau > 0, got {alpha} and {tau}."
    )
  if samples < 2 or rows % samples:
    raise ValueError(
      f"R_ppl ranks a group of at least 2 samples, got {rows} rows in groups "
      f"of {samples}. Raise config.rl.samples, and give every prompt "
      "all of its samples."
    )
  logprob_RM, continuation_RM = _pack(continuation_logprob, layout)
  # How many prompts are open-ended differs from step to step: few shapes.
  mean_RS, _, count_RX, self_RX = _compared(
    _more_rows(logprob_RM, 0.0),
    _more_rows(continuation_RM, _NONE),
    _more_rows(layout.previous, _NONE),
    tau=float(tau),
  )
  count_R, self_R = np.asarray(count_RX)[:rows], np.asarray(self_RX)[:rows]
  score_R = np.asarray(mean_RS)[np.arange(rows), layout.last]
  score_BN = score_R.reshape(-1, samples)
  rank_XN = _ranked(_more_rows(score_BN, 0.0))
  rank_BN = np.asarray(rank_XN)[: len(score_BN)]
  if mode == "one_hot":
    rank_BN = (rank_BN == 1.0).astype(np.float32)
  self_BN = np.asarray(self_R).reshape(score_BN.shape)
  total_BN = {
    "r_self": self_BN,
    "r_ppl": rank_BN,
    "both": alpha * rank_BN + (1 - alpha) * self_BN,
    "one_hot": alpha * rank_BN + (1 - alpha) * self_BN,
  }[mode]
  parts = {
    "total": total_BN,
    "r_ppl": rank_BN,
    "r_self": self_BN,
    "count": np.asarray(count_R).reshape(score_BN.shape),
    "score": score_BN,
  }
  return {name: part.astype(np.float32) for name, part in parts.items()}


def step_deltas(
  continuation_logprob: Sequence[np.ndarray], layout: Layout
) -> np.ndarray:
  """`P_j - P_{j-1}` of each step, float32 [R, J], nats a token.

  NaN where the step's ends were not scored: every step is scored with
  `all_steps=True`, only reflective ones without.
  """
  mean_RS = np.full(layout.previous.shape, np.nan, np.float32)
  for q, logprob_G in enumerate(continuation_logprob):
    mean_RS[layout.row[q], layout.slot[q]] = np.mean(logprob_G)
  row_R1 = np.arange(len(layout.last))[:, None]
  delta_RJ = mean_RS[row_R1, layout.after] - mean_RS[row_R1, layout.before]
  return np.where(layout.after == _NONE, np.float32(np.nan), delta_RJ)


def _steps_of_row(
  thoughts: structs.Thoughts, row: int, completion_length: int
) -> tuple[list[int], np.ndarray]:
  """Ends and reflective flags of one row's steps; none if not closed."""
  count = int(thoughts.count[row]) if thoughts.closed[row] else 0
  end_J = [int(end) for end in thoughts.step_end[row, :count]]
  bounds = [int(thoughts.start[row]), *end_J, int(completion_length)]
  if count and (bounds[0] < 0 or bounds != sorted(bounds)):
    raise ValueError(
      f"Row {row}: its thought starts at {bounds[0]} and its steps end at "
      f"{end_J}, of {completion_length} tokens; steps must rise within the "
      "completion. Mark the steps on the sampled tokens themselves."
    )
  return end_J, np.asarray(thoughts.reflective[row, :count])


def _more_rows(x_RX: np.ndarray, value: float) -> np.ndarray:
  """Rows of `value` added, up to a bucket."""
  more = _bucket(len(x_RX)) - len(x_RX)
  return np.pad(x_RX, ((0, more), (0, 0)), constant_values=value)


def _bucket(size: int) -> int:
  """The next power of two, at least 8: few shapes, few compilations."""
  return 1 << max(3, (size - 1).bit_length())


def _pack(
  continuation_logprob: Sequence[np.ndarray], layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
  """All scored tokens of a row side by side, and the slot of each."""
  if len(continuation_logprob) != len(layout.row):
    raise ValueError(
      f"Got scores of {len(continuation_logprob)} continuations, the layout "
      f"has {len(layout.row)}. Pass the slice that this reward's queries "
      "became."
    )
  rows = len(layout.last)
  used_R = np.zeros(rows, np.int64)
  for q, logprob_G in enumerate(continuation_logprob):
    if not np.all(np.isfinite(logprob_G)):
      raise ValueError(
        f"The log-probability of continuation {q} (row {layout.row[q]}) holds "
        f"{logprob_G[~np.isfinite(logprob_G)][0]}; log-probabilities must be "
        "finite. Check the policy's parameters for NaN."
      )
    used_R[layout.row[q]] += len(logprob_G)
  width = _bucket(int(used_R.max(initial=1)))
  logprob_RM = np.zeros((rows, width), np.float32)
  continuation_RM = np.full((rows, width), _NONE, np.int32)
  used_R[:] = 0
  for q, logprob_G in enumerate(continuation_logprob):
    r, begin = layout.row[q], used_R[layout.row[q]]
    logprob_RM[r, begin : begin + len(logprob_G)] = logprob_G
    continuation_RM[r, begin : begin + len(logprob_G)] = layout.slot[q]
    used_R[r] += len(logprob_G)
  return logprob_RM, continuation_RM
