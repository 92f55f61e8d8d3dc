"""TPU kernels of attention in which each query sees a prefix of the keys.

  out_q = sum_{t < seen_q} p_qt v_t,      p_qt = exp(scale q.k_t - lse_q)

Query blocks meet key blocks with an online softmax in scratch. How many key
blocks a query block needs is prefetched to scalar memory: what lies beyond is
neither computed (`pl.when`) nor fetched (the index map stays on a block that
is there already).

VMEM: a block of keys is at most 2 MiB (512 keys of one head, or of all heads
where queries are few), held twice for keys and for values, and in float32 for
their gradients; with 256 queries and five tiles of float32 scores under 24
MiB, of the `VMEM_LIMIT` that the compiler keeps to.

Shape key: B rows, S continuations (1 for a prefix), K key-value heads, Q
queries a key-value head, H head features, T keys, q queries and t keys of
one block.
"""

import functools

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
  seed: tuple[jax.Array, jax.Array] | None = None,
  layer: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Attends to prefixes.

  Args:
    scale: what multiplies q.k.
    q_BKSQH: [B, K, S, Q, H] float32 or bfloat16.
    k_BSKTH: [B, S, K, T, H], of q's dtype.
    v_BSKTH: like the keys.
    seen_BSQ: [B, S, Q] int32 in [0, T], how many keys a query sees.
    seed: out and logsumexp over other keys of the same softmax, or None.
    layer: int scalar; keys and values then lead with an axis of layers, of
      which this one is fetched where it lies.

  Returns:
    out [B, K, S, Q, H], of q's dtype if seeded, else float32, to be a seed;
    logsumexp [B, K, S, Q, 1] float32. A query that sees nothing has out 0 and
    a logsumexp of about -1e30.
  """
  plan = limited_plan.Plan(q_BKSQH, k_BSKTH, layered=layer is not None)
  *outer, H = q_BKSQH.shape
  seeds = seed or ()
  needed = plan.needed(seen_BSQ)
  if layer is not None:
    needed = jnp.append(needed, layer.astype(jnp.int32))
  operands = (seen_BSQ[..., None], q_BKSQH, k_BSKTH, v_BSKTH, *seeds)
  per_query = (plan.query_spec(H, _outer), plan.query_spec(1, _outer))
  return pl.pallas_call(
    functools.partial(_forward_kernel, plan=plan, scale=scale),
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
        plan.seen_spec(_outer),
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of `forward`'s share of a softmax whose logsumexp is `lse`.

  Args:
    scale: as in `forward`, like the next four.
    q_BKSQH: queries.
    k_BSKTH: keys.
    v_BSKTH: values.
    seen_BSQ: how many keys a query sees.
    d_out_BKSQH: cotangent of the whole output, of q's dtype.
    lse_BKSQ1: [B, K, S, Q, 1] float32, over all keys of the softmax.
    delta_BKSQ1: [B, K, S, Q, 1] float32, d_out . out of the whole output.

  Returns:
    d_q float32, d_k and d_v of the keys' dtype.
  """
  plan = limited_plan.Plan(q_BKSQH, k_BSKTH)
  H = q_BKSQH.shape[4]
  needed = plan.needed(seen_BSQ)
  operands = (
    seen_BSQ[..., None],
    q_BKSQH,
    d_out_BKSQH,
    lse_BKSQ1,
    delta_BKSQ1,
    k_BSKTH,
    v_BSKTH,
  )

  def specs(query, key):
    return [
      plan.seen_spec(query),
      *[plan.query_spec(H, query)] * 2,
      *[plan.query_spec(1, query)] * 2,
      *[plan.key_spec(key)] * 2,
    ]

  d_q = pl.pallas_call(
    functools.partial(_d_query_kernel, plan=plan, scale=scale),
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
    functools.partial(_d_key_kernel, plan=plan, scale=scale),
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


def _outer(b, s, outer, *_):
  return outer


def _forward_kernel(
  needed_ref, seen_ref, q_ref, k_ref, v_ref, *refs, plan, scale
):
  *seed, out_ref, lse_ref, sum_ref, m_ref, l_ref = refs
  b, s, i, j = (pl.program_id(axis) for axis in (0, 1, 3, 4))

  @pl.when(j == 0)
  def _():
    if seed:
      sum_ref[...] = seed[0][0, :, 0]
      m_ref[...] = seed[1][0, :, 0]
      l_ref[...] = jnp.ones_like(l_ref)
    else:
      sum_ref[...] = jnp.zeros_like(sum_ref)
      m_ref[...] = jnp.full_like(m_ref, MASKED)
      l_ref[...] = jnp.zeros_like(l_ref)

  @pl.when(j < plan.blocks_for(b, s, i, needed_ref))
  def _():
    visible = _visible(seen_ref, j, plan)
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
  def _():
    for n in range(plan.heads):
      total = jnp.maximum(l_ref[n], 1e-30)
      out_ref[0, n, 0] = (sum_ref[n] / total).astype(out_ref.dtype)
      lse_ref[0, n, 0] = m_ref[n] + jnp.log(total)


def _d_query_kernel(
  needed_ref,
  seen_ref,
  q_ref,
  d_out_ref,
  lse_ref,
  delta_ref,
  k_ref,
  v_ref,
  d_q_ref,
  sum_ref,
  *,
  plan,
  scale,
):
  b, s, i, j = (pl.program_id(axis) for axis in (0, 1, 3, 4))

  @pl.when(j == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(j < plan.blocks_for(b, s, i, needed_ref))
  def _():
    visible = _visible(seen_ref, j, plan)
    for n in range(plan.heads):
      k = _zero_beyond(k_ref[0, 0, n], j, plan.t, plan.T)
      v = v_ref[0, 0, n]
      p = _probability(visible, q_ref[0, n, 0], k, lse_ref[0, n, 0], scale)
      slope = _dot(d_out_ref[0, n, 0], v, 1, 1) - delta_ref[0, n, 0]
      d_score = jnp.where(visible, scale * p * slope, 0.0)
      sum_ref[n] += _dot(d_score.astype(k.dtype), k, 1, 0)

  @pl.when(j == plan.key_blocks - 1)
  def _():
    d_q_ref[0, :, 0] = sum_ref[...]


def _d_key_kernel(
  needed_ref,
  first_ref,
  seen_ref,
  q_ref,
  d_out_ref,
  lse_ref,
  delta_ref,
  k_ref,
  v_ref,
  d_k_ref,
  d_v_ref,
  k_sum_ref,
  v_sum_ref,
  *,
  plan,
  scale,
):
  b, s, j, i = (pl.program_id(axis) for axis in (0, 1, 3, 4))

  @pl.when(i == 0)
  def _():
    k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
    v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

  @pl.when(plan.blocks_for(b, s, i, needed_ref) > j)
  def _():
    visible = _visible(seen_ref, j, plan)
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
  def _():
    d_k_ref[0, 0] = k_sum_ref[...].astype(d_k_ref.dtype)
    d_v_ref[0, 0] = v_sum_ref[...].astype(d_v_ref.dtype)


def _probability(visible, q, k, lse_q1, scale):
  return jnp.where(visible, jnp.exp(scale * _dot(q, k, 1, 1) - lse_q1), 0.0)


def _visible(seen_ref, key_block, plan):
  """[q, t]: whether a query sees a key; never beyond the last one."""
  seen_q1 = seen_ref[0, 0] - key_block * plan.t
  key_qt = jax.lax.broadcasted_iota(jnp.int32, (plan.q, plan.t), 1)
  return key_qt < seen_q1


def _within(shape, block, size, length):
  if length % size == 0:
    return True
  row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return row < length - block * size


def _zero_beyond(x, block, size, length):
  """Clears the rows that a block holds beyond the array's end."""
  if length % size == 0:
    return x
  return jnp.where(_within(x.shape, block, size, length), x, jnp.zeros_like(x))


def _dot(x, y, x_axis, y_axis):
  return jax.lax.dot_general(
    x,
    y,
    (((x_axis,), (y_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _compiler_params():
  return pltpu.CompilerParams(
    dimension_semantics=("parallel",) * 4 + ("arbitrary",),
    vmem_limit_bytes=VMEM_LIMIT,
  )
