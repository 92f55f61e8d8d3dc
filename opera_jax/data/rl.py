"""Rows of a policy update from completions, scores and advantages.

Shape key: R completions, rows of T tokens; P tokens of a shared prompt, S
completions that share it, G tokens of each.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import batching


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the completions of a step stand in the rows of its update.

  Attributes:
    row: [R] the row of each completion.
    begin: [R] the place of its first token there.
    size: [R] its tokens.
    shape: rows, and tokens of a row.
    prefix: P, or 0 where every row is one prompt and its completion.
    continuations: S, or 0.
  """

  row: np.ndarray
  begin: np.ndarray
  size: np.ndarray
  shape: tuple[int, int]
  prefix: int = 0
  continuations: int = 0

  def scatter(self, values: Sequence[np.ndarray]) -> np.ndarray:
    """Puts values of completion tokens at their places, and 0 elsewhere.

    Args:
      values: [size, ...] of each completion.

    Returns:
      [*shape, ...], dtype of the values.
    """
    out = np.zeros((*self.shape, *values[0].shape[1:]), values[0].dtype)
    for place, value in zip(self._places(), values, strict=True):
      out[place] = value
    return out

  def gather(self, array: np.ndarray) -> list[np.ndarray]:
    """Undoes `scatter`: [size, ...] of each completion."""
    return [array[place] for place in self._places()]

  def _places(self):
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
  """Where the completions of a step stand: alone in a row, or several.

  Args:
    prompt_lengths: [R] prompt tokens before each completion.
    sizes: [R] tokens of each completion, prompt-major.
    buckets: allowed lengths of a row, or of a completion where several share a
      row.
    completions_per_row: 1 gives each completion a row with its own prompt.
    padded_prompt: P, padded tokens of a prompt that several share.

  Raises:
    ValueError: a row or completion longer than the largest bucket.
  """
  if completions_per_row > 1:
    return shared(sizes, completions_per_row, padded_prompt, buckets)
  return whole(prompt_lengths, sizes, buckets)


def whole(
  begins: Sequence[int], sizes: Sequence[int], buckets: Sequence[int]
) -> Placement:
  """A row a completion: its prompt, then itself.

  Args:
    begins: prompt tokens of each.
    sizes: tokens of each.
    buckets: allowed T, of which the smallest that holds every row is taken.

  Raises:
    ValueError: a row longer than the largest bucket.
  """
  begin, size = np.asarray(begins), np.asarray(sizes)
  length = batching.bucket(int((begin + size).max()), buckets)
  return Placement(np.arange(len(size)), begin, size, (len(size), length))


def shared(
  sizes: Sequence[int],
  completions_per_row: int,
  prefix: int,
  buckets: Sequence[int],
) -> Placement:
  """A row for every `completions_per_row` completions of a prompt, behind one
  copy of it.

  Args:
    sizes: tokens of each completion, prompt-major.
    completions_per_row: S, which divides the completions of a prompt.
    prefix: P, padded tokens of a prompt.
    buckets: allowed G, of which the smallest that holds every completion is
      taken.

  Raises:
    ValueError: a completion longer than the largest bucket.
  """
  size = np.asarray(sizes)
  length = batching.bucket(int(size.max()), buckets)
  row, slot = np.divmod(np.arange(len(size)), completions_per_row)
  shape = (
    len(size) // completions_per_row,
    prefix + completions_per_row * length,
  )
  return Placement(
    row, prefix + slot * length, size, shape, prefix, completions_per_row
  )


def rows(
  placement: Placement,
  prefixes: Sequence[np.ndarray],
  old_logprob: Sequence[np.ndarray],
  ref_logprob: Sequence[np.ndarray],
) -> structs.Batch:
  """Puts completions where `placement` says; their tokens are the targets.

  Args:
    placement: of the completions.
    prefixes: int32, prompt + completion.
    old_logprob: float32 [size] of each under the policy that the updates start
      from.
    ref_logprob: float32 [size] under the reference policy.

  Returns:
    A host batch whose advantages are 0; see `with_advantages`.
  """
  tokens = np.zeros(placement.shape, np.int32)
  segments = np.zeros(placement.shape, np.int32)
  positions = np.zeros(placement.shape, np.int32)
  if not placement.continuations:
    positions[:] = np.arange(placement.shape[1])
  for r, (row, begin, size) in enumerate(
    zip(placement.row, placement.begin, placement.size)
  ):
    prompt = len(prefixes[r]) - size
    tokens[row, :prompt] = prefixes[r][:prompt]
    tokens[row, begin : begin + size] = prefixes[r][prompt:]
    segments[row, :prompt] = 1
    if placement.continuations:
      P, G = (
        placement.prefix,
        (placement.shape[1] - placement.prefix) // placement.continuations,
      )
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
    prefix=placement.prefix,
    continuations=placement.continuations,
  )


def with_advantages(
  batch: structs.Batch,
  placement: Placement,
  advantages: Sequence[np.ndarray],
  extra: Mapping[str, np.ndarray] | None = None,
) -> structs.Batch:
  """The rows with an advantage at every completion token.

  Args:
    batch: of `rows`.
    placement: of the completions.
    advantages: float32 [size] of each completion.
    extra: what else the loss reads, [*shape, ...] by name.
  """
  return batch.replace(
    advantage=placement.scatter(advantages), extra=dict(extra or {})
  )


def mini_batches(batch: structs.Batch, count: int) -> list[structs.Batch]:
  """`count` batches of consecutive rows, so that groups stay together.

  Raises:
    ValueError: the rows do not divide.
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
  """Two rows of each group: its better sample, and its worse one.

  Args:
    batch: rows of whole groups, whose advantage is above 0 on the tokens of
      the better sample and below on those of the worse.
    samples: N, rows of a group.
    count: mini-batches to come; in each, the better rows come first.

  Returns:
    The batch of 2 rows a group. A group that names no pair keeps its first
    two rows, without targets.
  """
  side_RT = batch.advantage * batch.loss_mask
  side_BN = side_RT.sum(axis=1).reshape(-1, samples)
  begin_B = np.arange(len(side_BN)) * samples
  named_B = (side_BN.max(axis=1) > 0) & (side_BN.min(axis=1) < 0)
  better_B = begin_B + np.where(named_B, side_BN.argmax(axis=1), 0)
  worse_B = begin_B + np.where(named_B, side_BN.argmin(axis=1), 1)
  order = np.concatenate(
    [
      np.concatenate([b, w])
      for b, w in zip(np.split(better_B, count), np.split(worse_B, count))
    ]
  )
  chosen = jax.tree.map(lambda leaf: leaf[order], batch)
  used_R = np.repeat(named_B.reshape(count, -1), 2, axis=0).reshape(-1)
  mask_RT = chosen.loss_mask * used_R[:, None]
  return chosen.replace(loss_mask=mask_RT.astype(np.float32))
