"""Key/value caches: one per prompt (the prefix) and one per sample.

The head axis comes before the token axis, so that attention reads each head's
keys from contiguous memory. Layers are stacked in one array, which the model
scans over. A CPU keeps them unstacked, as a tuple: slicing one layer out of a
stack copies it there, and the copy costs more than attending to it.

Shape key: L layers, B prompt slots, T prefix length, S sample slots of a
prompt, C capacity of a sample slot, K key/value heads, H head dimension.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct

Layers = jax.Array | tuple[jax.Array, ...]


@struct.dataclass
class PrefixCache:
  """Keys and values of the prompts, which all samples of a prompt share."""

  k: Layers  # [L, B, K, T, H], or L times [B, K, T, H]
  v: Layers  # like k

  @property
  def length(self) -> int:
    """T."""
    return jax.tree.leaves(self.k)[0].shape[-2]


@struct.dataclass
class SampleCache:
  """Keys and values of the tokens that each sample added to its prompt."""

  k: Layers  # [L, B, S, K, C, H], or L times [B, S, K, C, H]
  v: Layers  # like k

  @property
  def capacity(self) -> int:
    """C."""
    return jax.tree.leaves(self.k)[0].shape[-2]


Cache = TypeVar("Cache", PrefixCache, SampleCache)


def empty_prefix_cache(
  layers: int,
  prompt_slots: int,
  length: int,
  kv_heads: int,
  head_dim: int,
  dtype: jax.typing.DTypeLike,
) -> PrefixCache:
  """A prefix cache of zeros, with stacked layers."""
  shape = (layers, prompt_slots, kv_heads, length, head_dim)
  return PrefixCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def empty_sample_cache(
  layers: int,
  prompt_slots: int,
  slots: int,
  capacity: int,
  kv_heads: int,
  head_dim: int,
  dtype: jax.typing.DTypeLike,
) -> SampleCache:
  """A cache of zeros for S samples of each prompt, with stacked layers."""
  shape = (layers, prompt_slots, slots, kv_heads, capacity, head_dim)
  return SampleCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def unstack_layers(cache: Cache) -> Cache:
  """The same cache with its layers in a tuple instead of a stack."""
  return type(cache)(k=tuple(cache.k), v=tuple(cache.v))
