"""Keys and values kept between calls.

Heads lead the tokens, so that attention multiplies what lies together. Layers
are stacked, to be scanned; on a CPU they are a tuple, since a layer cut out of
a stack there is a copy of it, which costs more than attending to it.

Shape key: L layers, B rows, T prefix length, S samples a row, C sample
capacity, K key/value heads, H head dimension.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Layers = jax.Array | tuple[jax.Array, ...]


@struct.dataclass
class PrefixCache:
  """Prompts, computed once and shared by their samples."""

  k: Layers  # [L, B, K, T, H], or L of [B, K, T, H]
  v: Layers  # like k

  @property
  def length(self) -> int:
    """T."""
    return jax.tree.leaves(self.k)[0].shape[-2]


@struct.dataclass
class Samples:
  """What each sample added after its prompt."""

  k: Layers  # [L, B, S, K, C, H], or L of [B, S, K, C, H]
  v: Layers  # like k

  @property
  def capacity(self) -> int:
    """C."""
    return jax.tree.leaves(self.k)[0].shape[-2]


def empty_prefix(
  layers: int, rows: int, length: int, kv_heads: int, head_dim: int, dtype
) -> PrefixCache:
  """A zeroed prefix cache, its layers stacked."""
  shape = (layers, rows, kv_heads, length, head_dim)
  return PrefixCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def empty_samples(
  layers: int,
  rows: int,
  samples: int,
  capacity: int,
  kv_heads: int,
  head_dim: int,
  dtype,
) -> Samples:
  """A zeroed cache of S samples a row, its layers stacked."""
  shape = (layers, rows, samples, kv_heads, capacity, head_dim)
  return Samples(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def apart(cache: Any) -> Any:
  """A Prefix or Samples whose layers are a tuple in place of a stack."""
  return type(cache)(k=tuple(cache.k), v=tuple(cache.v))
