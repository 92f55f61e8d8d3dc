"""Compacts the active slots, so that decoding computes no idle ones.

A prompt slot holds as many sample slots as its prompt may have samples, and
often few of them are still decoding. A step gathers one token per active slot,
runs the layers on those, and scatters the results back. Key/value caches are
not moved: they stay indexed by prompt slot and slot.

Shape key: B prompt slots, S slots of each, M compacted active slots.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class ActiveSlots:
  """Maps slots [B, S] to compacted active slots [M] and back."""

  slot_M: jax.Array  # int32, prompt slot * S + slot; B * S for padding
  index_BS: jax.Array  # int32, a slot's index in M; M or more if not active
  active_BS: jax.Array  # bool

  def gather(self, x_BS: jax.Array) -> jax.Array:
    """Picks the active slots' values: [B, S, ...] to [M, 1, ...]."""
    flat = x_BS.reshape(self.index_BS.size, *x_BS.shape[2:])
    return jnp.take(flat, self.slot_M, axis=0, mode="clip")[:, None]

  def scatter(
    self, x_M: jax.Array, inactive: jax.Array | int | None = None
  ) -> jax.Array:
    """Puts the active slots' values back: [M, 1, ...] to [B, S, ...].

    Args:
      x_M: values of the active slots, [M, 1, ...].
      inactive: values of the other slots, [B, S, ...] or one number; None
        leaves them undefined.
    """
    x_BS = jnp.take(x_M[:, 0], self.index_BS, axis=0, mode="clip")
    if inactive is None:
      return x_BS
    shape = self.active_BS.shape + (1,) * (x_BS.ndim - 2)
    return jnp.where(self.active_BS.reshape(shape), x_BS, inactive)


def create(slot_M: jax.Array, prompt_slots: int, slots: int) -> ActiveSlots:
  """The mapping for the slots `slot_M`, each listed once; see `ActiveSlots`."""
  none = jnp.full(prompt_slots * slots, slot_M.shape[0], jnp.int32)
  index = jnp.arange(slot_M.shape[0], dtype=jnp.int32)
  index_BS = none.at[slot_M].set(index, mode="drop")
  index_BS = index_BS.reshape(prompt_slots, slots)
  return ActiveSlots(slot_M, index_BS, index_BS < slot_M.shape[0])
