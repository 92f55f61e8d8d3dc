"""Token log-probability and entropy by their definition: all logits at once.

Shape key: M tokens, D features, V vocabulary.
"""

import jax
import jax.numpy as jnp


def token_logprob(
  hidden_MD: jax.Array,
  head: jax.Array,
  target_M: jax.Array,
  *,
  temperature: float,
  transposed: bool,
) -> tuple[jax.Array, jax.Array]:
  """log softmax(hidden @ head / temperature) at the target, and its entropy."""
  head_DV = head.T if transposed else head
  logit_MV = jnp.dot(hidden_MD, head_DV, preferred_element_type=jnp.float32)
  log_p_MV = jax.nn.log_softmax(logit_MV / temperature, axis=-1)
  picked_M1 = jnp.take_along_axis(log_p_MV, target_M[:, None], axis=-1)
  entropy_M = -jnp.sum(jnp.exp(log_p_MV) * log_p_MV, axis=-1)
  return picked_M1[:, 0], entropy_M
