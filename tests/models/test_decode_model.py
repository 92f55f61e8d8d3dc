"""The unstacked layers decode what the model with stacked layers computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opera_jax.models import attention, decode_model, decoder


def _tokens(vocab_size, shape=(3, 5)):
  rng = np.random.default_rng(0)
  return rng.integers(0, vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_and_logits_are_the_models(tiny_model, tied):
  """With one attention for both: layers, norms and head are what differs."""
  config = dataclasses.replace(tiny_model[0], tie_word_embeddings=tied)
  graphdef, params = decoder.create(config, seed=4)
  token_BT = _tokens(config.vocab_size)
  position_BT = np.broadcast_to(np.arange(5, dtype=np.int32), token_BT.shape)

  @jax.jit
  def both(params):
    model = nnx.merge(graphdef, params)
    attend = attention.causal(jnp.ones(token_BT.shape, jnp.int32))
    inputs = jnp.asarray(token_BT), jnp.asarray(position_BT)
    want, _ = model(*inputs, attend)
    layers = decode_model.unstack_layers(model)
    got, _ = decode_model.hidden_states(model, layers, *inputs, attend, None)
    head, transposed = model.head_matrix()
    head_DV = head.T if transposed else head
    flat = got.reshape(-1, config.hidden_size)
    got_logits = decode_model.logits(flat, head_DV, tied=tied)
    return want, got, want @ head_DV, got_logits

  want, got, want_logits, got_logits = both(params)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    got_logits.reshape(want_logits.shape), want_logits, rtol=1e-4, atol=1e-4
  )


def test_layers_are_unstacked_in_the_compute_dtype(tiny_model):
  config = dataclasses.replace(tiny_model[0], dtype="bfloat16")
  graphdef, params = decoder.create(config, seed=4)
  model = nnx.merge(graphdef, params)
  layers = decode_model.unstack_layers(model)
  assert len(layers) == config.num_hidden_layers
  D, N, H = 48, 4, 16
  for index, layer in enumerate(layers):
    assert {x.dtype for x in jax.tree.leaves(layer)} == {jnp.dtype("bfloat16")}
    stacked = model.layers.attention
    q_DNH = np.asarray(stacked.q[...][index].astype(jnp.bfloat16))
    np.testing.assert_array_equal(layer.q, q_DNH.reshape(D, N * H).T)
    o_NHD = np.asarray(stacked.o[...][index].astype(jnp.bfloat16))
    np.testing.assert_array_equal(layer.o, o_NHD.reshape(N * H, D).T)


@pytest.mark.parametrize("features", [16, 48, 256])
def test_rms_norm_does_not_depend_on_how_many_tokens_there_are(features):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, features)).astype(np.float32)
  scale = rng.normal(size=features).astype(np.float32)
  norm = jax.jit(lambda x: decode_model.rms_norm(x, scale, 1e-6))
  every = norm(x)
  np.testing.assert_allclose(
    every, decoder.rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-6), rtol=1e-5
  )
  for count in (1, 2, 3, 8, 17):
    np.testing.assert_array_equal(norm(x[:count]), every[:count])
