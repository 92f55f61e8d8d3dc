"""Log-probability and entropy of target tokens, from final hidden states.

Shape key: B rows, T tokens of a row, D hidden size.
"""

import jax
import jax.numpy as jnp

from opera_jax.models import decoder, sharded_ops


def token_logprobs(
  model: decoder.Decoder,
  hidden_BTD: jax.Array,
  target_BT: jax.Array,
  *,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """Applies the language model head and scores one target per hidden state.

  Args:
    model: whose head is applied.
    hidden_BTD: final hidden states, each just before its target.
    target_BT: int32 token ids to score.
    temperature: divides the logits.

  Returns:
    Log-probability [B, T] of the targets and entropy [B, T] of the
    distributions, float32, in nats.
  """
  head, transposed = model.head_matrix()
  return sharded_ops.token_logprob(
    hidden_BTD,
    head.astype(hidden_BTD.dtype),
    target_BT,
    temperature=temperature,
    transposed=transposed,
  )


def shift_right(x_BT: jax.Array) -> jax.Array:
  """Shifts [B, T, ...] right by one along T; entry 0 becomes 0.

  The state at token t - 1 predicts token t, so this moves its output to t.
  """
  rest = ((0, 0),) * (x_BT.ndim - 2)
  return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0), *rest))
