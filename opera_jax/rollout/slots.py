"""The sampler's state on the device: prompt slots and their sample slots.

A prompt slot holds the keys and values of one prompt (the prefix); its S slots
hold samples of that prompt. The first token that a slot feeds is the last token
of its context, whose key is therefore stored in the slot and not in the prefix.
So a sample can start wherever a prefix ends, and the tokens of a finished
sample can be appended to the prefix without recomputing anything.

Shape key: L layers, B prompt slots, S slots of each, T prefix capacity, C slot
capacity, U steps of one decode call, W recent tokens, K key/value heads, H head
dimension.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from opera_jax.kernels import target
from opera_jax.models import decoder, kv_cache, sharded_ops
from opera_jax.sharding import rules

# Why a sample ended, in `Slots.ended`; 0 if it did not, or ran out of length.
STOPPED, LOOPED = 1, 2
# Logical axes of the caches; stacked layers are one more axis, at the front.
PREFIX_AXES = ("batch", "heads", None, None)
CACHE_AXES = ("batch", None, "heads", None, None)


class Slots(struct.PyTreeNode):
  """State of all prompt slots and their slots."""

  prefix: kv_cache.PrefixCache  # [L, B, K, T, H]
  cache: kv_cache.SampleCache  # [L, B, S, K, C, H]
  # [B] int32, prefix tokens that the slots of a prompt attend to
  prefix_length: jax.Array
  token: jax.Array  # [B, S] int32, the token to feed next
  # [B, S] int32, tokens sampled, which equals own tokens fed
  num_generated: jax.Array
  budget: jax.Array  # [B, S] int32, most tokens to sample
  key: jax.Array  # [B, S, words] uint32, data of each sample's random key
  state: jax.Array  # [B, S] int32, of the stop strings' automaton
  recent: jax.Array  # [B, S, W] int32, the last tokens, -1 for none
  live: jax.Array  # [B, S] bool, still sampling
  ended: jax.Array  # [B, S] int32, 0, STOPPED or LOOPED


@struct.dataclass
class SampledTokens:
  """What one decode call sampled; a slot's tokens are the first `count`."""

  token: jax.Array  # [B, S, U] int32
  logprob: jax.Array  # [B, S, U] float32, at the sampling temperature
  # [B, S, U] float32, at temperature 1; None if not requested
  model_logprob: jax.Array | None
  # [B, S, U] float32, under the truncated distribution; None without one
  truncated: jax.Array | None
  count: jax.Array  # [B, S] int32
  live: jax.Array  # [B, S] bool, the sample continues in the next call
  ended: jax.Array  # [B, S] int32


def empty(
  config: decoder.Config,
  prompt_slots: int,
  slots: int,
  prefix_capacity: int,
  capacity: int,
  *,
  recent: int,
  dtype: str,
) -> Slots:
  """Slots without prompts and samples.

  Args:
    config: the model's sizes.
    prompt_slots: B.
    slots: S.
    prefix_capacity: T.
    capacity: C.
    recent: W.
    dtype: of keys and values.
  """
  shape = (prompt_slots, slots)

  def zeros() -> jax.Array:
    return jnp.zeros(shape, jnp.int32)

  prefix = kv_cache.empty_prefix_cache(
    layers=config.num_hidden_layers,
    prompt_slots=prompt_slots,
    length=prefix_capacity,
    kv_heads=config.num_key_value_heads,
    head_dim=config.head_dim,
    dtype=dtype,
  )
  cache = kv_cache.empty_sample_cache(
    layers=config.num_hidden_layers,
    prompt_slots=prompt_slots,
    slots=slots,
    capacity=capacity,
    kv_heads=config.num_key_value_heads,
    head_dim=config.head_dim,
    dtype=dtype,
  )
  if unstacks_layers():
    prefix = kv_cache.unstack_layers(prefix)
    cache = kv_cache.unstack_layers(cache)
  key_shape = jax.random.key_data(jax.random.key(0)).shape
  created = Slots(
    prefix=prefix,
    cache=cache,
    prefix_length=jnp.zeros(prompt_slots, jnp.int32),
    token=zeros(),
    num_generated=zeros(),
    budget=zeros(),
    key=jnp.zeros((*shape, *key_shape), jnp.uint32),
    state=zeros(),
    recent=jnp.full((*shape, recent), -1, jnp.int32),
    live=jnp.zeros(shape, bool),
    ended=zeros(),
  )
  return constrain(created)


def unstacks_layers() -> bool:
  """Whether caches and weights have unstacked layers, which they do on a CPU.

  See `models.decode_model`.
  """
  return target.platform() == "cpu"


def shardings(slots: Slots, mesh: jax.sharding.Mesh) -> Slots:
  """How the slots are sharded: B over the data axes, heads over tensor.

  Args:
    slots: arrays or their shapes; prefix and cache may be None.
    mesh: of real or abstract devices.

  Returns:
    A tree of NamedShardings.
  """
  with jax.set_mesh(mesh):

    def sharding(x: Any, axes: tuple[str | None, ...]) -> NamedSharding:
      spec = (rules.activation_axis(n, s) for n, s in zip(axes, x.shape))
      return NamedSharding(mesh, PartitionSpec(*spec))

    return _map_with_axes(sharding, slots)


def constrain(slots: Slots) -> Slots:
  """Constrains the slots' sharding on the mesh in force."""
  return _map_with_axes(rules.constrain, slots)


def constrain_prefix(prefix: kv_cache.PrefixCache) -> kv_cache.PrefixCache:
  """Constrains the prefix's sharding on the mesh in force."""
  return _map_layers(rules.constrain, prefix, PREFIX_AXES)


def padded_length(tokens: int) -> int:
  """The shortest cache length that holds `tokens`: whole attention blocks."""
  block = sharded_ops.DECODE_BLOCK[target.platform()]
  return -(-tokens // block) * block


def _map_with_axes(function: Callable[..., Any], slots: Slots) -> Slots:
  """Calls `function(leaf, logical axes)` on every leaf."""
  rest = jax.tree.map(
    lambda x: function(x, ("batch",) + (None,) * (x.ndim - 1)),
    slots.replace(prefix=None, cache=None),
  )
  return rest.replace(
    prefix=_map_layers(function, slots.prefix, PREFIX_AXES),
    cache=_map_layers(function, slots.cache, CACHE_AXES),
  )


def _map_layers(
  function: Callable[..., Any], cache: Any, axes: tuple[str | None, ...]
) -> Any:
  """`_map_with_axes` of a cache; stacked layers get an unsharded first axis."""
  return jax.tree.map(
    lambda x: function(x, (None,) * (x.ndim - len(axes)) + axes), cache
  )
