"""Continuation attention by online softmax over blocks of keys.

All continuations of a row meet a block of the prefix in one matmul; blocks
beyond the furthest limit are not visited. The backward pass forms each block of
probabilities again from the saved logsumexp. Where a row's queries would give
too many scores at once, continuations (and then their queries) go chunk by
chunk.

Shape key: B rows, S continuations, G queries of a continuation, N query heads,
K key-value heads, R = N / K query heads a key-value head, Q = G * R, H head
features, T prefix length, C continuation length, x keys of one block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.kernels import manual_axes

MASKED = -1e30  # finite, so that a block without a visible key gives no NaN
PREFIX = "bxkh"  # axes of the prefix's keys and values
CONTINUATION = "bsxkh"


def shared_prefix_attention(
  q_BSGNH: jax.Array,
  prefix_k_BTKH: jax.Array,
  prefix_v_BTKH: jax.Array,
  continuation_k_BSCKH: jax.Array,
  continuation_v_BSCKH: jax.Array,
  prefix_length_BS: jax.Array,
  offset_BS: jax.Array,
  *,
  scale: float,
  block_keys: int,
  block_scores: int,
) -> jax.Array:
  """Streams `api.shared_prefix_attention`; `block_scores` scores of a row at
  once."""
  B, S, G, N, H = q_BSGNH.shape
  T, K, _ = prefix_k_BTKH.shape[-3:]
  C = continuation_k_BSCKH.shape[-3]
  block_keys = min(block_keys, max(T, C))
  chunk = _chunk(S, G, max(1, block_scores // (N * block_keys)))
  pad = -G % chunk[1]
  q_BSGNH = jnp.pad(q_BSGNH, ((0, 0), (0, 0), (0, pad), (0, 0), (0, 0)))
  arrays = (
    q_BSGNH.reshape(B, S, G + pad, K, N // K, H),
    *(prefix_k_BTKH, prefix_v_BTKH, continuation_k_BSCKH, continuation_v_BSCKH),
    *(prefix_length_BS, offset_BS),
  )
  out_BSGKRH = _attention((scale, block_keys, chunk), *arrays)
  return out_BSGKRH.reshape(B, S, G + pad, N, H)[:, :, :G]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q_BSGKRH, *keys):
  return _forward_rule(settings, q_BSGKRH, *keys)[0]


def _forward_rule(settings, q_BSGKRH, *keys):
  scale, block_keys, chunk = settings

  def attend(part):
    q_BKSQH = _rows(_take(q_BSGKRH, part, chunk))
    own = [_take(x, part, chunk[:1]) for x in keys[2:]]
    zero = jnp.zeros(q_BKSQH.shape, jnp.float32)
    total: Any = (zero[..., 0] + MASKED, zero[..., 0], zero)
    total = tuple(manual_axes.varying_like(x, q_BSGKRH, *keys) for x in total)

    def step(total, k, v, axes, visible, _):
      m, l, o = total
      score = jnp.where(visible, scale * _scores(q_BKSQH, k, axes), MASKED)
      m_new = jnp.maximum(m, jnp.max(score, axis=-1))
      p = jnp.exp(score - m_new[..., None])
      keep = jnp.exp(m - m_new)
      o = o * keep[..., None] + _weigh(p.astype(v.dtype), v, axes)
      return m_new, l * keep + jnp.sum(p, axis=-1), o

    seen = _own_keys_seen(own[3], part, chunk[1], q_BSGKRH.shape[4])
    prefix_length = own[2][..., None]
    total = _visit(step, total, CONTINUATION, own[0], own[1], seen, block_keys)
    total = _visit(
      step, total, PREFIX, keys[0], keys[1], prefix_length, block_keys
    )
    m, l, o = total
    out = (o / l[..., None]).astype(q_BSGKRH.dtype)
    normaliser = (m + jnp.log(l))[..., None]
    return _unrows(out, chunk[1]), _unrows(normaliser, chunk[1])

  parts = _parts(q_BSGKRH, chunk)
  if len(parts) == 1:
    out, normaliser = attend(parts[0])
  else:
    out, normaliser = (
      _put_together(x, q_BSGKRH.shape)
      for x in jax.lax.map(attend, jnp.asarray(parts))
    )
  return out, (q_BSGKRH, *keys, out, normaliser)


def _backward_rule(settings, residuals, d_out_BSGKRH):
  q_BSGKRH, *keys, out_BSGKRH, normaliser_BSGKR1 = residuals
  scale, block_keys, chunk = settings
  delta_BSGKR1 = jnp.sum(
    d_out_BSGKRH.astype(jnp.float32) * out_BSGKRH.astype(jnp.float32),
    axis=-1,
    keepdims=True,
  )
  per_query = (q_BSGKRH, d_out_BSGKRH, normaliser_BSGKR1, delta_BSGKR1)

  def zeros(shape):
    zero = jnp.zeros(shape, jnp.float32)
    return manual_axes.varying_like(zero, d_out_BSGKRH, q_BSGKRH, *keys)

  def attend(d_keys, part):
    q, d_out, normaliser, delta = (
      _rows(_take(x, part, chunk)) for x in per_query
    )
    own = [_take(x, part, chunk[:1]) for x in keys[2:]]
    d_own = [_take(x, part, chunk[:1]) for x in d_keys[2:]]

    def step(total, k, v, axes, visible, start):
      d_q, d_k, d_v = total
      score = jnp.where(visible, scale * _scores(q, k, axes), MASKED)
      p = jnp.exp(score - normaliser)
      d_score = scale * p * (_scores(d_out, v, axes) - delta)
      d_score = d_score.astype(q.dtype)
      d_q = d_q + _weigh(d_score, k, axes)
      d_k = _add(d_k, _spread(d_score, q, axes), axes, start)
      d_v = _add(d_v, _spread(p.astype(d_out.dtype), d_out, axes), axes, start)
      return d_q, d_k, d_v

    seen = _own_keys_seen(own[3], part, chunk[1], q_BSGKRH.shape[4])
    total = (zeros(q.shape), *d_own)
    d_q, *d_own = _visit(
      step, total, CONTINUATION, own[0], own[1], seen, block_keys
    )
    total = (d_q, *d_keys[:2])
    prefix_length = own[2][..., None]
    d_q, *d_prefix = _visit(
      step, total, PREFIX, keys[0], keys[1], prefix_length, block_keys
    )
    d_own = [_put(x, d, part, chunk) for x, d in zip(d_keys[2:], d_own)]
    return (*d_prefix, *d_own), _unrows(d_q, chunk[1]).astype(q.dtype)

  d_keys = tuple(zeros(x.shape) for x in keys[:4])
  parts = _parts(q_BSGKRH, chunk)
  if len(parts) == 1:
    d_keys, d_q = attend(d_keys, parts[0])
  else:
    d_keys, d_q = jax.lax.scan(attend, d_keys, jnp.asarray(parts))
    d_q = _put_together(d_q, q_BSGKRH.shape)
  gradients = (
    manual_axes.reduce_like(d_x, x).astype(x.dtype)
    for d_x, x in zip((d_q, *d_keys), (q_BSGKRH, *keys[:4]))
  )
  return (*gradients, None, None)


_attention.defvjp(_forward_rule, _backward_rule)


def _visit(step, total, axes, k, v, seen_BSQ, block_keys):
  """Folds `step` over the blocks of keys that some query sees.

  `seen_BSQ` (or [B, S, 1]) counts the visible keys. The last block ends at
  the last key; what it shares with the block before is masked.
  """
  axis = axes.index("x")
  length = k.shape[axis]
  size = min(block_keys, length)
  seen_B1SQ1 = seen_BSQ[:, None, :, :, None]

  def block(i, total):
    start = jnp.minimum(i * size, length - size)
    position = (start + jnp.arange(size))[None, None, None, None]
    visible = (position >= i * size) & (position < seen_B1SQ1)
    k_block, v_block = (
      jax.lax.dynamic_slice_in_dim(x, start, size, axis) for x in (k, v)
    )
    return step(total, k_block, v_block, axes, visible, start)

  if size == length:
    visible = jnp.arange(size)[None, None, None, None] < seen_B1SQ1
    return step(total, k, v, axes, visible, 0)
  count = -(-jnp.minimum(jnp.max(seen_BSQ), length) // size)
  return jax.lax.fori_loop(0, count, block, total)


def _scores(q_BKSQH, k, axes):
  """Every query against every key of a block, [B, K, S, Q, x] float32."""
  return _einsum(f"bksqh,{axes}->bksqx", q_BKSQH, k)


def _weigh(p_BKSQx, v, axes):
  """Probabilities times values, [B, K, S, Q, H] float32."""
  return _einsum(f"bksqx,{axes}->bksqh", p_BKSQx, v)


def _spread(p_BKSQx, q_BKSQH, axes):
  """Transposed: what each key receives, shaped like the keys, float32."""
  return _einsum(f"bksqx,bksqh->{axes}", p_BKSQx, q_BKSQH)


def _einsum(equation, x, y):
  dtype = jnp.result_type(x, y)
  return jnp.einsum(
    equation,
    x.astype(dtype),
    y.astype(dtype),
    preferred_element_type=jnp.float32,
  )


def _own_keys_seen(offset_BS, part, queries, repeats):
  """How many keys of its own continuation each row of scores sees, [B, S,
  Q]."""
  query = part[1] + jnp.arange(queries * repeats) // repeats
  return offset_BS[..., None] + query[None, None] + 1


def _chunk(S, G, rows):
  """(continuations, queries) of one chunk: at most `rows` queries, S first."""
  if rows < G:
    return 1, -(-G // -(-G // rows))
  return max(s for s in range(1, S + 1) if S % s == 0 and s * G <= rows), G


def _parts(q_BSGKRH, chunk):
  """First continuation and first query of every chunk."""
  S, G = q_BSGKRH.shape[1:3]
  return [(s, g) for s in range(0, S, chunk[0]) for g in range(0, G, chunk[1])]


def _take(x, part, chunk):
  """Cuts a chunk out of axis 1 (continuations) and, if sized, axis 2
  (queries)."""
  for axis, (start, size) in enumerate(zip(part, chunk), 1):
    if size != x.shape[axis]:
      x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
  return x


def _put(x, piece, part, chunk):
  if chunk[0] == x.shape[1]:
    return piece
  return jax.lax.dynamic_update_slice_in_dim(x, piece, part[0], 1)


def _add(x, piece, axes, start):
  axis = axes.index("x")
  if x.shape == piece.shape:
    return x + piece
  old = jax.lax.dynamic_slice_in_dim(x, start, piece.shape[axis], axis)
  return jax.lax.dynamic_update_slice_in_dim(x, old + piece, start, axis)


def _rows(x_BSGKRH):
  """[B, K, S, Q, ...]: the queries that share keys, side by side."""
  B, S, G, K, R, H = x_BSGKRH.shape
  return x_BSGKRH.transpose(0, 3, 1, 2, 4, 5).reshape(B, K, S, G * R, H)


def _unrows(x_BKSQH, G):
  B, K, S, Q, H = x_BKSQH.shape
  x_BKSGRH = x_BKSQH.reshape(B, K, S, G, Q // G, H)
  return x_BKSGRH.transpose(0, 2, 3, 1, 4, 5)


def _put_together(x, shape):
  """Chunks [n, B, s, g, ...] back to [B, S, G, ...]."""
  _, B, s, g = x.shape[:4]
  S, G = shape[1:3]
  x = x.reshape(S // s, G // g, B, s, g, *x.shape[4:])
  x = jnp.moveaxis(x, (2, 0, 3, 1), (0, 1, 2, 3))
  return x.reshape(B, S, G, *x.shape[5:])
