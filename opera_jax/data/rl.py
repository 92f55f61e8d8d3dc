"""Rows of a policy update from completions, prices and advantages."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opera_jax import structs
from opera_jax.data import batching


def rows(
  trunks: Sequence[np.ndarray],
  prompt_lengths: Sequence[int],
  advantages: Sequence[float],
  old_logprob: Sequence[np.ndarray],
  ref_logprob: Sequence[np.ndarray],
  *,
  buckets: Sequence[int],
) -> structs.Batch:
  """Pads rows to one length; completion tokens are the targets.

  Args:
    trunks: int32 [T_r], prompt + completion.
    prompt_lengths: tokens of each row that are prompt.
    advantages: one a row, spread over its completion's tokens.
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
    structs.Batch(
      **{
        field.name: getattr(batch, field.name)[i * size : (i + 1) * size]
        for field in dataclasses.fields(batch)
      }
    )
    for i in range(count)
  ]
