"""Attention of one new token a continuation, over caches as they lie.

What costs time here is reading the caches. One layer's caches are multiplied
where they lie, whole: on a CPU a block cut out of them would be a copy, which
costs more than to attend to keys that nobody sees. Out of stacked layers,
blocks are cut as far as some continuation sees, by online softmax; an
accelerator fuses the cut with the product.

Either way a continuation's numbers come from blocks of fixed size, added in
order, so that they do not change with the caches' lengths.

Shape key: L layers, B rows, S continuations, N query heads, K key-value heads,
R = N / K query heads a key-value head, H head features, T prefix length, C
continuation length, n blocks, x keys of one block, Q queries that share keys.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from opera_jax.kernels import target

MASKED = -1e30  # finite, so that a block without a visible key gives no NaN
FEW = 4  # queries up to which a CPU takes them one by one


def decode_attention(
  q_BSNH: jax.Array,
  prefix_k: jax.Array,
  prefix_v: jax.Array,
  continuation_k: jax.Array,
  continuation_v: jax.Array,
  prefix_length_BS: jax.Array,
  offset_BS: jax.Array,
  layer: jax.Array | None,
  *,
  scale: float,
  block_keys: int,
) -> jax.Array:
  """Computes `api.decode_attention`, which states the shapes."""
  B, S, N, H = q_BSNH.shape
  K = prefix_k.shape[-3]
  R = N // K
  q_BSKRH = q_BSNH.reshape(B, S, K, R, H)
  own = (continuation_k, continuation_v, (offset_BS + 1)[:, :, None, None])
  prefix_length_BQ = jnp.repeat(prefix_length_BS, R, axis=1)
  prefix = (prefix_k, prefix_v, prefix_length_BQ[:, None])

  def together(x):  # the queries of a row, [B, K, S * R, ...]
    return jnp.swapaxes(x, 1, 2).reshape(B, K, S * R, *x.shape[4:])

  visit = _whole if layer is None else functools.partial(_blocks, layer)
  total = visit(q_BSKRH, *own, None, scale, block_keys)
  _, l, o = visit(
    together(q_BSKRH), *prefix, [together(x) for x in total], scale, block_keys
  )
  out_BKSRH = (o / l[..., None]).astype(q_BSNH.dtype).reshape(B, K, S, R, H)
  return jnp.swapaxes(out_BKSRH, 1, 2).reshape(B, S, N, H)


def _whole(q, k, v, seen, total, scale, block_keys):
  """(m, l, o) of q [..., Q, H] over keys [..., length, H], added to `total`.

  `seen` [..., Q] counts the visible keys; what is masked adds exact zeros.
  """
  length, H = k.shape[-2:]
  x = block_keys if length % block_keys == 0 else length
  k, v = (y.reshape(*y.shape[:-2], length // x, x, H) for y in (k, v))
  Q = q.shape[-2]
  position = jnp.arange(length).reshape(
    (1,) * (seen.ndim - 1) + (length // x, 1, x)
  )
  visible = position < seen[..., None, :, None]
  q = jnp.broadcast_to(q[..., None, :, :], (*k.shape[:-2], Q, H))
  score = jnp.where(visible, scale * _scores(q, k), MASKED)
  m = jnp.max(score, axis=(-3, -1))
  if total is not None:
    m = jnp.maximum(m, total[0])
  p = jnp.exp(score - m[..., None, :, None])
  l = _in_order(_sum(p), -2)
  o = _in_order(_dot(p.astype(v.dtype), v, -2), -3)
  if total is not None:
    keep = jnp.exp(total[0] - m)
    l, o = total[1] * keep + l, total[2] * keep[..., None] + o
  return m, l, o


def _in_order(x, axis):
  parts = [
    jax.lax.index_in_dim(x, i, axis, keepdims=False)
    for i in range(x.shape[axis])
  ]
  return functools.reduce(operator.add, parts)


def _sum(x):
  """Over the last axis, in an order that no other axis can change.

  XLA adds up in one order or another by the shape of the whole array.
  """
  while x.shape[-1] % 2 == 0:
    half = x.shape[-1] // 2
    x = x[..., :half] + x[..., half:]
  return jnp.sum(x, axis=-1)


def _blocks(layer, q, k, v, seen, total, scale, block_keys):
  """Like `_whole`, over one of stacked layers, as far as some query sees.

  The last block ends at the last key; what it shares with the block before is
  masked.
  """
  if total is None:
    zero = jnp.zeros(q.shape, jnp.float32)
    total = (zero[..., 0] + MASKED, zero[..., 0], zero)
  length = k.shape[-2]
  size = min(block_keys, length)

  def block(i, total):
    start = jnp.minimum(i * size, length - size)
    position = (start + jnp.arange(size)).reshape((1,) * seen.ndim + (-1,))
    visible = (position >= i * size) & (position < seen[..., None])
    m, l, o = total
    score = jnp.where(visible, scale * _scores(q, cut(k, start)), MASKED)
    m_new = jnp.maximum(m, jnp.max(score, axis=-1))
    p = jnp.exp(score - m_new[..., None])
    keep = jnp.exp(m - m_new)
    o = o * keep[..., None] + _dot(p.astype(v.dtype), cut(v, start), -2)
    return m_new, l * keep + jnp.sum(p, axis=-1), o

  def cut(x, start):
    starts, sizes = [0] * x.ndim, list(x.shape)
    starts[0], sizes[0] = layer, 1
    starts[-2], sizes[-2] = start, size
    return jax.lax.dynamic_slice(x, starts, sizes)[0]

  count = -(-jnp.minimum(jnp.max(seen), length) // size)
  return jax.lax.fori_loop(0, count, block, tuple(total))


def _scores(q, k):
  """[..., Q, H] against [..., x, H]: [..., Q, x] float32."""
  if q.shape[-2] <= FEW and target.platform() == "cpu":
    # A product with a vector reads the keys as they lie.
    each = [_dot(q[..., i, :], k, -1) for i in range(q.shape[-2])]
    return jnp.stack(each, axis=-2)
  return _dot(q, k, -1)


def _dot(x, y, y_axis):
  """Contracts x's last axis with one of y's last two; the others lead."""
  dtype = jnp.result_type(x, y)
  batch = tuple(range(y.ndim - 2))
  return jax.lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    (((x.ndim - 1,), (y.ndim + y_axis,)), (batch, batch)),
    preferred_element_type=jnp.float32,
  )
