"""Who sees whom: the `attend` arguments of the model.

Each function here returns `attend(cache, layer, q, k, v) -> (out, cache)`.

Shape key: B rows, T prefix tokens, S continuations a row, G tokens a
continuation, N query heads, K key/value heads, H head dimension.
"""

from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.models import compaction as compaction
from opera_jax.models import kv_cache, self_attention, sharded_ops


def causal(
  segment_BT: jax.Array,
  *,
  right_padded: bool = False,
  implementation: str | None = None,
):
  """Causal attention within segments; see `self_attention` for both options."""

  def attend(cache, layer, q, k, v):
    del layer
    out_BTNH = self_attention.self_attention(
      q,
      k,
      v,
      segment_BT,
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
):
  """A prefix of T tokens followed, on the token axis, by S continuations of G.

  The prefix is causal, and each row of it one segment, then padding;
  continuation s of row b sees prefix positions below `prefix_length[b, s]` and
  its own tokens causally. Nothing sees a continuation but itself.
  """
  B, T = prefix_segment_BT.shape
  S, G = prefix_length_BS.shape[1], continuation_tokens
  prefix = causal(
    prefix_segment_BT, right_padded=True, implementation=implementation
  )

  def attend(cache, layer, q, k, v):
    out_BTNH, cache = prefix(cache, layer, q[:, :T], k[:, :T], v[:, :T])

    def continuations(x):
      return x[:, T:].reshape(B, S, G, *x.shape[2:])

    out_BSGNH = sharded_ops.shared_prefix_attention(
      continuations(q),
      k[:, :T],
      v[:, :T],
      continuations(k),
      continuations(v),
      prefix_length_BS,
      scale=q.shape[-1] ** -0.5,
    )
    out = out_BSGNH.reshape(B, S * G, *out_BSGNH.shape[3:])
    return jnp.concatenate([out_BTNH, out], axis=1), cache

  return attend


def prefill(segment_BT: jax.Array, *, implementation: str | None = None):
  """Causal attention that also fills `kv_cache.PrefixCache` layer by layer.

  Each row is one segment, then padding.
  """
  inner = causal(segment_BT, right_padded=True, implementation=implementation)

  def attend(cache, layer, q, k, v):
    cache = kv_cache.PrefixCache(
      k=cache.k.at[layer].set(jnp.swapaxes(k, 1, 2).astype(cache.k.dtype)),
      v=cache.v.at[layer].set(jnp.swapaxes(v, 1, 2).astype(cache.v.dtype)),
    )
    return inner(None, layer, q, k, v)[0], cache

  return attend


def decode(
  prefix: kv_cache.PrefixCache,
  prefix_length_B: jax.Array,
  num_generated_BS: jax.Array,
  live_BS: jax.Array,
  active_slots: compaction.ActiveSlots | None = None,
):
  """One new token of each of S samples of every row.

  Queries come as [B, S, N, H] (the token axis holds the samples). The new
  key of a live sample is written into its own cache at `num_generated`, then
  the sample sees its row's prefix below `prefix_length` and its own keys up to
  there. Where the caches' layers are apart, `layer` must be an int. With
  `active_slots`, queries, depths and who is live come by place, [M, 1, ...],
  and so does what is given.
  """

  def attend(cache, layer, q, k, v):
    num_generated = jnp.where(live_BS, num_generated_BS, cache.capacity)
    if active_slots is not None:
      q, k, v = (active_slots.scatter(x) for x in (q, k, v))
      num_generated = active_slots.scatter(num_generated, cache.capacity)
    apart = isinstance(cache.k, tuple)
    halves = [prefix.k, prefix.v, cache.k, cache.v]
    if apart:
      halves = [half[layer] for half in halves]
    dtype = halves[0].dtype
    new: Any
    out_BSNH, *new = sharded_ops.decode_attention(
      q,
      k.astype(dtype),
      v.astype(dtype),
      *(halves[0], halves[1], halves[2], halves[3]),
      *(prefix_length_B, num_generated),
      None if apart else layer,
      scale=q.shape[-1] ** -0.5,
    )
    if apart:
      new = [
        (*old[:layer], one, *old[layer + 1 :])
        for old, one in zip((cache.k, cache.v), new)
      ]
    if active_slots is not None:
      out_BSNH = active_slots.gather(out_BSNH)
    return out_BSNH, kv_cache.Samples(*new)

  return attend
