"""What the device holds while it samples: rows of slots.

A row holds one prompt's keys and values (the prefix); its S slots hold samples
of that prompt. A slot feeds the last token of its context again as its own
first token, so that a sample can begin wherever a prefix ends, and a kept
sample can become more prefix without running anything twice.

Shape key: L layers, B rows, S slots a row, T prefix capacity, C slot capacity,
U steps of one call, W recent tokens, K key-value heads, H head dimension.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from opera_jax.kernels import target
from opera_jax.models import kv_cache, qwen3, sharded_ops
from opera_jax.sharding import rules

STOPPED, LOOPED = 1, 2
PREFIX = ("batch", "heads", None, None)  # and layers before them, if stacked
CACHE = ("batch", None, "heads", None, None)


class Slots(struct.PyTreeNode):
  """What every row and slot is at."""

  prefix: kv_cache.PrefixCache  # [L, B, K, T, H] in all
  cache: kv_cache.Samples  # [L, B, S, K, C, H] in all
  prefix_length: (
    jax.Array
  )  # [B] int32, prefix tokens seen by the slots of a row
  token: jax.Array  # [B, S] int32, the token to feed next
  num_generated: (
    jax.Array
  )  # [B, S] int32, own tokens fed, which is tokens drawn
  budget: jax.Array  # [B, S] int32, tokens that may be drawn in all
  key: jax.Array  # [B, S, words] uint32, random key data, one a sample
  state: jax.Array  # [B, S] int32, of the stop strings' automaton
  recent: jax.Array  # [B, S, W] int32, last tokens, -1 for none
  live: jax.Array  # [B, S] bool
  ended: jax.Array  # [B, S] int32, 0, STOPPED or LOOPED


@struct.dataclass
class Drawn:
  """What one call drew; a slot's tokens are the first `count`."""

  token: jax.Array  # [B, S, U] int32
  logprob: jax.Array  # [B, S, U] float32, at the sampling temperature
  model_logprob: (
    jax.Array | None
  )  # [B, S, U] float32, at temperature 1, where asked
  truncated: jax.Array | None  # [B, S, U] float32, of the truncated
  # distribution, where there is one
  count: jax.Array  # [B, S] int32
  live: jax.Array  # [B, S] bool, goes on after this call
  ended: jax.Array  # [B, S] int32


def empty(
  config: qwen3.Config,
  rows: int,
  slots: int,
  prefix_capacity: int,
  capacity: int,
  *,
  recent: int,
  dtype: str,
) -> Slots:
  """Slots with nothing in them."""
  sizes = (config.num_key_value_heads, config.head_dim, dtype)
  shape = (rows, slots)

  def zeros():
    return jnp.zeros(shape, jnp.int32)

  prefix = kv_cache.empty_prefix(
    config.num_hidden_layers, rows, prefix_capacity, *sizes
  )
  cache = kv_cache.empty_samples(
    config.num_hidden_layers, rows, slots, capacity, *sizes
  )
  if layers_apart():
    prefix, cache = kv_cache.apart(prefix), kv_cache.apart(cache)
  made = Slots(
    prefix=prefix,
    cache=cache,
    prefix_length=jnp.zeros(rows, jnp.int32),
    token=zeros(),
    num_generated=zeros(),
    budget=zeros(),
    key=jnp.zeros(
      (*shape, *jax.random.key_data(jax.random.key(0)).shape), jnp.uint32
    ),
    state=zeros(),
    recent=jnp.full((*shape, recent), -1, jnp.int32),
    live=jnp.zeros(shape, bool),
    ended=zeros(),
  )
  return laid_out(made)


def layers_apart() -> bool:
  """Whether caches and weights lie by layer: on a CPU; see `Qwen3.apart`."""
  return target.platform() == "cpu"


def shardings(slots: Slots, mesh: jax.sharding.Mesh) -> Slots:
  """Where the slots lie: rows over the data axes, heads over tensor.

  Args:
    slots: arrays or their shapes; parts may be None.
    mesh: present or absent devices.

  Returns:
    A tree of NamedShardings.
  """
  with jax.set_mesh(mesh):

    def place(x, axes):
      parts = (rules.activation_axis(n, s) for n, s in zip(axes, x.shape))
      return NamedSharding(mesh, PartitionSpec(*parts))

    return _by_axes(place, slots)


def laid_out(slots: Slots) -> Slots:
  """Pins the slots over the mesh in force."""
  return _by_axes(rules.constrain, slots)


def _by_axes(function, slots: Slots) -> Slots:
  """`function(leaf, logical axes)` of every leaf."""
  rest = jax.tree.map(
    lambda x: function(x, ("batch",) + (None,) * (x.ndim - 1)),
    slots.replace(prefix=None, cache=None),
  )
  return rest.replace(
    prefix=_of_layers(function, slots.prefix, PREFIX),
    cache=_of_layers(function, slots.cache, CACHE),
  )


def _of_layers(function, cache, axes):
  """Stacked layers lead with an axis of their own."""
  return jax.tree.map(
    lambda x: function(x, (None,) * (x.ndim - len(axes)) + axes), cache
  )


def laid_out_prefix(prefix: kv_cache.PrefixCache) -> kv_cache.PrefixCache:
  """Pins the prefix over the mesh in force."""
  return _of_layers(rules.constrain, prefix, PREFIX)


def whole_blocks(tokens: int) -> int:
  """A cache length that holds `tokens`, over the mesh in force."""
  block = sharded_ops.DECODE_BLOCK[target.platform()]
  return -(-tokens // block) * block
