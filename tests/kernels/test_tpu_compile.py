"""Every TPU kernel compiles for every TPU generation, without the hardware.

The compiler keeps to the VMEM limit that each kernel states (32 or 48 MiB;
the smallest VMEM is 64 MiB a core), so a kernel that needs more fails here.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from opera_jax.kernels.perplexity_reward import api as perplexity_reward
from opera_jax.kernels.shared_prefix_attention import (
  api as shared_prefix_attention,
)
from opera_jax.kernels.token_logprob import api as token_logprob

# Compiling needs no chip, so two processes may load libtpu at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
TOPOLOGIES = (
  pytest.param("v5e:2x2", marks=pytest.mark.slow),
  pytest.param("v5p:2x2x1", marks=pytest.mark.slow),
  pytest.param("v6e:2x2", marks=pytest.mark.slow),
  "tpu7x:2x2x1",
)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_cached():
  """A program for absent hardware can be written to the cache, not read."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, 1e9)
  yield
  jax.config.update(name, before)


def _compile(topology, function, *shapes):
  device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  with jax.default_matmul_precision("default"):
    jitted = jax.jit(function, in_shardings=place, out_shardings=place)
    lowered = jitted.lower(*shapes)
  kernels = lowered.as_text().count("tpu_custom_call")
  return kernels, lowered.compile().memory_analysis()


def _gradients(function, arguments):
  def loss(*arrays):
    return sum(
      jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(function(*arrays))
    )

  return jax.grad(loss, argnums=arguments)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_token_logprob_compiles_and_holds_no_logits(topology):
  shape, dtype = jax.ShapeDtypeStruct, jnp.bfloat16
  logprob = functools.partial(
    token_logprob.token_logprob,
    temperature=0.7,
    transposed=True,
    implementation="pallas_tpu",
  )
  kernels, memory = _compile(
    topology,
    _gradients(logprob, (0, 1)),
    shape((4100, 1024), dtype),
    shape((151936, 1024), dtype),
    shape((4100,), jnp.int32),
  )
  assert kernels == 3
  assert memory.temp_size_in_bytes < 16 * MIB


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
  "B,S,G,N,K,H,T,C,dtype",
  [
    (2, 4, 256, 16, 8, 128, 640, 256, jnp.bfloat16),
    (2, 3, 5, 4, 2, 64, 13, 5, jnp.float32),
    pytest.param(
      *(4, 16, 1, 32, 8, 128, 1000, 2048, jnp.bfloat16), marks=pytest.mark.slow
    ),
  ],
  ids=["scoring", "ragged", "one-query"],
)
def test_shared_prefix_attention_compiles(
  topology, B, S, G, N, K, H, T, C, dtype
):
  shapes = [
    (B, S, G, N, H),
    *[(B, T, K, H)] * 2,
    *[(B, S, C, K, H)] * 2,
  ]
  arrays = [jax.ShapeDtypeStruct(x, dtype) for x in shapes]
  bounds = [jax.ShapeDtypeStruct((B, S), jnp.int32)] * 2
  attend = functools.partial(
    shared_prefix_attention.shared_prefix_attention,
    scale=0.1,
    implementation="pallas_tpu",
  )
  kernels, _ = _compile(
    topology, _gradients(attend, range(5)), *arrays, *bounds
  )
  assert kernels == 6


def test_a_sliding_window_compiles():
  """Gemma 3 1B's heads; the window is known at run time only."""
  B, S, G, N, K, H, T = 2, 3, 96, 4, 1, 256, 640
  shapes = [(B, S, G, N, H), *[(B, T, K, H)] * 2, *[(B, S, G, K, H)] * 2]
  arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shapes]
  bounds = [jax.ShapeDtypeStruct((B, S), jnp.int32)] * 2
  window = jax.ShapeDtypeStruct((), jnp.int32)

  def attend(*arrays):
    *arrays, window = arrays
    return shared_prefix_attention.shared_prefix_attention(
      *arrays, scale=0.1, window=window, implementation="pallas_tpu"
    )

  kernels, _ = _compile(
    "v5e:2x2", _gradients(attend, range(5)), *arrays, *bounds, window
  )
  assert kernels == 6


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_decoding_copies_no_cache(topology):
  """Neither the prefix nor a layer of it, nor the samples' own tokens."""
  L, B, S, N, K, H, T, C = 3, 4, 16, 32, 8, 128, 4096, 4096

  def decode(q_BSNH, prefix_k, prefix_v, steps):
    cache = jnp.zeros((L, B, S, K, C, H), jnp.bfloat16)
    prefix_length_BS = jnp.full((B, S), T)

    def step(i, state):
      def one(layer, state):
        q_BSNH, *caches = state
        caches = [
          jax.lax.dynamic_update_slice(
            x, q_BSNH[None, :, :, :K, None], (layer, 0, 0, 0, i, 0)
          )
          for x in caches
        ]
        out_BSNH = shared_prefix_attention.decode_attention(
          q_BSNH,
          prefix_k,
          prefix_v,
          *caches,
          prefix_length_BS,
          jnp.full_like(prefix_length_BS, i),
          layer,
          scale=0.1,
          implementation="pallas_tpu",
        )
        return out_BSNH, *caches

      return jax.lax.fori_loop(0, L, one, state)

    return jax.lax.fori_loop(0, steps, step, (q_BSNH, cache, cache))[0]

  shape, dtype = jax.ShapeDtypeStruct, jnp.bfloat16
  kernels, memory = _compile(
    topology,
    decode,
    shape((B, S, N, H), dtype),
    *[shape((L, B, K, T, H), dtype)] * 2,
    shape((), jnp.int32),
  )
  assert kernels == 2
  caches = 2 * L * B * S * C * K * H * 2
  assert memory.temp_size_in_bytes < 1.01 * caches


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_perplexity_reward_compiles(topology):
  def reward(logprob_RM, continuation_RM, previous_RS):
    result = perplexity_reward.perplexity_reward(
      logprob_RM, continuation_RM, previous_RS, implementation="pallas_tpu"
    )
    return result, perplexity_reward.group_rank(
      result.mean_RS, implementation="pallas_tpu"
    )

  shape = jax.ShapeDtypeStruct
  kernels, memory = _compile(
    topology,
    reward,
    shape((65, 24577), jnp.float32),
    shape((65, 24577), jnp.int32),
    shape((65, 40), jnp.int32),
  )
  assert kernels == 2
  assert memory.temp_size_in_bytes < MIB


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_compile_for_four_chips(topology):
  devices = topologies.get_topology_desc(topology, platform="tpu").devices
  mesh = jax.sharding.Mesh(
    np.array(devices[:4]).reshape(2, 2), ("data", "tensor")
  )
  rows, heads = P("data"), P("data", None, None, "tensor")
  logprob = jax.shard_map(
    functools.partial(
      token_logprob.token_logprob,
      axis_name="tensor",
      implementation="pallas_tpu",
    ),
    mesh=mesh,
    in_specs=(rows, P(None, "tensor"), rows),
    out_specs=rows,
  )
  prefix = P("data", None, "tensor")
  attend = jax.shard_map(
    functools.partial(
      shared_prefix_attention.shared_prefix_attention,
      scale=0.1,
      implementation="pallas_tpu",
    ),
    mesh=mesh,
    in_specs=(heads, prefix, prefix, heads, heads, rows),
    out_specs=heads,
  )

  def place(shape, dtype, spec):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  half = jnp.bfloat16
  logprobs = (
    place((1024, 256), half, rows),
    place((256, 2000), half, P(None, "tensor")),
    place((1024,), jnp.int32, rows),
  )
  continuations = (
    place((4, 4, 32, 8, 128), half, heads),
    *[place((4, 96, 4, 128), half, prefix)] * 2,
    *[place((4, 4, 32, 4, 128), half, heads)] * 2,
    place((4, 4), jnp.int32, rows),
  )
  with jax.default_matmul_precision("default"):
    for function, count, arrays in (
      (logprob, 2, logprobs),
      (attend, 5, continuations),
    ):
      made = jax.jit(_gradients(function, range(count))).lower(*arrays)
      assert "tpu_custom_call" in made.compile().as_text()
