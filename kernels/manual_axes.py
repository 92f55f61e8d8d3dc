"""Tracks over which mesh axes a value varies inside `jax.shard_map`.

A loop's carry must have the same type before and after an iteration, and a
custom backward pass must return cotangents of its primals' types. Outside of
`shard_map`, or with check_vma=False, no value varies and these functions do
nothing.
"""

import jax


def varying_like(x: jax.Array, *like: jax.Array) -> jax.Array:
  """Marks x as varying over every mesh axis that one of `like` varies over."""
  missing = tuple(sorted(varying(*like) - varying(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def reduce_like(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
  """Sums a cotangent over the mesh axes that its primal is replicated over."""
  axes = tuple(sorted(varying(cotangent) - varying(primal)))
  return jax.lax.psum(cotangent, axes) if axes else cotangent


def shape_like(
  shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *operands: jax.Array
) -> jax.ShapeDtypeStruct:
  """The type of a kernel's output, which varies where an operand varies."""
  kind = jax.sharding.ManualAxisType(varying=varying(*operands))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def varying(*arrays: jax.Array) -> frozenset[str]:
  """The mesh axes that at least one of the arrays varies over."""
  return frozenset().union(
    *(jax.typeof(x).manual_axis_type.varying for x in arrays)
  )
