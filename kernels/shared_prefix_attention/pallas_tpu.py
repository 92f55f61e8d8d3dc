"""Shared-prefix attention as TPU kernels.

Attention to the prefix and attention to the own continuation are the same
operation: each query sees the first keys only, `prefix_length` of the prefix
and offset + g + 1 of its continuation; with a sliding window, the last of
these. `limited_attention` has the kernels. The
online softmax of the continuation continues from that of the prefix; the
backward pass runs once for each, with the logsumexp over both. Against the
prefix, all queries of a row are one block, so that decoding reads a prompt's
cache once for all of its samples.

The kernels read keys as [.., K, length, H]. Caches have this layout. Inside a
jitted layer XLA gives it to the projections, so that the transposes here are
free. An array that enters a program in another layout is copied once.

Shape key: B rows, S continuations, G queries of a continuation, N query heads,
K key/value heads, R = N / K, Q = G * R, H head dimension, T prefix length,
C continuation length.
"""

import functools
from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp

from opera_jax.kernels import manual_axes
from opera_jax.kernels.shared_prefix_attention import limited_attention


def unsupported(*arrays: jax.Array) -> str | None:
  """Why these kernels do not apply, or None if they do.

  Args:
    *arrays: queries, keys and values; the last axis is the head dimension.
  """
  dtypes = {str(x.dtype) for x in arrays}
  if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
    return f"the arrays are {sorted(dtypes)}, not all float32 or all bfloat16"
  if arrays[0].shape[-1] > 256:
    return f"a head has {arrays[0].shape[-1]} features, more than 256"
  return None


def shared_prefix_attention(
  q_BSGNH: jax.Array,
  prefix_k_BTKH: jax.Array,
  prefix_v_BTKH: jax.Array,
  continuation_k_BSCKH: jax.Array,
  continuation_v_BSCKH: jax.Array,
  prefix_length_BS: jax.Array,
  offset_BS: jax.Array,
  window: jax.Array | None = None,
  *,
  scale: float,
) -> jax.Array:
  """Computes `api.shared_prefix_attention`.

  Raises:
    NotImplementedError: `unsupported` gives a reason.
  """
  arrays = (
    q_BSGNH,
    prefix_k_BTKH,
    prefix_v_BTKH,
    continuation_k_BSCKH,
    continuation_v_BSCKH,
  )
  _require(*arrays)
  return _attention(scale, *arrays, prefix_length_BS, offset_BS, window)


def decode_attention(
  q_BSNH: jax.Array,
  prefix_k_LBKTH: jax.Array,
  prefix_v_LBKTH: jax.Array,
  continuation_k_LBSKCH: jax.Array,
  continuation_v_LBSKCH: jax.Array,
  prefix_length_BS: jax.Array,
  offset_BS: jax.Array,
  layer: jax.Array,
  *,
  scale: float,
  window: jax.Array | None = None,
) -> jax.Array:
  """Computes `api.decode_attention` without copying the layer out.

  Raises:
    NotImplementedError: `unsupported` gives a reason.
  """
  _require(
    q_BSNH,
    prefix_k_LBKTH,
    prefix_v_LBKTH,
    continuation_k_LBSKCH,
    continuation_v_LBSKCH,
  )
  B, S, N, H = q_BSNH.shape
  K, T = prefix_k_LBKTH.shape[2:4]
  R, C = N // K, continuation_k_LBSKCH.shape[4]
  q_BKSRH = q_BSNH.reshape(B, S, K, R, H).swapaxes(1, 2)
  first_prefix: Any = None
  first_own: Any = None
  if window is not None:
    first_own, first_prefix = (
      jnp.broadcast_to(x[..., None], (B, S, R)).astype(jnp.int32)
      for x in (
        offset_BS + 1 - window,
        prefix_length_BS + offset_BS + 1 - window,
      )
    )
    first_prefix = first_prefix.reshape(B, 1, S * R)
  prefix_length_BSR, own_BSR = (
    jnp.broadcast_to(jnp.minimum(x, most)[..., None], (B, S, R))
    for x, most in ((prefix_length_BS, T), (offset_BS + 1, C))
  )
  seed = limited_attention.forward(
    scale,
    q_BKSRH.reshape(B, K, 1, S * R, H),
    prefix_k_LBKTH[:, :, None],
    prefix_v_LBKTH[:, :, None],
    prefix_length_BSR.reshape(B, 1, S * R).astype(jnp.int32),
    first_BSQ=first_prefix,
    layer=layer,
  )
  out, logsumexp = (x.reshape(B, K, S, R, -1) for x in seed)
  out_BKSRH, _ = limited_attention.forward(
    scale,
    q_BKSRH,
    continuation_k_LBSKCH,
    continuation_v_LBSKCH,
    own_BSR.astype(jnp.int32),
    first_BSQ=first_own,
    seed=(out, logsumexp),
    layer=layer,
  )
  return out_BKSRH.swapaxes(1, 2).reshape(B, S, N, H)


def _require(*arrays: jax.Array) -> None:
  reason = unsupported(*arrays)
  if reason is not None:
    raise NotImplementedError(
      f"The TPU kernel does not apply: {reason}. Pass implementation='xla'."
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale: float, *arrays: Any) -> jax.Array:
  return _forward_rule(scale, *arrays)[0]


def _forward_rule(
  scale: float, q_BSGNH: jax.Array, *keys: Any
) -> tuple[jax.Array, Any]:
  K = keys[0].shape[2]
  R = q_BSGNH.shape[3] // K
  q_BKSQH = _heads_first(q_BSGNH, K)
  prefix, continuations = _operands(q_BKSQH, R, keys)
  seed = limited_attention.forward(scale, *prefix)
  out, logsumexp = (x.reshape(*q_BKSQH.shape[:4], -1) for x in seed)
  q, k, v, seen, first = continuations
  out_BKSQH, lse_BKSQ1 = limited_attention.forward(
    scale, q, k, v, seen, first_BSQ=first, seed=(out, logsumexp)
  )
  out_BSGNH = _undo_heads_first(out_BKSQH, q_BSGNH.shape[2])
  return out_BSGNH, (q_BSGNH, keys, out_BSGNH, lse_BKSQ1)


def _backward_rule(
  scale: float, residuals: Any, d_out_BSGNH: jax.Array
) -> tuple[Any, ...]:
  q_BSGNH, keys, out_BSGNH, lse_BKSQ1 = residuals
  K = keys[0].shape[2]
  R = q_BSGNH.shape[3] // K
  q_BKSQH, d_out_BKSQH, out_BKSQH = (
    _heads_first(x, K) for x in (q_BSGNH, d_out_BSGNH, out_BSGNH)
  )
  delta_BKSQ1 = jnp.sum(
    d_out_BKSQH.astype(jnp.float32) * out_BKSQH.astype(jnp.float32),
    axis=-1,
    keepdims=True,
  )
  d_q_BKSQH: Any = 0.0
  d_keys = []
  for q, k, v, seen, first in _operands(q_BKSQH, R, keys):
    shape = q.shape[:4] + (-1,)
    d_q, d_k, d_v = limited_attention.backward(
      scale,
      q,
      k,
      v,
      seen,
      d_out_BKSQH.reshape(shape),
      lse_BKSQ1.reshape(shape),
      delta_BKSQ1.reshape(shape),
      first_BSQ=first,
    )
    d_q_BKSQH = d_q_BKSQH + d_q.reshape(q_BKSQH.shape)
    d_keys += [jnp.swapaxes(x, 2, 3) for x in (d_k, d_v)]
  d_q_BSGNH = _undo_heads_first(
    d_q_BKSQH.astype(q_BSGNH.dtype), q_BSGNH.shape[2]
  )
  gradients = (
    manual_axes.reduce_like(d_x.reshape(x.shape), x)
    for d_x, x in zip((d_q_BSGNH, *d_keys), (q_BSGNH, *keys[:4]))
  )
  return (*gradients, None, None, None)


_attention.defvjp(_forward_rule, _backward_rule)


def _operands(
  q_BKSQH: jax.Array, R: int, keys: Sequence[Any]
) -> tuple[Any, Any]:
  """Queries, keys, values, last and first visible keys of `limited_attention`.

  Returns:
    Those of the prefix, as one long continuation, and of the continuations.
  """
  (
    prefix_k,
    prefix_v,
    continuation_k,
    continuation_v,
    prefix_length_BS,
    offset_BS,
    window,
  ) = keys
  B, K, S, Q, H = q_BKSQH.shape
  T, C = prefix_k.shape[1], continuation_k.shape[2]
  query_Q = jnp.arange(Q, dtype=jnp.int32) // R
  end_BSQ = offset_BS[..., None] + query_Q[None, None] + 1
  own_BSQ = jnp.minimum(end_BSQ, C)
  first_prefix: Any = None
  first_own: Any = None
  if window is not None:
    first_own = (end_BSQ - window).astype(jnp.int32)
    first_prefix = first_own + prefix_length_BS[..., None].astype(jnp.int32)
    first_prefix = first_prefix.reshape(B, 1, S * Q)
  prefix_length_BSQ = jnp.broadcast_to(
    jnp.minimum(prefix_length_BS, T)[..., None], (B, S, Q)
  )
  return (
    (
      q_BKSQH.reshape(B, K, 1, S * Q, H),
      jnp.swapaxes(prefix_k, 1, 2)[:, None],
      jnp.swapaxes(prefix_v, 1, 2)[:, None],
      prefix_length_BSQ.reshape(B, 1, S * Q).astype(jnp.int32),
      first_prefix,
    ),
    (
      q_BKSQH,
      jnp.swapaxes(continuation_k, 2, 3),
      jnp.swapaxes(continuation_v, 2, 3),
      own_BSQ.astype(jnp.int32),
      first_own,
    ),
  )


def _heads_first(x_BSGNH: jax.Array, K: int) -> jax.Array:
  """The queries that share keys side by side, [B, K, S, Q, H]."""
  return einops.rearrange(x_BSGNH, "B S G (K R) H -> B K S (G R) H", K=K)


def _undo_heads_first(x_BKSQH: jax.Array, G: int) -> jax.Array:
  """Inverse of `_heads_first`, [B, S, G, N, H]."""
  return einops.rearrange(x_BKSQH, "B K S (G R) H -> B S G (K R) H", G=G)
