"""Kernels over a mesh: on a TPU they are Pallas calls, each device its part."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from opera_jax.models import sharded_ops
from opera_jax.sharding import mesh as mesh_lib

# Compiling needs no chip, so two processes may load libtpu at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
B, S, G, N, K, H, T, D, V = 4, 2, 8, 4, 2, 128, 256, 256, 1000


@pytest.fixture(scope="module")
def tpu_mesh():
  devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
  return mesh_lib.create({"fsdp": 2, "tensor": 2}, devices)


def _compile(mesh, function, *shapes):
  """Text before and after compiling; whole arrays come in, laid out by rows."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  # A program for absent hardware can be written to the cache, not read.
  jax.config.update(name, 1e9)
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  try:
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
      lowered = jax.jit(function).lower(
        *(
          jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
          for shape, dtype in shapes
        )
      )
      return lowered.as_text(), lowered.compile().as_text()
  finally:
    jax.config.update(name, before)


def test_shared_prefix_attention_splits_rows_and_heads(tpu_mesh):
  bf16 = jnp.bfloat16
  text, compiled = _compile(
    tpu_mesh,
    jax.grad(
      lambda *arrays: jnp.sum(
        sharded_ops.shared_prefix_attention(*arrays, scale=1.0).astype(
          jnp.float32
        )
      ),
      argnums=(0, 1, 3),
    ),
    ((B, S, G, N, H), bf16),
    ((B, T, K, H), bf16),
    ((B, T, K, H), bf16),
    ((B, S, G, K, H), bf16),
    ((B, S, G, K, H), bf16),
    ((B, S), jnp.int32),
  )
  assert text.count("tpu_custom_call") >= 3
  assert "tpu_custom_call" in compiled
  # Half of the rows and half of the heads reach each device's kernel.
  assert f"bf16[{B // 2},{K // 2},{S}" in compiled


def test_token_logprob_keeps_the_vocabulary_split(tpu_mesh):
  head = NamedSharding(tpu_mesh, PartitionSpec("tensor", None))

  def loss(hidden_BTD, head_VD, target_BT):
    head_VD = jax.lax.with_sharding_constraint(head_VD, head)
    logprob_BT, entropy_BT = sharded_ops.token_logprob(
      hidden_BTD, head_VD, target_BT, temperature=1.0, transposed=True
    )
    return jnp.sum(logprob_BT) + jnp.sum(entropy_BT)

  text, compiled = _compile(
    tpu_mesh,
    jax.grad(loss, argnums=(0, 1)),
    ((B, T, D), jnp.bfloat16),
    ((V, D), jnp.bfloat16),
    ((B, T), jnp.int32),
  )
  assert text.count("tpu_custom_call") == 3
  assert f"bf16[{V // 2},{D}]" in compiled


@pytest.mark.skipif(
  jax.__version__ == "0.11.2",
  reason="the CPU compiler of jaxlib 0.11.2 crashes on the keys' gradient over "
  "a mesh of CPU devices (a segmentation fault); for TPUs it compiles",
)
@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 4}, {"fsdp": 8}])
def test_a_mesh_changes_no_value_and_no_gradient(one_device, shape):
  rng = np.random.default_rng(0)
  q = rng.normal(size=(8, S, 3, 8, 4)).astype(np.float32)
  k, v = rng.normal(size=(2, 8, 12, 4, 4)).astype(np.float32)
  own_k, own_v = rng.normal(size=(2, 8, S, 3, 4, 4)).astype(np.float32)
  prefix_length = rng.integers(0, 13, (8, S)).astype(np.int32)
  head = rng.normal(size=(4, 40)).astype(np.float32)
  target = rng.integers(0, 40, (8, S * 3)).astype(np.int32)

  def loss(q, k, v, own_k, own_v, head):
    out = sharded_ops.shared_prefix_attention(
      q, k, v, own_k, own_v, prefix_length, scale=0.5
    )
    logprob, entropy = sharded_ops.token_logprob(
      out.mean(3).reshape(8, S * 3, 4),
      head,
      target,
      temperature=0.7,
      transposed=False,
    )
    return jnp.sum(logprob * jnp.cos(target)) + jnp.sum(entropy)

  def outcome(mesh):
    with jax.set_mesh(mesh):
      rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
      arrays = jax.device_put((q, k, v, own_k, own_v), rows)
      return jax.jit(jax.value_and_grad(loss, argnums=range(6)))(*arrays, head)

  want, got = outcome(one_device), outcome(mesh_lib.create(shape))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
