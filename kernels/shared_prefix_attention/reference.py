"""Shared-prefix attention by its definition: all scores at once, one softmax.

Shape key: B rows, S continuations, G queries of a continuation, N query heads,
K key/value heads, H head dimension, T prefix length, C continuation length.
"""

import jax
import jax.numpy as jnp


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
) -> jax.Array:
  """Computes `api.shared_prefix_attention`, which states the equation."""
  B, S, G, N, _ = q_BSGNH.shape
  T, K = prefix_k_BTKH.shape[1:3]
  C = continuation_k_BSCKH.shape[2]

  def repeat_heads(
    prefix_BTKH: jax.Array, continuation_BSCKH: jax.Array
  ) -> jax.Array:
    """Prefix and continuation keys for every query head, [B, S, X, N, H]."""
    prefix_BSTKH = jnp.broadcast_to(
      prefix_BTKH[:, None], (B, S, *prefix_BTKH.shape[1:])
    )
    both = jnp.concatenate([prefix_BSTKH, continuation_BSCKH], axis=2)
    return jnp.repeat(both, N // K, axis=3)

  last_BSG1 = offset_BS[:, :, None, None] + jnp.arange(G)[None, None, :, None]
  seen_BSG1 = prefix_length_BS[:, :, None, None]
  visible_BSGX = jnp.concatenate(
    [
      jnp.broadcast_to(
        jnp.arange(T)[None, None, None] < seen_BSG1,
        (B, S, G, T),
      ),
      jnp.arange(C)[None, None, None] <= last_BSG1,
    ],
    axis=-1,
  )
  if window is not None:
    position_BSGX = jnp.concatenate(
      [
        jnp.broadcast_to(jnp.arange(T)[None, None, None], (B, S, G, T)),
        jnp.broadcast_to(
          seen_BSG1 + jnp.arange(C)[None, None, None], (B, S, G, C)
        ),
      ],
      axis=-1,
    )
    visible_BSGX &= position_BSGX > seen_BSG1 + last_BSG1 - window
  score_BSNGX = scale * jnp.einsum(
    "bsgnh,bsxnh->bsngx",
    q_BSGNH,
    repeat_heads(prefix_k_BTKH, continuation_k_BSCKH),
    preferred_element_type=jnp.float32,
  )
  score_BSNGX = jnp.where(visible_BSGX[:, :, None], score_BSNGX, -jnp.inf)
  out_BSGNH = jnp.einsum(
    "bsngx,bsxnh->bsgnh",
    jax.nn.softmax(score_BSNGX, axis=-1),
    repeat_heads(prefix_v_BTKH, continuation_v_BSCKH).astype(jnp.float32),
  )
  return out_BSGNH.astype(q_BSGNH.dtype)
