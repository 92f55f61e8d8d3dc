"""Tests run stricter than production: eight devices, exact matmuls, no silent
rank promotion; programs compiled once stay in a cache on local disk."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """The folder of real data; skips where a clone stands alone."""
  if not SHARED_DATA.exists():
    pytest.skip("no ../shared/data beside this checkout")
  return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_model():
  """A random two-layer Qwen3 with odd sizes: (config, graphdef, params)."""
  from opera_jax.models import decoder

  config = decoder.Config(
    vocab_size=300,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
  )
  graphdef, params = decoder.create(config, seed=3)
  # Larger weights than at initialisation, so that positions matter.
  params = jax.tree.map(lambda x: x * 1.5, params)
  return config, graphdef, params


@pytest.fixture(scope="session")
def one_device():
  """A mesh of one device."""
  from opera_jax.sharding import mesh

  return mesh.create(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def slow_logprob(tiny_model):
  """log p of every token of one row by the plain definition, no sharing."""
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from opera_jax.models import attention

  _, graphdef, params = tiny_model

  @jax.jit
  def logits(tokens):
    model = nnx.merge(graphdef, params)
    size = tokens.shape[0]
    hidden, _ = model(
      tokens[None],
      jnp.arange(size)[None],
      attention.causal(jnp.ones((1, size), jnp.int32)),
    )
    head, transposed = model.head_matrix()
    return hidden[0] @ (head.T if transposed else head)

  def logprob(tokens) -> np.ndarray:
    # To whole 32s, so that few programs are compiled: no token sees a later.
    padded = np.zeros(-(-len(tokens) // 32) * 32, np.int32)
    padded[: len(tokens)] = tokens
    table = np.asarray(jax.nn.log_softmax(logits(jnp.asarray(padded))))
    steps = np.arange(1, len(tokens))
    return table[steps - 1, padded[steps]]

  return logprob
