"""Which slots a decoding step computes, where it need not be all of them.

Rows hold as many slots as a prompt may ever have samples; often few of them
are live. Tokens are then computed in active slots, one a live slot, and only
the caches, which lie where they lie, know rows and slots.

Shape key: B rows, S slots a row, M active slots.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class ActiveSlots:
  """ActiveSlots and the slots that they compute."""

  slot_M: jax.Array  # int32, row * S + slot; B * S for a place of no slot
  place_BS: jax.Array  # int32, the place of a slot; any for a slot of none
  active_BS: jax.Array  # bool, whether a slot has a place

  def gather(self, x_BS: jax.Array) -> jax.Array:
    """Slots' values [B, S, ...] as active slots' [M, 1, ...]."""
    flat = x_BS.reshape(self.place_BS.size, *x_BS.shape[2:])
    return jnp.take(flat, self.slot_M, axis=0, mode="clip")[:, None]

  def scatter(
    self, x_M: jax.Array, others: jax.Array | int | None = None
  ) -> jax.Array:
    """ActiveSlots' values [M, 1, ...] as slots' [B, S, ...].

    Args:
      x_M: the values.
      others: what the slots without a place have, [B, S, ...] or one number;
        None leaves it open.
    """
    x_BS = jnp.take(x_M[:, 0], self.place_BS, axis=0, mode="clip")
    if others is None:
      return x_BS
    shape = self.active_BS.shape + (1,) * (x_BS.ndim - 2)
    return jnp.where(self.active_BS.reshape(shape), x_BS, others)


def create(slot_M: jax.Array, rows: int, slots: int) -> ActiveSlots:
  """ActiveSlots of the slots `slot_M`, each named once; see `ActiveSlots`."""
  none = jnp.full(rows * slots, slot_M.shape[0], jnp.int32)
  place = jnp.arange(slot_M.shape[0], dtype=jnp.int32)
  place_BS = none.at[slot_M].set(place, mode="drop").reshape(rows, slots)
  return ActiveSlots(slot_M, place_BS, place_BS < slot_M.shape[0])
