"""Products with weights: with gradients written out, or for few tokens.

Shape key: B rows, T tokens, D hidden, V vocabulary, I inputs and O outputs of a
projection, X all tokens, padded to whole eights.
"""

import functools
import math

import jax
import jax.numpy as jnp

from opera_jax.kernels import target
from opera_jax.sharding import rules

# Tokens of one small matmul on a CPU. XLA picks the order of its sums by the
# shape and the number of threads (it may split the contraction between them),
# so that only matmuls of one shape add up alike.
BLOCK_TOKENS = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(embed_VD: jax.Array, token_BT: jax.Array, dtype: str) -> jax.Array:
  """Rows [B, T, D] of the table in `dtype`; their gradients add in float32."""
  return embed_VD.astype(dtype)[token_BT]


def _look_up_forward(embed_VD, token_BT, dtype):
  return look_up(embed_VD, token_BT, dtype), (embed_VD, token_BT)


def _look_up_backward(dtype, saved, grad_BTD):
  del dtype
  embed_VD, token_BT = saved
  zeros_VD = jnp.zeros(embed_VD.shape, jnp.float32)
  mesh = jax.sharding.get_abstract_mesh()
  if not rules.alone() and rules.ways(("data", "sequence"), mesh) == 1:
    # Features go to where the table's lie; else it would be summed whole.
    # From rows over several axes the partitioner knows no way but through
    # whole states, which is worse.
    grad_BTD = rules.constrain(grad_BTD, (None, None, "features"))
    zeros_VD = rules.constrain(zeros_VD, ("vocab", "features"))
  grad_VD = zeros_VD.at[token_BT].add(grad_BTD.astype(jnp.float32))
  return grad_VD.astype(embed_VD.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


@jax.custom_vjp
def project(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
  """x @ w, [B, T, O], whose gradients turn the narrower factor alone.

  The weights' gradient contracts all tokens, so that one of its factors is
  turned first. Left to itself that is the output's, and on a CPU all that led
  to it is then computed column by column.
  """
  return x_BTI @ w_IO


def _project_forward(x_BTI, w_IO):
  return project(x_BTI, w_IO), (x_BTI, w_IO)


def _project_backward(saved, grad_BTO):
  x_BTI, w_IO = saved
  narrow_first = w_IO.shape[0] <= w_IO.shape[1]
  pair = (x_BTI, grad_BTO) if narrow_first else (grad_BTO, x_BTI)
  grad = jax.lax.dot_general(*pair, (((0, 1), (0, 1)), ((), ())))
  return grad_BTO @ w_IO.T, grad if narrow_first else grad.T


project.defvjp(_project_forward, _project_backward)


def small_batch_matmul(
  x: jax.Array,
  weight: jax.Array,
  axes: int = 1,
  *,
  preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """`jnp.tensordot(x, weight, axes)`, as one CPU likes it for few tokens.

  From two tokens on, a token's numbers there do not change with how many there
  are: every matmul has the same shape, 8 tokens. The weight is the left factor
  and tokens lie side by side, which takes about three quarters of the time. The
  weight must lie in memory with its inputs last (be turned as it is handed
  over); otherwise every call turns it.

  Args:
    x: [..., inputs], as many axes of inputs as `axes` says.
    weight: [inputs, outputs], each of one or more axes.
    axes: how many axes are inputs.
    preferred_element_type: of the result; None is x's and the weight's.

  Returns:
    [..., outputs].
  """
  dtype = preferred_element_type or jnp.result_type(x, weight)
  lead, outputs = x.shape[: x.ndim - axes], weight.shape[axes:]
  tokens, inputs = math.prod(lead), math.prod(weight.shape[:axes])
  if target.platform() != "cpu" or not rules.alone() or tokens == 1:
    return jnp.tensordot(x, weight, axes, preferred_element_type=dtype)
  x_XI = jnp.pad(
    x.reshape(tokens, inputs), ((0, -tokens % BLOCK_TOKENS), (0, 0))
  )
  weight_OI = weight.reshape(inputs, -1).T

  def multiply(x_XI):
    out_OX = jax.lax.dot_general(
      weight_OI, x_XI, (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )
    # Else XLA would turn the factors instead of the product.
    return jax.lax.optimization_barrier(out_OX).T

  blocks = [
    multiply(x_XI[start : start + BLOCK_TOKENS])
    for start in range(0, x_XI.shape[0], BLOCK_TOKENS)
  ]
  out_XO = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks)
  return out_XO[:tokens].reshape(*lead, *outputs)
