"""Blocks, grids and index maps of the kernels in `limited_attention`.

Shape key: as in `limited_attention`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

BLOCK_QUERIES = 256
BLOCK_KEYS = 512
MAX_QUERIES_ALL_HEADS = 64  # up to so many queries, one step takes all heads


class Plan:
  """Block sizes, grids and index maps of one call.

  The grid is (b, s, head group, outer block, inner block).
  """

  def __init__(
    self, q_BKSQH: jax.Array, k_BSKTH: jax.Array, *, layered: bool = False
  ):
    """Plans the blocks.

    Args:
      q_BKSQH: queries.
      k_BSKTH: keys; with `layered`, their first axis is layers.
      layered: whether the keys have an axis of layers.
    """
    B, K, S, Q, self.H = q_BKSQH.shape
    self.T, self.Q, self.S = k_BSKTH.shape[-2], Q, S
    self.layered = layered
    self.q = min(Q, BLOCK_QUERIES)
    self.heads = K if Q <= MAX_QUERIES_ALL_HEADS else 1
    key_bytes = self.heads * self.H * k_BSKTH.dtype.itemsize
    self.t = min(self.T, BLOCK_KEYS, max(128, (2 << 20) // key_bytes))
    self.query_blocks = pl.cdiv(Q, self.q)
    self.key_blocks = pl.cdiv(self.T, self.t)
    outer = (B, S, K // self.heads)
    self.grid_over_keys = (*outer, self.query_blocks, self.key_blocks)
    self.grid_over_queries = (*outer, self.key_blocks, self.query_blocks)

  def needed(self, seen_BSQ: jax.Array) -> jax.Array:
    """How many key blocks each query block sees, flat [B * S * blocks]."""
    pad = self.query_blocks * self.q - self.Q
    padded = jnp.pad(seen_BSQ, ((0, 0), (0, 0), (0, pad)))
    most = jnp.max(padded.reshape(-1, self.q), axis=1)
    return pl.cdiv(most, self.t)

  def first(self, needed: jax.Array) -> jax.Array:
    """The first query block that sees a key block, flat [B * S * blocks]."""
    key_block = jnp.arange(self.key_blocks)[None, :, None]
    sees = needed.reshape(-1, 1, self.query_blocks) > key_block
    return jnp.argmax(sees, axis=2).astype(jnp.int32).ravel()

  def blocks_for(
    self, b: Any, s: Any, query_block: Any, needed_ref: Any
  ) -> Any:
    """How many key blocks a query block needs."""
    return needed_ref[(b * self.S + s) * self.query_blocks + query_block]

  def key_needed(self, b: Any, s: Any, i: Any, j: Any, needed_ref: Any) -> Any:
    """Key block j, or the last one that query block i needs."""
    last = self.blocks_for(b, s, i, needed_ref) - 1
    return jnp.minimum(j, jnp.maximum(last, 0))

  def query_needed(
    self, b: Any, s: Any, j: Any, i: Any, needed_ref: Any, first_ref: Any
  ) -> Any:
    """Query block i, or the first one that sees key block j."""
    sees = self.blocks_for(b, s, i, needed_ref) > j
    return jnp.where(sees, i, first_ref[(b * self.S + s) * self.key_blocks + j])

  def query_spec(self, width: int, query: Callable[..., Any]) -> pl.BlockSpec:
    """Blocks of [B, K, S, Q, width]; `query` gives the query block."""
    return pl.BlockSpec(
      (1, self.heads, 1, self.q, width),
      lambda b, s, k, *rest: (b, k, s, query(b, s, *rest), 0),
    )

  def seen_spec(self, query: Callable[..., Any]) -> pl.BlockSpec:
    """Blocks of [B, S, Q, 1]; `query` gives the query block."""
    return pl.BlockSpec(
      (1, 1, self.q, 1), lambda b, s, k, *rest: (b, s, query(b, s, *rest), 0)
    )

  def key_spec(self, key: Callable[..., Any]) -> pl.BlockSpec:
    """Blocks of [B, S, K, T, H]; `key` gives the key block."""
    if self.layered:  # the layer is the last of the prefetched scalars
      return pl.BlockSpec(
        (None, 1, 1, self.heads, self.t, self.H),
        lambda b, s, k, *rest: (
          *(rest[-1][rest[-1].shape[0] - 1], b, s, k),
          *(key(b, s, *rest), 0),
        ),
      )
    return pl.BlockSpec(
      (1, 1, self.heads, self.t, self.H),
      lambda b, s, k, *rest: (b, s, k, key(b, s, *rest), 0),
    )
