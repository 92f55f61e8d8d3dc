"""The mean hidden state: padding, order and company change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opera_jax.models import attention
from opera_jax.scoring import embed


def test_mean_of_the_plain_hidden_states(tiny_model, one_device):
  config, graphdef, params = tiny_model
  rng = np.random.default_rng(0)
  texts = [
    rng.integers(0, config.vocab_size, size).astype(np.int32)
    for size in (3, 17, 1, 30, 8, 9, 40)
  ]

  @jax.jit
  def plain(tokens):
    hidden, _ = nnx.merge(graphdef, params)(
      tokens[None],
      jnp.arange(len(tokens))[None],
      attention.causal(jnp.ones((1, len(tokens)), jnp.int32)),
    )
    return hidden[0].mean(axis=0)

  found = embed.Embedder(
    graphdef, mesh=one_device, rows=2, length_buckets=(8, 32)
  ).embed(params, texts)
  assert found.shape == (len(texts), config.hidden_size)
  # The last text is truncated to the largest bucket.
  expected = [plain(text[:32]) for text in texts]
  np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)
