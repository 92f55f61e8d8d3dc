"""Embedding lookup and matmul with hand-written backward passes.

The gradients equal those of autodiff; what differs is where and in which layout
they are computed.

Shape key: B rows, T tokens, D hidden, V vocabulary, I inputs and O outputs of a
matmul.
"""

import functools

import jax
import jax.numpy as jnp

from opera_jax.sharding import rules


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embedding_lookup(
  embed_VD: jax.Array, token_BT: jax.Array, dtype: str
) -> jax.Array:
  """Gathers embeddings in `dtype`; their gradients are summed in float32.

  Args:
    embed_VD: embedding table.
    token_BT: int32 token ids.
    dtype: compute dtype.

  Returns:
    [B, T, D] in `dtype`.
  """
  return embed_VD.astype(dtype)[token_BT]


def _embedding_lookup_forward(
  embed_VD: jax.Array, token_BT: jax.Array, dtype: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return embedding_lookup(embed_VD, token_BT, dtype), (embed_VD, token_BT)


def _embedding_lookup_backward(
  dtype: str, residuals: tuple[jax.Array, jax.Array], grad_BTD: jax.Array
) -> tuple[jax.Array, None]:
  del dtype
  embed_VD, token_BT = residuals
  zeros_VD = jnp.zeros(embed_VD.shape, jnp.float32)
  mesh = jax.sharding.get_abstract_mesh()
  if (
    not rules.is_single_device()
    and rules.num_shards(("data", "sequence"), mesh) == 1
  ):
    # Shard the features like the table's. Otherwise every device would sum a
    # whole [V, D] gradient. With rows over several mesh axes GSPMD would
    # all-gather the gradient here, which is worse.
    grad_BTD = rules.constrain(grad_BTD, (None, None, "features"))
    zeros_VD = rules.constrain(zeros_VD, ("vocab", "features"))
  grad_VD = zeros_VD.at[token_BT].add(grad_BTD.astype(jnp.float32))
  return grad_VD.astype(embed_VD.dtype), None


embedding_lookup.defvjp(_embedding_lookup_forward, _embedding_lookup_backward)


@jax.custom_vjp
def matmul(x_BTI: jax.Array, weight_IO: jax.Array) -> jax.Array:
  """Computes x @ weight, [B, T, O]; the backward pass transposes little.

  The weight's gradient contracts over all tokens, so XLA transposes one of its
  two operands. By default that is the output's gradient, and a CPU then
  computes everything that leads to it column by column. Here the narrower
  operand is transposed.
  """
  return x_BTI @ weight_IO


def _matmul_forward(
  x_BTI: jax.Array, weight_IO: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return matmul(x_BTI, weight_IO), (x_BTI, weight_IO)


def _matmul_backward(
  residuals: tuple[jax.Array, jax.Array], grad_BTO: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x_BTI, weight_IO = residuals
  inputs_first = weight_IO.shape[0] <= weight_IO.shape[1]
  operands = (x_BTI, grad_BTO) if inputs_first else (grad_BTO, x_BTI)
  grad = jax.lax.dot_general(*operands, (((0, 1), (0, 1)), ((), ())))
  return grad_BTO @ weight_IO.T, grad if inputs_first else grad.T


matmul.defvjp(_matmul_forward, _matmul_backward)
