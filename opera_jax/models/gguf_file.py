"""Reads a GGUF file as a Hugging Face checkpoint: its config and its tensors.

llama.cpp's converter renames the tensors and changes some numbers. This module
undoes both, so that the rest of the code knows one format:

- The rows of q and k of Llama are permuted within each head, because GGML
  rotates neighbouring channels where Hugging Face rotates the two halves.
- Gemma's norms store 1 + weight.
- Llama 3's rope scaling is stored as its result, one divisor per frequency.

Rows are read from disk and dequantised as they are asked for, by `gguf`.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from opera_jax import gguf_header
from opera_jax.gguf_header import find, is_gguf

__all__ = ["GgufCheckpoint", "GgufTensor", "find", "is_gguf", "read"]

TYPES = (
  "F32",
  "F16",
  "BF16",
  "Q4_0",
  "Q4_1",
  "Q5_0",
  "Q5_1",
  "Q8_0",
  "Q4_K",
  "Q5_K",
  "Q6_K",
)
# GGUF's architecture: model_type of Hugging Face.
_FAMILIES = {
  "llama": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "phi3": "phi3",
  "gemma3": "gemma3_text",
}
_NORM_OFFSET = {"gemma3": 1.0}  # stored over Hugging Face's
_PERMUTED = ("llama",)

# Tensors outside the layers, then within: their name, and the shape in sizes
# of `_Sizes`. Letters: V vocabulary, D hidden, Q query heads times channels,
# K key/value heads times channels, P both of the latter and the queries, H
# channels of a head, F feed-forward, G twice that.
_OUTSIDE = {
  "token_embd.weight": ("model.embed_tokens.weight", "VD"),
  "output_norm.weight": ("model.norm.weight", "D"),
}
_HEAD = "output.weight"
_ATTENTION = {
  "attn_norm.weight": ("input_layernorm.weight", "D"),
  "attn_q.weight": ("self_attn.q_proj.weight", "QD"),
  "attn_k.weight": ("self_attn.k_proj.weight", "KD"),
  "attn_v.weight": ("self_attn.v_proj.weight", "KD"),
  "attn_output.weight": ("self_attn.o_proj.weight", "DQ"),
}
_MLP = {
  "ffn_gate.weight": ("mlp.gate_proj.weight", "FD"),
  "ffn_up.weight": ("mlp.up_proj.weight", "FD"),
  "ffn_down.weight": ("mlp.down_proj.weight", "DF"),
}
_NORM = {"ffn_norm.weight": ("post_attention_layernorm.weight", "D")}
_QK_NORM = {
  "attn_q_norm.weight": ("self_attn.q_norm.weight", "H"),
  "attn_k_norm.weight": ("self_attn.k_norm.weight", "H"),
}
_QKV_BIAS = {
  "attn_q.bias": ("self_attn.q_proj.bias", "Q"),
  "attn_k.bias": ("self_attn.k_proj.bias", "K"),
  "attn_v.bias": ("self_attn.v_proj.bias", "K"),
}
_LAYER = {
  "llama": _ATTENTION | _NORM | _MLP,
  "qwen2": _ATTENTION | _QKV_BIAS | _NORM | _MLP,
  "qwen3": _ATTENTION | _QK_NORM | _NORM | _MLP,
  "phi3": {
    "attn_norm.weight": ("input_layernorm.weight", "D"),
    "attn_qkv.weight": ("self_attn.qkv_proj.weight", "PD"),
    "attn_output.weight": ("self_attn.o_proj.weight", "DQ"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "D"),
    "ffn_up.weight": ("mlp.gate_up_proj.weight", "GD"),
    "ffn_down.weight": ("mlp.down_proj.weight", "DF"),
  },
  "gemma3": _ATTENTION
  | _QK_NORM
  | _MLP
  | {
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "D"),
    "ffn_norm.weight": ("pre_feedforward_layernorm.weight", "D"),
    "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", "D"),
  },
}
# Read into the config, not into the tensors.
_ROPE_FACTORS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclasses.dataclass(frozen=True)
class GgufTensor:
  """A tensor of a GGUF file, read like `tensor_files.Tensor`.

  Attributes:
    file: it is in.
    dtype: as GGML spells it, e.g. Q4_K.
    shape: rows first, as Hugging Face has it.
    offset: bytes from the start of the file.
    size: bytes in the file.
    head_dim: rows of a head whose rows are permuted; 0 where none are.
    excess: what the file stores beyond the weight.
  """

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int
  size: int
  head_dim: int = 0
  excess: float = 0.0

  def bytes(self) -> int:
    """Size of the whole tensor in the file."""
    return self.size

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads entries [start, stop) of the first axis, [stop - start, ...].

    Returns:
      float32, as Hugging Face's checkpoint of the model has them.
    """
    if not self.head_dim:
      return self._stored(start, stop)
    # Row j of the first half of a head is stored at 2 j, row j of the second
    # at 2 j + 1: whole heads are read, and rows picked from them.
    half = self.head_dim // 2
    first = start // self.head_dim * self.head_dim
    last = -(-stop // self.head_dim) * self.head_dim
    head, row = np.divmod(np.arange(start, stop), self.head_dim)
    second, pair = np.divmod(row, half)
    source = head * self.head_dim + 2 * pair + second
    return self._stored(first, last)[source - first]

  def _stored(self, start: int, stop: int) -> np.ndarray:
    """Rows in the order of the file, dequantised."""
    gguf = gguf_header.library()
    # A vector's blocks, if it has any, lie along its only axis.
    whole = len(self.shape) == 1
    low, high = (0, self.shape[0]) if whole else (start, stop)
    width = self.size // self.shape[0]
    count = self.size if whole else (high - low) * width
    raw = np.fromfile(
      self.file,
      np.uint8,
      count=count,
      offset=self.offset + (0 if whole else low * width),
    )
    if raw.size != count:
      raise ValueError(
        f"{self.file} ended while it was read; it has changed since its "
        "header was read. Download it again."
      )
    values = gguf.dequantize(
      raw if whole else raw.reshape(high - low, width),
      gguf.GGMLQuantizationType[self.dtype],
    ).reshape(high - low, *self.shape[1:])
    values = values[start - low : stop - low]
    return values - np.float32(self.excess) if self.excess else values


@dataclasses.dataclass(frozen=True)
class GgufCheckpoint:
  """A GGUF file in Hugging Face's terms.

  Attributes:
    file: it was read from.
    config: what the model's config.json would say.
    tensors: by Hugging Face's names, e.g. model.layers.0.mlp.up_proj.weight.
  """

  file: pathlib.Path
  config: Mapping[str, Any]
  tensors: Mapping[str, GgufTensor]


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """The sizes that shapes are made of."""

  layers: int
  hidden: int
  heads: int
  kv_heads: int
  head_dim: int
  intermediate: int
  vocab: int

  def shape(self, letters: str) -> tuple[int, ...]:
    sizes = {
      "V": self.vocab,
      "D": self.hidden,
      "Q": self.heads * self.head_dim,
      "K": self.kv_heads * self.head_dim,
      "P": (self.heads + 2 * self.kv_heads) * self.head_dim,
      "H": self.head_dim,
      "F": self.intermediate,
      "G": 2 * self.intermediate,
    }
    return tuple(sizes[letter] for letter in letters)


def read(path: str | pathlib.Path) -> GgufCheckpoint:
  """Reads what a GGUF file says of its model; its weights stay on disk.

  Args:
    path: the file, or a directory that holds no other.

  Raises:
    FileNotFoundError: no such file.
    ImportError: the package `gguf` is not installed.
    ValueError: a damaged file (see `gguf_header.read`); another architecture,
      or a mixture of experts; metadata that is missing or impossible; tensors
      that are missing, unexpected, of another shape or of an unsupported type
      (one error lists all of these).
  """
  header = gguf_header.read(path)
  arch = header.get("general.architecture", str)
  _check_family(header, arch)
  sizes = _sizes(header, arch)
  config = _config(header, arch, sizes)
  names = _names(header, arch, sizes)
  tensors = {}
  for theirs, (name, _) in names.items():
    entry = header.tensors[theirs]
    permuted = arch in _PERMUTED and theirs.endswith(
      ("attn_q.weight", "attn_k.weight")
    )
    tensors[name] = GgufTensor(
      file=header.file,
      dtype=entry.type,
      shape=entry.shape,
      offset=entry.offset,
      size=entry.size,
      head_dim=sizes.head_dim if permuted else 0,
      excess=_NORM_OFFSET.get(arch, 0.0)
      if theirs.endswith("norm.weight")
      else 0.0,
    )
  return GgufCheckpoint(header.file, config, tensors)


def _check_family(header: gguf_header.Header, arch: str) -> None:
  experts = header.get(f"{arch}.expert_count", int, 0)
  if experts or "moe" in arch or any("_exps" in n for n in header.tensors):
    raise ValueError(
      f"{header.file} is a mixture of experts ({arch!r}), and only dense "
      f"models are read. Choose a dense model of {', '.join(_FAMILIES)}."
    )
  if arch not in _FAMILIES:
    raise ValueError(
      f"{header.file} has the architecture {arch[:80]!r}, and "
      f"{', '.join(_FAMILIES)} are read. Choose a model of one of them."
    )


def _sizes(header: gguf_header.Header, arch: str) -> _Sizes:
  """The model's sizes; one error lists all that are missing or impossible."""
  wrong = []

  def whole(key: str, default: int | None = None) -> int:
    try:
      value = header.get(f"{arch}.{key}", int, default)
    except ValueError as error:
      wrong.append(str(error))
      return 1
    # Above 2**31 GGML counts no axis, and below 1 nothing is left.
    if not 1 <= value < 2**31:
      wrong.append(f"{arch}.{key} is {value}, must be from 1 to 2**31")
      return 1
    return value

  hidden = whole("embedding_length")
  heads = whole("attention.head_count")
  # llama.cpp's rule for a file that does not say.
  head_dim = whole("attention.key_length", max(1, hidden // heads))
  value_dim = whole("attention.value_length", head_dim)
  if value_dim != head_dim:
    wrong.append(
      f"{arch}.attention.value_length is {value_dim}, must equal the keys' "
      f"{head_dim}"
    )
  kv_heads = whole("attention.head_count_kv", heads)
  if heads % kv_heads or head_dim % 2:
    wrong.append(
      f"{heads} query heads of {head_dim} channels cannot share {kv_heads} "
      "key-value heads: the heads must divide, the channels be even"
    )
  layers = whole("block_count")
  if layers > len(header.tensors):
    wrong.append(
      f"{arch}.block_count is {layers}, and the file has "
      f"{len(header.tensors)} tensors in all"
    )
  intermediate = whole("feed_forward_length")
  if wrong:
    raise ValueError(
      f"{header.file} describes no model that can be read:\n  "
      + "\n  ".join(wrong)
      + "\nConvert the model again with a current llama.cpp."
    )
  embedding = header.tensors.get("token_embd.weight")
  return _Sizes(
    layers=layers,
    hidden=hidden,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    intermediate=intermediate,
    # The rows that there are: a file's vocab_size may count the tokens alone.
    vocab=embedding.shape[0] if embedding is not None else 0,
  )


def _names(
  header: gguf_header.Header, arch: str, sizes: _Sizes
) -> dict[str, tuple[str, str]]:
  """Hugging Face's name and the shape's letters by GGUF's name.

  Raises:
    ValueError: lists every tensor that is missing, unexpected, of another
      shape or of an unsupported type.
  """
  names = dict(_OUTSIDE)
  if _HEAD in header.tensors:
    names[_HEAD] = ("lm_head.weight", "VD")
  for layer in range(sizes.layers):
    for theirs, (name, letters) in _LAYER[arch].items():
      names[f"blk.{layer}.{theirs}"] = (f"model.layers.{layer}.{name}", letters)
  wrong = []
  for theirs, (_, letters) in names.items():
    shape = sizes.shape(letters)
    if theirs not in header.tensors:
      wrong.append(f"missing: {theirs} {list(shape)}")
      continue
    entry = header.tensors[theirs]
    if entry.shape != shape:
      wrong.append(
        f"shape: {theirs} is {list(entry.shape)}, must be {list(shape)}"
      )
    if entry.type not in TYPES:
      wrong.append(f"type: {theirs} is {entry.type}")
  known = names.keys() | _rope_tensors(arch)
  wrong += [
    f"unexpected: {name}" for name in header.tensors if name not in known
  ]
  if wrong:
    raise ValueError(
      f"{header.file} does not hold the weights of a dense {arch} model in a "
      f"type that is read ({', '.join(TYPES)}). Choose another file of the "
      f"model, or convert it again. {len(wrong)} mismatches:\n  "
      + "\n  ".join(wrong)
    )
  return names


def _rope_tensors(arch: str) -> set[str]:
  return {_LONG, _SHORT} if arch == "phi3" else {_ROPE_FACTORS}


def _config(
  header: gguf_header.Header, arch: str, sizes: _Sizes
) -> dict[str, Any]:
  """What the model's config.json would say."""
  meta = header.metadata
  config: dict[str, Any] = {
    "model_type": _FAMILIES[arch],
    "hidden_size": sizes.hidden,
    "num_hidden_layers": sizes.layers,
    "num_attention_heads": sizes.heads,
    "num_key_value_heads": sizes.kv_heads,
    "head_dim": sizes.head_dim,
    "intermediate_size": sizes.intermediate,
    "vocab_size": sizes.vocab,
    "max_position_embeddings": header.get(f"{arch}.context_length", int),
    "rms_norm_eps": _positive(
      header, f"{arch}.attention.layer_norm_rms_epsilon"
    ),
    "tie_word_embeddings": _HEAD not in header.tensors,
    "attention_bias": False,
    # llama.cpp's default; its converter always writes the key.
    "rope_theta": _positive(header, f"{arch}.rope.freq_base", 10_000.0),
  }
  config |= _rope(header, arch, config)
  if arch == "gemma3":
    config |= _gemma(header, config)
  else:
    config["hidden_act"] = "silu"
  if arch == "phi3":
    # 0 stands for no window, as in Phi-4.
    window = header.get(f"{arch}.attention.sliding_window", int, 0)
    config["sliding_window"] = window or None
  rotated = header.get(f"{arch}.rope.dimension_count", int, sizes.head_dim)
  if rotated != sizes.head_dim:
    config["partial_rotary_factor"] = rotated / sizes.head_dim
  for name in ("attn_logit_softcapping", "final_logit_softcapping"):
    if f"{arch}.{name}" in meta:
      config[name] = header.get(f"{arch}.{name}", float)
  ends = gguf_header.end_ids(header) if gguf_header.TOKENS in meta else ()
  if ends:
    config["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
  for name, key in (("bos", "bos"), ("pad", "padding")):
    if f"tokenizer.ggml.{key}_token_id" in meta:
      config[f"{name}_token_id"] = header.get(
        f"tokenizer.ggml.{key}_token_id", int
      )
  return config


def _positive(
  header: gguf_header.Header, key: str, default: float | None = None
) -> float:
  value = header.get(key, float, default)
  if not 0 < value < math.inf:
    raise ValueError(
      f"{header.file}: {key} is {value}, must be positive and finite. Convert "
      "the model again."
    )
  return value


def _gemma(
  header: gguf_header.Header, config: dict[str, Any]
) -> dict[str, Any]:
  """What Gemma 3 has besides."""
  layers = config["num_hidden_layers"]
  # Few files name the pattern: every sixth layer of Gemma 3 sees all positions.
  every = header.get("gemma3.attention.sliding_window_pattern", int, 6)
  if every < 1:
    raise ValueError(
      f"{header.file}: gemma3.attention.sliding_window_pattern is {every}, "
      "must be at least 1. Convert the model again."
    )
  full = [(layer + 1) % every == 0 for layer in range(layers)]
  # None names the queries' scale: it is that of a head's channels in every
  # Gemma 3 but the 27B, which llama.cpp, too, recognises by its layers.
  scale = config["head_dim"]
  if layers == 62:
    scale = config["hidden_size"] // config["num_attention_heads"]
  return {
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": [
      "full_attention" if whole else "sliding_attention" for whole in full
    ],
    "query_pre_attn_scalar": scale,
    "rope_local_base_freq": _positive(
      header, "gemma3.rope.freq_base_swa", 10_000.0
    ),
    "sliding_window": header.get("gemma3.attention.sliding_window", int),
  }


def _rope(
  header: gguf_header.Header, arch: str, config: dict[str, Any]
) -> dict[str, Any]:
  """The scaling of the rotary frequencies; empty where there is none."""
  count = config["head_dim"] // 2
  prefix = f"{arch}.rope.scaling"
  length = f"{prefix}.original_context_length"
  if _ROPE_FACTORS in header.tensors and arch != "phi3":
    factors = _factors(header, _ROPE_FACTORS, count)
    return {"rope_scaling": {"rope_type": "factors", "factors": factors}}
  if arch == "phi3" and {_LONG, _SHORT} & header.tensors.keys():
    missing = {_LONG, _SHORT} - header.tensors.keys()
    if missing:
      raise ValueError(
        f"{header.file} lacks {missing.pop()}, and LongRoPE has factors for "
        "short and for long texts. Convert the model again."
      )
    original = header.get(length, int)
    return {
      "original_max_position_embeddings": original,
      "rope_scaling": {
        "rope_type": "longrope",
        "long_factor": _factors(header, _LONG, count),
        "short_factor": _factors(header, _SHORT, count),
        "attention_factor": _positive(header, f"{prefix}.attn_factor"),
        "original_max_position_embeddings": original,
      },
    }
  kind = header.get(f"{prefix}.type", str, "none")
  if kind == "none":
    return {}
  scaling: dict[str, Any] = {
    "rope_type": kind,
    "factor": _positive(header, f"{prefix}.factor"),
  }
  if length in header.metadata:
    scaling["original_max_position_embeddings"] = header.get(length, int)
  return {"rope_scaling": scaling}


def _factors(header: gguf_header.Header, name: str, count: int) -> list[float]:
  """Divisors of the rotary frequencies, one each."""
  entry = header.tensors[name]
  if entry.shape != (count,) or entry.type != "F32":
    raise ValueError(
      f"{header.file}: {name} is {entry.type}{list(entry.shape)}, must be "
      f"F32[{count}], one divisor per frequency. Convert the model again."
    )
  factors = GgufTensor(
    header.file, entry.type, entry.shape, entry.offset, entry.size
  ).rows(0, count)
  if not (np.isfinite(factors).all() and (factors > 0).all()):
    raise ValueError(
      f"{header.file}: {name} divides frequencies by {factors.tolist()[:8]}; "
      "divisors are positive. Download it again."
    )
  return [float(str(factor)) for factor in factors]
