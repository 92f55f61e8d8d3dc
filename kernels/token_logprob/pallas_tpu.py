"""Token log-probability and entropy as TPU kernels; no logits leave VMEM.

Forward: a grid of token blocks by vocabulary tiles, the running sums of
`online` in scratch. Backward: one kernel a gradient, each of which forms a
tile of logits again; the token's (vocabulary's) blocks go round inside, so a
gradient block is summed in float32 scratch and written once.

VMEM: both operands' blocks twice (the pipeline fetches ahead), the gradient
block three times (sum, and output twice), six tiles of float32 scores.
`_blocks` picks the largest that stay within `VMEM_BYTES`.

Shape key: M tokens, D features, V vocabulary, b tokens of a block, v columns
of a tile; "head" blocks are [D, v], or [v, D] where transposed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opera_jax.kernels import manual_axes
from opera_jax.kernels.token_logprob import online

VMEM_BYTES = 28 << 20  # what blocks may take; v5p and 7x have 64 MiB a core
VMEM_LIMIT = 48 << 20  # what the compiler may take
MASKED = -1e30


def unsupported(hidden_MD: jax.Array, head: jax.Array) -> str | None:
  """Why these kernels do not apply, or None where they do."""
  for name, x in (("hidden states", hidden_MD), ("head", head)):
    if x.dtype not in (jnp.float32, jnp.bfloat16):
      return f"the {name} are {x.dtype}, not float32 or bfloat16"
  if _blocks(hidden_MD.shape[1], 4) is None:
    return f"{hidden_MD.shape[1]} features do not fit in VMEM"
  return None


def token_logprob(
  hidden_MD: jax.Array,
  head: jax.Array,
  target_M: jax.Array,
  *,
  temperature: float,
  transposed: bool,
  axis_name: str | None,
) -> tuple[jax.Array, jax.Array]:
  """Computes `api.token_logprob`.

  Raises:
    NotImplementedError: with the reason, where `unsupported` gives one.
  """
  reason = unsupported(hidden_MD, head)
  if reason is not None:
    raise NotImplementedError(
      f"The TPU kernel does not apply: {reason}. Pass implementation='xla'."
    )
  settings = (temperature, transposed, axis_name)
  return _token_logprob(settings, hidden_MD, head, target_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprob(settings, hidden_MD, head, target_M):
  return _forward_rule(settings, hidden_MD, head, target_M)[0]


def _forward_rule(settings, hidden_MD, head, target_M):
  temperature, transposed, axis_name = settings
  M, D, V, b, v = _sizes(hidden_MD, head, transposed)
  local_M = online.local_target(target_M, V, axis_name)
  operands = (hidden_MD, head, local_M[:, None])
  statistics_M4 = pl.pallas_call(
    functools.partial(
      _forward_kernel, V=V, transposed=transposed, temperature=temperature
    ),
    out_shape=manual_axes.shape_like((M, 4), jnp.float32, *operands),
    grid=(pl.cdiv(M, b), pl.cdiv(V, v)),
    in_specs=[
      pl.BlockSpec((b, D), lambda i, j: (i, 0)),
      _head_spec(D, v, transposed, lambda i, j: j),
      pl.BlockSpec((b, 1), lambda i, j: (i, 0)),
    ],
    out_specs=pl.BlockSpec((b, 4), lambda i, j: (i, 0)),
    scratch_shapes=[pltpu.VMEM((b, 1), jnp.float32)] * 4,
    compiler_params=_compiler_params(),
    name="token_logprob_forward",
  )(*operands)
  logprob_M, entropy_M, normaliser_M = online.finish(
    *(*statistics_M4.T, axis_name)
  )
  residuals = (hidden_MD, head, local_M, normaliser_M, entropy_M)
  return (logprob_M, entropy_M), residuals


def _backward_rule(settings, residuals, cotangents):
  temperature, transposed, _ = settings
  hidden_MD, head, local_M, normaliser_M, entropy_M = residuals
  M, D, V, b, v = _sizes(hidden_MD, head, transposed)
  per_token_M4 = jnp.stack((normaliser_M, entropy_M, *cotangents), axis=1)
  operands = (hidden_MD, head, local_M[:, None], per_token_M4)
  head_block = (v, D) if transposed else (D, v)

  def gradient(kernel, grid, tokens, columns, like, spec, block, name):
    return pl.pallas_call(
      functools.partial(
        kernel, M=M, V=V, transposed=transposed, temperature=temperature
      ),
      out_shape=manual_axes.shape_like(like.shape, like.dtype, *operands),
      grid=grid,
      in_specs=[
        pl.BlockSpec((b, D), lambda i, j: (tokens(i, j), 0)),
        _head_spec(D, v, transposed, columns),
        pl.BlockSpec((b, 1), lambda i, j: (tokens(i, j), 0)),
        pl.BlockSpec((b, 4), lambda i, j: (tokens(i, j), 0)),
      ],
      out_specs=spec,
      scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
      compiler_params=_compiler_params(),
      name=name,
    )(*operands)

  blocks, tiles = pl.cdiv(M, b), pl.cdiv(V, v)
  d_hidden_MD = gradient(
    _d_hidden_kernel,
    (blocks, tiles),
    lambda i, j: i,
    lambda i, j: j,
    hidden_MD,
    pl.BlockSpec((b, D), lambda i, j: (i, 0)),
    (b, D),
    "token_logprob_d_hidden",
  )
  d_head = gradient(
    _d_head_kernel,
    (tiles, blocks),
    lambda i, j: j,
    lambda i, j: i,
    head,
    _head_spec(D, v, transposed, lambda i, j: i),
    head_block,
    "token_logprob_d_head",
  )
  return (
    manual_axes.reduce_like(d_hidden_MD, hidden_MD),
    manual_axes.reduce_like(d_head, head),
    None,
  )


_token_logprob.defvjp(_forward_rule, _backward_rule)


def _forward_kernel(
  hidden_ref,
  head_ref,
  target_ref,
  out_ref,
  *running,
  V,
  transposed,
  temperature,
):
  tile = pl.program_id(1)
  logit_bv = _logits(hidden_ref[...], head_ref[...], transposed, temperature)
  v = logit_bv.shape[1]
  if V % v:
    column_bv = jax.lax.broadcasted_iota(jnp.int32, logit_bv.shape, 1)
    logit_bv = jnp.where(column_bv < V - tile * v, logit_bv, MASKED)
  new = online.statistics(logit_bv, target_ref[...] - tile * v)

  @pl.when(tile == 0)
  def _():
    for ref, x in zip(running, new):
      ref[...] = x

  @pl.when(tile > 0)
  def _():
    merged = online.merge(tuple(ref[...] for ref in running), new)
    for ref, x in zip(running, merged):
      ref[...] = x

  @pl.when(tile == pl.num_programs(1) - 1)
  def _():
    for k, ref in enumerate(running):
      out_ref[:, k : k + 1] = ref[...]


def _d_hidden_kernel(
  hidden_ref,
  head_ref,
  target_ref,
  per_token_ref,
  out_ref,
  sum_ref,
  *,
  M,
  V,
  transposed,
  temperature,
):
  del M  # a row beyond the last token only spoils itself
  tile = pl.program_id(1)
  v = head_ref.shape[0 if transposed else 1]
  head = _zero_beyond(
    head_ref[...], V - tile * v, V % v, 0 if transposed else 1
  )
  d_logit_bv = _d_logits(
    hidden_ref[...],
    head,
    target_ref[...] - tile * v,
    per_token_ref[...],
    V - tile * v,
    transposed,
    temperature,
  )
  _accumulate(
    sum_ref, out_ref, _dot(d_logit_bv, head, 1, 0 if transposed else 1)
  )


def _d_head_kernel(
  hidden_ref,
  head_ref,
  target_ref,
  per_token_ref,
  out_ref,
  sum_ref,
  *,
  M,
  V,
  transposed,
  temperature,
):
  tile, block = pl.program_id(0), pl.program_id(1)
  b = hidden_ref.shape[0]
  v = head_ref.shape[0 if transposed else 1]
  left = M - block * b
  hidden_bD = _zero_beyond(hidden_ref[...], left, M % b, 0)
  d_logit_bv = _d_logits(
    hidden_bD,
    head_ref[...],
    target_ref[...] - tile * v,
    per_token_ref[...],
    V - tile * v,
    transposed,
    temperature,
  )
  d_logit_bv = _zero_beyond(d_logit_bv, left, M % b, 0)
  pair = (d_logit_bv, hidden_bD) if transposed else (hidden_bD, d_logit_bv)
  _accumulate(sum_ref, out_ref, _dot(*pair, 0, 0))


def _accumulate(sum_ref, out_ref, more):
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _():
    sum_ref[...] = more

  @pl.when(step > 0)
  def _():
    sum_ref[...] += more

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _d_logits(
  hidden_bD, head, target_b1, per_token_b4, columns, transposed, temperature
):
  """The cotangent of hidden @ head, 0 in columns beyond the vocabulary."""
  logit_bv = _logits(hidden_bD, head, transposed, temperature)
  d_logit_bv = online.logit_cotangent(
    logit_bv, target_b1, *(per_token_b4[:, k : k + 1] for k in range(4))
  )
  column_bv = jax.lax.broadcasted_iota(jnp.int32, logit_bv.shape, 1)
  d_logit_bv = jnp.where(column_bv < columns, d_logit_bv, 0.0)
  dtype = jnp.result_type(hidden_bD, head)
  return (d_logit_bv * (1.0 / temperature)).astype(dtype)


def _logits(hidden_bD, head, transposed, temperature):
  logit_bv = _dot(hidden_bD, head, 1, 1 if transposed else 0)
  return logit_bv if temperature == 1.0 else logit_bv * (1.0 / temperature)


def _dot(x, y, x_axis, y_axis):
  dtype = jnp.result_type(x, y)
  return jax.lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    (((x_axis,), (y_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _zero_beyond(x, size, ragged, axis):
  """Clears what a block holds beyond the array's end: it may be anything."""
  if not ragged:
    return x
  position = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
  return jnp.where(position < size, x, jnp.zeros_like(x))


def _head_spec(D, v, transposed, column):
  if transposed:
    return pl.BlockSpec((v, D), lambda i, j: (column(i, j), 0))
  return pl.BlockSpec((D, v), lambda i, j: (0, column(i, j)))


def _sizes(hidden_MD, head, transposed):
  M, D = hidden_MD.shape
  V = head.shape[0 if transposed else 1]
  itemsize = jnp.result_type(hidden_MD, head).itemsize
  b, v = _blocks(D, itemsize)
  return M, D, V, min(b, pl.cdiv(M, 16) * 16), min(v, pl.cdiv(V, 128) * 128)


def _blocks(D, itemsize):
  """The most tokens, then the most columns, that fit; None if none do."""
  for b in (1024, 512, 256, 128):
    for v in (1024, 512, 256, 128):
      operands = 2 * (b + v) * D * itemsize
      gradient = max(b, v) * D * (4 + 2 * itemsize)
      if v <= b and operands + gradient + 6 * b * v * 4 <= VMEM_BYTES:
        return b, v
  return None


def _compiler_params():
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"),
    vmem_limit_bytes=VMEM_LIMIT,
  )
