"""Rows of a policy update from completions, prices and advantages."""

from collections.abc import Sequence

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import batching


def rows(
  trunks: Sequence[np.ndarray],
  prompt_lengths: Sequence[int],
  advantages: Sequence[np.ndarray],
  old_logprob: Sequence[np.ndarray],
  ref_logprob: Sequence[np.ndarray],
  *,
  buckets: Sequence[int],
) -> structs.Batch:
  """Pads rows to one length; completion tokens are the targets.

  Args:
    trunks: int32 [T_r], prompt + completion.
    prompt_lengths: tokens of each row that are prompt.
    advantages: float32 [C_r] of each row, one a completion token.
    old_logprob: float32 [T_r] of each row under the policy that the updates
      start from.
    ref_logprob: float32 [T_r] under the reference policy.
    buckets: allowed T, of which the smallest that holds every row is taken.

  Returns:
    A host batch of `len(trunks)` rows.

  Raises:
    ValueError: a row longer than the largest bucket.
  """
  R = len(trunks)
  length = batching.bucket(max(map(len, trunks)), buckets)
  tokens_RT = np.zeros((R, length), np.int32)
  segments_RT = np.zeros((R, length), np.int32)
  mask_RT = np.zeros((R, length), np.float32)
  advantage_RT = np.zeros((R, length), np.float32)
  old_RT = np.zeros((R, length), np.float32)
  ref_RT = np.zeros((R, length), np.float32)
  for r, trunk in enumerate(trunks):
    size, begin = len(trunk), prompt_lengths[r]
    tokens_RT[r, :size] = trunk
    segments_RT[r, :size] = 1
    mask_RT[r, begin:size] = 1
    advantage_RT[r, begin:size] = advantages[r]
    old_RT[r, :size] = old_logprob[r]
    ref_RT[r, :size] = ref_logprob[r]
  positions_RT = np.broadcast_to(np.arange(length, dtype=np.int32), (R, length))
  return structs.Batch(
    tokens=tokens_RT,
    positions=positions_RT,
    segments=segments_RT,
    loss_mask=mask_RT,
    advantage=advantage_RT,
    old_logprob=old_RT,
    ref_logprob=ref_RT,
  )


def spread(
  values: Sequence[np.ndarray], begins: Sequence[int], length: int
) -> np.ndarray:
  """Values of completion tokens put at their places, 0 elsewhere.

  Args:
    values: [C_r, ...] of each row.
    begins: prompt tokens of each row.
    length: T.

  Returns:
    [R, T, ...], dtype of the values.
  """
  rest = values[0].shape[1:]
  out = np.zeros((len(values), length, *rest), values[0].dtype)
  for row, (value, begin) in enumerate(zip(values, begins)):
    out[row, begin : begin + len(value)] = value
  return out


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
