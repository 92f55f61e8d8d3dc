"""Attention of continuations over the prefix they fork from, and over
themselves.

Query g of continuation s of row b sees the prefix's positions t < limit[b, s]
and its own continuation's keys c <= offset[b, s] + g:

  out = softmax_visible(scale q [prefix_k; continuation_k]^T) [prefix_v;
  continuation_v]

Scoring: C == G, offset 0. Decoding (`decode_attention`): G == 1, C the cache's
length, offset the number of tokens before the current one, S the samples of
one prompt.

Shape key: B rows, S continuations, G queries of a continuation, N query heads,
K key-value heads, H head features, T prefix length, C continuation length.
"""

from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.kernels import target
from opera_jax.kernels.shared_prefix_attention import (
  pallas_tpu,
  reference,
  xla,
  xla_decode,
  xla_rows,
)

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
  implementation: str | None = None,
  block_keys: int | None = None,
  block_scores: int | None = None,
) -> jax.Array:
  """Attends; differentiable in queries, keys and values.

  Softmax and sums are float32 whatever the inputs. Query head n reads
  key-value head n // (N / K). A limit beyond T counts as T and one of 0 or
  less leaves the continuation alone with itself; an offset below 0 counts as 0,
  so every query sees at least one key.

  Args:
    q_BSGNH: [B, S, G, N, H] floating.
    prefix_k_BTKH: [B, T, K, H] floating.
    prefix_v_BTKH: like the prefix's keys.
    continuation_k_BSCKH: [B, S, C, K, H] floating.
    continuation_v_BSCKH: like the continuations' keys.
    prefix_length_BS: [B, S] integer, how much of the prefix a continuation
      sees.
    offset_BS: [B, S] integer, own keys before the one of query 0; None is 0.
    scale: what multiplies q.k, usually H ** -0.5.
    implementation: "reference", "xla" (streams), "xla_rows" (one continuation
      after the other, for a CPU) or "pallas_tpu"; None picks.
    block_keys: keys of one block of "xla"; None is 256.
    block_scores: scores of one row of the batch that "xla" holds at once,
      over all heads; more queries than that go chunk by chunk. None is what
      a CPU's caches hold, or 16 MiB on an accelerator.

  Returns:
    [B, S, G, N, H], of q's dtype.

  Raises:
    ValueError: on shapes that do not match, N not a multiple of K, more than
      C queries, a float limit or offset, a block of 0 or less, an unknown
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
  given_BS = None if offset_BS is None else jnp.maximum(offset_BS, 0)
  if offset_BS is None:
    offset_BS = jnp.zeros_like(prefix_length_BS)
  _check_bounds(q_BSGNH, prefix_length_BS, offset_BS)
  if block_keys is None:
    block_keys = 256
  if block_scores is None:
    block_scores = _score_budget(q_BSGNH.shape[0], q_BSGNH.shape[3], block_keys)
  _check_blocks(block_keys=block_keys, block_scores=block_scores)
  implementation = _pick(implementation, arrays, cpu="xla_rows")
  bounds = (prefix_length_BS, jnp.maximum(offset_BS, 0))
  if implementation == "reference":
    return reference.shared_prefix_attention(*arrays, *bounds, scale=scale)
  if implementation == "xla_rows":
    return xla_rows.shared_prefix_attention(
      *arrays, prefix_length_BS, given_BS, scale=float(scale)
    )
  if implementation == "pallas_tpu":
    return pallas_tpu.shared_prefix_attention(
      *arrays, *bounds, scale=float(scale)
    )
  return xla.shared_prefix_attention(
    *arrays,
    *bounds,
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
  implementation: str | None = None,
  block_keys: int | None = None,
) -> jax.Array:
  """`shared_prefix_attention` of one query a continuation, in one layer of
  caches.

  The caches hold heads before tokens, and all layers, of which one is read
  where it lies, or one layer, without the axis L. Without gradients.

  Args:
    q_BSNH: [B, S, N, H] floating.
    prefix_k_LBKTH: [L, B, K, T, H] floating.
    prefix_v_LBKTH: like the prefix's keys.
    continuation_k_LBSKCH: [L, B, S, K, C, H] floating.
    continuation_v_LBSKCH: like the continuations' keys.
    prefix_length_BS: [B, S] integer, how much of the prefix a continuation
      sees.
    offset_BS: [B, S] integer, own keys before the query's.
    layer: int scalar in [0, L), or None where the caches are of one layer.
    scale: what multiplies q.k, usually H ** -0.5.
    implementation: "reference", "xla" or "pallas_tpu"; None picks.
    block_keys: keys of one block of "xla"; None is 64 on a CPU, else 128.

  Returns:
    [B, S, N, H], of q's dtype.

  Raises:
    ValueError: as `shared_prefix_attention`.
  """
  caches = (
    prefix_k_LBKTH,
    prefix_v_LBKTH,
    continuation_k_LBSKCH,
    continuation_v_LBSKCH,
  )
  one: Any = caches
  if layer is not None:
    one = [jax.eval_shape(lambda x: x[0], x) for x in caches]
  one = [jax.eval_shape(lambda x: x.swapaxes(-3, -2), x) for x in one]
  _check(jax.eval_shape(lambda q: q[:, :, None], q_BSNH), *one)
  _check_bounds(q_BSNH, prefix_length_BS, offset_BS)
  if block_keys is None:
    block_keys = 64 if target.platform() == "cpu" else 128
  _check_blocks(block_keys=block_keys)
  if implementation == "xla_rows":
    raise ValueError('Decoding has no "xla_rows"; use "xla", or None.')
  implementation = _pick(implementation, (q_BSNH, *caches), cpu="xla")
  bounds = (prefix_length_BS, jnp.maximum(offset_BS, 0))
  if implementation == "reference":
    own: Any = [x if layer is None else x[layer] for x in caches]
    own = [x.swapaxes(-3, -2) for x in own]
    return reference.shared_prefix_attention(
      q_BSNH[:, :, None], *(*own, *bounds), scale=scale
    )[:, :, 0]
  arrays: Any = (q_BSNH, *caches, *bounds, layer)
  if implementation == "pallas_tpu":
    if layer is None:
      arrays = (q_BSNH, *(x[None] for x in caches), *bounds, jnp.int32(0))
    return pallas_tpu.decode_attention(*arrays, scale=float(scale))
  return xla_decode.decode_attention(
    *arrays, scale=float(scale), block_keys=block_keys
  )


def _pick(implementation, arrays, cpu):
  """The name of the implementation, checked; `cpu` is a CPU's."""
  if implementation is None:
    platform = target.platform()
    if platform == "tpu" and not pallas_tpu.unsupported(*arrays):
      return "pallas_tpu"
    return cpu if platform == "cpu" else "xla"
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"Continuation attention has the implementations {IMPLEMENTATIONS}, got "
      f"{implementation!r}. Name one of them, or None."
    )
  return implementation


def _score_budget(B, N, block_keys):
  if target.platform() == "cpu":
    return max((1 << 20) // B, 64 * N * block_keys)
  return 1 << 22


def _check_blocks(**sizes):
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(
        f"A block holds at least 1 key and score, got {name}={size}. Raise it."
      )


def _check(
  q_BSGNH,
  prefix_k_BTKH,
  prefix_v_BTKH,
  continuation_k_BSCKH,
  continuation_v_BSCKH,
):
  ranks = (q_BSGNH.ndim, prefix_k_BTKH.ndim, continuation_k_BSCKH.ndim)
  if ranks != (5, 4, 5):
    raise ValueError(
      "Continuation attention takes q [B, S, G, N, H], prefix [B, T, K, H] and "
      f"continuation [B, S, C, K, H], got {q_BSGNH.shape}, "
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
      "an empty prefix to 1 position and set its limit to 0."
    )
  for name, x, shape in (
    ("Prefix keys", prefix_k_BTKH, (B, T, K, H)),
    ("Prefix values", prefix_v_BTKH, (B, T, K, H)),
    ("Continuation keys", continuation_k_BSCKH, (B, S, C, K, H)),
    ("Continuation values", continuation_v_BSCKH, (B, S, C, K, H)),
  ):
    if x.shape != shape:
      raise ValueError(
        f"{name} have shape {x.shape} where the other arrays ask for {shape}. "
        "Rows, continuations, heads and features must agree."
      )
  if N % K:
    raise ValueError(
      f"Query heads are shared out over key-value heads: {N} is no multiple "
      f"of {K}. Repeat or drop heads."
    )
  if G > C:
    raise ValueError(
      f"Each query has a key of its own in the continuation, got {G} queries "
      f"and {C} keys. Lengthen the continuation's cache."
    )


def _check_bounds(q_BSGNH, prefix_length_BS, offset_BS):
  for name, x in (("limit", prefix_length_BS), ("offset", offset_BS)):
    if x.shape != q_BSGNH.shape[:2] or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(
        f"The {name} is one integer a continuation, {q_BSGNH.shape[:2]}, got "
        f"{x.dtype} {x.shape}. Broadcast it to [B, S] as int32."
      )
