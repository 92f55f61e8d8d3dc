"""What some losses ask of the model besides the sampled token's
log-probability.

A critic is a linear head on the policy's last hidden state. A teacher's top
tokens are found block by block of the vocabulary, so that no
[tokens, vocabulary] array is ever whole.

Shape key: R rows, T tokens of a row, X states of a row, K top tokens, D hidden,
V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opera_jax import structs
from opera_jax.scoring import logprob_scorer


def init_value(hidden: int) -> dict[str, jax.Array]:
  """A critic that says 0 everywhere: kernel [D] and bias []."""
  return {"kernel": jnp.zeros(hidden), "bias": jnp.zeros(())}


def row_heads(
  graphdef: nnx.GraphDef, *, temperature: float = 1.0
) -> Callable[[Any, structs.Batch], tuple[Any, ...]]:
  """`logprob_scorer.row_logprob` with further heads.

  Returns:
    `f(params, batch) -> (logprob_RT, entropy_RT, heads)` where params is
    {"policy": the model's, "value": a critic's}. heads["value"] [R, T] is the
    critic's word before token t; heads["top_logprob"] [R, T, K], where
    `batch.extra` has "top_ids" [R, T, K], the log-probability of those tokens
    in the place of token t.
  """

  def fn(params, batch: structs.Batch):
    model = nnx.merge(graphdef, params["policy"])
    states = logprob_scorer.row_states(model, batch)
    hidden_RXD, target_RX = states.hidden_RXD, states.said(batch.tokens)
    logprob_RX, entropy_RX = logprob_scorer.token_logprobs(
      model, hidden_RXD, target_RX, temperature
    )
    critic = params["value"]
    value_RX = hidden_RXD.astype(jnp.float32) @ critic["kernel"]
    heads = {"value": states.placed(value_RX + critic["bias"])}
    if "top_ids" in batch.extra:
      head, transposed = model.head_matrix()
      head = head.astype(hidden_RXD.dtype)
      rows_VD = head if transposed else head.T
      ids_RXK = states.said(batch.extra["top_ids"])
      logit_RX = _logits(hidden_RXD, rows_VD, target_RX[..., None], temperature)
      scale_RX1 = logit_RX - logprob_RX[..., None]
      logit_RXK = _logits(hidden_RXD, rows_VD, ids_RXK, temperature)
      heads["top_logprob"] = states.placed(logit_RXK - scale_RX1)
    return states.placed(logprob_RX), states.placed(entropy_RX), heads

  return fn


def row_top(
  graphdef: nnx.GraphDef,
  top: int,
  *,
  temperature: float = 1.0,
  block: int = 8192,
) -> Callable[[Any, structs.Batch], tuple[jax.Array, jax.Array]]:
  """The likeliest tokens in the place of every token.

  Args:
    graphdef: of the model.
    top: K, at most the vocabulary.
    temperature: divides the logits.
    block: columns of the vocabulary at a time.

  Returns:
    `f(params, batch) -> (ids_RTK int32, logprob_RTK float32)`, likeliest
    first; entry t stands in the place of token t.
  """

  def fn(params, batch: structs.Batch):
    model = nnx.merge(graphdef, params)
    states = logprob_scorer.row_states(model, batch)
    head, transposed = model.head_matrix()
    rows_VD = (head if transposed else head.T).astype(jnp.float32)
    V = rows_VD.shape[0]
    starts = range(0, V, block)

    def row(hidden_TD):
      hidden_TD = hidden_TD.astype(jnp.float32)
      best_TK = jnp.full((hidden_TD.shape[0], top), -jnp.inf)
      ids_TK = jnp.zeros(best_TK.shape, jnp.int32)
      norm_T = jnp.full(hidden_TD.shape[0], -jnp.inf)
      for start in starts:
        part = rows_VD[start : start + block]
        logit = hidden_TD @ part.T / temperature
        norm_T = jnp.logaddexp(norm_T, jax.nn.logsumexp(logit, axis=-1))
        every = jnp.concatenate([best_TK, logit], axis=1)
        named = jnp.broadcast_to(
          jnp.arange(start, start + part.shape[0]), logit.shape
        )
        names = jnp.concatenate([ids_TK, named], axis=1)
        best_TK, place = jax.lax.top_k(every, top)
        ids_TK = jnp.take_along_axis(names, place, axis=1)
      return ids_TK, best_TK - norm_T[:, None]

    ids_RXK, logprob_RXK = jax.lax.map(row, states.hidden_RXD)
    return states.placed(ids_RXK), states.placed(logprob_RXK)

  return fn


def _logits(hidden_RTD, rows_VD, ids_RTK, temperature):
  """Logits of a few tokens at each place; one row's head rows at a time."""

  @jax.checkpoint
  def row(carry):
    hidden_TD, ids_TK = carry
    return jnp.einsum(
      "td,tkd->tk",
      hidden_TD,
      rows_VD[ids_TK],
      preferred_element_type=jnp.float32,
    )

  return jax.lax.map(row, (hidden_RTD, ids_RTK)) / temperature
