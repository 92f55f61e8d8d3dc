"""Sliding-window attention: which layers see the last tokens only.

A query at position p sees positions p - W < t <= p. Positions are counted in
the sequence, not in an array: a continuation sees the window that ends with its
own position, although its prefix is stored elsewhere.

The layers of a model differ in this, and they run in one scan. So a layer's
window has a size that is known when the program is compiled, and a flag that
may be known at run time only.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

_UNLIMITED = 2**30  # more positions than a sequence has


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
  """The window of one layer."""

  size: int  # positions that a query sees, its own included
  slides: bool | jax.Array = True  # bool scalar; a layer may see all instead

  def positions(self) -> jax.Array:
    """How many positions a query sees, int32 scalar."""
    return jnp.where(self.slides, self.size, _UNLIMITED).astype(jnp.int32)


def positions(window: SlidingWindow | None) -> jax.Array | None:
  """`SlidingWindow.positions`, or None where every layer sees everything."""
  return None if window is None else window.positions()


def slides(layer: Any, pattern: int) -> Any:
  """Whether a layer has a window: all but every `pattern`-th.

  Args:
    layer: index of the layer, from 0; an int, or traced.
    pattern: 0 if every layer has one.

  Returns:
    A bool, or a traced one where the answer depends on a traced index.
  """
  return pattern == 0 or (layer + 1) % pattern != 0
