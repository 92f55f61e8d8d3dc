"""TPU kernels of the perplexity-reduction reward and of the group ranks.

Tokens stream through VMEM once, in blocks of 8 rows by up to 8,192 tokens. The
sums and token counts of all slots stay in scratch; the last grid step turns
them into means, gains, counts and rewards. VMEM: 1 MiB for tokens (two arrays,
double-buffered) and 12 blocks of 8 x S float32, under 4 MiB at S = 4,096.

Shape key: R rows, M tokens of a row, S slots, B prompts, N samples of a prompt;
r rows and m tokens of one block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opera_jax.kernels import manual_axes

BLOCK_ROWS = 8
BLOCK_TOKENS = 8192
MAX_SLOTS = 4096


def unsupported(slots: int) -> str | None:
  """Why the kernels do not support so many slots or samples, or None."""
  if slots > MAX_SLOTS:
    return f"{slots} slots or samples are more than {MAX_SLOTS}"
  return None


def perplexity_reward(
  logprob_RM: jax.Array,
  continuation_RM: jax.Array,
  previous_RS: jax.Array,
  *,
  tau: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Computes `api.perplexity_reward`.

  Raises:
    NotImplementedError: `unsupported` gives a reason.
  """
  (R, M), S = logprob_RM.shape, previous_RS.shape[1]
  _require(S)
  r, m = min(R, BLOCK_ROWS), min(M, BLOCK_TOKENS)
  continuation_RM, previous_RS = (
    x.astype(jnp.int32) for x in (continuation_RM, previous_RS)
  )
  operands = (logprob_RM, continuation_RM, previous_RS)
  token_spec = pl.BlockSpec((r, m), lambda i, j: (i, j))
  slot_spec = pl.BlockSpec((r, S), lambda i, j: (i, 0))
  row_spec = pl.BlockSpec((r, 1), lambda i, j: (i, 0))
  mean_RS, gain_RS, count_R1, r_self_R1 = pl.pallas_call(
    functools.partial(_reward_kernel, M=M, tau=tau),
    out_shape=(
      manual_axes.shape_like((R, S), jnp.float32, *operands),
      manual_axes.shape_like((R, S), jnp.float32, *operands),
      manual_axes.shape_like((R, 1), jnp.int32, *operands),
      manual_axes.shape_like((R, 1), jnp.float32, *operands),
    ),
    grid=(pl.cdiv(R, r), pl.cdiv(M, m)),
    in_specs=[token_spec, token_spec, slot_spec],
    out_specs=(slot_spec, slot_spec, row_spec, row_spec),
    scratch_shapes=[pltpu.VMEM((r, S), jnp.float32)] * 2,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    name="perplexity_reward",
  )(*operands)
  return mean_RS, gain_RS, count_R1[:, 0], r_self_R1[:, 0]


def group_rank(score_BN: jax.Array) -> jax.Array:
  """Computes `api.group_rank`.

  Raises:
    NotImplementedError: `unsupported` gives a reason.
  """
  B, N = score_BN.shape
  _require(N)
  spec = pl.BlockSpec((min(B, BLOCK_ROWS), N), lambda i: (i, 0))
  return pl.pallas_call(
    _rank_kernel,
    out_shape=manual_axes.shape_like((B, N), jnp.float32, score_BN),
    grid=(pl.cdiv(B, BLOCK_ROWS),),
    in_specs=[spec],
    out_specs=spec,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    name="group_rank",
  )(score_BN.astype(jnp.float32))


def _reward_kernel(
  logprob_ref: Any,
  continuation_ref: Any,
  previous_ref: Any,
  mean_ref: Any,
  gain_ref: Any,
  count_ref: Any,
  r_self_ref: Any,
  total_ref: Any,
  size_ref: Any,
  *,
  M: int,
  tau: float,
) -> None:
  block = pl.program_id(1)
  S = previous_ref.shape[1]
  slot_rS = jax.lax.broadcasted_iota(jnp.int32, total_ref.shape, 1)

  @pl.when(block == 0)
  def _() -> None:
    total_ref[...] = jnp.zeros_like(total_ref)
    size_ref[...] = jnp.zeros_like(size_ref)

  token_rm = jax.lax.broadcasted_iota(jnp.int32, continuation_ref.shape, 1)
  left = M - block * continuation_ref.shape[1]
  continuation_rm = jnp.where(token_rm < left, continuation_ref[...], -1)
  logprob_rm = logprob_ref[...]

  def add(slot: jax.Array, _: None) -> None:
    of_slot_rm = continuation_rm == slot
    total_r1 = _sum(jnp.where(of_slot_rm, logprob_rm, 0.0))
    size_r1 = _sum(jnp.where(of_slot_rm, 1.0, 0.0))
    total_ref[...] += jnp.where(slot_rS == slot, total_r1, 0.0)
    size_ref[...] += jnp.where(slot_rS == slot, size_r1, 0.0)

  jax.lax.fori_loop(0, S, add, None)

  @pl.when(block == pl.num_programs(1) - 1)
  def _() -> None:
    size_rS = size_ref[...]
    mean_rS = total_ref[...] / jnp.maximum(size_rS, 1.0)
    previous_rS = previous_ref[...]

    def look_up(
      slot: jax.Array, found: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
      before_rS, size_before_rS = found
      here_rS, hit_rS = slot_rS == slot, previous_rS == slot
      mean_r1 = _sum(jnp.where(here_rS, mean_rS, 0.0))
      size_r1 = _sum(jnp.where(here_rS, size_rS, 0.0))
      before_rS = jnp.where(hit_rS, mean_r1, before_rS)
      return before_rS, jnp.where(hit_rS, size_r1, size_before_rS)

    nothing_rS = jnp.zeros_like(mean_rS)
    before_rS, size_before_rS = jax.lax.fori_loop(
      0, S, look_up, (nothing_rS, nothing_rS)
    )
    compared_rS = (size_rS > 0.0) & (size_before_rS > 0.0)
    gain_rS = jnp.where(compared_rS, mean_rS - before_rS, 0.0)
    count_r1 = _sum(jnp.where(gain_rS > 0.0, 1.0, 0.0))
    mean_ref[...] = mean_rS
    gain_ref[...] = gain_rS
    count_ref[...] = count_r1.astype(jnp.int32)
    r_self_ref[...] = jnp.tanh(count_r1 / tau)


def _rank_kernel(score_ref: Any, out_ref: Any) -> None:
  score_rN = score_ref[...]
  N = score_rN.shape[1]
  sample_rN = jax.lax.broadcasted_iota(jnp.int32, score_rN.shape, 1)

  def add(sample: jax.Array, below_rN: jax.Array) -> jax.Array:
    score_r1 = _sum(jnp.where(sample_rN == sample, score_rN, 0.0))
    return below_rN + jnp.where(score_r1 < score_rN, 1.0, 0.0)

  below_rN = jax.lax.fori_loop(0, N, add, jnp.zeros_like(score_rN))
  out_ref[...] = below_rN / (N - 1)


def _sum(x_rK: jax.Array) -> jax.Array:
  return jnp.sum(x_rK, axis=1, keepdims=True)


def _require(slots: int) -> None:
  reason = unsupported(slots)
  if reason is not None:
    raise NotImplementedError(
      f"The TPU kernel does not apply: {reason}. Pass implementation='xla'."
    )
