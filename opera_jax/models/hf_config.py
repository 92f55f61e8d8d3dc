"""Reads and writes Hugging Face's config.json; finds a model's folder."""

import difflib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from opera_jax import gguf_header, hub
from opera_jax.models import decoder, gguf_file, rope
from opera_jax.models.families import table

# Fields of decoder.Config that a checkpoint does not determine.
FREE = ("dtype", "remat", "attention", "rope_factors", "lora")
# A GGUF file has the divisors that a scaling comes to, and not its settings.
# LongRoPE with two equal sets says the same in a config.json.
_DIVISORS = "factors"
_SIZES = (
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "intermediate_size",
  "rms_norm_eps",
)
# What a config.json may leave out, see `Family.defaults`.
_MAY_LACK = ("tie_word_embeddings", "max_position_embeddings")


def contents(config: decoder.Config, dtype: str) -> dict[str, Any]:
  """Contents of config.json for weights of `dtype`."""
  family = table.FAMILIES[config.family]
  return {
    "architectures": [family.architecture],
    "attention_dropout": 0.0,
    # A tokenizer that is saved beside it names them; a class's own defaults
    # may be ids that this vocabulary does not have.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": dtype,
    "head_dim": config.head_dim,
    "hidden_act": config.hidden_act,
    "hidden_size": config.hidden_size,
    "initializer_range": 0.02,
    "intermediate_size": config.intermediate_size,
    "max_position_embeddings": config.max_position_embeddings,
    "model_type": family.model_type,
    "num_attention_heads": config.num_attention_heads,
    "num_hidden_layers": config.num_hidden_layers,
    "num_key_value_heads": config.num_key_value_heads,
    "rms_norm_eps": config.rms_norm_eps,
    "tie_word_embeddings": config.tie_word_embeddings,
    "torch_dtype": dtype,
    "use_cache": True,
    "vocab_size": config.vocab_size,
    **_write_rope(config),
    **family.write(config),
  }


def _write_rope(config: decoder.Config) -> dict[str, Any]:
  """Before version 5 transformers reads rope_theta, later rope_parameters."""
  scaling = _write_scaling(config.rope_scaling)
  both: dict[str, Any] = {
    "rope_theta": config.rope_theta,
    "rope_parameters": {
      "rope_theta": config.rope_theta,
      **(scaling or {"rope_type": "default"}),
    },
  }
  if scaling is not None:
    both["rope_scaling"] = scaling
  if config.rope_local_theta:
    local = {"rope_theta": config.rope_local_theta, "rope_type": "default"}
    both["rope_parameters"] = {
      "full_attention": both["rope_parameters"],
      "sliding_attention": local,
    }
  return both


def _write_scaling(scaling: rope.Scaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  out: dict[str, Any] = {"rope_type": scaling.kind}
  names = {
    "linear": ("factor",),
    "llama3": (
      "factor",
      "low_freq_factor",
      "high_freq_factor",
      "original_max_position_embeddings",
    ),
    "longrope": (
      "short_factor",
      "long_factor",
      "original_max_position_embeddings",
    ),
  }[scaling.kind]
  for name in names:
    value = getattr(scaling, name)
    out[name] = list(value) if isinstance(value, tuple) else value
  if scaling.kind == "longrope":
    for name in ("factor", "attention_factor"):
      if getattr(scaling, name):
        out[name] = getattr(scaling, name)
  return out


def read(path_or_hub_id: str | os.PathLike) -> decoder.Config:
  """Reads config.json of a model, or what a GGUF file says in its place.

  Args:
    path_or_hub_id: a directory with a config.json, a GGUF file or a directory
      with one, or an id on the hub.

  Returns:
    The model's sizes and its family's fields; those of `FREE`, which a
    checkpoint does not determine, have their defaults.

  Raises:
    FileNotFoundError: there is no config.json.
    ValueError: it is no config; fields that are missing, or settings that our
      model does not have (one error lists all of them).
  """
  if gguf_header.is_gguf(pathlib.Path(path_or_hub_id)):
    gguf = gguf_file.read(pathlib.Path(path_or_hub_id))
    return from_contents(gguf.config, str(gguf.file))
  file = folder(path_or_hub_id, ("config.json",)) / "config.json"
  if not file.exists():
    raise FileNotFoundError(
      f"{file} is not there. Name the directory of a Hugging Face model."
    )
  try:
    raw = json.loads(file.read_text("utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{file} is not JSON ({error}). Fetch the model again."
    ) from error
  if not isinstance(raw, dict):
    raise ValueError(
      f"{file} holds {type(raw).__name__} and no object. Fetch the model again."
    )
  return from_contents(raw, str(file))


def from_contents(raw: Mapping[str, Any], where: str) -> decoder.Config:
  """The config that the contents of a config.json state.

  Args:
    raw: the contents.
    where: they come from, for errors.

  Raises:
    ValueError: like `read`.
  """
  family = table.FAMILIES.get(raw.get("model_type", ""))
  if family is None:
    raise ValueError(f"{where}: {_unknown(raw.get('model_type'))}")
  ropes = raw.get("rope_parameters") or {}
  if "full_attention" in ropes:
    ropes = ropes["full_attention"]
  ropes = {**ropes, **(raw.get("rope_scaling") or {})}
  theta = ropes.get("rope_theta", raw.get("rope_theta"))
  defaults = {
    name: raw.get(name, family.defaults.get(name)) for name in _MAY_LACK
  }
  wrong = [f"{name} is missing" for name in _SIZES if raw.get(name) is None]
  wrong += [f"{n} is missing" for n, value in defaults.items() if value is None]
  if theta is None:
    wrong.append("rope_theta is missing")
    theta = 0.0
  wrong += _unsupported(raw, ropes) + family.unsupported(raw)
  scaling: rope.Scaling | None = None
  if not wrong:
    try:
      scaling = _read_scaling(raw, ropes)
    except (KeyError, TypeError, ValueError) as error:
      wrong.append(f"its rope scaling cannot be read ({error})")
  if wrong:
    raise ValueError(
      f"{where} is not the config of a published dense {family.model_type}: "
      f"{'; '.join(wrong)}. Choose a dense model of {_known()}."
    )
  heads = raw["num_attention_heads"]
  sizes = {
    **{name: raw[name] for name in _SIZES if name != "rms_norm_eps"},
    "num_key_value_heads": raw.get("num_key_value_heads") or heads,
    "max_position_embeddings": defaults["max_position_embeddings"],
  }
  no_sizes = [
    f"{name}={value!r}"
    for name, value in sizes.items()
    if type(value) is not int or value < 1
  ]
  if no_sizes:
    raise ValueError(
      f"{where} states {', '.join(no_sizes)}; a size is a whole number of at "
      "least 1. Fetch the model again."
    )
  try:
    fields = {
      **sizes,
      **defaults,
      "rms_norm_eps": float(raw["rms_norm_eps"]),
      "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
      "hidden_act": raw.get("hidden_act") or "silu",
      "rope_theta": float(theta),
      "rope_scaling": scaling,
      "family": family.model_type,
      **family.fields,
      **family.read(raw),
    }
    return decoder.Config(**fields)
  except TypeError as error:
    raise ValueError(
      f"{where} states a value of a wrong kind ({error}). Fetch the model "
      "again."
    ) from error


def _known() -> str:
  return ", ".join(sorted(table.FAMILIES))


def _unknown(model_type: Any) -> str:
  """Why a model_type is not read."""
  if model_type in table.EXPERTS:
    return (
      f"model_type is {model_type!r}, a mixture of experts, and the decoder is "
      f"dense. Choose a dense model of {_known()}."
    )
  if model_type == "gemma3":
    return (
      "model_type is 'gemma3', which reads images too. Choose a text model "
      "(gemma3_text: 270M, 1B), or save the text model of this one."
    )
  near = difflib.get_close_matches(str(model_type), table.FAMILIES, 1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return (
    f"model_type is {model_type!r}, and models of {_known()} are read.{hint} "
    "CONTRIBUTING.md shows how a family is registered."
  )


def _read_scaling(
  raw: Mapping[str, Any], ropes: Mapping[str, Any]
) -> rope.Scaling | None:
  """The rope scaling, or None for none."""
  kind = ropes.get("rope_type", ropes.get("type", "default"))
  kind = "longrope" if kind == "su" else kind  # an early name of Phi-3's
  if kind == "default":
    return None
  if kind == _DIVISORS:
    divisors = tuple(map(float, ropes["factors"]))
    return rope.Scaling(
      kind="longrope",
      original_max_position_embeddings=int(raw["max_position_embeddings"]),
      short_factor=divisors,
      long_factor=divisors,
      attention_factor=1.0,
    )
  original = 0
  if kind != "linear":
    name = "original_max_position_embeddings"
    original = ropes.get(name, raw.get(name, raw["max_position_embeddings"]))
  numbers = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
  )
  return rope.Scaling(
    kind=kind,
    original_max_position_embeddings=int(original),
    short_factor=tuple(map(float, ropes.get("short_factor") or ())),
    long_factor=tuple(map(float, ropes.get("long_factor") or ())),
    **{name: float(ropes[name]) for name in numbers if ropes.get(name)},
  )


def _unsupported(raw: Mapping[str, Any], ropes: Mapping[str, Any]) -> list[str]:
  """Settings of config.json that no family of ours has."""
  wrong = []
  if raw.get("num_experts") or raw.get("num_local_experts"):
    wrong.append("it has a mixture of experts")
  act = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
  if act not in decoder.ACTIVATIONS:
    wrong.append(
      f"hidden_act is {act!r}, not {' or '.join(decoder.ACTIVATIONS)}"
    )
  kind = ropes.get("rope_type", ropes.get("type", "default"))
  if kind not in ("default", "su", _DIVISORS, *rope.KINDS):
    wrong.append(f"rope scaling {kind!r} is in use")
  factor = ropes.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
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
      f"{str(path_or_hub_id)!r} is no directory, no GGUF file and no model "
      "that the Hugging Face hub gives out. Give a directory of safetensors, a "
      "GGUF file, or an id such as 'Qwen/Qwen3-0.6B' (and a network, and a "
      "token if it is gated)."
    ) from error
