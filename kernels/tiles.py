"""One tile of attention, in plain XLA, written so that a CPU fuses it.

The CPU compiler makes one pass of product, scale, mask, maximum, exponential
and sum, if what masks is added (a select is computed apart), if it broadcasts
over leading axes alone, and if the maximum is used for nothing else; so no
logsumexp leaves a tile, and a backward pass makes the probabilities anew.

Shape key: b rows, K key-value heads, R query heads a key-value head, C queries,
W keys, H head features.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a query that sees no key gives no NaN


def bias(seen: jax.Array) -> jax.Array:
  """0 where a query sees a key, else MASKED; float32."""
  return jnp.where(seen, 0.0, MASKED)


def probabilities(
  q_bKRCH: jax.Array, k_bKWH: jax.Array, bias: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """exp(score - its maximum) [b, K, R, C, W], and its sums [b, K, R, C, 1].

  Args:
    q_bKRCH: queries.
    k_bKWH: keys.
    bias: float32, the rank of the scores, to be broadcast to their shape.
    scale: what multiplies q.k.

  Returns:
    Both float32.
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
    bias: what masks.
    d_out_bKRCH: cotangent of the output.
    delta_bKRC1: float32, d_out . out.
    scale: as in `forward`.

  Returns:
    d_q [b, K, R, C, H], and d_k and d_v turned: [b, K, H, W].
  """
  p, total = probabilities(q_bKRCH, k_bKWH, bias, scale)
  p = p / total
  d_score = p * (scores(d_out_bKRCH, v_bKWH) - delta_bKRC1) * scale
  d_score = d_score.astype(q_bKRCH.dtype)
  return (
    weigh(d_score, k_bKWH),
    received(q_bKRCH, d_score),
    received(d_out_bKRCH, p.astype(d_out_bKRCH.dtype)),
  )


def delta(d_out: jax.Array, out: jax.Array) -> jax.Array:
  """d_out . out over the last axis, which stays with size 1; float32."""
  product = d_out.astype(jnp.float32) * out.astype(jnp.float32)
  return jnp.sum(product, axis=-1, keepdims=True)


def scores(q_bKRCH: jax.Array, k_bKWH: jax.Array) -> jax.Array:
  """[b, K, R, C, W] float32."""
  return _product(q_bKRCH, k_bKWH, (4,), (3,))


def weigh(p_bKRCW: jax.Array, v_bKWH: jax.Array) -> jax.Array:
  """[b, K, R, C, H] float32."""
  return _product(p_bKRCW, v_bKWH, (4,), (2,))


def received(q_bKRCH: jax.Array, p_bKRCW: jax.Array) -> jax.Array:
  """What each key gets, [b, K, H, W]: the large factor lies as it is."""
  return _product(q_bKRCH, p_bKRCW, (2, 3), (2, 3))


def grouped(x_bTNH: jax.Array, K: int) -> jax.Array:
  """[b, K, R, T, H]: heads lead, those of a key-value head together."""
  b, T, N, H = x_bTNH.shape
  return x_bTNH.reshape(b, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def ungrouped(x_bKRTH: jax.Array) -> jax.Array:
  """Undoes `grouped`."""
  b, K, R, T, H = x_bKRTH.shape
  return x_bKRTH.transpose(0, 3, 1, 2, 4).reshape(b, T, K * R, H)


def _product(x, y, x_axes, y_axes):
  """Batched over b and K."""
  return jax.lax.dot_general(
    x,
    y,
    ((x_axes, y_axes), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )
