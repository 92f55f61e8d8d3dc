"""Token log-probability and entropy as TPU kernels; logits stay in VMEM.

The forward pass has a grid of token blocks by vocabulary tiles and keeps the
statistics of `online` in scratch. The backward pass is one kernel per gradient,
each of which recomputes the tiles of logits. Its inner grid axis is the one
that is summed over, so that a gradient block accumulates in float32 scratch and
is written once.

VMEM holds both operands' blocks twice (double buffering), the gradient block
three times (the sum, and the output twice) and six tiles of float32 scores.
`_fitting_blocks` picks the largest blocks within `VMEM_BYTES`.

Shape key: M tokens, D features, V vocabulary, b tokens of a block, v columns
of a tile; blocks of the head are [D, v], or [v, D] if transposed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opera_jax.kernels import manual_axes
from opera_jax.kernels.token_logprob import online

VMEM_BYTES = 28 << 20  # for the blocks; v5p and 7x have 64 MiB per core
VMEM_LIMIT = 48 << 20  # for the compiler
MASKED = -1e30


def unsupported(hidden_MD: jax.Array, head: jax.Array) -> str | None:
  """Why these kernels do not apply, or None if they do."""
  for name, x in (("hidden states", hidden_MD), ("head", head)):
    if x.dtype not in (jnp.float32, jnp.bfloat16):
      return f"the {name} are {x.dtype}, not float32 or bfloat16"
  if not _fitting_blocks(hidden_MD.shape[1], 4):
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
    NotImplementedError: `unsupported` gives a reason.
  """
  reason = unsupported(hidden_MD, head)
  if reason is not None:
    raise NotImplementedError(
      f"The TPU kernel does not apply: {reason}. Pass implementation='xla'."
    )
  settings = _Settings(temperature, transposed, axis_name)
  return _token_logprob(settings, hidden_MD, head, target_M)


class _Settings(NamedTuple):
  """The static arguments of `token_logprob`."""

  temperature: float
  transposed: bool
  axis_name: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprob(
  settings: _Settings,
  hidden_MD: jax.Array,
  head: jax.Array,
  target_M: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  return _forward_rule(settings, hidden_MD, head, target_M)[0]


def _forward_rule(
  settings: _Settings,
  hidden_MD: jax.Array,
  head: jax.Array,
  target_M: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
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
  m, s, w, t = statistics_M4.T
  logprob_M, entropy_M, normaliser_M = online.finish(
    m, s, w, t, axis_name=axis_name
  )
  residuals = (hidden_MD, head, local_M, normaliser_M, entropy_M)
  return (logprob_M, entropy_M), residuals


def _backward_rule(
  settings: _Settings, residuals: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
  temperature, transposed, _ = settings
  hidden_MD, head, local_M, normaliser_M, entropy_M = residuals
  M, D, V, b, v = _sizes(hidden_MD, head, transposed)
  per_token_M4 = jnp.stack((normaliser_M, entropy_M, *cotangents), axis=1)
  operands = (hidden_MD, head, local_M[:, None], per_token_M4)
  head_block = (v, D) if transposed else (D, v)

  def gradient(
    name: str,
    kernel: Callable[..., None],
    *,
    grid: tuple[int, int],
    tokens: Callable[..., Any],
    columns: Callable[..., Any],
    like: jax.Array,
    out_spec: pl.BlockSpec,
    block: tuple[int, int],
  ) -> jax.Array:
    """A gradient shaped `like` an operand.

    `tokens` and `columns` give the token block and the vocabulary tile of a
    grid index; `block` is the shape of the gradient's blocks.
    """
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
      out_specs=out_spec,
      scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
      compiler_params=_compiler_params(),
      name=name,
    )(*operands)

  blocks, tiles = pl.cdiv(M, b), pl.cdiv(V, v)
  d_hidden_MD = gradient(
    "token_logprob_d_hidden",
    _d_hidden_kernel,
    grid=(blocks, tiles),
    tokens=lambda i, j: i,
    columns=lambda i, j: j,
    like=hidden_MD,
    out_spec=pl.BlockSpec((b, D), lambda i, j: (i, 0)),
    block=(b, D),
  )
  d_head = gradient(
    "token_logprob_d_head",
    _d_head_kernel,
    grid=(tiles, blocks),
    tokens=lambda i, j: j,
    columns=lambda i, j: i,
    like=head,
    out_spec=_head_spec(D, v, transposed, lambda i, j: i),
    block=head_block,
  )
  return (
    manual_axes.reduce_like(d_hidden_MD, hidden_MD),
    manual_axes.reduce_like(d_head, head),
    None,
  )


_token_logprob.defvjp(_forward_rule, _backward_rule)


def _forward_kernel(
  hidden_ref: Any,
  head_ref: Any,
  target_ref: Any,
  out_ref: Any,
  *running: Any,
  V: int,
  transposed: bool,
  temperature: float,
) -> None:
  tile = pl.program_id(1)
  logit_bv = _logits(hidden_ref[...], head_ref[...], transposed, temperature)
  v = logit_bv.shape[1]
  if V % v:
    column_bv = jax.lax.broadcasted_iota(jnp.int32, logit_bv.shape, 1)
    logit_bv = jnp.where(column_bv < V - tile * v, logit_bv, MASKED)
  new = online.statistics(logit_bv, target_ref[...] - tile * v)

  @pl.when(tile == 0)
  def _() -> None:
    for ref, x in zip(running, new):
      ref[...] = x

  @pl.when(tile > 0)
  def _() -> None:
    merged = online.merge(tuple(ref[...] for ref in running), new)
    for ref, x in zip(running, merged):
      ref[...] = x

  @pl.when(tile == pl.num_programs(1) - 1)
  def _() -> None:
    for k, ref in enumerate(running):
      out_ref[:, k : k + 1] = ref[...]


def _d_hidden_kernel(
  hidden_ref: Any,
  head_ref: Any,
  target_ref: Any,
  per_token_ref: Any,
  out_ref: Any,
  sum_ref: Any,
  *,
  M: int,
  V: int,
  transposed: bool,
  temperature: float,
) -> None:
  del M  # rows beyond the last token affect only themselves
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
    columns=V - tile * v,
    transposed=transposed,
    temperature=temperature,
  )
  _accumulate(
    sum_ref, out_ref, _dot(d_logit_bv, head, 1, 0 if transposed else 1)
  )


def _d_head_kernel(
  hidden_ref: Any,
  head_ref: Any,
  target_ref: Any,
  per_token_ref: Any,
  out_ref: Any,
  sum_ref: Any,
  *,
  M: int,
  V: int,
  transposed: bool,
  temperature: float,
) -> None:
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
    columns=V - tile * v,
    transposed=transposed,
    temperature=temperature,
  )
  d_logit_bv = _zero_beyond(d_logit_bv, left, M % b, 0)
  operands = (hidden_bD, d_logit_bv)
  if transposed:
    operands = (d_logit_bv, hidden_bD)
  _accumulate(sum_ref, out_ref, _dot(*operands, 0, 0))


def _accumulate(sum_ref: Any, out_ref: Any, more: jax.Array) -> None:
  """Sums over the inner grid axis; the last step writes the output."""
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _() -> None:
    sum_ref[...] = more

  @pl.when(step > 0)
  def _() -> None:
    sum_ref[...] += more

  @pl.when(step == pl.num_programs(1) - 1)
  def _() -> None:
    out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _d_logits(
  hidden_bD: jax.Array,
  head: jax.Array,
  target_b1: jax.Array,
  per_token_b4: jax.Array,
  *,
  columns: Any,
  transposed: bool,
  temperature: float,
) -> jax.Array:
  """The cotangent of hidden @ head; 0 from column `columns` on."""
  logit_bv = _logits(hidden_bD, head, transposed, temperature)
  d_logit_bv = online.logit_cotangent(
    logit_bv, target_b1, *(per_token_b4[:, k : k + 1] for k in range(4))
  )
  column_bv = jax.lax.broadcasted_iota(jnp.int32, logit_bv.shape, 1)
  d_logit_bv = jnp.where(column_bv < columns, d_logit_bv, 0.0)
  dtype = jnp.result_type(hidden_bD, head)
  return (d_logit_bv * (1.0 / temperature)).astype(dtype)


def _logits(
  hidden_bD: jax.Array, head: jax.Array, transposed: bool, temperature: float
) -> jax.Array:
  logit_bv = _dot(hidden_bD, head, 1, 1 if transposed else 0)
  return logit_bv if temperature == 1.0 else logit_bv * (1.0 / temperature)


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
  """Contracts one axis of each; float32."""
  dtype = jnp.result_type(x, y)
  return jax.lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    (((x_axis,), (y_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _zero_beyond(x: jax.Array, size: Any, ragged: int, axis: int) -> jax.Array:
  """Zeroes a block beyond the array's end, where its values are undefined."""
  if not ragged:
    return x
  position = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
  return jnp.where(position < size, x, jnp.zeros_like(x))


def _head_spec(
  D: int, v: int, transposed: bool, column: Callable[..., Any]
) -> pl.BlockSpec:
  if transposed:
    return pl.BlockSpec((v, D), lambda i, j: (column(i, j), 0))
  return pl.BlockSpec((D, v), lambda i, j: (0, column(i, j)))


def _sizes(
  hidden_MD: jax.Array, head: jax.Array, transposed: bool
) -> tuple[int, int, int, int, int]:
  """M, D, V, and the block sizes b and v."""
  M, D = hidden_MD.shape
  V = head.shape[0 if transposed else 1]
  itemsize = jnp.result_type(hidden_MD, head).itemsize
  b, v = _fitting_blocks(D, itemsize)[0]
  return M, D, V, min(b, pl.cdiv(M, 16) * 16), min(v, pl.cdiv(V, 128) * 128)


def _fitting_blocks(D: int, itemsize: int) -> list[tuple[int, int]]:
  """Sizes (tokens, columns) of blocks that fit in VMEM, largest first."""
  fitting = []
  for b in (1024, 512, 256, 128):
    for v in (1024, 512, 256, 128):
      operands = 2 * (b + v) * D * itemsize
      gradient = max(b, v) * D * (4 + 2 * itemsize)
      if v <= b and operands + gradient + 6 * b * v * 4 <= VMEM_BYTES:
        fitting.append((b, v))
  return fitting


def _compiler_params() -> pltpu.CompilerParams:
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"),
    vmem_limit_bytes=VMEM_LIMIT,
  )
