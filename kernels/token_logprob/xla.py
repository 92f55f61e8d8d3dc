"""Token log-probability and entropy, streamed over tokens and vocabulary.

Per token four running numbers are enough, and two tiles' numbers merge:

  m = max_v l_v             s = sum_v exp(l_v - m)
  w = sum_v exp(l_v - m) (l_v - m)          t = l_target
  log p = t - m - log s     entropy = log s - w / s

The backward pass forms each tile of logits again. With p = exp(l - logsumexp),

  d l_v = d_logprob (1[v = target] - p_v) - d_entropy p_v (log p_v + entropy)

Block j of n holds the tokens j, j + n, j + 2n, ...: where the tokens are
sharded in contiguous runs, every block then has its share on every device.

Shape key: M tokens, D features, V vocabulary, n blocks of b tokens, v columns
of one vocabulary tile.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import manual_axes


def token_logprob(
  hidden_MD: jax.Array,
  head: jax.Array,
  target_M: jax.Array,
  *,
  temperature: float,
  transposed: bool,
  axis_name: str | None,
  block_tokens: int,
  block_vocab: int,
) -> tuple[jax.Array, jax.Array]:
  """Streams `api.token_logprob`; the largest array is a tile of logits."""
  settings = (temperature, transposed, axis_name, block_tokens, block_vocab)
  return _token_logprob(settings, hidden_MD, head, target_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprob(settings, hidden_MD, head, target_M):
  return _forward(settings, hidden_MD, head, target_M)[0]


def _forward(settings, hidden_MD, head, target_M):
  temperature, transposed, axis_name, block_tokens, block_vocab = settings
  target_M = local_target(target_M, head, transposed, axis_name)
  hidden_bnD, target_bn = split(block_tokens, hidden_MD, target_M)

  def block(j):
    hidden_bD = hidden_bnD[:, j]
    target_b = target_bn[:, j]

    def tile(start, size):
      logit_bv = _logits(hidden_bD, head, start, size, temperature, transposed)
      return tile_statistics(logit_bv, target_b - start)

    return _over_tiles(tile, merge, _columns(head, transposed), block_vocab)

  statistics = jax.lax.map(block, jnp.arange(hidden_bnD.shape[1]))
  m, s, w, t = (join(x_nb, target_M.shape[0]) for x_nb in statistics)
  outputs, normaliser_M = finish(m, s, w, t, axis_name)
  return outputs, normaliser_M


def _forward_rule(settings, hidden_MD, head, target_M):
  outputs, normaliser_M = _forward(settings, hidden_MD, head, target_M)
  return outputs, (hidden_MD, head, target_M, normaliser_M, outputs[1])


def _backward_rule(settings, residuals, cotangents):
  temperature, transposed, axis_name, block_tokens, block_vocab = settings
  hidden_MD, head, target_M, normaliser_M, entropy_M = residuals
  M, D = hidden_MD.shape
  local_M = local_target(target_M, head, transposed, axis_name)
  hidden_bnD, *per_token_bn = split(
    block_tokens, hidden_MD, local_M, normaliser_M, entropy_M, *cotangents
  )
  dtype = jnp.result_type(hidden_MD, head)
  b, n, _ = hidden_bnD.shape

  def tile(start, size):
    head_tile = _slice(head, start, size, transposed).astype(dtype)

    def block(d_head, j):
      hidden_bD = hidden_bnD[:, j].astype(dtype)
      target_b, *rest_b = (x_bn[:, j] for x_bn in per_token_bn)
      logit_bv = _product(hidden_bD, head_tile, transposed) / temperature
      d_logit_bv = logit_cotangent(logit_bv, target_b - start, *rest_b)
      d_logit_bv = (d_logit_bv / temperature).astype(dtype)
      d_hidden_bD = _product(d_logit_bv, head_tile, not transposed)
      if transposed:
        d_head = d_head + _contract_tokens(d_logit_bv, hidden_bD)
      else:
        d_head = d_head + _contract_tokens(hidden_bD, d_logit_bv)
      return d_head, d_hidden_bD

    shape = (size, D) if transposed else (D, size)
    zero = manual_axes.varying_like(
      jnp.zeros(shape, jnp.float32), hidden_MD, head, target_M, *cotangents
    )
    d_head, d_hidden_nbD = jax.lax.scan(block, zero, jnp.arange(n))
    return d_head.astype(head.dtype), d_hidden_nbD

  V = _columns(head, transposed)
  axis = 0 if transposed else 1
  if block_vocab >= V:
    d_head, d_hidden_nbD = tile(0, V)
  else:

    def whole_tile(total_nbD, i):
      d_head_tile, d_hidden_nbD = tile(i * block_vocab, block_vocab)
      return total_nbD + d_hidden_nbD, d_head_tile

    whole = V // block_vocab
    zero = jnp.zeros((n, b, D), jnp.float32)
    zero = manual_axes.varying_like(
      zero, hidden_MD, head, target_M, *cotangents
    )
    d_hidden_nbD, tiles = jax.lax.scan(whole_tile, zero, jnp.arange(whole))
    tiles = jnp.moveaxis(tiles, 0, axis)
    pieces = [
      tiles.reshape((-1, D) if transposed else (D, -1)),
    ]
    if V % block_vocab:
      start = whole * block_vocab
      d_head_tile, last_nbD = tile(start, V - start)
      d_hidden_nbD = d_hidden_nbD + last_nbD
      pieces.append(d_head_tile)
    d_head = jnp.concatenate(pieces, axis=axis)

  d_hidden_MD = join(d_hidden_nbD, M)
  return (
    manual_axes.reduce_like(d_hidden_MD, hidden_MD).astype(hidden_MD.dtype),
    manual_axes.reduce_like(d_head, head),
    None,
  )


_token_logprob.defvjp(_forward_rule, _backward_rule)


def tile_statistics(logit_bv, target_b):
  """m, s, w, t of one tile; a target outside of it contributes nothing."""
  m_b = jnp.max(logit_bv, axis=-1)
  shifted_bv = logit_bv - m_b[:, None]
  e_bv = jnp.exp(shifted_bv)
  hit_bv = jnp.arange(logit_bv.shape[1])[None] == target_b[:, None]
  return (
    m_b,
    jnp.sum(e_bv, axis=-1),
    jnp.sum(e_bv * shifted_bv, axis=-1),
    jnp.sum(jnp.where(hit_bv, logit_bv, 0.0), axis=-1),
  )


def merge(one, two):
  """The statistics of two disjoint sets of columns as one."""
  m = jnp.maximum(one[0], two[0])
  s, w = 0.0, 0.0
  for m_i, s_i, w_i, _ in (one, two):
    scale = jnp.exp(m_i - m)
    s = s + scale * s_i
    w = w + scale * (w_i + (m_i - m) * s_i)
  return m, s, w, one[3] + two[3]


def finish(m, s, w, t, axis_name):
  """((log-probability, entropy), logsumexp) from all columns' statistics."""
  if axis_name is not None:
    top = jax.lax.pmax(jax.lax.stop_gradient(m), axis_name)
    scale = jnp.exp(m - top)
    w = jax.lax.psum(scale * (w + (m - top) * s), axis_name)
    s = jax.lax.psum(scale * s, axis_name)
    t = jax.lax.psum(t, axis_name)
    m = top
  log_s = jnp.log(s)
  return (t - m - log_s, log_s - w / s), m + log_s


def logit_cotangent(
  logit_bv, target_b, normaliser_b, entropy_b, d_logprob_b, d_entropy_b
):
  """The equation of the module's head."""
  log_p_bv = logit_bv - normaliser_b[:, None]
  hit_bv = jnp.arange(logit_bv.shape[1])[None] == target_b[:, None]
  slope_bv = d_logprob_b[:, None] + d_entropy_b[:, None] * (
    log_p_bv + entropy_b[:, None]
  )
  on_target_bv = jnp.where(hit_bv, d_logprob_b[:, None], 0.0)
  return on_target_bv - jnp.exp(log_p_bv) * slope_bv


def local_target(target_M, head, transposed, axis_name):
  """Targets counted from the first column that this device holds."""
  if axis_name is None:
    return target_M
  return target_M - jax.lax.axis_index(axis_name) * _columns(head, transposed)


def split(block_tokens, *arrays):
  """Cuts [M, ...] into interleaved blocks [b, n, ...], padded by zeros."""
  M = arrays[0].shape[0]
  n = -(-M // block_tokens)
  b = -(-M // n)
  pad = b * n - M
  return tuple(
    jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(b, n, *x.shape[1:])
    for x in arrays
  )


def join(x_nb, M):
  """Undoes `split` for what a loop over the blocks has stacked."""
  x_bn = jnp.swapaxes(x_nb, 0, 1)
  return x_bn.reshape(-1, *x_nb.shape[2:])[:M]


def _over_tiles(tile, merge_two, V, block_vocab):
  """Whole tiles in a loop, then the ragged last one."""
  total = tile(0, min(V, block_vocab))
  whole = V // block_vocab
  if whole > 1:
    total = jax.lax.fori_loop(
      1,
      whole,
      lambda i, so_far: merge_two(so_far, tile(i * block_vocab, block_vocab)),
      total,
    )
  if whole and V % block_vocab:
    start = whole * block_vocab
    total = merge_two(total, tile(start, V - start))
  return total


def _logits(hidden_bD, head, start, size, temperature, transposed):
  head_tile = _slice(head, start, size, transposed)
  return _product(hidden_bD, head_tile, transposed) / temperature


def _product(x_bK, y, transposed):
  """x @ y, or x @ y.T where y is transposed, accumulated in float32."""
  dtype = jnp.result_type(x_bK, y)
  return jax.lax.dot_general(
    x_bK.astype(dtype),
    y.astype(dtype),
    (((1,), (1 if transposed else 0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _contract_tokens(x_bK, y_bL):
  """x.T @ y, accumulated in float32."""
  return jax.lax.dot_general(
    x_bK, y_bL, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )


def _slice(head, start, size, transposed):
  axis = 0 if transposed else 1
  if size == head.shape[axis]:
    return head
  return jax.lax.dynamic_slice_in_dim(head, start, size, axis)


def _columns(head, transposed):
  return head.shape[0 if transposed else 1]
