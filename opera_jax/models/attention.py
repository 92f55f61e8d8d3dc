"""Which tokens attend to which: the `attend` arguments of the model.

Each function here returns
`attend(cache, layer, q, k, v, window=None) -> (out, cache)`, whose window is a
`sliding_window.SlidingWindow` or None.

Shape key: B rows (when decoding, prompt slots), T prefix tokens,
S continuations of a row (when decoding, slots of a prompt), G tokens of a
continuation, M compacted active slots, N query heads, K key/value heads,
H head dimension.
"""

from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.models import (
  compaction,
  decoder,
  kv_cache,
  self_attention,
  sharded_ops,
  sliding_window,
)


def causal(
  segment_BT: jax.Array,
  *,
  right_padded: bool = False,
  implementation: str | None = None,
) -> decoder.Attend:
  """Causal attention within segments; see `self_attention` for both options."""

  def attend(
    cache: Any,
    layer: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: sliding_window.SlidingWindow | None = None,
  ) -> tuple[jax.Array, Any]:
    del layer
    out_BTNH = self_attention.self_attention(
      q,
      k,
      v,
      segment_BT,
      window=window,
      right_padded=right_padded,
      implementation=implementation,
    )
    return out_BTNH, cache

  return attend


def prefix_and_continuations(
  prefix_segment_BT: jax.Array,
  prefix_length_BS: jax.Array,
  continuation_tokens: int,
  *,
  implementation: str | None = None,
) -> decoder.Attend:
  """A prefix of T tokens followed, on the token axis, by S continuations of G.

  The prefix is causal; each row of it is one segment, then padding.
  Continuation s of row b attends to prefix positions below
  `prefix_length[b, s]` and causally to its own tokens. No other token attends
  to a continuation.
  """
  B, T = prefix_segment_BT.shape
  S, G = prefix_length_BS.shape[1], continuation_tokens
  attend_prefix = causal(
    prefix_segment_BT, right_padded=True, implementation=implementation
  )

  def attend(
    cache: Any,
    layer: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: sliding_window.SlidingWindow | None = None,
  ) -> tuple[jax.Array, Any]:
    out_BTNH, cache = attend_prefix(
      cache, layer, q[:, :T], k[:, :T], v[:, :T], window
    )

    def continuations(x: jax.Array) -> jax.Array:
      return x[:, T:].reshape(B, S, G, *x.shape[2:])

    out_BSGNH = sharded_ops.shared_prefix_attention(
      continuations(q),
      k[:, :T],
      v[:, :T],
      continuations(k),
      continuations(v),
      prefix_length_BS,
      sliding_window.positions(window),
      scale=q.shape[-1] ** -0.5,
    )
    out = out_BSGNH.reshape(B, S * G, *out_BSGNH.shape[3:])
    return jnp.concatenate([out_BTNH, out], axis=1), cache

  return attend


def prefill(
  segment_BT: jax.Array, *, implementation: str | None = None
) -> decoder.Attend:
  """Causal attention that also fills a `kv_cache.PrefixCache` layer by layer.

  Each row is one segment, then padding.
  """
  attend_causally = causal(
    segment_BT, right_padded=True, implementation=implementation
  )

  def attend(
    cache: Any,
    layer: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: sliding_window.SlidingWindow | None = None,
  ) -> tuple[jax.Array, Any]:
    cache = kv_cache.PrefixCache(
      k=cache.k.at[layer].set(jnp.swapaxes(k, 1, 2).astype(cache.k.dtype)),
      v=cache.v.at[layer].set(jnp.swapaxes(v, 1, 2).astype(cache.v.dtype)),
    )
    return attend_causally(None, layer, q, k, v, window)[0], cache

  return attend


def decode(
  prefix: kv_cache.PrefixCache,
  prefix_length_B: jax.Array,
  num_generated_BS: jax.Array,
  live_BS: jax.Array,
  active_slots: compaction.ActiveSlots | None = None,
) -> decoder.Attend:
  """One new token of each of S samples of every prompt.

  `attend` takes q [B, S, N, H] and k, v [B, S, K, H] of the new tokens (the
  token axis holds the samples) and carries a `kv_cache.SampleCache`. It writes
  the new key and value of each live sample to position `num_generated` of the
  sample's cache. The sample then attends to its prompt's prefix below
  `prefix_length` and to its own keys up to the new one.

  Args:
    prefix: keys and values of the prompts.
    prefix_length_B: int32, prefix tokens that the samples of a prompt see.
    num_generated_BS: int32, tokens in each sample's cache.
    live_BS: bool; other slots write nothing and their output is undefined.
    active_slots: computes compacted slots: `attend`'s q, k, v and output, and
      `num_generated` and `live`, are then [M, 1, ...].

  Returns:
    `attend`. With unstacked layers `layer` must be a Python int.
  """

  def attend(
    cache: Any,
    layer: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: sliding_window.SlidingWindow | None = None,
  ) -> tuple[jax.Array, Any]:
    # A position beyond the cache writes nothing.
    num_generated = jnp.where(live_BS, num_generated_BS, cache.capacity)
    if active_slots is not None:
      q, k, v = (active_slots.scatter(x) for x in (q, k, v))
      num_generated = active_slots.scatter(num_generated, cache.capacity)
    unstacked = isinstance(cache.k, tuple)

    def of_layer(x: Any) -> jax.Array:
      return x[layer] if unstacked else x

    def replace_layer(old: Any, new: jax.Array) -> kv_cache.Layers:
      return (*old[:layer], new, *old[layer + 1 :]) if unstacked else new

    dtype = of_layer(cache.k).dtype
    out_BSNH, new_k, new_v = sharded_ops.decode_attention(
      q_BSNH=q,
      k_BSKH=k.astype(dtype),
      v_BSKH=v.astype(dtype),
      prefix_k_LBKTH=of_layer(prefix.k),
      prefix_v_LBKTH=of_layer(prefix.v),
      cache_k_LBSKCH=of_layer(cache.k),
      cache_v_LBSKCH=of_layer(cache.v),
      prefix_length_B=prefix_length_B,
      num_generated_BS=num_generated,
      layer=None if unstacked else layer,
      window=sliding_window.positions(window),
      scale=q.shape[-1] ** -0.5,
    )
    cache = kv_cache.SampleCache(
      k=replace_layer(cache.k, new_k), v=replace_layer(cache.v, new_v)
    )
    if active_slots is not None:
      out_BSNH = active_slots.gather(out_BSNH)
    return out_BSNH, cache

  return attend
