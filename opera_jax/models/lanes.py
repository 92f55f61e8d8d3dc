"""Which slots a decoding step computes, where it need not be all of them.

Rows hold as many slots as a prompt may ever have samples; often few of them
are live. Tokens are then computed in lanes, one a live slot, and only the
caches, which lie where they lie, know rows and slots.

Shape key: B rows, S slots a row, M lanes.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Lanes:
  """Lanes and the slots that they compute."""

  slot_M: jax.Array  # int32, row * S + slot; B * S for a lane of no slot
  lane_BS: jax.Array  # int32, the lane of a slot; any for a slot of none
  taken_BS: jax.Array  # bool, whether a slot has a lane

  def gather(self, x_BS: jax.Array) -> jax.Array:
    """Slots' values [B, S, ...] as lanes' [M, 1, ...]."""
    flat = x_BS.reshape(self.lane_BS.size, *x_BS.shape[2:])
    return jnp.take(flat, self.slot_M, axis=0, mode="clip")[:, None]

  def spread(
    self, x_M: jax.Array, others: jax.Array | int | None = None
  ) -> jax.Array:
    """Lanes' values [M, 1, ...] as slots' [B, S, ...].

    Args:
      x_M: the values.
      others: what the slots without a lane have, [B, S, ...] or one number;
        None leaves it open.
    """
    x_BS = jnp.take(x_M[:, 0], self.lane_BS, axis=0, mode="clip")
    if others is None:
      return x_BS
    shape = self.taken_BS.shape + (1,) * (x_BS.ndim - 2)
    return jnp.where(self.taken_BS.reshape(shape), x_BS, others)


def create(slot_M: jax.Array, rows: int, slots: int) -> Lanes:
  """Lanes of the slots `slot_M`, each named once; see `Lanes`."""
  none = jnp.full(rows * slots, slot_M.shape[0], jnp.int32)
  lane = jnp.arange(slot_M.shape[0], dtype=jnp.int32)
  lane_BS = none.at[slot_M].set(lane, mode="drop").reshape(rows, slots)
  return Lanes(slot_M, lane_BS, lane_BS < slot_M.shape[0])
