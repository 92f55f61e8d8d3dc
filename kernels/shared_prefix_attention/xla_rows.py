"""Shared-prefix attention of one continuation after the other, for a CPU.

The scores of one continuation against the prefix and itself stay in the CPU's
caches; see `kernels.tiles`.

Shape key: B rows, S continuations, G queries of a continuation, N query heads,
K key/value heads, R = N / K, H head dimension, T prefix length, C continuation
length, X = T + C, g queries of a chunk, W = T + own keys that a chunk sees.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.kernels import manual_axes, tiles

CHUNK = 128  # queries


def shared_prefix_attention(
  q_BSGNH: jax.Array,
  prefix_k_BTKH: jax.Array,
  prefix_v_BTKH: jax.Array,
  continuation_k_BSCKH: jax.Array,
  continuation_v_BSCKH: jax.Array,
  prefix_length_BS: jax.Array,
  offset_BS: jax.Array | None,
  window: jax.Array | None = None,
  *,
  scale: float,
) -> jax.Array:
  """Computes `api.shared_prefix_attention`; an offset of None is 0."""
  return _attention(
    scale,
    q_BSGNH,
    prefix_k_BTKH,
    prefix_v_BTKH,
    continuation_k_BSCKH,
    continuation_v_BSCKH,
    prefix_length_BS,
    offset_BS,
    window,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale: float, *arrays: Any) -> jax.Array:
  return _forward_rule(scale, *arrays)[0]


def _forward_rule(
  scale: float,
  q_BSGNH: jax.Array,
  prefix_k_BTKH: jax.Array,
  prefix_v_BTKH: jax.Array,
  *rest: Any,
) -> tuple[jax.Array, Any]:
  *own, window = rest
  K = prefix_k_BTKH.shape[2]

  def row(inputs: Any) -> Any:
    prefix_k_TKH, prefix_v_TKH, per_continuation = inputs
    prefix_k_KTH, prefix_v_KTH = (
      jnp.swapaxes(prefix_k_TKH, 0, 1),
      jnp.swapaxes(prefix_v_TKH, 0, 1),
    )

    def continuation(inputs: Any) -> jax.Array:
      q_GNH, k_CKH, v_CKH, *bounds = inputs
      q_1KRGH = tiles.grouped(q_GNH[None], K)
      k_1KXH, v_1KXH = (
        _joined(prefix_k_KTH, k_CKH),
        _joined(prefix_v_KTH, v_CKH),
      )
      out = [
        tiles.forward(
          q_1KRGH[:, :, :, queries],
          k_1KXH[:, :, keys],
          v_1KXH[:, :, keys],
          bias=mask,
          scale=scale,
        )
        for queries, keys, mask in _chunks(
          q_GNH, prefix_k_TKH, k_CKH, window, *bounds
        )
      ]
      out_1KRGH = jnp.concatenate(out, axis=3).astype(q_GNH.dtype)
      return tiles.ungrouped(out_1KRGH)[0]

    return jax.lax.map(continuation, per_continuation)

  out_BSGNH = jax.lax.map(
    row, (prefix_k_BTKH, prefix_v_BTKH, _present(q_BSGNH, *own))
  )
  return out_BSGNH, (q_BSGNH, prefix_k_BTKH, prefix_v_BTKH, *rest, out_BSGNH)


def _backward_rule(
  scale: float, residuals: Any, d_out_BSGNH: jax.Array
) -> tuple[Any, ...]:
  q_BSGNH, prefix_k_BTKH, prefix_v_BTKH, *own, window, out_BSGNH = residuals
  T, K, H = prefix_k_BTKH.shape[1:]
  like = (d_out_BSGNH, q_BSGNH, prefix_k_BTKH, prefix_v_BTKH, *own[:2])

  def zeros(length: int) -> jax.Array:
    zero = jnp.zeros((1, K, H, length), jnp.float32)
    return manual_axes.varying_like(zero, *like)

  def row(inputs: Any) -> Any:
    prefix_k_TKH, prefix_v_TKH, per_continuation = inputs
    prefix_k_KTH, prefix_v_KTH = (
      jnp.swapaxes(prefix_k_TKH, 0, 1),
      jnp.swapaxes(prefix_v_TKH, 0, 1),
    )

    def continuation(d_prefix: Any, inputs: Any) -> tuple[Any, Any]:
      d_out_GNH, out_GNH, q_GNH, k_CKH, v_CKH, *bounds = inputs
      per_query: Any = (q_GNH, d_out_GNH, tiles.delta(d_out_GNH, out_GNH))
      per_query = [tiles.grouped(x[None], K) for x in per_query]
      k_1KXH, v_1KXH = (
        _joined(prefix_k_KTH, k_CKH),
        _joined(prefix_v_KTH, v_CKH),
      )
      d_keys, d_q = [zeros(T + k_CKH.shape[0])] * 2, []
      for queries, keys, mask in _chunks(
        q_GNH, prefix_k_TKH, k_CKH, window, *bounds
      ):
        q, d_out, delta = (x[:, :, :, queries] for x in per_query)
        d_q_chunk, *d_chunk = tiles.backward(
          q,
          k_1KXH[:, :, keys],
          v_1KXH[:, :, keys],
          bias=mask,
          d_out_bKRCH=d_out,
          delta_bKRC1=delta,
          scale=scale,
        )
        d_q.append(d_q_chunk)
        d_keys = [d.at[..., keys].add(new) for d, new in zip(d_keys, d_chunk)]
      d_prefix = [d + new[..., :T] for d, new in zip(d_prefix, d_keys)]
      d_q_1KRGH = jnp.concatenate(d_q, axis=3).astype(q_GNH.dtype)
      d_own = [jnp.moveaxis(d[0, ..., T:], 2, 0) for d in d_keys]
      return d_prefix, (tiles.ungrouped(d_q_1KRGH)[0], *d_own)

    d_prefix, rest = jax.lax.scan(
      continuation, [zeros(T)] * 2, per_continuation
    )
    return *(jnp.moveaxis(d[0], 2, 0) for d in d_prefix), rest

  d_prefix_k, d_prefix_v, (d_q, d_k, d_v) = jax.lax.map(
    row,
    (
      prefix_k_BTKH,
      prefix_v_BTKH,
      _present(d_out_BSGNH, out_BSGNH, q_BSGNH, *own),
    ),
  )
  primals = (q_BSGNH, prefix_k_BTKH, prefix_v_BTKH, *own[:2])
  gradients = (
    manual_axes.reduce_like(d_x, x).astype(x.dtype)
    for d_x, x in zip((d_q, d_prefix_k, d_prefix_v, d_k, d_v), primals)
  )
  return (*gradients, None, None, None)


_attention.defvjp(_forward_rule, _backward_rule)


def _present(*arrays: jax.Array | None) -> tuple[jax.Array, ...]:
  """The arrays without an offset that is None."""
  return tuple(x for x in arrays if x is not None)


def _joined(prefix_KTH: jax.Array, continuation_CKH: jax.Array) -> jax.Array:
  """Prefix and own keys (or values) in one array, [1, K, X, H]."""
  return jnp.concatenate([prefix_KTH, jnp.swapaxes(continuation_CKH, 0, 1)], 1)[
    None
  ]


def _chunks(
  q_GNH: jax.Array,
  prefix_TKH: jax.Array,
  continuation_CKH: jax.Array,
  window: jax.Array | None,
  prefix_length: jax.Array,
  offset: jax.Array | None = None,
) -> Iterator[tuple[slice, slice, jax.Array]]:
  """Cuts a continuation's queries into chunks.

  Yields:
    The chunk's queries, the keys that it needs, and its additive mask
    [1, 1, 1, g, W].
  """
  G, T, C = len(q_GNH), len(prefix_TKH), len(continuation_CKH)
  key_X = jnp.arange(T + C)
  for start in range(0, G, CHUNK):
    end = min(start + CHUNK, G)
    # Without an offset no query sees an own key behind its own position.
    keys = slice(0, T + end if offset is None else T + C)
    last_g = T + jnp.arange(start, end) + (0 if offset is None else offset)
    key_1W = key_X[None, keys]
    visible_gW = (key_1W <= last_g[:, None]) & (
      (key_1W < prefix_length) | (key_1W >= T)
    )
    if window is not None:
      # The own key in place T has position `prefix_length`.
      ahead_g = prefix_length - T
      position_1W = jnp.where(key_1W < T, key_1W, key_1W + ahead_g)
      visible_gW &= position_1W > last_g[:, None] + ahead_g - window
    yield slice(start, end), keys, tiles.bias(visible_gW)[None, None, None]
