"""TPU kernels of attention in which each query sees the first keys only.

  out_q = sum_{t < seen_q} p_qt v_t,      p_qt = exp(scale q.k_t - lse_q)

With a sliding window it sees the keys first_q <= t < seen_q.

Each block of queries runs an online softmax over blocks of keys, with its state
in scratch. The number of key blocks that a query block needs is prefetched to
scalar memory. Further blocks are neither computed (`pl.when`) nor fetched (the
index map repeats a block that is already in VMEM).

VMEM: a block of keys is at most 2 MiB (512 keys of one head, or of all heads if
there are few queries). Keys and values are double-buffered, and their gradients
are float32. With 256 queries and five tiles of float32 scores this is under
24 MiB; the compiler's limit is `VMEM_LIMIT`.

Shape key: B rows, S continuations (1 for a prefix), K key/value heads,
Q queries per key/value head, H head dimension, T keys, q queries and t keys of
one block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opera_jax.kernels import manual_axes
from opera_jax.kernels.shared_prefix_attention import limited_plan

VMEM_LIMIT = 32 << 20
MASKED = -1e30


def forward(
  scale: float,
  q_BKSQH: jax.Array,
  k_BSKTH: jax.Array,
  v_BSKTH: jax.Array,
  seen_BSQ: jax.Array,
  first_BSQ: jax.Array | None = None,
  seed: tuple[jax.Array, jax.Array] | None = None,
  layer: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention of every query to its first `seen` keys.

  Args:
    scale: multiplies q.k.
    q_BKSQH: [B, K, S, Q, H] float32 or bfloat16.
    k_BSKTH: [B, S, K, T, H], in q's dtype.
    v_BSKTH: like the keys.
    seen_BSQ: [B, S, Q] int32 in [0, T], the last key that a query sees + 1.
    first_BSQ: [B, S, Q] int32, the first key that it sees; None for key 0.
    seed: out and logsumexp over other keys of the same softmax, or None; the
      online softmax continues from them.
    layer: int scalar; keys and values then have a first axis of layers, of
      which this one is read without copying it out.

  Returns:
    out [B, K, S, Q, H], in q's dtype if seeded, else in float32, to be a seed;
    logsumexp [B, K, S, Q, 1] float32. A query that sees no key has out 0 and a
    logsumexp of about -1e30.
  """
  plan = limited_plan.Plan(q_BKSQH, k_BSKTH, layered=layer is not None)
  *outer, H = q_BKSQH.shape
  seeds = seed or ()
  needed = plan.needed(seen_BSQ)
  if layer is not None:
    needed = jnp.append(needed, layer.astype(jnp.int32))
  bounds = _bounds(seen_BSQ, first_BSQ)
  operands = (*bounds, q_BKSQH, k_BSKTH, v_BSKTH, *seeds)
  per_query = (plan.query_spec(H, _outer), plan.query_spec(1, _outer))
  return pl.pallas_call(
    functools.partial(
      _forward_kernel, plan=plan, scale=scale, num_bounds=len(bounds)
    ),
    out_shape=(
      manual_axes.shape_like(
        (*outer, H), q_BKSQH.dtype if seed else jnp.float32, *operands
      ),
      manual_axes.shape_like((*outer, 1), jnp.float32, *operands),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=plan.grid_over_keys,
      in_specs=[
        *[plan.seen_spec(_outer)] * len(bounds),
        per_query[0],
        *[plan.key_spec(plan.key_needed)] * 2,
        *per_query[: len(seeds)],
      ],
      out_specs=per_query,
      scratch_shapes=[
        pltpu.VMEM((plan.heads, plan.q, width), jnp.float32)
        for width in (H, 1, 1)
      ],
    ),
    compiler_params=_compiler_params(),
    name="limited_attention_forward",
  )(needed, *operands)


def backward(
  scale: float,
  q_BKSQH: jax.Array,
  k_BSKTH: jax.Array,
  v_BSKTH: jax.Array,
  seen_BSQ: jax.Array,
  d_out_BKSQH: jax.Array,
  lse_BKSQ1: jax.Array,
  delta_BKSQ1: jax.Array,
  first_BSQ: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients through these keys of a softmax whose logsumexp is `lse`.

  Args:
    scale: as in `forward`, like the next four.
    q_BKSQH: queries.
    k_BSKTH: keys.
    v_BSKTH: values.
    seen_BSQ: how many keys a query sees.
    d_out_BKSQH: cotangent of the whole output, of q's dtype.
    lse_BKSQ1: [B, K, S, Q, 1] float32, over all keys of the whole softmax.
    delta_BKSQ1: [B, K, S, Q, 1] float32, d_out . out of the whole output.
    first_BSQ: as in `forward`.

  Returns:
    d_q in float32; d_k and d_v in the keys' dtype.
  """
  plan = limited_plan.Plan(q_BKSQH, k_BSKTH)
  H = q_BKSQH.shape[4]
  needed = plan.needed(seen_BSQ)
  bounds = _bounds(seen_BSQ, first_BSQ)
  operands = (
    *bounds,
    q_BKSQH,
    d_out_BKSQH,
    lse_BKSQ1,
    delta_BKSQ1,
    k_BSKTH,
    v_BSKTH,
  )

  def specs(
    query: Callable[..., Any], key: Callable[..., Any]
  ) -> list[pl.BlockSpec]:
    return [
      *[plan.seen_spec(query)] * len(bounds),
      *[plan.query_spec(H, query)] * 2,
      *[plan.query_spec(1, query)] * 2,
      *[plan.key_spec(key)] * 2,
    ]

  d_q = pl.pallas_call(
    functools.partial(
      _d_query_kernel, plan=plan, scale=scale, num_bounds=len(bounds)
    ),
    out_shape=manual_axes.shape_like(q_BKSQH.shape, jnp.float32, *operands),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=plan.grid_over_keys,
      in_specs=specs(_outer, plan.key_needed),
      out_specs=plan.query_spec(H, _outer),
      scratch_shapes=[pltpu.VMEM((plan.heads, plan.q, H), jnp.float32)],
    ),
    compiler_params=_compiler_params(),
    name="limited_attention_d_query",
  )(needed, *operands)
  block = pltpu.VMEM((plan.heads, plan.t, H), jnp.float32)
  d_k, d_v = pl.pallas_call(
    functools.partial(
      _d_key_kernel, plan=plan, scale=scale, num_bounds=len(bounds)
    ),
    out_shape=(manual_axes.shape_like(k_BSKTH.shape, k_BSKTH.dtype, *operands),)
    * 2,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=plan.grid_over_queries,
      in_specs=specs(plan.query_needed, _outer),
      out_specs=(plan.key_spec(_outer),) * 2,
      scratch_shapes=[block, block],
    ),
    compiler_params=_compiler_params(),
    name="limited_attention_d_key",
  )(needed, plan.first(needed), *operands)
  return d_q, d_k, d_v


def _bounds(
  seen_BSQ: jax.Array, first_BSQ: jax.Array | None
) -> tuple[jax.Array, ...]:
  """Last visible key + 1 and, if there are any, first visible keys."""
  both = (seen_BSQ,) if first_BSQ is None else (seen_BSQ, first_BSQ)
  return tuple(x[..., None] for x in both)


def _outer(b: Any, s: Any, outer: Any, *_: Any) -> Any:
  """The index of the outer of a grid's two block axes."""
  return outer


def _forward_kernel(
  needed_ref: Any,
  *refs: Any,
  plan: limited_plan.Plan,
  scale: float,
  num_bounds: int,
) -> None:
  bounds, (q_ref, k_ref, v_ref, *rest) = refs[:num_bounds], refs[num_bounds:]
  *seed, out_ref, lse_ref, sum_ref, m_ref, l_ref = rest
  b, s, i, j = (pl.program_id(axis) for axis in (0, 1, 3, 4))

  @pl.when(j == 0)
  def _() -> None:
    if seed:
      sum_ref[...] = seed[0][0, :, 0]
      m_ref[...] = seed[1][0, :, 0]
      l_ref[...] = jnp.ones_like(l_ref)
    else:
      sum_ref[...] = jnp.zeros_like(sum_ref)
      m_ref[...] = jnp.full_like(m_ref, MASKED)
      l_ref[...] = jnp.zeros_like(l_ref)

  @pl.when(j < plan.blocks_for(b, s, i, needed_ref))
  def _() -> None:
    visible = _visible(bounds, j, plan)
    for n in range(plan.heads):
      k = k_ref[0, 0, n]
      v = _zero_beyond(v_ref[0, 0, n], j, plan.t, plan.T)
      score = jnp.where(visible, scale * _dot(q_ref[0, n, 0], k, 1, 1), MASKED)
      m_old = m_ref[n]
      m_new = jnp.maximum(m_old, jnp.max(score, axis=1, keepdims=True))
      p = jnp.where(visible, jnp.exp(score - m_new), 0.0)
      keep = jnp.exp(m_old - m_new)
      m_ref[n] = m_new
      l_ref[n] = keep * l_ref[n] + jnp.sum(p, axis=1, keepdims=True)
      sum_ref[n] = keep * sum_ref[n] + _dot(p.astype(v.dtype), v, 1, 0)

  @pl.when(j == plan.key_blocks - 1)
  def _() -> None:
    for n in range(plan.heads):
      total = jnp.maximum(l_ref[n], 1e-30)
      out_ref[0, n, 0] = (sum_ref[n] / total).astype(out_ref.dtype)
      lse_ref[0, n, 0] = m_ref[n] + jnp.log(total)


def _d_query_kernel(
  needed_ref: Any,
  *refs: Any,
  plan: limited_plan.Plan,
  scale: float,
  num_bounds: int,
) -> None:
  bounds, refs = refs[:num_bounds], refs[num_bounds:]
  q_ref, d_out_ref, lse_ref, delta_ref, k_ref, v_ref, d_q_ref, sum_ref = refs
  b, s, i, j = (pl.program_id(axis) for axis in (0, 1, 3, 4))

  @pl.when(j == 0)
  def _() -> None:
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(j < plan.blocks_for(b, s, i, needed_ref))
  def _() -> None:
    visible = _visible(bounds, j, plan)
    for n in range(plan.heads):
      k = _zero_beyond(k_ref[0, 0, n], j, plan.t, plan.T)
      v = v_ref[0, 0, n]
      p = _probability(visible, q_ref[0, n, 0], k, lse_ref[0, n, 0], scale)
      slope = _dot(d_out_ref[0, n, 0], v, 1, 1) - delta_ref[0, n, 0]
      d_score = jnp.where(visible, scale * p * slope, 0.0)
      sum_ref[n] += _dot(d_score.astype(k.dtype), k, 1, 0)

  @pl.when(j == plan.key_blocks - 1)
  def _() -> None:
    d_q_ref[0, :, 0] = sum_ref[...]


def _d_key_kernel(
  needed_ref: Any,
  first_ref: Any,
  *refs: Any,
  plan: limited_plan.Plan,
  scale: float,
  num_bounds: int,
) -> None:
  bounds, refs = refs[:num_bounds], refs[num_bounds:]
  q_ref, d_out_ref, lse_ref, delta_ref, k_ref, v_ref, *outs = refs
  d_k_ref, d_v_ref, k_sum_ref, v_sum_ref = outs
  b, s, j, i = (pl.program_id(axis) for axis in (0, 1, 3, 4))

  @pl.when(i == 0)
  def _() -> None:
    k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
    v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

  @pl.when(plan.blocks_for(b, s, i, needed_ref) > j)
  def _() -> None:
    visible = _visible(bounds, j, plan)
    visible = visible & _within(visible.shape, i, plan.q, plan.Q)
    for n in range(plan.heads):
      q = _zero_beyond(q_ref[0, n, 0], i, plan.q, plan.Q)
      d_out = _zero_beyond(d_out_ref[0, n, 0], i, plan.q, plan.Q)
      k, v = k_ref[0, 0, n], v_ref[0, 0, n]
      p = _probability(visible, q, k, lse_ref[0, n, 0], scale)
      slope = _dot(d_out, v, 1, 1) - delta_ref[0, n, 0]
      d_score = jnp.where(visible, scale * p * slope, 0.0)
      k_sum_ref[n] += _dot(d_score.astype(q.dtype), q, 0, 0)
      v_sum_ref[n] += _dot(p.astype(q.dtype), d_out, 0, 0)

  @pl.when(i == plan.query_blocks - 1)
  def _() -> None:
    d_k_ref[0, 0] = k_sum_ref[...].astype(d_k_ref.dtype)
    d_v_ref[0, 0] = v_sum_ref[...].astype(d_v_ref.dtype)


def _probability(
  visible: Any, q: jax.Array, k: jax.Array, lse_q1: jax.Array, scale: float
) -> jax.Array:
  """Probabilities of a tile, recomputed from the logsumexp, [q, t]."""
  return jnp.where(visible, jnp.exp(scale * _dot(q, k, 1, 1) - lse_q1), 0.0)


def _visible(
  bounds: Sequence[Any], key_block: Any, plan: limited_plan.Plan
) -> jax.Array:
  """Whether a query sees a key of the block, [q, t] bool.

  Args:
    bounds: refs of what `_bounds` gives.
    key_block: index of the block.
    plan: its sizes.
  """
  start = key_block * plan.t
  key_qt = jax.lax.broadcasted_iota(jnp.int32, (plan.q, plan.t), 1)
  visible = key_qt < bounds[0][0, 0] - start
  for first_ref in bounds[1:]:
    visible = visible & (key_qt >= first_ref[0, 0] - start)
  return visible


def _within(shape: tuple[int, ...], block: Any, size: int, length: int) -> Any:
  """Whether a row of the block is inside an array of `length` rows."""
  if length % size == 0:
    return True
  row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return row < length - block * size


def _zero_beyond(x: jax.Array, block: Any, size: int, length: int) -> jax.Array:
  """Zeroes a block's rows beyond the array's end."""
  if length % size == 0:
    return x
  return jnp.where(_within(x.shape, block, size, length), x, jnp.zeros_like(x))


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
  """Contracts one axis of each; float32."""
  return jax.lax.dot_general(
    x,
    y,
    (((x_axis,), (y_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _compiler_params() -> pltpu.CompilerParams:
  return pltpu.CompilerParams(
    dimension_semantics=("parallel",) * 4 + ("arbitrary",),
    vmem_limit_bytes=VMEM_LIMIT,
  )
