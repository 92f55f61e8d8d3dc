"""Attention of one new token per continuation to key/value caches.

This is bandwidth-bound: its time is that of reading the caches. The caches of
one layer (unstacked layers, on a CPU) are multiplied whole: slicing a block
copies it there, which costs more than attending to keys that no query sees. Out
of stacked layers, an online softmax visits the blocks that some continuation
sees; an accelerator fuses the slice with the matmul.

Either way the keys are summed in blocks of a fixed size and in order, so that a
continuation's numbers do not depend on the caches' lengths.

Shape key: L layers, B rows, S continuations, N query heads, K key/value heads,
R = N / K query heads per key/value head, H head dimension, T prefix length,
C continuation length, n blocks, x keys of one block, Q queries that share keys.
"""

import functools
import operator
from typing import Any

import einops
import jax
import jax.numpy as jnp

from opera_jax.kernels import target

MASKED = -1e30  # finite, so that a block without visible keys gives no NaN
MAX_MATVEC_QUERIES = 4  # a CPU multiplies so few queries one by one


# Online softmax: the maximum m [..., Q], the sum l of exp(score - m) [..., Q],
# and the weighted sum o of the values [..., Q, H].
_Softmax = tuple[jax.Array, jax.Array, jax.Array]


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
  window: jax.Array | None,
  block_keys: int,
) -> jax.Array:
  """Computes `api.decode_attention`, which states the shapes."""
  B, S, N, H = q_BSNH.shape
  K = prefix_k.shape[-3]
  R = N // K
  q_BSKRH = q_BSNH.reshape(B, S, K, R, H)
  prefix_length_BQ = jnp.repeat(prefix_length_BS, R, axis=1)
  own_BS11 = (offset_BS + 1)[:, :, None, None]
  first_own = first_prefix = None
  if window is not None:
    first_own = own_BS11 - window
    first_prefix = prefix_length_BQ + jnp.repeat(first_own[:, :, 0, 0], R, 1)
    first_prefix = first_prefix[:, None]

  def join_samples(x: jax.Array) -> jax.Array:
    """All queries of a row side by side, [B, K, S * R, ...]."""
    return einops.rearrange(x, "B S K R ... -> B K (S R) ...")

  attend: Any = _attend_whole
  if layer is not None:
    attend = functools.partial(_attend_blocks, layer)
  total = attend(
    q_BSKRH,
    continuation_k,
    continuation_v,
    visible=own_BS11,
    first=first_own,
    total=None,
    scale=scale,
    block_keys=block_keys,
  )
  _, l, o = attend(
    join_samples(q_BSKRH),
    prefix_k,
    prefix_v,
    visible=prefix_length_BQ[:, None],
    first=first_prefix,
    total=tuple(join_samples(x) for x in total),
    scale=scale,
    block_keys=block_keys,
  )
  out_BKSRH = (o / l[..., None]).astype(q_BSNH.dtype).reshape(B, K, S, R, H)
  return jnp.swapaxes(out_BKSRH, 1, 2).reshape(B, S, N, H)


def _attend_whole(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  visible: jax.Array,
  first: jax.Array | None,
  total: _Softmax | None,
  scale: float,
  block_keys: int,
) -> _Softmax:
  """Attention to the whole caches of one layer.

  Args:
    q: [..., Q, H].
    k: [..., length, H].
    v: like k.
    visible: [..., Q] integer, the last key that a query sees + 1; masked keys
      add exact zeros.
    first: [..., Q] integer, the first key that it sees; None for all keys
      before the last.
    total: the softmax over other keys, which these are added to, or None.
    scale: multiplies q.k.
    block_keys: keys that are summed as one block.

  Returns:
    The softmax over these keys and those of `total`.
  """
  length, H = k.shape[-2:]
  x = block_keys if length % block_keys == 0 else length
  k, v = (y.reshape(*y.shape[:-2], length // x, x, H) for y in (k, v))
  Q = q.shape[-2]
  position = jnp.arange(length).reshape(
    (1,) * (visible.ndim - 1) + (length // x, 1, x)
  )
  mask = position < visible[..., None, :, None]
  if first is not None:
    mask &= position >= first[..., None, :, None]
  q = jnp.broadcast_to(q[..., None, :, :], (*k.shape[:-2], Q, H))
  score = jnp.where(mask, scale * _scores(q, k), MASKED)
  m = jnp.max(score, axis=(-3, -1))
  if total is not None:
    m = jnp.maximum(m, total[0])
  p = jnp.exp(score - m[..., None, :, None])
  l = _sum_in_order(_sum(p), -2)
  o = _sum_in_order(_dot(p.astype(v.dtype), v, -2), -3)
  if total is not None:
    keep = jnp.exp(total[0] - m)
    l, o = total[1] * keep + l, total[2] * keep[..., None] + o
  return m, l, o


def _sum_in_order(x: jax.Array, axis: int) -> jax.Array:
  """Adds the entries of an axis one after the other."""
  entries = [
    jax.lax.index_in_dim(x, i, axis, keepdims=False)
    for i in range(x.shape[axis])
  ]
  return functools.reduce(operator.add, entries)


def _sum(x: jax.Array) -> jax.Array:
  """Sums the last axis, in an order that depends on its length alone.

  XLA's own order depends on the shape of the whole array.
  """
  while x.shape[-1] % 2 == 0:
    half = x.shape[-1] // 2
    x = x[..., :half] + x[..., half:]
  return jnp.sum(x, axis=-1)


def _attend_blocks(
  layer: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  visible: jax.Array,
  first: jax.Array | None,
  total: _Softmax | None,
  scale: float,
  block_keys: int,
) -> _Softmax:
  """Like `_attend_whole`, over the blocks of one of the stacked layers.

  Blocks that no query sees are skipped. The last block ends at the last key;
  the keys that it shares with the block before are masked.
  """
  if total is None:
    zero = jnp.zeros(q.shape, jnp.float32)
    total = (zero[..., 0] + MASKED, zero[..., 0], zero)
  length = k.shape[-2]
  size = min(block_keys, length)

  def add_block(i: jax.Array, total: _Softmax) -> _Softmax:
    start = jnp.minimum(i * size, length - size)
    position = (start + jnp.arange(size)).reshape((1,) * visible.ndim + (-1,))
    mask = (position >= i * size) & (position < visible[..., None])
    if first is not None:
      mask &= position >= first[..., None]
    m, l, o = total
    score = jnp.where(mask, scale * _scores(q, block(k, start)), MASKED)
    m_new = jnp.maximum(m, jnp.max(score, axis=-1))
    p = jnp.exp(score - m_new[..., None])
    keep = jnp.exp(m - m_new)
    o = o * keep[..., None] + _dot(p.astype(v.dtype), block(v, start), -2)
    return m_new, l * keep + jnp.sum(p, axis=-1), o

  def block(x: jax.Array, start: jax.Array) -> jax.Array:
    starts: list[Any] = [0] * x.ndim
    sizes = list(x.shape)
    starts[0], sizes[0] = layer, 1
    starts[-2], sizes[-2] = start, size
    return jax.lax.dynamic_slice(x, starts, sizes)[0]

  count = -(-jnp.minimum(jnp.max(visible), length) // size)
  begin: Any = 0
  if first is not None:
    begin = jnp.clip(jnp.min(first), 0, length) // size
  return jax.lax.fori_loop(begin, count, add_block, total)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """[..., Q, H] against [..., x, H]: [..., Q, x] float32."""
  if q.shape[-2] <= MAX_MATVEC_QUERIES and target.platform() == "cpu":
    # A matrix-vector product reads the keys without transposing them.
    each = [_dot(q[..., i, :], k, -1) for i in range(q.shape[-2])]
    return jnp.stack(each, axis=-2)
  return _dot(q, k, -1)


def _dot(x: jax.Array, y: jax.Array, y_axis: int) -> jax.Array:
  """Contracts x's last axis with one of y's last two; other axes are batch."""
  dtype = jnp.result_type(x, y)
  batch = tuple(range(y.ndim - 2))
  return jax.lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    (((x.ndim - 1,), (y.ndim + y_axis,)), (batch, batch)),
    preferred_element_type=jnp.float32,
  )
