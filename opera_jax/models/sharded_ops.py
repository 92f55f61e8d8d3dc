"""Calls the kernels on a mesh, each device on its own shard.

GSPMD cannot partition a Pallas call, and it would all-gather a head that is
sharded over the vocabulary. So on a mesh of several devices each call is a
`jax.shard_map`: rows are sharded over the batch axes, heads and the vocabulary
over the tensor axis. An array axis that its mesh axis does not divide is
replicated. Without a mesh, or on one device, the kernel is called directly.

Shape key: B rows, S continuations, G queries of a continuation, N query heads,
K key/value heads, H head dimension, T prefix tokens, C continuation keys,
D hidden, V vocabulary, L layers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from opera_jax.kernels.shared_prefix_attention import (
  api as shared_prefix_attention_api,
)
from opera_jax.kernels.token_logprob import api as token_logprob_api
from opera_jax.sharding import rules

# Keys of one attention block in decoding. Cache lengths are multiples of it, so
# that a sample's numbers do not depend on the length of the cache.
DECODE_BLOCK = {"cpu": 64, "gpu": 128, "tpu": 128}
# A TPU's kernel reads several of them at once, of at most so many keys.
KEY_BLOCK = shared_prefix_attention_api.KEY_BLOCK


def shared_prefix_attention(
  q_BSGNH: jax.Array,
  prefix_k_BTKH: jax.Array,
  prefix_v_BTKH: jax.Array,
  continuation_k_BSCKH: jax.Array,
  continuation_v_BSCKH: jax.Array,
  prefix_length_BS: jax.Array,
  window: jax.Array | None = None,
  *,
  scale: float,
) -> jax.Array:
  """`kernels.shared_prefix_attention` on the mesh in force, without offsets.

  Arguments, result and errors are those of the kernel.
  """

  def attend(*arrays: jax.Array) -> jax.Array:
    operands, window = arrays[:6], arrays[6:]
    return shared_prefix_attention_api.shared_prefix_attention(
      *operands, scale=scale, window=window[0] if window else None
    )

  arrays = (
    q_BSGNH,
    prefix_k_BTKH,
    prefix_v_BTKH,
    continuation_k_BSCKH,
    continuation_v_BSCKH,
    prefix_length_BS,
    *(() if window is None else (window,)),
  )
  if rules.is_single_device():
    return attend(*arrays)
  batch = rules.activation_axis("batch", q_BSGNH.shape[0])
  heads = rules.activation_axis("heads", prefix_k_BTKH.shape[2])
  query = PartitionSpec(batch, None, None, heads)
  prefix = PartitionSpec(batch, None, heads)
  row = PartitionSpec(batch)
  return jax.shard_map(
    attend,
    in_specs=(
      *(query, prefix, prefix, query, query, row),
      *([PartitionSpec()] * (len(arrays) - 6)),
    ),
    out_specs=query,
  )(*arrays)


def decode_attention(
  q_BSNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  prefix_k_LBKTH: jax.Array,
  prefix_v_LBKTH: jax.Array,
  cache_k_LBSKCH: jax.Array,
  cache_v_LBSKCH: jax.Array,
  prefix_length_B: jax.Array,
  num_generated_BS: jax.Array,
  layer: jax.Array | None,
  window: jax.Array | None = None,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Writes one token of every sample to its cache, then computes attention.

  The write is inside the `shard_map`: GSPMD would all-gather the cache.

  Args:
    q_BSNH: queries of the new tokens.
    k_BSKH: their keys, in the cache's dtype.
    v_BSKH: their values.
    prefix_k_LBKTH: keys of the prompts, all layers.
    prefix_v_LBKTH: their values.
    cache_k_LBSKCH: keys of the samples' own tokens.
    cache_v_LBSKCH: their values.
    prefix_length_B: int32, prefix tokens that the samples of a prompt see.
    num_generated_BS: int32, position of the new token in its cache. With C or
      more nothing is written and the sample's output is undefined.
    layer: int32 scalar; None if the caches are those of one layer, without L.
    window: int32 scalar, how many positions a query sees; None means all.
    scale: multiplies q.k.

  Returns:
    out [B, S, N, H], and the two caches.
  """

  def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    prefix_length: jax.Array,
    num_generated: jax.Array,
    *scalars: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    layer = scalars[: len(stack)]
    B, S = num_generated.shape
    # A slice over the heads would make XLA lay them out beside the features,
    # while the attention kernel reads rows of tokens: it would copy the whole
    # cache in every layer of every step.
    b, s, head = jnp.ogrid[:B, :S, : k.shape[2]]
    where = (*layer, b, s, head, num_generated[..., None])
    cache_k = cache_k.at[where].set(k, mode="drop")
    cache_v = cache_v.at[where].set(v, mode="drop")
    live = num_generated < cache_k.shape[-2]
    out = shared_prefix_attention_api.decode_attention(
      q,
      prefix_k,
      prefix_v,
      cache_k,
      cache_v,
      jnp.where(live, prefix_length[:, None], 0),
      jnp.where(live, num_generated, 0),
      *layer,
      scale=scale,
      window=scalars[-1] if len(scalars) > len(stack) else None,
    )
    return out, cache_k, cache_v

  stack = () if layer is None else (None,)
  arrays = (
    *(q_BSNH, k_BSKH, v_BSKH, prefix_k_LBKTH, prefix_v_LBKTH),
    *(cache_k_LBSKCH, cache_v_LBSKCH, prefix_length_B, num_generated_BS),
    *(() if layer is None else (layer,)),
    *(() if window is None else (window,)),
  )
  if rules.is_single_device():
    return run(*arrays)
  batch = rules.activation_axis("batch", q_BSNH.shape[0])
  heads = rules.activation_axis("heads", k_BSKH.shape[2])
  new = PartitionSpec(batch, None, heads)
  prefix = PartitionSpec(*stack, batch, heads)
  cache = PartitionSpec(*stack, batch, None, heads)
  row = PartitionSpec(batch)
  return jax.shard_map(
    run,
    in_specs=(
      *(new, new, new, prefix, prefix, cache, cache, row, row),
      *([PartitionSpec()] * (len(arrays) - 9)),
    ),
    out_specs=(new, cache, cache),
  )(*arrays)


def token_logprob(
  hidden_BTD: jax.Array,
  head: jax.Array,
  target_BT: jax.Array,
  *,
  temperature: float,
  transposed: bool,
) -> tuple[jax.Array, jax.Array]:
  """`kernels.token_logprob` of [B, T] tokens on the mesh in force.

  Args:
    hidden_BTD: final hidden states.
    head: [D, V], or [V, D] if `transposed`.
    target_BT: int32 token ids.
    temperature: divides the logits.
    transposed: whether the head is [V, D].

  Returns:
    logprob [B, T] and entropy [B, T], float32, in nats.
  """

  def logprob(
    hidden_BTD: jax.Array,
    head: jax.Array,
    target_BT: jax.Array,
    axis_name: Any = None,
  ) -> tuple[jax.Array, jax.Array]:
    B, T, D = hidden_BTD.shape
    logprob_M, entropy_M = token_logprob_api.token_logprob(
      hidden_BTD.reshape(B * T, D),
      head,
      target_BT.reshape(B * T),
      temperature=temperature,
      transposed=transposed,
      axis_name=axis_name,
    )
    return logprob_M.reshape(B, T), entropy_M.reshape(B, T)

  if rules.is_single_device():
    return logprob(hidden_BTD, head, target_BT)
  B, T, _ = hidden_BTD.shape
  rows = PartitionSpec(
    rules.activation_axis("batch", B), rules.activation_axis("length", T)
  )
  vocab = rules.activation_axis("vocab", head.shape[0 if transposed else 1])
  return jax.shard_map(
    functools.partial(logprob, axis_name=vocab),
    in_specs=(
      rows,
      PartitionSpec(vocab, None) if transposed else PartitionSpec(None, vocab),
      rows,
    ),
    out_specs=(rows, rows),
  )(hidden_BTD, head, target_BT)
