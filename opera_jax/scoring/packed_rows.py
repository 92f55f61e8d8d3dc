"""The update's view of the model: log-probabilities of a batch's packed rows.

Shape key: R packed rows, T tokens of a row, X predicting states of a row, P
tokens of a shared prompt, S completions that share it, G tokens of each, D
hidden size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opera_jax import structs
from opera_jax.models import attention, decoder
from opera_jax.scoring import token_logprobs


@dataclasses.dataclass(frozen=True)
class PredictingStates:
  """Final hidden states of packed rows, each of which predicts one token.

  Without a shared prompt there is a state for every token (X = T), and state t
  predicts token t + 1. With one, only the completions have states (X = T - P):
  state x predicts token P + x.

  Attributes:
    hidden_RXD: the states.
    prefix_length: P, leading tokens without a state; 0 without a shared prompt.
  """

  hidden_RXD: jax.Array
  prefix_length: int

  def to_states(self, x_RT: jax.Array) -> jax.Array:
    """Aligns token values with the states that predict them.

    Args:
      x_RT: [R, T, ...], one value per token.

    Returns:
      [R, X, ...]: for each state the value of the token that it predicts.
    """
    if self.prefix_length:
      return x_RT[:, self.prefix_length :]
    return jnp.roll(x_RT, -1, axis=1)

  def to_tokens(self, x_RX: jax.Array) -> jax.Array:
    """Aligns state outputs with the tokens that the states predict.

    Args:
      x_RX: [R, X, ...], one value per state.

    Returns:
      [R, T, ...]: 0 for tokens that no state predicts.
    """
    if self.prefix_length:
      rest = ((0, 0),) * (x_RX.ndim - 2)
      return jnp.pad(x_RX, ((0, 0), (self.prefix_length, 0), *rest))
    return token_logprobs.shift_right(x_RX)


def predicting_states(
  model: decoder.Decoder, batch: structs.Batch
) -> PredictingStates:
  """Runs the model on packed rows; a shared prompt is computed once."""
  implementation = model.config.attention or None
  if not batch.num_continuations:
    attend = attention.causal(batch.segments, implementation=implementation)
    hidden_RTD, _ = model(batch.tokens, batch.positions, attend)
    return PredictingStates(hidden_RTD, prefix_length=0)
  P, S = batch.prefix_length, batch.num_continuations
  R, T = batch.tokens.shape
  G = (T - P) // S
  segment_RP = (batch.segments[:, :P] == 1).astype(jnp.int32)
  # A completion's first position is the number of prompt tokens before it.
  prompt_length_RS = batch.positions[:, P::G]
  attend = attention.prefix_and_continuations(
    segment_RP, prompt_length_RS, G, implementation=implementation
  )
  hidden_RTD, _ = model(batch.tokens, batch.positions, attend)
  # The last state of the prompt predicts the first token of each completion.
  last_RS1 = jnp.maximum(prompt_length_RS - 1, 0)[..., None]
  prompt_RSD = jnp.take_along_axis(hidden_RTD[:, :P], last_RS1, axis=1)
  own_RSGD = hidden_RTD[:, P:].reshape(R, S, G, -1)
  hidden_RSGD = jnp.concatenate(
    [prompt_RSD[:, :, None], own_RSGD[:, :, :-1]], axis=2
  )
  return PredictingStates(hidden_RSGD.reshape(R, S * G, -1), prefix_length=P)


def logprob_fn(
  graphdef: nnx.GraphDef, *, temperature: float = 1.0
) -> Callable[[Any, structs.Batch], tuple[jax.Array, jax.Array]]:
  """The function that an update differentiates.

  Args:
    graphdef: of the model.
    temperature: divides the logits.

  Returns:
    `f(params, batch) -> (logprob_RT, entropy_RT)`, float32, in nats: entry t
    is the log-probability of token t given the tokens before it in its
    segment, and the entropy of that distribution. Entry 0 is 0, and so is
    every entry of a prompt that completions share.
  """

  def fn(params: Any, batch: structs.Batch) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, params)
    states = predicting_states(model, batch)
    logprob_RX, entropy_RX = token_logprobs.token_logprobs(
      model,
      states.hidden_RXD,
      states.to_states(batch.tokens),
      temperature=temperature,
    )
    return states.to_tokens(logprob_RX), states.to_tokens(entropy_RX)

  return fn
