"""A matmul for a small batch of tokens on a CPU, as decoding needs it.

A token's result does not depend on how many tokens are multiplied with it. XLA
chooses the order of a matmul's sums by its shape and by the number of threads
(it may split the contraction between them), so only matmuls of one shape add up
in one order. Every matmul here has the same shape: a block of 8 tokens.

Shape key: I inputs and O outputs of the matmul, M tokens padded to whole
blocks, b tokens of one block.
"""

import math

import jax
import jax.numpy as jnp

from opera_jax.kernels import target
from opera_jax.sharding import rules

BLOCK_TOKENS = 8


def small_batch_matmul(
  x: jax.Array,
  weight_OI: jax.Array,
  *,
  preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """Computes x @ weight.T; see the module for what it guarantees on a CPU.

  With the weight as the left operand and the tokens side by side, a block takes
  about three quarters of the time of the usual order. The weight must be stored
  as [O, I]; XLA would otherwise transpose it at every call.

  The guarantee holds from two tokens on: a single token is a matrix-vector
  product, which is faster and sums in another order. Accelerators and meshes of
  several devices take a plain matmul.

  Args:
    x: [..., I].
    weight_OI: [O, I].
    preferred_element_type: dtype of the result; None means that of the
      operands.

  Returns:
    [..., O].
  """
  dtype = preferred_element_type or jnp.result_type(x, weight_OI)
  *batch, inputs = x.shape
  tokens = math.prod(batch)
  if target.platform() != "cpu" or not rules.is_single_device() or tokens == 1:
    return jnp.tensordot(x, weight_OI.T, 1, preferred_element_type=dtype)
  x_MI = jnp.pad(
    x.reshape(tokens, inputs), ((0, -tokens % BLOCK_TOKENS), (0, 0))
  )

  def multiply(x_bI: jax.Array) -> jax.Array:
    out_Ob = jax.lax.dot_general(
      weight_OI, x_bI, (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )
    # Without the barrier XLA transposes the operands instead of the product.
    return jax.lax.optimization_barrier(out_Ob).T

  blocks = [
    multiply(x_MI[start : start + BLOCK_TOKENS])
    for start in range(0, x_MI.shape[0], BLOCK_TOKENS)
  ]
  out_MO = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks)
  return out_MO[:tokens].reshape(*batch, -1)
