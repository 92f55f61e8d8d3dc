"""Keys and values kept between calls.

Shape key: L layers, B rows, P trunk length, S samples a row, C sample
capacity, K key/value heads, H head dimension.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Trunk:
  """Prompts, computed once and shared by their samples."""

  k: jax.Array  # [L, B, P, K, H]
  v: jax.Array  # [L, B, P, K, H]


@struct.dataclass
class Samples:
  """What each sample added after its prompt."""

  k: jax.Array  # [L, B, S, C, K, H]
  v: jax.Array  # [L, B, S, C, K, H]


def empty_trunk(
  layers: int, rows: int, length: int, kv_heads: int, head_dim: int, dtype
) -> Trunk:
  """A zeroed trunk cache."""
  shape = (layers, rows, length, kv_heads, head_dim)
  return Trunk(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def empty_samples(
  layers: int,
  rows: int,
  samples: int,
  capacity: int,
  kv_heads: int,
  head_dim: int,
  dtype,
) -> Samples:
  """A zeroed cache of S samples a row, `capacity` tokens each."""
  shape = (layers, rows, samples, capacity, kv_heads, head_dim)
  return Samples(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))
