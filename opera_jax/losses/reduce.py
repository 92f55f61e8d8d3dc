"""From per-token losses to one number.

Each reduction is a weight per token, so a loss is `sum(weight * loss)`. The
weights are computed once from the masks of the WHOLE mini-batch; micro-batches
and devices only add, so the loss does not depend on how the batch was split.

Shape key: R rows, T tokens of a row.
"""

import jax
import jax.numpy as jnp

NAMES = ("token_mean", "sequence_mean", "constant")


def token_weight(
  name: str,
  loss_mask_RT: jax.Array,
  segments_RT: jax.Array,
  *,
  constant: float | None = None,
) -> jax.Array:
  """The weight of each token in the loss.

      token_mean      1 / (targets in the batch)
      sequence_mean   1 / (targets in my sequence * sequences in the batch)
      constant        1 / constant

  A sequence is one segment of one row; sequences without targets do not count.

  Args:
    name: OPERA and GRPO use "sequence_mean", DAPO "token_mean", Dr.GRPO
      "constant" (the sum over the batch divided by `constant`).
    loss_mask_RT: float32, 1 where token t is a target.
    segments_RT: int32, the sequences packed in a row are numbered from 1;
      0 is padding.
    constant: the divisor of "constant", positive; unused by the others.

  Returns:
    float32 [R, T], 0 for tokens that are not targets; all zeros for an empty
    batch.

  Raises:
    ValueError: an unknown reduction, or "constant" without a positive divisor.
  """
  mask_RT = jnp.where(segments_RT > 0, loss_mask_RT, 0.0)
  mask_RT = mask_RT.astype(jnp.float32)
  if name == "token_mean":
    return mask_RT / jnp.maximum(jnp.sum(mask_RT), 1.0)
  if name == "sequence_mean":
    length_RS = jax.vmap(_segment_sum)(mask_RT, segments_RT)
    sequences = jnp.sum(length_RS > 0)
    mine_RT = sequence_sum(mask_RT, segments_RT)
    return mask_RT / jnp.maximum(mine_RT * sequences, 1.0)
  if name == "constant":
    if constant is None or constant <= 0:
      raise ValueError(
        f'Reduction "constant" divides by a positive constant, got '
        f"{constant}. Pass constant=, for example the response limit."
      )
    return mask_RT / constant
  raise ValueError(f"Unknown reduction {name!r}. Use one of {NAMES}.")


def sequence_sum(value_RT: jax.Array, segments_RT: jax.Array) -> jax.Array:
  """The sum of values over each token's own sequence, at every token.

  Args:
    value_RT: float32.
    segments_RT: int32, see `token_weight`.

  Returns:
    float32 [R, T].
  """
  total_RS = jax.vmap(_segment_sum)(value_RT, segments_RT)
  return jnp.take_along_axis(total_RS, segments_RT, axis=1)


def _segment_sum(value_T: jax.Array, segments_T: jax.Array) -> jax.Array:
  """Sum of each segment of one row, [T + 1]."""
  return jax.ops.segment_sum(
    value_T, segments_T, num_segments=value_T.shape[0] + 1
  )


def weighted_sum(weight_RT: jax.Array, value_RT: jax.Array) -> jax.Array:
  """`sum(weight * value)` in float32, a scalar.

  A value whose weight is 0 is ignored, even if infinite or NaN, and gets no
  gradient.
  """
  kept_RT = jnp.where(weight_RT > 0, value_RT, 0.0)
  return jnp.sum(weight_RT * kept_RT.astype(jnp.float32))
