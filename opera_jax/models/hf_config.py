"""Reads and writes Qwen3's Hugging Face config.json; finds a model's folder."""

import json
import os
import pathlib
from typing import Any

from opera_jax import hub
from opera_jax.models import decoder

_MAX_POSITIONS = 40_960  # of every published Qwen3


def contents(config: decoder.Config, dtype: str) -> dict[str, Any]:
  """Contents of config.json for weights of `dtype`."""
  return {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": dtype,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "hidden_size": config.hidden_size,
    "initializer_range": 0.02,
    "intermediate_size": config.intermediate_size,
    "max_position_embeddings": _MAX_POSITIONS,
    "max_window_layers": config.num_hidden_layers,
    "model_type": "qwen3",
    "num_attention_heads": config.num_attention_heads,
    "num_hidden_layers": config.num_hidden_layers,
    "num_key_value_heads": config.num_key_value_heads,
    "rms_norm_eps": config.rms_norm_eps,
    # Before version 5 transformers reads the first, later the second.
    "rope_theta": config.rope_theta,
    "rope_parameters": {
      "rope_theta": config.rope_theta,
      "rope_type": "default",
    },
    "sliding_window": None,
    "tie_word_embeddings": config.tie_word_embeddings,
    "torch_dtype": dtype,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": config.vocab_size,
  }


_FIELDS = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_hidden_layers": "num_hidden_layers",
  "num_attention_heads": "num_attention_heads",
  "num_key_value_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "intermediate_size": "intermediate_size",
  "rms_norm_eps": "rms_norm_eps",
  "tie_word_embeddings": "tie_word_embeddings",
}


def read(path_or_hub_id: str | os.PathLike) -> decoder.Config:
  """Reads config.json of a Qwen3 model.

  Args:
    path_or_hub_id: a directory with a config.json, or an id on the hub.

  Returns:
    The model's sizes; `dtype` and `remat`, which a checkpoint does not
    determine, have their defaults.

  Raises:
    FileNotFoundError: there is no config.json.
    ValueError: fields that are missing, or settings that our model does not
      have; one error lists all of them.
  """
  file = folder(path_or_hub_id, ("config.json",)) / "config.json"
  if not file.exists():
    raise FileNotFoundError(
      f"{file} is not there. Name the directory of a Hugging Face model."
    )
  raw = json.loads(file.read_text("utf-8"))
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  theta = rope.get("rope_theta", raw.get("rope_theta"))
  wrong = _unsupported(raw, rope)
  missing = [name for name in _FIELDS if name not in raw]
  missing += ["rope_theta"] if theta is None else []
  wrong += [f"{name} is missing" for name in missing]
  if wrong:
    raise ValueError(
      f"{file} is not the config of a published dense Qwen3: "
      f"{'; '.join(wrong)}. Choose a dense Qwen3 model."
    )
  fields = {ours: raw[name] for name, ours in _FIELDS.items()}
  return decoder.Config(rope_theta=float(theta), **fields)


def _unsupported(raw: dict[str, Any], rope: dict[str, Any]) -> list[str]:
  """Settings of config.json that our model does not implement."""
  wrong = []
  if raw.get("model_type") != "qwen3":
    wrong.append(f"model_type is {raw.get('model_type')!r}, not 'qwen3'")
  if raw.get("num_experts") or raw.get("num_local_experts"):
    wrong.append("it has a mixture of experts")
  if raw.get("attention_bias"):
    wrong.append("attention_bias is set")
  if raw.get("hidden_act", "silu") != "silu":
    wrong.append(f"hidden_act is {raw['hidden_act']!r}, not 'silu'")
  if raw.get("use_sliding_window") and raw.get("sliding_window") is not None:
    kinds = raw.get("layer_types")
    full = raw.get("max_window_layers", 0) >= raw.get("num_hidden_layers", 0)
    if not full if kinds is None else set(kinds) != {"full_attention"}:
      wrong.append("sliding-window attention is in use")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default":
    wrong.append(f"rope scaling {kind!r} is in use")
  factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
  if factor not in (None, 1, 1.0):
    wrong.append(f"partial_rotary_factor is {factor}")
  if raw.get("quantization_config"):
    wrong.append("its weights are quantized")
  return wrong


def folder(
  path_or_hub_id: str | os.PathLike, patterns: tuple[str, ...]
) -> pathlib.Path:
  """The directory itself, or the one that the hub's files were downloaded to.

  Args:
    path_or_hub_id: a directory, or an id; see `hub.split` for revisions.
    patterns: of the files to download.

  Raises:
    FileNotFoundError: neither exists.
  """
  path = pathlib.Path(path_or_hub_id)
  if path.is_dir():
    return path
  import huggingface_hub
  from huggingface_hub import errors

  hub_id, revision = hub.split(str(path_or_hub_id))
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        hub_id, revision=revision, allow_patterns=list(patterns)
      )
    )
  except (
    errors.HFValidationError,
    errors.LocalEntryNotFoundError,
    errors.RepositoryNotFoundError,
    errors.RevisionNotFoundError,
  ) as error:
    raise FileNotFoundError(
      f"{str(path_or_hub_id)!r} is neither a directory nor a model that the "
      "Hugging Face hub gives out. Give a directory of safetensors, or an id "
      "such as 'Qwen/Qwen3-0.6B' (and a network, and a token if it is gated)."
    ) from error
