"""A lower bound of a run's memory per device, without compiling.

While the policy samples, memory holds its float32 parameters and two moments,
the reference policy, the parameters in the sharding and dtype of decoding, and
the KV caches. With LoRA it holds the frozen parameters once, an adapter with
its moments, and for decoding at least the weights that the adapter changes.
Activations come on top, so this is a lower bound: a run that it refuses cannot
fit, one that it accepts may still not fit (`experiments.plan` compiles the
programs to find out).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opera_jax.models import decoder, lora
from opera_jax.plan import hardware
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.sharding import rules
from opera_jax.train import optimizer as optimizer_lib

GIB = 1 << 30


def shard_bytes(tree: Any) -> int:
  """Bytes per device of a tree of arrays or ShapeDtypeStructs with
  shardings."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    total += int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
  return total


def token_bytes(config: decoder.Config, cache_dtype: str) -> int:
  """Bytes of one token's keys and values in all layers."""
  width = jnp.dtype(cache_dtype).itemsize
  return (
    2
    * config.num_hidden_layers
    * config.num_key_value_heads
    * config.head_dim
    * width
  )


def num_cache_shards(config: decoder.Config, mesh: jax.sharding.Mesh) -> int:
  """Number of shards of the KV caches: over rows, and over heads if they
  divide."""
  tensor = mesh.shape["tensor"]
  heads = tensor if config.num_key_value_heads % tensor == 0 else 1
  return mesh_lib.num_data_shards(mesh) * heads


def floor(
  config: decoder.Config,
  mesh: jax.sharding.Mesh,
  *,
  prompts: int,
  samples: int,
  prompt_tokens: int,
  new_tokens: int,
  cache_dtype: str,
  optimizer: str,
  moment_dtype: str,
  adapter: lora.Settings | None = None,
) -> dict[str, int]:
  """Lower bounds of the bytes per device during sampling, by component.

  Args:
    config: of the model.
    mesh: of the run.
    prompts: number in flight.
    samples: number in flight per prompt.
    prompt_tokens: longest prompt.
    new_tokens: longest completion.
    cache_dtype: of keys and values.
    optimizer: one of `train.optimizer.NAMES`.
    moment_dtype: of the optimizer's moments.
    adapter: of a run with LoRA.
  """

  def laid_out(shapes: Any, table: dict[str, Any], dtype: Any) -> int:
    axes = decoder.logical_axes(shapes)
    return shard_bytes(
      jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(
          x.shape, jnp.dtype(dtype), sharding=s
        ),
        shapes,
        rules.shardings(axes, mesh, table),
      )
    )

  shapes = decoder.abstract(dataclasses.replace(config, lora=adapter))[1]
  trained, decoded, frozen = shapes, shapes, 0
  if adapter is not None:
    trained, weights = lora.split(shapes)
    frozen = laid_out(weights, rules.TRAIN, adapter.base_dtype)
    decoded = lora.targets_of(weights, adapter)
  master = laid_out(trained, rules.TRAIN, jnp.float32)
  tokens = prompts * (prompt_tokens + samples * new_tokens)
  return {
    "parameters": master + frozen,
    "optimizer": optimizer_lib.NAMES[optimizer]
    * laid_out(trained, rules.TRAIN, moment_dtype),
    "reference": 0 if adapter else master,
    "rollout weights": laid_out(decoded, rules.ROLLOUT, config.dtype),
    "caches": tokens
    * token_bytes(config, cache_dtype)
    // num_cache_shards(config, mesh),
  }


def device_limit(mesh: jax.sharding.Mesh) -> int | None:
  """Memory limit of this process's smallest device, in bytes.

  A CPU's devices share the machine's available memory. None if the devices do
  not report a limit, and the machine neither.
  """
  devices = mesh.local_devices
  if all(d.platform == "cpu" for d in devices):
    available = hardware.available_memory()
    return available and available // len(devices)
  stats = [d.memory_stats() for d in devices]
  limits = [s["bytes_limit"] for s in stats if s and "bytes_limit" in s]
  return min(limits, default=None)


def check(parts: dict[str, int], limit: int | None) -> None:
  """Raises an error if a run cannot fit.

  Args:
    parts: see `floor`.
    limit: see `device_limit`; None skips the check.

  Raises:
    ValueError: lists every component and the settings to lower.
  """
  total = sum(parts.values())
  if limit is None or total <= limit:
    return
  listed = ", ".join(f"{k} {v / GIB:.2f}" for k, v in parts.items())
  raise ValueError(
    f"Sampling needs at least {total / GIB:.2f} GiB per device "
    f"({listed} GiB) and a device has {limit / GIB:.2f} GiB. Lower "
    "config.engine.prompt_slots or config.rollout.max_new_tokens for the "
    "caches, set config.engine.cache_dtype or config.model.dtype to bfloat16, "
    "train a LoRA adapter (config.rl.lora.rank=16), raise config.mesh.tensor "
    "or config.mesh.fsdp, or take more devices."
  )
