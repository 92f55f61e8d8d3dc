"""Next-token cross entropy, per token, from log-probabilities."""

import jax


def cross_entropy(logprob_RT: jax.Array) -> jax.Array:
  """`-log p(token t | tokens before t)`, float32 [R, T], nats.

  The log-probabilities come from a head that streams over the vocabulary, so
  no [tokens, vocabulary] array exists here either.
  """
  return -logprob_RT
