"""Causal attention within segments in plain XLA, no score kept for long.

Chunks of queries each meet the keys from their own segments' start on; how
many those are is known when it runs: of a few window lengths, all compiled,
the shortest is taken that holds them. The backward pass makes the
probabilities anew, so that queries, keys, values and outputs are all that is
kept.

On a CPU what costs is memory traffic, so rows go one after the other, whose
scores stay in its caches. A chunk's softmax is written to fuse with the
product before it: nothing but the probabilities leaves it, and what masks is
added.

Shape key: b rows at once, T tokens (queries), N query heads, K key/value heads,
R = N / K query heads a key head, H head dimension, C queries of a chunk,
W keys of its window.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import target
from opera_jax.sharding import rules

# What the remat policy "attention" keeps.
OUTPUT = "attention"
# The longest chunk; as many of them still go without a loop.
CHUNK = 512
CHUNKS = 8
_SMALLEST = 128
MASKED = -1e30  # finite: a query whose window holds no key gives no NaN


@jax.custom_vjp
def attend(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_BT: jax.Array
) -> jax.Array:
  """Computes `self_attention.self_attention`, which states the shapes."""
  return _forward_rule(q_BTNH, k_BTKH, v_BTKH, segment_BT)[0]


def _forward_rule(*arrays):
  out_BTNH = _by_rows(_forward, arrays)
  # Named here, so that to keep it is to run no attention a second time.
  out_BTNH = checkpoint_name(out_BTNH, OUTPUT)
  return out_BTNH, (*arrays, out_BTNH)


def _backward_rule(saved, d_out_BTNH):
  return (*_by_rows(_backward, (*saved, d_out_BTNH)), None)


attend.defvjp(_forward_rule, _backward_rule)


def _by_rows(function, arrays):
  """One row after the other on a CPU, else all at once."""
  if target.platform() != "cpu" or not rules.alone():
    return function(*arrays)
  rows = jax.lax.map(
    lambda row: function(*(x[None] for x in row)), tuple(arrays)
  )
  return jax.tree.map(lambda x: x[:, 0], rows)


def _forward(q_bTNH, k_bTKH, v_bTKH, segment_bT):
  K = k_bTKH.shape[2]
  q_bKRTH, k_bKTH, v_bKTH = _grouped(q_bTNH, K), _led(k_bTKH), _led(v_bTKH)
  outs = []
  for start, end, windows, chosen in _chunks(segment_bT):

    def run(window, start=start, end=end):
      keys = slice(end - window, end)
      p, total = _probabilities(
        q_bKRTH[:, :, :, start:end],
        k_bKTH[:, :, keys],
        _bias(segment_bT, start, end, window),
      )
      return _weigh(p.astype(v_bKTH.dtype), v_bKTH[:, :, keys]) / total

    outs.append(_switch(chosen, windows, run))
  out_bKRTH = jnp.concatenate(outs, axis=3).astype(q_bTNH.dtype)
  return _ungrouped(out_bKRTH)


def _backward(q_bTNH, k_bTKH, v_bTKH, segment_bT, out_bTNH, d_out_bTNH):
  K, H = k_bTKH.shape[2:]
  q_bKRTH, k_bKTH, v_bKTH = _grouped(q_bTNH, K), _led(k_bTKH), _led(v_bTKH)
  d_out_bKRTH = _grouped(d_out_bTNH, K)
  delta_bTN1 = jnp.sum(
    d_out_bTNH.astype(jnp.float32) * out_bTNH.astype(jnp.float32),
    axis=-1,
    keepdims=True,
  )
  delta_bKRT1 = _grouped(delta_bTN1, K)
  shape = (*k_bKTH.shape[:2], H, k_bKTH.shape[2])
  d_keys = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
  d_qs = []
  for start, end, windows, chosen in _chunks(segment_bT):

    def run(window, d_k_bKHT, d_v_bKHT, start=start, end=end):
      keys, queries = slice(end - window, end), slice(start, end)
      q, d_out = (x[:, :, :, queries] for x in (q_bKRTH, d_out_bKRTH))
      k, v = k_bKTH[:, :, keys], v_bKTH[:, :, keys]
      p, total = _probabilities(q, k, _bias(segment_bT, start, end, window))
      p = p / total
      slope = _scores(d_out, v) - delta_bKRT1[:, :, :, queries]
      d_score = (p * slope * H**-0.5).astype(q.dtype)
      p = p.astype(d_out.dtype)
      return (
        _weigh(d_score, k),
        d_k_bKHT.at[..., keys].add(_received(q, d_score)),
        d_v_bKHT.at[..., keys].add(_received(d_out, p)),
      )

    d_q, *d_keys = _switch(chosen, windows, run, *d_keys)
    d_qs.append(d_q)
  d_q_bKRTH = jnp.concatenate(d_qs, axis=3).astype(q_bTNH.dtype)
  d_k_bTKH, d_v_bTKH = (
    jnp.moveaxis(d, 3, 1).astype(x.dtype)
    for d, x in zip(d_keys, (k_bTKH, v_bTKH))
  )
  return _ungrouped(d_q_bKRTH), d_k_bTKH, d_v_bTKH


def _chunks(segment_bT):
  """(first query, last + 1, window lengths, which of them) of every chunk."""
  T = segment_bT.shape[1]
  size = min(max(_SMALLEST, -(-T // CHUNKS)), CHUNK)
  for start in range(0, T, size):
    end = min(start + size, T)
    same_bCW = segment_bT[:, start:end, None] == segment_bT[:, None, :end]
    needed = end - jnp.argmax(same_bCW.any((0, 1)))
    shorter = (size * 2**power for power in range(1, CHUNKS.bit_length()))
    windows = [w for w in shorter if w < end] + [end]
    chosen = sum((needed > w).astype(jnp.int32) for w in windows[:-1])
    yield start, end, windows, chosen


def _switch(chosen, windows, run, *operands):
  if len(windows) == 1:
    return run(windows[0], *operands)
  branches = [lambda *x, w=window: run(w, *x) for window in windows]
  return jax.lax.switch(chosen, branches, *operands)


def _bias(segment_bT, start, end, window):
  """0 where a query sees a key, else MASKED, [b, 1, 1, C, W]."""
  query_C = jnp.arange(start, end)
  key_W = jnp.arange(end - window, end)
  same_bCW = (
    segment_bT[:, start:end, None] == segment_bT[:, None, end - window : end]
  )
  seen_bCW = same_bCW & (key_W[None] <= query_C[:, None])[None]
  return jnp.where(seen_bCW, 0.0, MASKED)[:, None, None]


def _probabilities(q_bKRCH, k_bKWH, bias_b11CW):
  """exp(score - its maximum) [b, K, R, C, W], and its sums [b, K, R, C, 1]."""
  score = _scores(q_bKRCH, k_bKWH) * q_bKRCH.shape[-1] ** -0.5 + bias_b11CW
  p = jnp.exp(score - jnp.max(score, axis=-1, keepdims=True))
  return p, jnp.sum(p, axis=-1, keepdims=True)


def _scores(q_bKRCH, k_bKWH):
  return _product(q_bKRCH, k_bKWH, (4,), (3,))


def _weigh(p_bKRCW, v_bKWH):
  return _product(p_bKRCW, v_bKWH, (4,), (2,))


def _received(q_bKRCH, p_bKRCW):
  """What each key gets, [b, K, H, W]: the large factor lies as it is."""
  return _product(q_bKRCH, p_bKRCW, (2, 3), (2, 3))


def _product(x, y, x_axes, y_axes):
  """Batched over b and K."""
  return jax.lax.dot_general(
    x,
    y,
    ((x_axes, y_axes), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )


def _grouped(x_bTNH, K):
  b, T, N, H = x_bTNH.shape
  return x_bTNH.reshape(b, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _ungrouped(x_bKRTH):
  b, K, R, T, H = x_bKRTH.shape
  return x_bKRTH.transpose(0, 3, 1, 2, 4).reshape(b, T, K * R, H)


def _led(x_bTKH):
  return jnp.swapaxes(x_bTKH, 1, 2)
