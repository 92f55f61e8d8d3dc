"""Branch attention as defined: every score at once, softmax over one row.

Shape key: B rows, S branches, G queries of a branch, N query heads, K
key-value heads, H head features, T trunk length, C branch length.
"""

import jax
import jax.numpy as jnp


def branch_attention(
  q_BSGNH: jax.Array,
  trunk_k_BTKH: jax.Array,
  trunk_v_BTKH: jax.Array,
  branch_k_BSCKH: jax.Array,
  branch_v_BSCKH: jax.Array,
  limit_BS: jax.Array,
  offset_BS: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """softmax(scale q [trunk; branch].k, where visible) [trunk; branch].v."""
  B, S, G, N, _ = q_BSGNH.shape
  T, K = trunk_k_BTKH.shape[1:3]
  C = branch_k_BSCKH.shape[2]

  def keys(trunk_BTKH, branch_BSCKH):
    trunk_BSTKH = jnp.broadcast_to(
      trunk_BTKH[:, None], (B, S, *trunk_BTKH.shape[1:])
    )
    both = jnp.concatenate([trunk_BSTKH, branch_BSCKH], axis=2)
    return jnp.repeat(both, N // K, axis=3)

  last_BSG1 = offset_BS[:, :, None, None] + jnp.arange(G)[None, None, :, None]
  visible_BSGX = jnp.concatenate(
    [
      jnp.broadcast_to(
        jnp.arange(T)[None, None, None] < limit_BS[:, :, None, None],
        (B, S, G, T),
      ),
      jnp.arange(C)[None, None, None] <= last_BSG1,
    ],
    axis=-1,
  )
  score_BSNGX = scale * jnp.einsum(
    "bsgnh,bsxnh->bsngx",
    q_BSGNH,
    keys(trunk_k_BTKH, branch_k_BSCKH),
    preferred_element_type=jnp.float32,
  )
  score_BSNGX = jnp.where(visible_BSGX[:, :, None], score_BSNGX, -jnp.inf)
  out_BSGNH = jnp.einsum(
    "bsngx,bsxnh->bsgnh",
    jax.nn.softmax(score_BSNGX, axis=-1),
    keys(trunk_v_BTKH, branch_v_BSCKH).astype(jnp.float32),
  )
  return out_BSGNH.astype(q_BSGNH.dtype)
