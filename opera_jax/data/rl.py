"""Packed rows of a policy update, from completions, log-probabilities and
advantages.

Shape key: R completions, T tokens of a packed row; P tokens of a shared prompt,
S completions that share it, G tokens of each.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import batching


@dataclasses.dataclass(frozen=True)
class Placement:
  """The packed row and offset of every completion of a step.

  Attributes:
    row: [R] the packed row of each completion.
    begin: [R] the offset of its first token in that row.
    size: [R] its number of tokens.
    shape: number of packed rows, and T.
    prefix_length: P, or 0 if every row is one prompt and its completion.
    num_continuations: S, or 0 likewise.
  """

  row: np.ndarray
  begin: np.ndarray
  size: np.ndarray
  shape: tuple[int, int]
  prefix_length: int = 0
  num_continuations: int = 0

  def scatter(self, values: Sequence[np.ndarray]) -> np.ndarray:
    """Writes values of completion tokens into packed rows, 0 elsewhere.

    Args:
      values: [size, ...] of each completion.

    Returns:
      [*shape, ...], dtype of the values.
    """
    out = np.zeros((*self.shape, *values[0].shape[1:]), values[0].dtype)
    for index, value in zip(self._indices(), values, strict=True):
      out[index] = value
    return out

  def gather(self, array: np.ndarray) -> list[np.ndarray]:
    """The inverse of `scatter`: [size, ...] of each completion."""
    return [array[index] for index in self._indices()]

  def _indices(self) -> Iterator[tuple[int, slice]]:
    for row, begin, size in zip(self.row, self.begin, self.size):
      yield row, slice(begin, begin + size)


def place(
  prompt_lengths: Sequence[int],
  sizes: Sequence[int],
  buckets: Sequence[int],
  *,
  completions_per_row: int,
  padded_prompt: int,
) -> Placement:
  """Assigns the completions of a step to packed rows.

  Args:
    prompt_lengths: [R] prompt tokens before each completion.
    sizes: [R] tokens of each completion, prompt-major.
    buckets: allowed lengths of a row; of a completion if several share a row.
    completions_per_row: 1 gives every completion its own copy of the prompt.
    padded_prompt: P, padded tokens of a shared prompt.

  Raises:
    ValueError: a row or completion longer than the largest bucket.
  """
  if completions_per_row > 1:
    return several_per_row(
      sizes,
      completions_per_row=completions_per_row,
      prefix_length=padded_prompt,
      buckets=buckets,
    )
  return one_per_row(prompt_lengths, sizes, buckets)


def one_per_row(
  begins: Sequence[int], sizes: Sequence[int], buckets: Sequence[int]
) -> Placement:
  """One packed row per completion: its prompt, then the completion.

  Args:
    begins: prompt tokens of each.
    sizes: tokens of each.
    buckets: allowed T; the smallest that holds every row is used.

  Raises:
    ValueError: a row longer than the largest bucket.
  """
  begin, size = np.asarray(begins), np.asarray(sizes)
  length = batching.bucket(int((begin + size).max()), buckets)
  return Placement(
    row=np.arange(len(size)),
    begin=begin,
    size=size,
    shape=(len(size), length),
  )


def several_per_row(
  sizes: Sequence[int],
  completions_per_row: int,
  prefix_length: int,
  buckets: Sequence[int],
) -> Placement:
  """One packed row per `completions_per_row` completions, which share one copy
  of their prompt.

  Args:
    sizes: tokens of each completion, prompt-major.
    completions_per_row: S, which divides the completions of a prompt.
    prefix_length: P, padded tokens of a prompt.
    buckets: allowed G; the smallest that holds every completion is used.

  Raises:
    ValueError: a completion longer than the largest bucket.
  """
  size = np.asarray(sizes)
  length = batching.bucket(int(size.max()), buckets)
  row, slot = np.divmod(np.arange(len(size)), completions_per_row)
  return Placement(
    row=row,
    begin=prefix_length + slot * length,
    size=size,
    shape=(
      len(size) // completions_per_row,
      prefix_length + completions_per_row * length,
    ),
    prefix_length=prefix_length,
    num_continuations=completions_per_row,
  )


def build_batch(
  placement: Placement,
  prefixes: Sequence[np.ndarray],
  old_logprob: Sequence[np.ndarray],
  ref_logprob: Sequence[np.ndarray],
) -> structs.Batch:
  """Writes completions into packed rows; their tokens are the targets.

  Args:
    placement: of the completions.
    prefixes: int32, prompt + completion.
    old_logprob: float32 [size] of each, under the policy before the updates.
    ref_logprob: float32 [size] of each, under the reference policy.

  Returns:
    A host batch whose advantages are 0; see `with_advantages`.
  """
  tokens = np.zeros(placement.shape, np.int32)
  segments = np.zeros(placement.shape, np.int32)
  positions = np.zeros(placement.shape, np.int32)
  P, S = placement.prefix_length, placement.num_continuations
  if not S:
    positions[:] = np.arange(placement.shape[1])
  for r, (row, begin, size) in enumerate(
    zip(placement.row, placement.begin, placement.size)
  ):
    prompt = len(prefixes[r]) - size
    tokens[row, :prompt] = prefixes[r][:prompt]
    tokens[row, begin : begin + size] = prefixes[r][prompt:]
    segments[row, :prompt] = 1
    if S:
      G = (placement.shape[1] - P) // S
      positions[row, :P] = np.arange(P)
      positions[row, begin : begin + G] = prompt + np.arange(G)
      segments[row, begin : begin + size] = 2 + (begin - P) // G
    else:
      segments[row, begin : begin + size] = 1
  return structs.Batch(
    tokens=tokens,
    positions=positions,
    segments=segments,
    loss_mask=placement.scatter(
      [np.ones(s, np.float32) for s in placement.size]
    ),
    advantage=np.zeros(placement.shape, np.float32),
    old_logprob=placement.scatter(old_logprob),
    ref_logprob=placement.scatter(ref_logprob),
    prefix_length=P,
    num_continuations=S,
  )


def with_advantages(
  batch: structs.Batch,
  placement: Placement,
  advantages: Sequence[np.ndarray],
  extra: Mapping[str, np.ndarray] | None = None,
) -> structs.Batch:
  """Adds an advantage for every completion token.

  Args:
    batch: from `build_batch`.
    placement: of the completions.
    advantages: float32 [size] of each completion.
    extra: further arrays that the loss reads, [*shape, ...] by name.
  """
  return batch.replace(
    advantage=placement.scatter(advantages), extra=dict(extra or {})
  )


def without(
  batch: structs.Batch, placement: Placement, dropped: Sequence[bool]
) -> structs.Batch:
  """Takes the tokens of some completions out of the loss.

  Args:
    batch: from `build_batch`.
    placement: of the completions.
    dropped: [R] the completions whose tokens are no targets.
  """
  kept = placement.scatter(
    [np.full(s, not d, np.float32) for s, d in zip(placement.size, dropped)]
  )
  return batch.replace(loss_mask=batch.loss_mask * kept)


def passes(
  batch: structs.Batch,
  group_tokens: Sequence[int],
  count: int,
  *,
  epochs: int,
  balance: bool,
  seed: Sequence[int],
) -> Iterator[structs.Batch]:
  """Arranges the groups of a step for every pass over it.

  Groups keep the order in which they were sampled in the first pass, and are
  shuffled in later ones. Every mini-batch has the same number of groups, so
  that all updates run the same program; balanced ones have about equal numbers
  of completion tokens.

  Args:
    batch: rows of whole groups, which are consecutive.
    group_tokens: completion tokens of each group.
    count: mini-batches that will be cut from a pass.
    epochs: passes over the step.
    balance: whether mini-batches are balanced by tokens.
    seed: of the shuffling; of this step, so that a resumed run shuffles alike.

  Yields:
    The batch of each pass, to be cut into mini-batches.
  """
  groups = len(group_tokens)
  size = batch.tokens.shape[0] // groups  # rows of a group
  for epoch in range(epochs):
    order = np.arange(groups)
    if epoch:
      order = np.random.default_rng([*seed, epoch]).permutation(groups)
    if balance:
      order = balanced_order(order, group_tokens, count)
    rows = (order[:, None] * size + np.arange(size)).reshape(-1)
    yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)


def balanced_order(
  order: np.ndarray, group_tokens: Sequence[int], count: int
) -> np.ndarray:
  """Deals groups to mini-batches of equal size with about equal tokens.

  The largest group left goes to the mini-batch of fewest tokens that has room
  (longest processing time first, Graham 1969). Mini-batches come in the order
  of their first groups.

  Args:
    order: int [groups], a permutation.
    group_tokens: tokens of each group.
    count: mini-batches, a divisor of the groups.

  Returns:
    The groups of the first mini-batch, then of the second, ...
  """
  room = len(order) // count
  sizes = np.asarray(group_tokens)[order].tolist()
  dealt: list[list[int]] = [[] for _ in range(count)]
  tokens = [0] * count
  for place in sorted(range(len(order)), key=lambda i: (-sizes[i], i)):
    open_ = [m for m in range(count) if len(dealt[m]) < room]
    least = min(open_, key=lambda m: tokens[m])
    dealt[least].append(place)
    tokens[least] += sizes[place]
  return order[np.concatenate(sorted(map(sorted, dealt)))]


def mini_batches(batch: structs.Batch, count: int) -> list[structs.Batch]:
  """Splits a batch into `count` runs of consecutive rows.

  Groups stay together, as their rows are consecutive.

  Raises:
    ValueError: the number of rows is not divisible by `count`.
  """
  rows = batch.tokens.shape[0]
  if rows % count:
    raise ValueError(
      f"{rows} rows do not divide into {count} mini-batches. Change "
      "config.rl.prompts, samples or mini_batch."
    )
  size = rows // count
  return [
    jax.tree.map(lambda leaf, i=i: leaf[i * size : (i + 1) * size], batch)
    for i in range(count)
  ]


def pairs(batch: structs.Batch, samples: int, count: int) -> structs.Batch:
  """Keeps two rows of each group: the chosen and the rejected completion.

  Args:
    batch: rows of whole groups; the advantage is positive on the tokens of the
      chosen completion, negative on those of the rejected one.
    samples: N, rows of a group.
    count: mini-batches that will be cut; in each, chosen rows come first.

  Returns:
    The batch with 2 rows per group. A group without a pair keeps its first two
    rows, with the loss mask 0.
  """
  sign_RT = batch.advantage * batch.loss_mask
  sign_BN = sign_RT.sum(axis=1).reshape(-1, samples)
  begin_B = np.arange(len(sign_BN)) * samples
  paired_B = (sign_BN.max(axis=1) > 0) & (sign_BN.min(axis=1) < 0)
  chosen_B = begin_B + np.where(paired_B, sign_BN.argmax(axis=1), 0)
  rejected_B = begin_B + np.where(paired_B, sign_BN.argmin(axis=1), 1)
  order = np.concatenate(
    [
      np.concatenate([chosen, rejected])
      for chosen, rejected in zip(
        np.split(chosen_B, count), np.split(rejected_B, count)
      )
    ]
  )
  kept = jax.tree.map(lambda leaf: leaf[order], batch)
  paired_R = np.repeat(paired_B.reshape(count, -1), 2, axis=0).reshape(-1)
  mask_RT = kept.loss_mask * paired_R[:, None]
  return kept.replace(loss_mask=mask_RT.astype(np.float32))
