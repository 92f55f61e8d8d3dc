"""Shared-prefix attention by online softmax over blocks of keys.

All continuations of a row attend to a block of the prefix in one matmul; blocks
beyond the longest prefix length are skipped. The backward pass recomputes each
block of probabilities from the saved logsumexp. If a row's queries would have
too many scores at once, they are processed in chunks of continuations (and, if
a single continuation is too long, of its queries).

Shape key: B rows, S continuations, G queries of a continuation, N query heads,
K key/value heads, R = N / K query heads per key/value head, Q = G * R,
H head dimension, T prefix length, C continuation length, x keys of one block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp

from opera_jax.kernels import manual_axes

MASKED = -1e30  # finite, so that a block without visible keys gives no NaN
PREFIX = "bxkh"  # axes of the prefix's keys and values
CONTINUATION = "bsxkh"


class _Chunk(NamedTuple):
  """Size of a chunk of queries, or where it starts."""

  continuation: Any
  query: Any


class _Settings(NamedTuple):
  """Static arguments."""

  scale: float
  block_keys: int
  chunk: _Chunk  # its size


class _Keys(NamedTuple):
  """Keys and values, and how many of them are visible."""

  prefix_k: jax.Array  # [B, T, K, H]
  prefix_v: jax.Array
  own_k: jax.Array  # [B, S, C, K, H]
  own_v: jax.Array
  prefix_length: jax.Array  # [B, S]
  offset: jax.Array  # [B, S]
  window: jax.Array | None  # scalar


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
  block_keys: int,
  block_scores: int,
) -> jax.Array:
  """Computes `api.shared_prefix_attention`, which states the arguments."""
  B, S, G, N, H = q_BSGNH.shape
  T, K, _ = prefix_k_BTKH.shape[-3:]
  C = continuation_k_BSCKH.shape[-3]
  block_keys = min(block_keys, max(T, C))
  chunk = _chunk_size(S, G, max(1, block_scores // (N * block_keys)))
  pad = -G % chunk.query
  q_BSGNH = jnp.pad(q_BSGNH, ((0, 0), (0, 0), (0, pad), (0, 0), (0, 0)))
  keys = _Keys(
    prefix_k=prefix_k_BTKH,
    prefix_v=prefix_v_BTKH,
    own_k=continuation_k_BSCKH,
    own_v=continuation_v_BSCKH,
    prefix_length=prefix_length_BS,
    offset=offset_BS,
    window=window,
  )
  out_BSGKRH = _attention(
    _Settings(scale=scale, block_keys=block_keys, chunk=chunk),
    q_BSGNH.reshape(B, S, G + pad, K, N // K, H),
    *keys,
  )
  return out_BSGKRH.reshape(B, S, G + pad, N, H)[:, :, :G]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  settings: _Settings, q_BSGKRH: jax.Array, *keys: Any
) -> jax.Array:
  return _forward_rule(settings, q_BSGKRH, *keys)[0]


def _forward_rule(
  settings: _Settings, q_BSGKRH: jax.Array, *arrays: Any
) -> tuple[jax.Array, Any]:
  scale, block_keys, chunk = settings
  keys = _Keys(*arrays)

  def attend(start: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """Output and logsumexp of the chunk that begins at `start`."""
    q_BKSQH = _heads_first(_slice_chunk(q_BSGKRH, start, chunk))
    own_k, own_v, prefix_length, offset = (
      _slice_chunk(x, start, chunk[:1]) for x in keys[2:6]
    )
    own, prefix = _visible(
      prefix_length, offset, keys.window, start, chunk, q_BSGKRH.shape[4]
    )
    zero = jnp.zeros(q_BKSQH.shape, jnp.float32)
    total: Any = (zero[..., 0] + MASKED, zero[..., 0], zero)
    total = tuple(
      manual_axes.varying_like(x, q_BSGKRH, *keys[:6]) for x in total
    )

    def add_block(
      total: Any, k: jax.Array, v: jax.Array, axes: str, visible: Any, _: Any
    ) -> Any:
      m, l, o = total
      score = jnp.where(visible, scale * _scores(q_BKSQH, k, axes), MASKED)
      m_new = jnp.maximum(m, jnp.max(score, axis=-1))
      p = jnp.exp(score - m_new[..., None])
      keep = jnp.exp(m - m_new)
      o = o * keep[..., None] + _weigh(p.astype(v.dtype), v, axes)
      return m_new, l * keep + jnp.sum(p, axis=-1), o

    total = _fold_blocks(
      add_block,
      total,
      axes=CONTINUATION,
      k=own_k,
      v=own_v,
      visible=own,
      block_keys=block_keys,
    )
    m, l, o = _fold_blocks(
      add_block,
      total,
      axes=PREFIX,
      k=keys.prefix_k,
      v=keys.prefix_v,
      visible=prefix,
      block_keys=block_keys,
    )
    out = (o / l[..., None]).astype(q_BSGKRH.dtype)
    logsumexp = (m + jnp.log(l))[..., None]
    G = chunk.query
    return _undo_heads_first(out, G), _undo_heads_first(logsumexp, G)

  starts = _chunk_starts(q_BSGKRH, chunk)
  if len(starts) == 1:
    out, logsumexp = attend(starts[0])
  else:
    out, logsumexp = (
      _join_chunks(x, q_BSGKRH.shape)
      for x in jax.lax.map(attend, jnp.asarray(starts))
    )
  return out, (q_BSGKRH, *keys, out, logsumexp)


def _backward_rule(
  settings: _Settings, residuals: Any, d_out_BSGKRH: jax.Array
) -> tuple[Any, ...]:
  q_BSGKRH, *arrays, out_BSGKRH, logsumexp_BSGKR1 = residuals
  keys = _Keys(*arrays)
  scale, block_keys, chunk = settings
  delta_BSGKR1 = jnp.sum(
    d_out_BSGKRH.astype(jnp.float32) * out_BSGKRH.astype(jnp.float32),
    axis=-1,
    keepdims=True,
  )
  per_query = (q_BSGKRH, d_out_BSGKRH, logsumexp_BSGKR1, delta_BSGKR1)

  def zeros(shape: tuple[int, ...]) -> jax.Array:
    zero = jnp.zeros(shape, jnp.float32)
    return manual_axes.varying_like(zero, d_out_BSGKRH, q_BSGKRH, *keys[:6])

  def attend(
    d_keys: tuple[jax.Array, ...], start: Any
  ) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Adds a chunk's gradients of keys and values; returns those of queries."""
    d_prefix, d_own = d_keys[:2], d_keys[2:]
    q, d_out, logsumexp, delta = (
      _heads_first(_slice_chunk(x, start, chunk)) for x in per_query
    )
    own_k, own_v, prefix_length, offset = (
      _slice_chunk(x, start, chunk[:1]) for x in keys[2:6]
    )
    own, prefix = _visible(
      prefix_length, offset, keys.window, start, chunk, q_BSGKRH.shape[4]
    )

    def add_block(
      total: Any,
      k: jax.Array,
      v: jax.Array,
      axes: str,
      visible: Any,
      first: Any,
    ) -> Any:
      d_q, d_k, d_v = total
      score = jnp.where(visible, scale * _scores(q, k, axes), MASKED)
      p = jnp.exp(score - logsumexp)
      d_score = scale * p * (_scores(d_out, v, axes) - delta)
      d_score = d_score.astype(q.dtype)
      d_q = d_q + _weigh(d_score, k, axes)
      more_k = _scatter_to_keys(d_score, q, axes)
      more_v = _scatter_to_keys(p.astype(d_out.dtype), d_out, axes)
      d_k = _add_block(d_k, more_k, axes, first)
      d_v = _add_block(d_v, more_v, axes, first)
      return d_q, d_k, d_v

    d_q, *d_chunk = _fold_blocks(
      add_block,
      (zeros(q.shape), *(_slice_chunk(x, start, chunk[:1]) for x in d_own)),
      axes=CONTINUATION,
      k=own_k,
      v=own_v,
      visible=own,
      block_keys=block_keys,
    )
    d_q, *d_prefix = _fold_blocks(
      add_block,
      (d_q, *d_prefix),
      axes=PREFIX,
      k=keys.prefix_k,
      v=keys.prefix_v,
      visible=prefix,
      block_keys=block_keys,
    )
    d_own = tuple(
      _update_chunk(x, new, start, chunk) for x, new in zip(d_own, d_chunk)
    )
    d_q = _undo_heads_first(d_q, chunk.query).astype(q.dtype)
    return (*d_prefix, *d_own), d_q

  d_keys = tuple(zeros(x.shape) for x in keys[:4])
  starts = _chunk_starts(q_BSGKRH, chunk)
  if len(starts) == 1:
    d_keys, d_q = attend(d_keys, starts[0])
  else:
    d_keys, d_q = jax.lax.scan(attend, d_keys, jnp.asarray(starts))
    d_q = _join_chunks(d_q, q_BSGKRH.shape)
  gradients = (
    manual_axes.reduce_like(d_x, x).astype(x.dtype)
    for d_x, x in zip((d_q, *d_keys), (q_BSGKRH, *keys[:4]))
  )
  return (*gradients, None, None, None)


_attention.defvjp(_forward_rule, _backward_rule)


def _fold_blocks(
  add_block: Callable[..., Any],
  total: Any,
  *,
  axes: str,
  k: jax.Array,
  v: jax.Array,
  visible: tuple[jax.Array | None, jax.Array],
  block_keys: int,
) -> Any:
  """Folds `add_block` over the blocks of keys that some query sees.

  The last block ends at the last key; the keys that it shares with the block
  before are masked.

  Args:
    add_block: `(total, k, v, axes, visible, first key of the block) -> total`.
    total: the initial value.
    axes: of k and v, PREFIX or CONTINUATION.
    k: keys.
    v: values.
    visible: the first key that each query sees [B, S, Q], or None for the
      first of all; and the last one + 1, [B, S, Q] or [B, S, 1].
    block_keys: keys of one block.
  """
  axis = axes.index("x")
  length = k.shape[axis]
  size = min(block_keys, length)
  first_BSQ, end_BSQ = visible

  def seen(position: jax.Array) -> jax.Array:
    seen = position < end_BSQ[:, None, :, :, None]
    if first_BSQ is None:
      return seen
    return seen & (position >= first_BSQ[:, None, :, :, None])

  def block(i: jax.Array, total: Any) -> Any:
    first = jnp.minimum(i * size, length - size)
    position = (first + jnp.arange(size))[None, None, None, None]
    mask = (position >= i * size) & seen(position)
    k_block, v_block = (
      jax.lax.dynamic_slice_in_dim(x, first, size, axis) for x in (k, v)
    )
    return add_block(total, k_block, v_block, axes, mask, first)

  if size == length:
    mask = seen(jnp.arange(size)[None, None, None, None])
    return add_block(total, k, v, axes, mask, 0)
  count = -(-jnp.minimum(jnp.max(end_BSQ), length) // size)
  start: Any = 0
  if first_BSQ is not None:
    start = jnp.clip(jnp.min(first_BSQ), 0, length) // size
  return jax.lax.fori_loop(start, count, block, total)


def _scores(q_BKSQH: jax.Array, k: jax.Array, axes: str) -> jax.Array:
  """Every query against every key of a block, [B, K, S, Q, x] float32."""
  return _einsum(f"bksqh,{axes}->bksqx", q_BKSQH, k)


def _weigh(p_BKSQx: jax.Array, v: jax.Array, axes: str) -> jax.Array:
  """Probabilities times values, [B, K, S, Q, H] float32."""
  return _einsum(f"bksqx,{axes}->bksqh", p_BKSQx, v)


def _scatter_to_keys(
  p_BKSQx: jax.Array, q_BKSQH: jax.Array, axes: str
) -> jax.Array:
  """The transpose of `_weigh`: sums over queries, shaped like the keys."""
  return _einsum(f"bksqx,bksqh->{axes}", p_BKSQx, q_BKSQH)


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  dtype = jnp.result_type(x, y)
  return jnp.einsum(
    equation,
    x.astype(dtype),
    y.astype(dtype),
    preferred_element_type=jnp.float32,
  )


def _visible(
  prefix_length_BS: jax.Array,
  offset_BS: jax.Array,
  window: jax.Array | None,
  start: Sequence[Any],
  chunk: _Chunk,
  repeats: int,
) -> tuple[Any, Any]:
  """First and last visible key + 1 of every query of a chunk.

  Returns:
    Those of its own continuation, and those of the prefix; see `_fold_blocks`.
  """
  query_Q = start[1] + jnp.arange(chunk.query * repeats) // repeats
  end_BSQ = offset_BS[..., None] + query_Q[None, None] + 1
  prefix_BS1 = prefix_length_BS[..., None]
  if window is None:
    return (None, end_BSQ), (None, prefix_BS1)
  return (end_BSQ - window, end_BSQ), (
    prefix_BS1 + end_BSQ - window,
    prefix_BS1,
  )


def _chunk_size(S: int, G: int, max_queries: int) -> _Chunk:
  """The largest chunk of at most `max_queries`, of whole continuations if any.

  Args:
    S: continuations.
    G: queries of a continuation.
    max_queries: at least 1.
  """
  if max_queries < G:
    return _Chunk(1, -(-G // -(-G // max_queries)))
  fitting = [s for s in range(1, S + 1) if S % s == 0 and s * G <= max_queries]
  return _Chunk(max(fitting), G)


def _chunk_starts(q_BSGKRH: jax.Array, chunk: _Chunk) -> list[_Chunk]:
  """First continuation and first query of every chunk."""
  S, G = q_BSGKRH.shape[1:3]
  return [
    _Chunk(s, g)
    for s in range(0, S, chunk.continuation)
    for g in range(0, G, chunk.query)
  ]


def _slice_chunk(
  x: jax.Array, start: Sequence[Any], size: Sequence[int]
) -> jax.Array:
  """Slices axis 1 (continuations) and, if `size` has it, axis 2 (queries)."""
  for axis, (first, length) in enumerate(zip(start, size), 1):
    if length != x.shape[axis]:
      x = jax.lax.dynamic_slice_in_dim(x, first, length, axis)
  return x


def _update_chunk(
  x: jax.Array, new: jax.Array, start: Sequence[Any], chunk: _Chunk
) -> jax.Array:
  """Replaces a chunk's continuations."""
  if chunk.continuation == x.shape[1]:
    return new
  return jax.lax.dynamic_update_slice_in_dim(x, new, start[0], 1)


def _add_block(
  x: jax.Array, new: jax.Array, axes: str, first: Any
) -> jax.Array:
  """Adds a block of keys whose first key is `first`."""
  axis = axes.index("x")
  if x.shape == new.shape:
    return x + new
  old = jax.lax.dynamic_slice_in_dim(x, first, new.shape[axis], axis)
  return jax.lax.dynamic_update_slice_in_dim(x, old + new, first, axis)


def _heads_first(x_BSGKRH: jax.Array) -> jax.Array:
  """The queries that share keys side by side, [B, K, S, Q, H]."""
  return einops.rearrange(x_BSGKRH, "B S G K R H -> B K S (G R) H")


def _undo_heads_first(x_BKSQH: jax.Array, G: int) -> jax.Array:
  """Inverse of `_heads_first`, [B, S, G, K, R, H]."""
  return einops.rearrange(x_BKSQH, "B K S (G R) H -> B S G K R H", G=G)


def _join_chunks(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Joins stacked chunks [chunks, B, s, g, ...] to [B, S, G, ...]."""
  s, g = x.shape[2:4]
  return einops.rearrange(
    x,
    "(S_s G_g) B s g ... -> B (S_s s) (G_g g) ...",
    S_s=shape[1] // s,
    G_g=shape[2] // g,
  )
