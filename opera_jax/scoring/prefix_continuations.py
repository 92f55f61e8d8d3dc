"""The reward's view of the model: prefixes and the continuations that fork from
them, in one forward pass.

Shape key: B prefixes, T tokens of a prefix, S continuations of a prefix, G
tokens of a continuation, X = T + S * G tokens of a row, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opera_jax.models import attention
from opera_jax.scoring import token_logprobs


def logprob_fn(
  graphdef: nnx.GraphDef, *, temperature: float = 1.0
) -> Callable[..., tuple[jax.Array, ...]]:
  """The function that `LogprobScorer` compiles.

  Args:
    graphdef: of the model.
    temperature: divides the logits.

  Returns:
    `f(params, token_BT, length_B, input_BSG, target_BSG, prefix_length_BS)`,
    where the arrays are those of a `packing.MicroBatch`. It returns
    log-probability and entropy of the prefixes' tokens [B, T] (entry t for
    token t given the tokens before it; entry 0 is 0) and of the continuations'
    targets [B, S, G], float32, in nats.
  """

  def fn(
    params: Any,
    token_BT: jax.Array,
    length_B: jax.Array,
    input_BSG: jax.Array,
    target_BSG: jax.Array,
    prefix_length_BS: jax.Array,
  ) -> tuple[jax.Array, ...]:
    model = nnx.merge(graphdef, params)
    B, T = token_BT.shape
    S, G = input_BSG.shape[1:]
    position_T = jnp.arange(T, dtype=jnp.int32)
    segment_BT = (position_T[None] < length_B[:, None]).astype(jnp.int32)
    position_BSG = (
      prefix_length_BS[:, :, None] + jnp.arange(G, dtype=jnp.int32)[None, None]
    )
    flat = (B, S * G)
    hidden_BXD, _ = model(
      jnp.concatenate([token_BT, input_BSG.reshape(flat)], axis=1),
      jnp.concatenate(
        [
          jnp.broadcast_to(position_T[None], (B, T)),
          position_BSG.reshape(flat),
        ],
        axis=1,
      ),
      attention.prefix_and_continuations(
        segment_BT,
        prefix_length_BS,
        G,
        implementation=model.config.attention or None,
      ),
    )
    target_BX = jnp.concatenate(
      [jnp.roll(token_BT, -1, axis=1), target_BSG.reshape(flat)], axis=1
    )
    logprob_BX, entropy_BX = token_logprobs.token_logprobs(
      model, hidden_BXD, target_BX, temperature=temperature
    )
    return (
      token_logprobs.shift_right(logprob_BX[:, :T]),
      token_logprobs.shift_right(entropy_BX[:, :T]),
      logprob_BX[:, T:].reshape(B, S, G),
      entropy_BX[:, T:].reshape(B, S, G),
    )

  return fn
