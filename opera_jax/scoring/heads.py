"""Outputs that some losses need besides the sampled token's log-probability.

A critic is a linear head on the policy's last hidden state. The teacher's
top-k tokens are found block by block over the vocabulary, so that a full
[tokens, vocabulary] array is never materialised.

Shape key: R packed rows, T tokens of a row, X predicting states of a row, K
teacher tokens per position, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opera_jax import structs
from opera_jax.scoring import packed_rows, token_logprobs


def init_value(hidden_size: int) -> dict[str, jax.Array]:
  """A critic whose value is 0 everywhere: kernel [D] and bias []."""
  return {"kernel": jnp.zeros(hidden_size), "bias": jnp.zeros(())}


def logprob_and_heads_fn(
  graphdef: nnx.GraphDef, *, temperature: float = 1.0
) -> Callable[[Any, structs.Batch], tuple[Any, ...]]:
  """`packed_rows.logprob_fn` with the outputs of a critic and for a teacher.

  Args:
    graphdef: of the model.
    temperature: divides the logits.

  Returns:
    `f(params, batch) -> (logprob_RT, entropy_RT, heads)` where params is
    {"policy": the model's parameters, "value": the critic's}. heads["value"]
    [R, T] is the critic's value of the state before token t. Where
    `batch.extra` has the teacher's "top_ids" [R, T, K], heads["top_logprob"]
    [R, T, K] is the policy's log-probability of those tokens at position t.
  """

  def fn(params: Any, batch: structs.Batch) -> tuple[Any, ...]:
    model = nnx.merge(graphdef, params["policy"])
    states = packed_rows.predicting_states(model, batch)
    hidden_RXD = states.hidden_RXD
    target_RX = states.to_states(batch.tokens)
    logprob_RX, entropy_RX = token_logprobs.token_logprobs(
      model, hidden_RXD, target_RX, temperature=temperature
    )
    critic = params["value"]
    value_RX = hidden_RXD.astype(jnp.float32) @ critic["kernel"]
    heads = {"value": states.to_tokens(value_RX + critic["bias"])}
    if "top_ids" in batch.extra:
      head, transposed = model.head_matrix()
      head = head.astype(hidden_RXD.dtype)
      head_VD = head if transposed else head.T
      ids_RXK = states.to_states(batch.extra["top_ids"])
      logit_RX = _logits(
        hidden_RXD, head_VD, target_RX[..., None], temperature=temperature
      )
      normalizer_RX1 = logit_RX - logprob_RX[..., None]
      logit_RXK = _logits(hidden_RXD, head_VD, ids_RXK, temperature=temperature)
      heads["top_logprob"] = states.to_tokens(logit_RXK - normalizer_RX1)
    return states.to_tokens(logprob_RX), states.to_tokens(entropy_RX), heads

  return fn


def top_tokens_fn(
  graphdef: nnx.GraphDef,
  teacher_top_k: int,
  *,
  temperature: float = 1.0,
  block: int = 8192,
) -> Callable[[Any, structs.Batch], tuple[jax.Array, jax.Array]]:
  """The K most likely tokens at every position, under a teacher.

  Args:
    graphdef: of the model.
    teacher_top_k: K, at most the vocabulary.
    temperature: divides the logits.
    block: vocabulary entries whose logits are computed at a time.

  Returns:
    `f(params, batch) -> (ids_RTK int32, logprob_RTK float32)`, most likely
    first; entry t holds the alternatives to token t.
  """

  def fn(params: Any, batch: structs.Batch) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, params)
    states = packed_rows.predicting_states(model, batch)
    head, transposed = model.head_matrix()
    head_VD = (head if transposed else head.T).astype(jnp.float32)
    V = head_VD.shape[0]
    starts = range(0, V, block)

    def top_of_row(hidden_XD: jax.Array) -> tuple[jax.Array, jax.Array]:
      hidden_XD = hidden_XD.astype(jnp.float32)
      best_XK = jnp.full((hidden_XD.shape[0], teacher_top_k), -jnp.inf)
      ids_XK = jnp.zeros(best_XK.shape, jnp.int32)
      norm_X = jnp.full(hidden_XD.shape[0], -jnp.inf)
      for start in starts:
        head_block = head_VD[start : start + block]
        logit = hidden_XD @ head_block.T / temperature
        norm_X = jnp.logaddexp(norm_X, jax.nn.logsumexp(logit, axis=-1))
        # Merge the best so far with this block and keep the best K of both.
        merged_logit = jnp.concatenate([best_XK, logit], axis=1)
        block_ids = jnp.broadcast_to(
          jnp.arange(start, start + head_block.shape[0]), logit.shape
        )
        merged_ids = jnp.concatenate([ids_XK, block_ids], axis=1)
        best_XK, index_XK = jax.lax.top_k(merged_logit, teacher_top_k)
        ids_XK = jnp.take_along_axis(merged_ids, index_XK, axis=1)
      return ids_XK, best_XK - norm_X[:, None]

    ids_RXK, logprob_RXK = jax.lax.map(top_of_row, states.hidden_RXD)
    return states.to_tokens(ids_RXK), states.to_tokens(logprob_RXK)

  return fn


def _logits(
  hidden_RXD: jax.Array,
  head_VD: jax.Array,
  ids_RXK: jax.Array,
  *,
  temperature: float,
) -> jax.Array:
  """Logits [R, X, K] of K token ids per state.

  Rows are mapped one by one, so that the gathered head vectors [X, K, D] of
  only one row are alive; they are rematerialised in the backward pass.
  """

  @jax.checkpoint
  def logits_of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
    hidden_XD, ids_XK = row
    return jnp.einsum(
      "td,tkd->tk",
      hidden_XD,
      head_VD[ids_XK],
      preferred_element_type=jnp.float32,
    )

  return jax.lax.map(logits_of_row, (hidden_RXD, ids_RXK)) / temperature
