"""Causal attention within segments in plain XLA, by chunks of queries.

Each chunk of queries attends to a window of keys that starts where the chunk's
first segment starts. The window's length is known only at run time: a few
lengths are compiled, and `lax.switch` takes the shortest that is long enough.
The backward pass recomputes the probabilities, so only queries, keys, values
and outputs are saved.

A CPU is limited by memory traffic, so it processes one row at a time, whose
scores stay in the CPU's caches.

Shape key: b rows at once, T tokens (queries), N query heads, K key/value heads,
R = N / K query heads per key head, H head dimension, C queries of a chunk,
W keys of its window.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from opera_jax.kernels import target, tiles
from opera_jax.sharding import rules

# Name of the output, which the remat policy "attention" saves.
OUTPUT = "attention"
CHUNK = 512  # queries of the longest chunk
CHUNKS = 8  # at most so many chunks are unrolled
_MIN_CHUNK = 128


@jax.custom_vjp
def attend(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  sliding: jax.Array | None = None,
) -> jax.Array:
  """Computes `self_attention.self_attention`, which states the shapes.

  Args:
    q_BTNH: queries.
    k_BTKH: keys.
    v_BTKH: values.
    segment_BT: segments.
    sliding: int32 scalar, how many positions a query sees; None means all.
  """
  return _forward_rule(q_BTNH, k_BTKH, v_BTKH, segment_BT, sliding)[0]


def _forward_rule(*inputs: Any) -> tuple[jax.Array, Any]:
  *arrays, sliding = inputs
  out_BTNH = _map_rows(
    functools.partial(_forward, sliding=sliding), tuple(arrays)
  )
  # Saving it avoids recomputing attention in the backward pass.
  out_BTNH = checkpoint_name(out_BTNH, OUTPUT)
  return out_BTNH, (*arrays, sliding, out_BTNH)


def _backward_rule(residuals: Any, d_out_BTNH: jax.Array) -> tuple[Any, ...]:
  *arrays, sliding, out_BTNH = residuals
  backward = functools.partial(_backward, sliding=sliding)
  return (*_map_rows(backward, (*arrays, out_BTNH, d_out_BTNH)), None, None)


attend.defvjp(_forward_rule, _backward_rule)


def _map_rows(
  function: Callable[..., Any], arrays: tuple[jax.Array, ...]
) -> Any:
  """Applies `function` to one row after the other on a CPU, else to all."""
  if target.platform() != "cpu" or not rules.is_single_device():
    return function(*arrays)
  rows = jax.lax.map(
    lambda row: function(*(x[None] for x in row)), tuple(arrays)
  )
  return jax.tree.map(lambda x: x[:, 0], rows)


def _forward(
  q_bTNH: jax.Array,
  k_bTKH: jax.Array,
  v_bTKH: jax.Array,
  segment_bT: jax.Array,
  *,
  sliding: jax.Array | None,
) -> jax.Array:
  K, H = k_bTKH.shape[2:]
  q_bKRTH = tiles.grouped(q_bTNH, K)
  k_bKTH, v_bKTH = jnp.swapaxes(k_bTKH, 1, 2), jnp.swapaxes(v_bTKH, 1, 2)
  outs = []
  for start, end, windows, chosen in _chunks(segment_bT, sliding):

    def run(window: int, start: int = start, end: int = end) -> jax.Array:
      keys = slice(end - window, end)
      return tiles.forward(
        q_bKRTH[:, :, :, start:end],
        k_bKTH[:, :, keys],
        v_bKTH[:, :, keys],
        bias=_bias(segment_bT, start, end, window, sliding),
        scale=H**-0.5,
      )

    outs.append(_switch(chosen, windows, run))
  out_bKRTH = jnp.concatenate(outs, axis=3).astype(q_bTNH.dtype)
  return tiles.ungrouped(out_bKRTH)


def _backward(
  q_bTNH: jax.Array,
  k_bTKH: jax.Array,
  v_bTKH: jax.Array,
  segment_bT: jax.Array,
  out_bTNH: jax.Array,
  d_out_bTNH: jax.Array,
  *,
  sliding: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  K, H = k_bTKH.shape[2:]
  per_query: Any = (q_bTNH, d_out_bTNH, tiles.delta(d_out_bTNH, out_bTNH))
  per_query = [tiles.grouped(x, K) for x in per_query]
  k_bKTH, v_bKTH = jnp.swapaxes(k_bTKH, 1, 2), jnp.swapaxes(v_bTKH, 1, 2)
  shape = (*k_bKTH.shape[:2], H, k_bKTH.shape[2])
  d_keys = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
  d_qs = []
  for start, end, windows, chosen in _chunks(segment_bT, sliding):

    def run(
      window: int,
      d_k_bKHT: jax.Array,
      d_v_bKHT: jax.Array,
      start: int = start,
      end: int = end,
    ) -> tuple[jax.Array, ...]:
      keys = slice(end - window, end)
      q, d_out, delta = (x[:, :, :, start:end] for x in per_query)
      d_q, d_k, d_v = tiles.backward(
        q,
        k_bKTH[:, :, keys],
        v_bKTH[:, :, keys],
        bias=_bias(segment_bT, start, end, window, sliding),
        d_out_bKRCH=d_out,
        delta_bKRC1=delta,
        scale=H**-0.5,
      )
      return (
        d_q,
        d_k_bKHT.at[..., keys].add(d_k),
        d_v_bKHT.at[..., keys].add(d_v),
      )

    d_q, *d_keys = _switch(chosen, windows, run, *d_keys)
    d_qs.append(d_q)
  d_q_bKRTH = jnp.concatenate(d_qs, axis=3).astype(q_bTNH.dtype)
  d_k_bTKH, d_v_bTKH = (
    jnp.moveaxis(d, 3, 1).astype(x.dtype)
    for d, x in zip(d_keys, (k_bTKH, v_bTKH))
  )
  return tiles.ungrouped(d_q_bKRTH), d_k_bTKH, d_v_bTKH


def _chunks(
  segment_bT: jax.Array, sliding: jax.Array | None
) -> Iterator[tuple[int, int, list[int], jax.Array]]:
  """Cuts the queries into chunks.

  Yields:
    First query, last query + 1, the window lengths that are compiled, and the
    index of the one to take (int32 scalar, known at run time).
  """
  T = segment_bT.shape[1]
  size = min(max(_MIN_CHUNK, -(-T // CHUNKS)), CHUNK)
  for start in range(0, T, size):
    end = min(start + size, T)
    same_bCW = segment_bT[:, start:end, None] == segment_bT[:, None, :end]
    needed = end - jnp.argmax(same_bCW.any((0, 1)))
    if sliding is not None:
      needed = jnp.minimum(needed, end - start + sliding - 1)
    shorter = (size * 2**power for power in range(1, CHUNKS.bit_length()))
    windows = [w for w in shorter if w < end] + [end]
    chosen = sum((needed > w).astype(jnp.int32) for w in windows[:-1])
    yield start, end, windows, chosen


def _switch(
  chosen: jax.Array,
  windows: list[int],
  run: Callable[..., Any],
  *operands: jax.Array,
) -> Any:
  """Calls `run(windows[chosen], *operands)`."""
  if len(windows) == 1:
    return run(windows[0], *operands)
  branches = [functools.partial(run, window) for window in windows]
  return jax.lax.switch(chosen, branches, *operands)


def _bias(
  segment_bT: jax.Array,
  start: int,
  end: int,
  window: int,
  sliding: jax.Array | None,
) -> jax.Array:
  """The additive mask, [b, 1, 1, C, W]."""
  query_C = jnp.arange(start, end)
  key_W = jnp.arange(end - window, end)
  same_bCW = (
    segment_bT[:, start:end, None] == segment_bT[:, None, end - window : end]
  )
  seen_CW = key_W[None] <= query_C[:, None]
  if sliding is not None:
    seen_CW &= key_W[None] > query_C[:, None] - sliding
  seen_bCW = same_bCW & seen_CW[None]
  return tiles.bias(seen_bCW)[:, None, None]
