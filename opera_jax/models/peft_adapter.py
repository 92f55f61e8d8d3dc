"""Writes a LoRA adapter as peft reads it.

The directory goes with the model that the adapter was trained beside: for a
stage's adapter, that is the model of the stage before it.
`peft.PeftModel.from_pretrained(base, directory)` puts the two together.

Letters: L layers, r rank.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import numpy as safetensors_numpy

from opera_jax.models import lora
from opera_jax.models.families import table
from opera_jax.sharding import layout

# Our target -> the module's name in a Hugging Face decoder layer.
MODULES = {
  **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
  **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save(
  path: str | os.PathLike,
  adapter: Any,
  settings: lora.Settings,
  *,
  family: str,
  base_model: str = "",
) -> None:
  """Writes adapter_model.safetensors and adapter_config.json.

  Every process of a run must call it; the first one writes.

  Args:
    path: directory without an adapter; created if it does not exist.
    adapter: of `lora.split`, on any mesh.
    settings: of the adapter.
    family: of the model, see `families`.
    base_model: hub id or directory of the model that it goes with, for peft's
      config; "" leaves that open.

  Raises:
    FileExistsError: the directory holds an adapter already.
    ValueError: the family's checkpoint fuses a target with other projections.
  """
  layer = table.FAMILIES[family].layer
  fused = [t for t in settings.targets if f"{MODULES[t]}.weight" not in layer]
  if fused:
    raise ValueError(
      f"A checkpoint of {family} fuses {', '.join(fused)} with other "
      "projections, so peft has no module for an adapter of one alone. Export "
      "the merged model instead."
    )
  host = layout.to_host(adapter)
  stacks = {path[-1]: x[...] for path, x in nnx.to_flat_state(host)}
  if jax.process_index():
    return
  folder = pathlib.Path(path)
  if (folder / _WEIGHTS).exists():
    raise FileExistsError(
      f"{folder} holds an adapter already ({_WEIGHTS}). Delete it, or name "
      "another directory."
    )
  tensors = {}
  for target in settings.targets:
    a_L, b_L = (stacks[f"{target}_lora_{which}"] for which in ("a", "b"))
    for index, (a, b) in enumerate(zip(a_L, b_L, strict=True)):
      name = f"base_model.model.model.layers.{index}.{MODULES[target]}"
      # theirs are [outputs, inputs], with heads and channels merged
      tensors[f"{name}.lora_A.weight"] = a.reshape(-1, settings.rank).T
      tensors[f"{name}.lora_B.weight"] = b.reshape(settings.rank, -1).T
  folder.mkdir(parents=True, exist_ok=True)
  safetensors_numpy.save_file(
    {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()},
    folder / _WEIGHTS,
    metadata={"format": "pt"},
  )
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model or None,
    "r": settings.rank,
    "lora_alpha": settings.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": [
      MODULES[target].rpartition(".")[2] for target in settings.targets
    ],
    "inference_mode": True,
  }
  (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
