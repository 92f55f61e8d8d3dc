"""Continuation attention of one continuation after the other, for a CPU.

A continuation meets the prefix and itself in one softmax, whose scores stay in
the CPU's caches; see `kernels.tiles`.

Shape key: B rows, S continuations, G queries of a continuation, N query heads,
K key-value heads, R = N / K, H head features, T prefix length, C continuation
length, g queries of a chunk, W = T + own keys that a chunk meets.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.kernels import manual_axes, tiles

CHUNK = 128


def shared_prefix_attention(
  q_BSGNH: jax.Array,
  prefix_k_BTKH: jax.Array,
  prefix_v_BTKH: jax.Array,
  continuation_k_BSCKH: jax.Array,
  continuation_v_BSCKH: jax.Array,
  prefix_length_BS: jax.Array,
  offset_BS: jax.Array | None,
  *,
  scale: float,
) -> jax.Array:
  """Computes `api.shared_prefix_attention`; an offset of None is known to be
  0."""
  return _attention(
    scale,
    q_BSGNH,
    prefix_k_BTKH,
    prefix_v_BTKH,
    continuation_k_BSCKH,
    continuation_v_BSCKH,
    prefix_length_BS,
    offset_BS,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, *arrays):
  return _forward_rule(scale, *arrays)[0]


def _forward_rule(scale, q_BSGNH, tk_BTKH, tv_BTKH, *own):
  K = tk_BTKH.shape[2]

  def row(inputs):
    tk_TKH, tv_TKH, per_continuation = inputs
    tk_KTH, tv_KTH = jnp.swapaxes(tk_TKH, 0, 1), jnp.swapaxes(tv_TKH, 0, 1)

    def continuation(inputs):
      q_GNH, k_CKH, v_CKH, *bounds = inputs
      q_1KRGH = tiles.grouped(q_GNH[None], K)
      k_1KXH, v_1KXH = _joined(tk_KTH, k_CKH), _joined(tv_KTH, v_CKH)
      out = [
        tiles.forward(
          q_1KRGH[:, :, :, queries],
          k_1KXH[:, :, keys],
          v_1KXH[:, :, keys],
          mask,
          scale,
        )
        for queries, keys, mask in _chunks(q_GNH, tk_TKH, k_CKH, *bounds)
      ]
      out_1KRGH = jnp.concatenate(out, axis=3).astype(q_GNH.dtype)
      return tiles.ungrouped(out_1KRGH)[0]

    return jax.lax.map(continuation, per_continuation)

  out_BSGNH = jax.lax.map(row, (tk_BTKH, tv_BTKH, _given(q_BSGNH, *own)))
  return out_BSGNH, (q_BSGNH, tk_BTKH, tv_BTKH, *own, out_BSGNH)


def _backward_rule(scale, saved, d_out_BSGNH):
  q_BSGNH, tk_BTKH, tv_BTKH, *own, out_BSGNH = saved
  T, K, H = tk_BTKH.shape[1:]
  like = (d_out_BSGNH, q_BSGNH, tk_BTKH, tv_BTKH, *own[:2])

  def zeros(length):
    zero = jnp.zeros((1, K, H, length), jnp.float32)
    return manual_axes.varying_like(zero, *like)

  def row(inputs):
    tk_TKH, tv_TKH, per_continuation = inputs
    tk_KTH, tv_KTH = jnp.swapaxes(tk_TKH, 0, 1), jnp.swapaxes(tv_TKH, 0, 1)

    def continuation(d_prefix, inputs):
      d_out_GNH, out_GNH, q_GNH, k_CKH, v_CKH, *bounds = inputs
      per_query: Any = (q_GNH, d_out_GNH, tiles.delta(d_out_GNH, out_GNH))
      per_query = [tiles.grouped(x[None], K) for x in per_query]
      k_1KXH, v_1KXH = _joined(tk_KTH, k_CKH), _joined(tv_KTH, v_CKH)
      d_keys, d_q = [zeros(T + k_CKH.shape[0])] * 2, []
      for queries, keys, mask in _chunks(q_GNH, tk_TKH, k_CKH, *bounds):
        q, d_out, delta = (x[:, :, :, queries] for x in per_query)
        one, *more = tiles.backward(
          *(q, k_1KXH[:, :, keys], v_1KXH[:, :, keys], mask, d_out, delta),
          scale,
        )
        d_q.append(one)
        d_keys = [d.at[..., keys].add(m) for d, m in zip(d_keys, more)]
      d_prefix = [d + more[..., :T] for d, more in zip(d_prefix, d_keys)]
      d_q_1KRGH = jnp.concatenate(d_q, axis=3).astype(q_GNH.dtype)
      d_own = [jnp.moveaxis(d[0, ..., T:], 2, 0) for d in d_keys]
      return d_prefix, (tiles.ungrouped(d_q_1KRGH)[0], *d_own)

    d_prefix, rest = jax.lax.scan(
      continuation, [zeros(T)] * 2, per_continuation
    )
    return *(jnp.moveaxis(d[0], 2, 0) for d in d_prefix), rest

  d_tk, d_tv, (d_q, d_k, d_v) = jax.lax.map(
    row, (tk_BTKH, tv_BTKH, _given(d_out_BSGNH, out_BSGNH, q_BSGNH, *own))
  )
  primals = (q_BSGNH, tk_BTKH, tv_BTKH, *own[:2])
  gradients = (
    manual_axes.reduce_like(d_x, x).astype(x.dtype)
    for d_x, x in zip((d_q, d_tk, d_tv, d_k, d_v), primals)
  )
  return (*gradients, None, None)


_attention.defvjp(_forward_rule, _backward_rule)


def _given(*arrays):
  """Without an offset that is None."""
  return tuple(x for x in arrays if x is not None)


def _joined(prefix_KTH, continuation_CKH):
  return jnp.concatenate([prefix_KTH, jnp.swapaxes(continuation_CKH, 0, 1)], 1)[
    None
  ]


def _chunks(q_GNH, prefix_TKH, continuation_CKH, prefix_length, offset=None):
  """(queries, keys, what masks [g, W]) of every chunk of a continuation."""
  G, T, C = len(q_GNH), len(prefix_TKH), len(continuation_CKH)
  key_X = jnp.arange(T + C)
  for start in range(0, G, CHUNK):
    end = min(start + CHUNK, G)
    # Without an offset no query sees an own key behind its own place.
    keys = slice(0, T + end if offset is None else T + C)
    last_g = T + jnp.arange(start, end) + (0 if offset is None else offset)
    key_1W = key_X[None, keys]
    seen_gW = (key_1W <= last_g[:, None]) & (
      (key_1W < prefix_length) | (key_1W >= T)
    )
    yield slice(start, end), keys, tiles.bias(seen_gW)[None, None, None]
