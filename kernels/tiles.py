"""One tile of attention in plain XLA, written so that XLA fuses it on a CPU.

XLA fuses matmul, scale, mask, maximum, exponential and sum into one pass on a
CPU under three conditions: the mask is added (a select is not fused), it
broadcasts over leading axes only, and the maximum has no other use. So a tile
returns no logsumexp, and the backward pass recomputes the probabilities.

Shape key: b rows, K key/value heads, R query heads per key/value head,
C queries, W keys, H head dimension.
"""

import einops
import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query without visible keys gives no NaN


def bias(visible: jax.Array) -> jax.Array:
  """The additive mask, float32: 0 where a key is visible, else MASKED."""
  return jnp.where(visible, 0.0, MASKED)


def probabilities(
  q_bKRCH: jax.Array, k_bKWH: jax.Array, bias: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Unnormalised probabilities and their sums.

  Args:
    q_bKRCH: queries.
    k_bKWH: keys.
    bias: additive mask, float32; broadcasts to [b, K, R, C, W].
    scale: multiplies q.k.

  Returns:
    exp(score - max(score)), float32 [b, K, R, C, W], and its sums over keys,
    float32 [b, K, R, C, 1].
  """
  score = scores(q_bKRCH, k_bKWH) * scale + bias
  p = jnp.exp(score - jnp.max(score, axis=-1, keepdims=True))
  return p, jnp.sum(p, axis=-1, keepdims=True)


def forward(
  q_bKRCH: jax.Array,
  k_bKWH: jax.Array,
  v_bKWH: jax.Array,
  bias: jax.Array,
  scale: float,
) -> jax.Array:
  """Attention of a tile, [b, K, R, C, H] float32."""
  p, total = probabilities(q_bKRCH, k_bKWH, bias, scale)
  return weigh(p.astype(v_bKWH.dtype), v_bKWH) / total


def backward(
  q_bKRCH: jax.Array,
  k_bKWH: jax.Array,
  v_bKWH: jax.Array,
  bias: jax.Array,
  d_out_bKRCH: jax.Array,
  delta_bKRC1: jax.Array,
  scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of `forward`, float32.

  Args:
    q_bKRCH: as in `forward`, like the next three.
    k_bKWH: keys.
    v_bKWH: values.
    bias: additive mask.
    d_out_bKRCH: cotangent of the output.
    delta_bKRC1: float32, d_out . out.
    scale: as in `forward`.

  Returns:
    d_q [b, K, R, C, H]; d_k and d_v transposed, [b, K, H, W].
  """
  p, total = probabilities(q_bKRCH, k_bKWH, bias, scale)
  p = p / total
  d_score = p * (scores(d_out_bKRCH, v_bKWH) - delta_bKRC1) * scale
  d_score = d_score.astype(q_bKRCH.dtype)
  return (
    weigh(d_score, k_bKWH),
    scatter_to_keys(q_bKRCH, d_score),
    scatter_to_keys(d_out_bKRCH, p.astype(d_out_bKRCH.dtype)),
  )


def delta(d_out: jax.Array, out: jax.Array) -> jax.Array:
  """sum(d_out * out) over the last axis, which is kept; float32."""
  product = d_out.astype(jnp.float32) * out.astype(jnp.float32)
  return jnp.sum(product, axis=-1, keepdims=True)


def scores(q_bKRCH: jax.Array, k_bKWH: jax.Array) -> jax.Array:
  """q @ k.T, [b, K, R, C, W] float32."""
  return _product(q_bKRCH, k_bKWH, (4,), (3,))


def weigh(p_bKRCW: jax.Array, v_bKWH: jax.Array) -> jax.Array:
  """Probabilities @ values, [b, K, R, C, H] float32."""
  return _product(p_bKRCW, v_bKWH, (4,), (2,))


def scatter_to_keys(q_bKRCH: jax.Array, p_bKRCW: jax.Array) -> jax.Array:
  """q.T @ p, [b, K, H, W] float32; the large operand p is not transposed."""
  return _product(q_bKRCH, p_bKRCW, (2, 3), (2, 3))


def grouped(x_bTNH: jax.Array, K: int) -> jax.Array:
  """Groups query heads by their key/value head, before the token axis."""
  return einops.rearrange(x_bTNH, "b T (K R) H -> b K R T H", K=K)


def ungrouped(x_bKRTH: jax.Array) -> jax.Array:
  """Undoes `grouped`."""
  return einops.rearrange(x_bKRTH, "b K R T H -> b T (K R) H")


def _product(
  x: jax.Array, y: jax.Array, x_axes: tuple[int, ...], y_axes: tuple[int, ...]
) -> jax.Array:
  """Contracts the named axes, batched over b and K."""
  return jax.lax.dot_general(
    x,
    y,
    ((x_axes, y_axes), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )
