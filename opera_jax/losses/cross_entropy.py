"""Next-token cross entropy, per token, from log-probabilities."""

import jax


def cross_entropy(logprob_RT: jax.Array) -> jax.Array:
  """`-log p(token t | tokens before t)`, float32 [R, T], nats.

  The head computes log-probabilities in blocks of the vocabulary, so no
  [tokens, vocabulary] array is materialised.
  """
  return -logprob_RT
