"""Attention of continuations to the prefix that they share and to themselves.

Query g of continuation s of row b sees the prefix's positions
t < prefix_length[b, s] and its own continuation's keys c <= offset[b, s] + g:

  out = softmax_visible(scale q [prefix_k; continuation_k]^T) [prefix_v;
  continuation_v]

With a sliding window of W positions it sees those of the W positions that end
with its own alone. Its position is prefix_length[b, s] + offset[b, s] + g, so a
window counts positions and not places in the arrays.

Scoring has C == G and offset 0. Decoding (`decode_attention`) has G == 1; C is
the cache's length, the offset the number of tokens before the current one, and
S the samples of one prompt.

Shape key: B rows, S continuations, G queries of a continuation, N query heads,
K key/value heads, H head dimension, T prefix length, C continuation length,
L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.kernels import target
from opera_jax.kernels.shared_prefix_attention import (
  limited_plan,
  pallas_tpu,
  reference,
  xla,
  xla_decode,
  xla_rows,
)

KEY_BLOCK = limited_plan.BLOCK_KEYS  # most keys that a kernel reads at once
IMPLEMENTATIONS = ("reference", "xla", "xla_rows", "pallas_tpu")


def shared_prefix_attention(
  q_BSGNH: jax.Array,
  prefix_k_BTKH: jax.Array,
  prefix_v_BTKH: jax.Array,
  continuation_k_BSCKH: jax.Array,
  continuation_v_BSCKH: jax.Array,
  prefix_length_BS: jax.Array,
  offset_BS: jax.Array | None = None,
  *,
  scale: float,
  window: jax.Array | int | None = None,
  implementation: str | None = None,
  block_keys: int | None = None,
  block_scores: int | None = None,
) -> jax.Array:
  """Computes the attention; differentiable in queries, keys and values.

  Softmax and sums are float32 for all input dtypes. Query head n attends with
  key/value head n // (N / K). A prefix length above T counts as T; with 0 or
  less a continuation sees only itself. An offset below 0 counts as 0, so every
  query sees at least one key.

  Args:
    q_BSGNH: [B, S, G, N, H] floating.
    prefix_k_BTKH: [B, T, K, H] floating.
    prefix_v_BTKH: like the prefix's keys.
    continuation_k_BSCKH: [B, S, C, K, H] floating.
    continuation_v_BSCKH: like the continuations' keys.
    prefix_length_BS: [B, S] integer, prefix positions that a continuation sees.
    offset_BS: [B, S] integer, own keys before that of query 0; None means 0.
    scale: multiplies q.k, usually H ** -0.5.
    window: int scalar, at least 1, positions that a query sees, its own
      included; None means all.
    implementation: "reference", "xla" (streams over blocks of keys), "xla_rows"
      (one continuation after the other, for a CPU) or "pallas_tpu"; None lets
      the platform choose.
    block_keys: keys of one block of "xla"; None means 256.
    block_scores: most scores of one row, over all heads, that "xla" holds at
      once; further queries go to further chunks. None means what fits a CPU's
      caches, or 16 MiB on an accelerator.

  Returns:
    [B, S, G, N, H], in q's dtype.

  Raises:
    ValueError: shapes that do not match, N not a multiple of K, more than C
      queries, a float prefix length or offset, a block of 0 or less, an unknown
      implementation.
  """
  arrays = (
    q_BSGNH,
    prefix_k_BTKH,
    prefix_v_BTKH,
    continuation_k_BSCKH,
    continuation_v_BSCKH,
  )
  _check(*arrays)
  # Not replaced by zeros: "xla_rows" computes less without an offset.
  optional_offset_BS = None if offset_BS is None else jnp.maximum(offset_BS, 0)
  if offset_BS is None:
    offset_BS = jnp.zeros_like(prefix_length_BS)
  _check_bounds(q_BSGNH, prefix_length_BS, offset_BS)
  if block_keys is None:
    block_keys = 256
  if block_scores is None:
    block_scores = _score_budget(q_BSGNH.shape[0], q_BSGNH.shape[3], block_keys)
  _check_blocks(block_keys=block_keys, block_scores=block_scores)
  implementation = _choose(implementation, arrays, cpu="xla_rows")
  bounds = (jnp.maximum(prefix_length_BS, 0), jnp.maximum(offset_BS, 0))
  window = _window(window)
  if implementation == "reference":
    return reference.shared_prefix_attention(
      *arrays, *bounds, window, scale=scale
    )
  if implementation == "xla_rows":
    return xla_rows.shared_prefix_attention(
      *arrays, bounds[0], optional_offset_BS, window, scale=float(scale)
    )
  if implementation == "pallas_tpu":
    return pallas_tpu.shared_prefix_attention(
      *arrays, *bounds, window, scale=float(scale)
    )
  return xla.shared_prefix_attention(
    *arrays,
    *bounds,
    window,
    scale=float(scale),
    block_keys=block_keys,
    block_scores=block_scores,
  )


def decode_attention(
  q_BSNH: jax.Array,
  prefix_k_LBKTH: jax.Array,
  prefix_v_LBKTH: jax.Array,
  continuation_k_LBSKCH: jax.Array,
  continuation_v_LBSKCH: jax.Array,
  prefix_length_BS: jax.Array,
  offset_BS: jax.Array,
  layer: jax.Array | None = None,
  *,
  scale: float,
  window: jax.Array | int | None = None,
  implementation: str | None = None,
  block_keys: int | None = None,
) -> jax.Array:
  """`shared_prefix_attention` of one query per continuation, without gradients.

  The caches have the head axis before the token axis. They hold all layers, of
  which `layer` is read without copying it out, or one layer, without axis L.

  Args:
    q_BSNH: [B, S, N, H] floating.
    prefix_k_LBKTH: [L, B, K, T, H] floating.
    prefix_v_LBKTH: like the prefix's keys.
    continuation_k_LBSKCH: [L, B, S, K, C, H] floating.
    continuation_v_LBSKCH: like the continuations' keys.
    prefix_length_BS: [B, S] integer, prefix positions that a continuation sees.
    offset_BS: [B, S] integer, own keys before the query's.
    layer: int scalar in [0, L); None if the caches are those of one layer.
    scale: multiplies q.k, usually H ** -0.5.
    window: as in `shared_prefix_attention`.
    implementation: "reference", "xla" or "pallas_tpu"; None lets the platform
      choose.
    block_keys: keys of one block of "xla"; None means 64 on a CPU, else 128.

  Returns:
    [B, S, N, H], in q's dtype.

  Raises:
    ValueError: like `shared_prefix_attention`.
  """
  caches = (
    prefix_k_LBKTH,
    prefix_v_LBKTH,
    continuation_k_LBSKCH,
    continuation_v_LBSKCH,
  )
  shapes: Any = caches
  if layer is not None:
    shapes = [jax.eval_shape(lambda x: x[0], x) for x in caches]
  shapes = [jax.eval_shape(lambda x: x.swapaxes(-3, -2), x) for x in shapes]
  _check(jax.eval_shape(lambda q: q[:, :, None], q_BSNH), *shapes)
  _check_bounds(q_BSNH, prefix_length_BS, offset_BS)
  if block_keys is None:
    block_keys = 64 if target.platform() == "cpu" else 128
  _check_blocks(block_keys=block_keys)
  if implementation == "xla_rows":
    raise ValueError('Decoding has no "xla_rows"; use "xla", or None.')
  implementation = _choose(implementation, (q_BSNH, *caches), cpu="xla")
  bounds = (jnp.maximum(prefix_length_BS, 0), jnp.maximum(offset_BS, 0))
  window = _window(window)
  if implementation == "reference":
    keys: Any = [x if layer is None else x[layer] for x in caches]
    keys = [x.swapaxes(-3, -2) for x in keys]
    return reference.shared_prefix_attention(
      q_BSNH[:, :, None], *(*keys, *bounds, window), scale=scale
    )[:, :, 0]
  arrays: Any = (q_BSNH, *caches, *bounds, layer)
  if implementation == "pallas_tpu":
    if layer is None:
      arrays = (q_BSNH, *(x[None] for x in caches), *bounds, jnp.int32(0))
    return pallas_tpu.decode_attention(
      *arrays, scale=float(scale), window=window
    )
  return xla_decode.decode_attention(
    *arrays, scale=float(scale), window=window, block_keys=block_keys
  )


def _window(window: jax.Array | int | None) -> jax.Array | None:
  """Checks a window; an int32 scalar, or None."""
  if window is None:
    return None
  if isinstance(window, int) and window < 1:
    raise ValueError(
      f"A sliding window holds at least the query's own position, got {window}."
      " Make it 1 or more, or None to see every position."
    )
  scalar = jnp.asarray(window)
  if scalar.shape or not jnp.issubdtype(scalar.dtype, jnp.integer):
    raise ValueError(
      f"A sliding window is one integer, got {scalar.dtype} {scalar.shape}."
    )
  return scalar.astype(jnp.int32)


def _choose(
  implementation: str | None, arrays: tuple[jax.Array, ...], *, cpu: str
) -> str:
  """Checks the name of the implementation; `cpu` is the default of a CPU."""
  if implementation is None:
    platform = target.platform()
    if platform == "tpu" and not pallas_tpu.unsupported(*arrays):
      return "pallas_tpu"
    return cpu if platform == "cpu" else "xla"
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"Shared-prefix attention has the implementations {IMPLEMENTATIONS}, got "
      f"{implementation!r}. Name one of them, or None."
    )
  return implementation


def _score_budget(B: int, N: int, block_keys: int) -> int:
  if target.platform() == "cpu":
    return max((1 << 20) // B, 64 * N * block_keys)
  return 1 << 22


def _check_blocks(**sizes: int) -> None:
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(
        f"A block holds at least 1 key and score, got {name}={size}. Raise it."
      )


def _check(
  q_BSGNH: jax.Array,
  prefix_k_BTKH: jax.Array,
  prefix_v_BTKH: jax.Array,
  continuation_k_BSCKH: jax.Array,
  continuation_v_BSCKH: jax.Array,
) -> None:
  ranks = (q_BSGNH.ndim, prefix_k_BTKH.ndim, continuation_k_BSCKH.ndim)
  if ranks != (5, 4, 5):
    raise ValueError(
      "Shared-prefix attention takes q [B, S, G, N, H], prefix [B, T, K, H] "
      f"and continuation [B, S, C, K, H], got {q_BSGNH.shape}, "
      f"{prefix_k_BTKH.shape} and {continuation_k_BSCKH.shape}. Add the "
      "missing axes with size 1."
    )
  B, S, G, N, H = q_BSGNH.shape
  T, K = prefix_k_BTKH.shape[1:3]
  C = continuation_k_BSCKH.shape[2]
  if min(B, S, G, N, H, T, K, C) < 1:
    raise ValueError(
      f"Every axis needs at least 1 entry, got q {q_BSGNH.shape}, prefix "
      f"{prefix_k_BTKH.shape}, continuation {continuation_k_BSCKH.shape}. Pad "
      "an empty prefix to 1 position and set its prefix length to 0."
    )
  for name, x, shape in (
    ("Prefix keys", prefix_k_BTKH, (B, T, K, H)),
    ("Prefix values", prefix_v_BTKH, (B, T, K, H)),
    ("Continuation keys", continuation_k_BSCKH, (B, S, C, K, H)),
    ("Continuation values", continuation_v_BSCKH, (B, S, C, K, H)),
  ):
    if x.shape != shape:
      raise ValueError(
        f"{name} have shape {x.shape}, but the other arrays need {shape}. "
        "Rows, continuations, heads and features must agree."
      )
  if N % K:
    raise ValueError(
      f"Query heads are divided among key/value heads: {N} is not a multiple "
      f"of {K}. Repeat or drop heads."
    )
  if G > C:
    raise ValueError(
      f"Each query has its own key in the continuation, got {G} queries and "
      f"{C} keys. Lengthen the continuation's cache."
    )


def _check_bounds(
  q_BSGNH: jax.Array, prefix_length_BS: jax.Array, offset_BS: jax.Array
) -> None:
  for name, x in (("prefix length", prefix_length_BS), ("offset", offset_BS)):
    if x.shape != q_BSGNH.shape[:2] or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(
        f"The {name} is one integer per continuation, {q_BSGNH.shape[:2]}, got "
        f"{x.dtype} {x.shape}. Broadcast it to [B, S] as int32."
      )
