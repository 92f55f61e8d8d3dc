"""Kernels on a mesh give what they give on one device.

Shape key: as in each kernel's api.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opera_jax.kernels.perplexity_reward import api as perplexity_reward
from opera_jax.kernels.shared_prefix_attention import (
  api as shared_prefix_attention,
)
from opera_jax.kernels.token_logprob import api as token_logprob


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh(
    (2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


def _logprobs(transposed=False):
  rng = np.random.default_rng(0)
  hidden_MD = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
  head_DV = jnp.asarray(rng.normal(size=(8, 40)), jnp.float32)
  target_M = jnp.asarray(rng.integers(40, size=16), jnp.int32)
  return hidden_MD, head_DV.T if transposed else head_DV, target_M


def _loss(logprob, hidden_MD, head, target_M):
  logprob_M, entropy_M = logprob(hidden_MD, head, target_M)
  weight_M = jnp.cos(jnp.arange(16.0))
  total = jnp.sum(weight_M * logprob_M) + jnp.sum(weight_M[::-1] * entropy_M)
  return total, (logprob_M, entropy_M)


def _assert_close(got, want):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def _vocabulary_sharded(mesh, implementation, transposed):
  arrays = _logprobs(transposed)
  settings = {"temperature": 0.7, "transposed": transposed}
  sharded = jax.shard_map(
    functools.partial(
      token_logprob.token_logprob,
      axis_name="tensor",
      implementation=implementation,
      block_tokens=4,
      block_vocab=4,
      **settings,
    ),
    mesh=mesh,
    in_specs=(
      P("data"),
      P("tensor", None) if transposed else P(None, "tensor"),
      P("data"),
    ),
    out_specs=P("data"),
  )
  whole = functools.partial(
    token_logprob.token_logprob, implementation="reference", **settings
  )
  return [
    jax.jit(
      jax.value_and_grad(
        functools.partial(_loss, logprob), argnums=(0, 1), has_aux=True
      )
    )(*arrays)
    for logprob in (sharded, whole)
  ]


@pytest.mark.parametrize("transposed", [False, True])
def test_vocabulary_over_a_mesh_axis(mesh, transposed):
  _assert_close(*_vocabulary_sharded(mesh, "xla", transposed))


def test_vocabulary_over_a_mesh_axis_in_tpu_kernels(mesh, interpreted):
  _assert_close(*_vocabulary_sharded(mesh, "pallas_tpu", False))


def test_sharded_tokens_are_scored_where_they_lie(mesh):
  arrays = _logprobs()
  shardings = tuple(
    jax.NamedSharding(mesh, spec) for spec in (P("data"), P(), P("data"))
  )
  logprob = jax.jit(
    functools.partial(token_logprob.token_logprob, block_tokens=4)
  )
  placed = jax.device_put(arrays, shardings)
  _assert_close(logprob(*placed), logprob(*arrays))
  assert "all-gather" not in logprob.lower(*placed).compile().as_text()


@pytest.mark.skipif(
  jax.__version__ == "0.11.2",
  reason="the CPU compiler of jaxlib 0.11.2 crashes on the keys' gradient over "
  "a mesh of CPU devices (a segmentation fault); for TPUs it compiles",
)
def test_rows_and_heads_of_continuations_over_the_mesh(mesh):
  rng = np.random.default_rng(0)
  B, S, G, N, K, H, T = 4, 2, 3, 8, 4, 8, 9
  shapes = [(B, S, G, N, H), *[(B, T, K, H)] * 2, *[(B, S, G, K, H)] * 2]
  arrays = [jnp.asarray(rng.normal(size=x), jnp.float32) for x in shapes]
  prefix_length_BS = jnp.asarray(rng.integers(T + 1, size=(B, S)), jnp.int32)
  continuation_spec = P("data", None, None, "tensor")
  prefix_spec = P("data", None, "tensor")
  specs = [continuation_spec, *[prefix_spec] * 2, *[continuation_spec] * 2]
  attend = functools.partial(
    shared_prefix_attention.shared_prefix_attention, scale=0.3, block_keys=4
  )
  mapped = jax.shard_map(
    attend, mesh=mesh, in_specs=(*specs, P("data")), out_specs=continuation_spec
  )

  def run(attend, arrays, prefix_length_BS):
    def loss(arrays):
      out = attend(*arrays, prefix_length_BS)
      return jnp.sum(jnp.sin(jnp.arange(out.size)) * out.ravel())

    return jax.jit(jax.value_and_grad(loss))(arrays)

  want = run(attend, arrays, prefix_length_BS)
  _assert_close(run(mapped, arrays, prefix_length_BS), want)
  placed = jax.device_put(arrays, [jax.NamedSharding(mesh, x) for x in specs])
  _assert_close(run(attend, placed, prefix_length_BS), want)


def test_rows_of_rewards_over_the_mesh(mesh):
  rng = np.random.default_rng(0)
  logprob_RM = -rng.exponential(size=(8, 21)).astype(np.float32)
  continuation_RM = rng.integers(-1, 4, size=(8, 21)).astype(np.int32)
  previous_RS = rng.integers(-1, 4, size=(8, 4)).astype(np.int32)

  @jax.jit
  def reward(*arrays):
    result = perplexity_reward.perplexity_reward(*arrays)
    return result, perplexity_reward.group_rank(result.mean_RS)

  sharding = jax.NamedSharding(mesh, P(("data", "tensor")))
  placed = jax.device_put((logprob_RM, continuation_RM, previous_RS), sharding)
  got, want = reward(*placed), reward(logprob_RM, continuation_RM, previous_RS)
  assert got[0].mean_RS.sharding.is_equivalent_to(sharding, 2)
  _assert_close(got, want)
