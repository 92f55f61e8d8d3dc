"""A critic's values and a teacher's top tokens against whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opera_jax import structs
from opera_jax.models import attention
from opera_jax.scoring import heads, packed_rows


@pytest.fixture
def case(tiny_model):
  config, graphdef, params = tiny_model
  rng = np.random.default_rng(0)
  rows, width = 2, 12
  length = np.asarray([12, 7])
  segments = (np.arange(width)[None] < length[:, None]).astype(np.int32)
  zeros = jnp.zeros((rows, width))
  batch = structs.Batch(
    tokens=jnp.asarray(rng.integers(0, config.vocab_size, (rows, width))),
    positions=jnp.broadcast_to(jnp.arange(width), (rows, width)),
    segments=jnp.asarray(segments),
    loss_mask=zeros,
    advantage=zeros,
    old_logprob=zeros,
    ref_logprob=zeros,
  )
  model = nnx.merge(graphdef, params)
  hidden, _ = model(
    batch.tokens, batch.positions, attention.causal(batch.segments)
  )
  head, transposed = model.head_matrix()
  logits = hidden @ (head.T if transposed else head) / 0.7
  return graphdef, params, batch, hidden, jax.nn.log_softmax(logits)


@pytest.mark.parametrize("block", [64, 8192])
def test_top_tokens_equal_those_of_the_full_vocabulary(case, block):
  graphdef, params, batch, _, table = case
  fn = jax.jit(heads.top_tokens_fn(graphdef, 5, temperature=0.7, block=block))
  ids, logprob = fn(params, batch)
  want, order = jax.lax.top_k(table, 5)
  np.testing.assert_array_equal(ids[:, 1:], order[:, :-1])
  np.testing.assert_allclose(logprob[:, 1:], want[:, :-1], 1e-5, 1e-5)


def test_heads_give_the_plain_logprobs_and_those_of_the_named_tokens(case):
  graphdef, params, batch, hidden, table = case
  rng = np.random.default_rng(1)
  ids = rng.integers(0, table.shape[-1], (*batch.tokens.shape, 3))
  batch = batch.replace(extra={"top_ids": jnp.asarray(ids)})
  critic = {
    "kernel": jnp.asarray(rng.normal(size=hidden.shape[-1]), jnp.float32),
    "bias": jnp.float32(0.5),
  }
  fn = jax.jit(heads.logprob_and_heads_fn(graphdef, temperature=0.7))
  logprob, entropy, got = fn({"policy": params, "value": critic}, batch)
  plain = jax.jit(packed_rows.logprob_fn(graphdef, temperature=0.7))
  want_logprob, want_entropy = plain(params, batch)
  np.testing.assert_allclose(logprob, want_logprob, atol=1e-5)
  np.testing.assert_allclose(entropy, want_entropy, atol=1e-5)
  value = hidden @ critic["kernel"] + 0.5
  np.testing.assert_allclose(got["value"][:, 1:], value[:, :-1], atol=1e-4)
  want = np.take_along_axis(np.asarray(table)[:, :-1], ids[:, 1:], axis=-1)
  np.testing.assert_allclose(got["top_logprob"][:, 1:], want, atol=1e-4)


def test_a_new_critic_is_zero():
  critic = heads.init_value(4)
  assert not critic["kernel"].any() and critic["bias"] == 0
