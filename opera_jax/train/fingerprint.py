"""A model's fingerprint: depends on its bits, not on the sharding.

Every element is hashed with its index, and the hashes are summed as integers,
so neither the order of the sum nor the sharding matters. It detects mix-ups of
models, not forgery.
"""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opera_jax.sharding import layout

_FACTORS = (0x9E3779B1, 0x85EBCA77)  # odd, of xxHash
_MIXED = 0xC2B2AE3D


def fingerprint(params: Any) -> str:
  """64 hex digits that depend on names, shapes, dtypes and all bits of a tree.

  All processes must call it together.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  sums = layout.to_host(_sums([leaf for _, leaf in leaves]))
  listed = [
    [
      jax.tree_util.keystr(path, simple=True, separator="/"),
      np.dtype(leaf.dtype).name,
      list(leaf.shape),
      [int(one) for one in both],
    ]
    for (path, leaf), both in zip(leaves, sums, strict=True)
  ]
  return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  return [jnp.stack([_sum(x, factor) for factor in _FACTORS]) for x in leaves]


def _sum(x: jax.Array, factor: int) -> jax.Array:
  """Sum of the elements' hashes, modulo 2 ** 32."""
  bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place += along * jnp.uint32(stride)
  mixed = bits.astype(jnp.uint32) ^ (place * jnp.uint32(factor))
  mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(_MIXED)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(factor)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
