"""Logits to a token.

Shape key: R rows, V vocabulary.
"""

import jax
import jax.numpy as jnp


def truncate(
  logit_RV: jax.Array, *, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
  """Sets logits outside the top k, then outside the nucleus, to -inf.

  Args:
    logit_RV: float32, already divided by the temperature.
    top_k: keep the k largest (ties with the k-th stay); 0 keeps all.
    top_p: of what is left, keep the smallest set of largest tokens whose
      probability reaches p; the most likely token always stays. 1 keeps all.

  Returns:
    float32 logits [R, V].

  Raises:
    ValueError: top_k negative or top_p outside (0, 1].
  """
  if top_k < 0 or not 0 < top_p <= 1:
    raise ValueError(
      f"Sampling needs top_k >= 0 and 0 < top_p <= 1, got top_k={top_k}, "
      f"top_p={top_p}."
    )
  V = logit_RV.shape[-1]
  if 0 < top_k < V:
    kth_R1 = jax.lax.top_k(logit_RV, top_k)[0][:, -1:]
    logit_RV = jnp.where(logit_RV < kth_R1, -jnp.inf, logit_RV)
  if top_p < 1:
    width = top_k if 0 < top_k < V else V
    sorted_RK = jax.lax.top_k(logit_RV, width)[0]
    probability_RK = jax.nn.softmax(sorted_RK, axis=-1)
    before_RK = jnp.cumsum(probability_RK, axis=-1) - probability_RK
    count_R1 = jnp.sum(before_RK < top_p, axis=-1, keepdims=True)
    last_R1 = jnp.take_along_axis(sorted_RK, count_R1 - 1, axis=-1)
    logit_RV = jnp.where(logit_RV < last_R1, -jnp.inf, logit_RV)
  return logit_RV


def sample(
  logit_RV: jax.Array,
  key_R: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token a row.

  Args:
    logit_RV: float32 logits of the head.
    key_R: one random key a row, so that a row's draw does not depend on its
      neighbours.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: see `truncate`.
    top_p: see `truncate`.

  Returns:
    Tokens [R] int32, and their log-probability [R] float32 under the
    UNtruncated distribution at this temperature (at temperature 1 if greedy),
    which is what the trainer computes.
  """
  if temperature < 0:
    raise ValueError(
      f"The temperature must be >= 0, got {temperature}. Use 0 for greedy."
    )
  scaled_RV = logit_RV if temperature == 0 else logit_RV / temperature
  if temperature == 0:
    token_R = jnp.argmax(scaled_RV, axis=-1)
  else:
    kept_RV = truncate(scaled_RV, top_k=top_k, top_p=top_p)
    noise_RV = jax.vmap(
      lambda key: jax.random.gumbel(key, kept_RV.shape[-1:], jnp.float32)
    )(key_R)
    token_R = jnp.argmax(kept_RV + noise_RV, axis=-1)
  token_R = token_R.astype(jnp.int32)
  chosen_R = jnp.take_along_axis(scaled_RV, token_R[:, None], axis=-1)[:, 0]
  return token_R, chosen_R - jax.nn.logsumexp(scaled_RV, axis=-1)
