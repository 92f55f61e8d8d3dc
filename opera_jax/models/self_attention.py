"""Causal attention within segments: one function, three implementations.

Token t of a row attends to the tokens at or before t of its own segment:

  out_t = softmax_{s <= t, segment_s = segment_t}(q_t k_s / sqrt(H)) v_s

With a sliding window of W it attends to those with s > t - W alone.

Padding is segment 0 and attends to padding, so its outputs stay finite. On a
mesh, rows are sharded over the data axes, heads over `tensor` and queries over
`sequence`; keys and values are all-gathered over `sequence`.

Shape key: B rows, T tokens (queries), N query heads, K key/value heads,
H head dimension, C queries of a chunk, X chunks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from opera_jax.kernels import target
from opera_jax.models import sliding_window, windowed_attention
from opera_jax.sharding import rules

IMPLEMENTATIONS = ("splash", "cudnn", "xla")
_LANES = 128
_BLOCKS = (512, 384, 256, _LANES)


def self_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  *,
  window: sliding_window.SlidingWindow | None = None,
  right_padded: bool = False,
  implementation: str | None = None,
) -> jax.Array:
  """Computes attention; differentiable in queries, keys and values.

  The softmax is float32 for all input dtypes. Query head n attends with key
  head n // (N / K).

  Args:
    q_BTNH: [B, T, N, H] floating.
    k_BTKH: [B, T, K, H] floating, N a multiple of K.
    v_BTKH: like the keys.
    segment_BT: [B, T] integer; 0 is padding.
    window: of the layer; None means that it sees the whole segment.
    right_padded: promises that every row is one segment from its first token
      on, then padding.
    implementation: "splash" (JAX's TPU kernel; elsewhere it is interpreted,
      slowly), "cudnn" or "xla". None means "splash" on a TPU and "xla"
      elsewhere.

  Returns:
    [B, T, N, H], in q's dtype.

  Raises:
    ValueError: an unknown implementation.
    NotImplementedError: "cudnn" without `right_padded`, or in float32.
  """
  if implementation is None:
    implementation = "splash" if target.platform() == "tpu" else "xla"
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"Attention has the implementations {IMPLEMENTATIONS}, got "
      f"{implementation!r}. Name one of them in config.model.attention, or "
      "leave it empty to let the device choose."
    )
  arrays = (q_BTNH, k_BTKH, v_BTKH, segment_BT)
  if implementation == "splash":
    out_BTNH = _by_window(_splash, arrays, window)
  elif implementation == "cudnn":
    cudnn = functools.partial(_cudnn, right_padded=right_padded)
    out_BTNH = _by_window(cudnn, arrays, window)
  else:
    out_BTNH = _xla(*arrays, sliding_window.positions(window))
  return checkpoint_name(out_BTNH, windowed_attention.OUTPUT)


def _by_window(
  attend: Callable[..., jax.Array],
  arrays: tuple[jax.Array, ...],
  window: sliding_window.SlidingWindow | None,
) -> jax.Array:
  """Calls a kernel whose mask is compiled: with the window, or without.

  Args:
    attend: takes the arrays and `size`, an int or None.
    arrays: its arguments.
    window: of the layer.
  """
  everything = functools.partial(attend, size=None)
  if window is None:
    return everything(*arrays)
  inside = functools.partial(attend, size=window.size)
  if isinstance(window.slides, bool):
    return (inside if window.slides else everything)(*arrays)
  return jax.lax.cond(window.slides, inside, everything, *arrays)


def _xla(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  sliding: jax.Array | None,
) -> jax.Array:
  """Attention by chunks of queries, so that no [B, N, T, T] array is built.

  Few chunks are unrolled, and each attends only to the keys of its segments
  (`windowed_attention`). Many chunks, or chunks of a sequence that is sharded,
  are scanned over, and each attends to all keys; the backward pass recomputes
  them. In the scan a chunk has every n-th query, so that it covers all shards.
  """
  B, T, N, H = q_BTNH.shape
  if _unrolls(T):
    return windowed_attention.attend(
      q_BTNH, k_BTKH, v_BTKH, segment_BT, sliding
    )
  chunks = -(-T // windowed_attention.CHUNK)
  pad = -T % chunks
  q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
  query_segment_BT = jnp.pad(segment_BT, ((0, 0), (0, pad)))
  q_BCXNH = q_BTNH.reshape(B, -1, chunks, N, H)
  query_segment_BCX = query_segment_BT.reshape(B, -1, chunks)
  offset_C = chunks * jnp.arange(q_BCXNH.shape[1], dtype=jnp.int32)

  @jax.checkpoint
  def chunk(
    _: None, inputs: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[None, jax.Array]:
    start, q_BCNH, query_segment_BC = inputs
    q_BCNH = rules.constrain(q_BCNH, ("batch", "length", "heads", None))
    return None, _attend(
      q_BCNH,
      query_segment_BC,
      position_C=offset_C + start,
      k_BTKH=k_BTKH,
      v_BTKH=v_BTKH,
      segment_BT=segment_BT,
      sliding=sliding,
    )

  _, out_XBCNH = jax.lax.scan(
    chunk,
    None,
    (
      jnp.arange(chunks, dtype=jnp.int32),
      jnp.moveaxis(q_BCXNH, 2, 0),
      jnp.moveaxis(query_segment_BCX, 2, 0),
    ),
  )
  return jnp.moveaxis(out_XBCNH, 0, 2).reshape(B, -1, N, H)[:, :T]


def _unrolls(T: int) -> bool:
  """Whether T queries are few chunks, each on one device."""
  mesh = jax.sharding.get_abstract_mesh()
  unsharded = mesh.empty or mesh.shape[rules.ACTIVATIONS["length"]] == 1
  return unsharded and T <= windowed_attention.CHUNKS * windowed_attention.CHUNK


def _attend(
  q_BCNH: jax.Array,
  query_segment_BC: jax.Array,
  position_C: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  sliding: jax.Array | None,
) -> jax.Array:
  """Attention of one chunk of queries to all keys of their rows, [B, C, N, H].

  Args:
    q_BCNH: queries of the chunk.
    query_segment_BC: their segments.
    position_C: their positions in the row.
    k_BTKH: all keys.
    v_BTKH: all values.
    segment_BT: segments of the keys.
    sliding: int32 scalar, how many positions a query sees; None means all.
  """
  B, C, N, H = q_BCNH.shape
  T, K = k_BTKH.shape[1:3]
  key_T = jnp.arange(T, dtype=jnp.int32)
  seen_CT = key_T[None] <= position_C[:, None]
  if sliding is not None:
    seen_CT &= key_T[None] > position_C[:, None] - sliding
  mask_BCT = seen_CT[None] & (
    query_segment_BC[:, :, None] == segment_BT[:, None]
  )
  # Heads first, so that each head is two plain matmuls.
  q_BKCH = q_BCNH.reshape(B, C, K, N // K, H).transpose(0, 2, 3, 1, 4)
  q_BKCH = q_BKCH.reshape(B, K, -1, H)
  score_BKCT = jnp.matmul(
    q_BKCH,
    k_BTKH.transpose(0, 2, 3, 1),
    preferred_element_type=jnp.float32,
  ).reshape(B, N, C, T)
  weight_BNCT = jax.nn.softmax(
    score_BKCT * H**-0.5, axis=-1, where=mask_BCT[:, None]
  )
  out_BKCH = jnp.matmul(
    weight_BNCT.reshape(B, K, -1, T).astype(v_BTKH.dtype),
    v_BTKH.transpose(0, 2, 1, 3),
  )
  out_BCNH = out_BKCH.reshape(B, N, C, H).transpose(0, 2, 1, 3)
  return out_BCNH.astype(q_BCNH.dtype)


def _cudnn(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  size: int | None,
  *,
  right_padded: bool,
) -> jax.Array:
  if not right_padded:
    raise NotImplementedError(
      "cuDNN attention takes lengths, not segments: rows that are packed or "
      "padded on the left would attend across segments. Use "
      "config.model.attention='xla' for packed rows."
    )
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f"cuDNN attention computes in half precision, got {q_BTNH.dtype}. Set "
      "config.model.dtype='bfloat16', or config.model.attention='xla'."
    )
  length_B = jnp.maximum(jnp.sum(segment_BT > 0, axis=1, dtype=jnp.int32), 1)
  return jax.nn.dot_product_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    is_causal=True,
    query_seq_lengths=length_B,
    key_value_seq_lengths=length_B,
    local_window_size=None if size is None else (size - 1, 0),
    implementation="cudnn",
  )


def _splash(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  size: int | None,
) -> jax.Array:
  """JAX's splash attention kernel; each device runs its rows and heads."""
  B, T, N, H = q_BTNH.shape
  shards = head_shards = 1
  if not rules.is_single_device():
    mesh = jax.sharding.get_abstract_mesh()
    rows = rules.activation_axis("batch", B)
    heads = rules.activation_axis("heads", k_BTKH.shape[2])
    sequence = rules.ACTIVATIONS["length"]
    shards = mesh.shape[sequence]
    head_shards = mesh.shape[heads] if heads else 1
  block, length = _blocks(-(-T // shards))
  pad = length * shards - T
  padding = ((0, 0), (0, pad), (0, 0), (0, -H % _LANES))
  q_BTNH, k_BTKH, v_BTKH = (
    jnp.pad(x, padding) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH)
  )
  segment_BT = jnp.pad(segment_BT, ((0, 0), (0, pad)))
  mask: Any = splash.CausalMask((T + pad, T + pad))
  if size is not None:
    mask = splash.LocalMask((T + pad, T + pad), (size - 1, 0), offset=0)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * (N // head_shards)),
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=shards,
    residual_checkpoint_name=windowed_attention.OUTPUT,
    interpret=target.platform() != "tpu",
  )

  def run(
    kernel: Any,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    query_segment_BT: jax.Array,
    segment_BT: jax.Array,
  ) -> jax.Array:
    q_BNTH, k_BKTH, v_BKTH = (
      jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    out_BNTH = jax.vmap(kernel)(
      q_BNTH,
      k_BKTH,
      v_BKTH,
      splash.SegmentIds(q=query_segment_BT, kv=segment_BT),
    )
    return jnp.swapaxes(out_BNTH, 1, 2)

  if not rules.is_single_device():
    mask_sharding = jax.sharding.NamedSharding(
      mesh, PartitionSpec(None, sequence)
    )
    keys = PartitionSpec(rows, None, heads)
    queries = PartitionSpec(rows, sequence, heads)
    run = jax.shard_map(
      run,
      in_specs=(
        kernel.manual_sharding_spec(mask_sharding),
        queries,
        keys,
        keys,
        PartitionSpec(rows, sequence),
        PartitionSpec(rows),
      ),
      out_specs=queries,
      check_vma=False,  # the kernel does not annotate what varies
    )
  out_BTNH = run(kernel, q_BTNH, k_BTKH, v_BTKH, segment_BT, segment_BT)
  return out_BTNH[:, :T, :, :H]


def _blocks(length: int) -> tuple[int, int]:
  """The largest block that adds at most an eighth of padding.

  Returns:
    The block, and `length` padded to whole blocks.
  """
  least = length + -length % _LANES
  fitting = [b for b in _BLOCKS if 8 * (length + -length % b) <= 9 * least]
  return fitting[0], length + -length % fitting[0]
