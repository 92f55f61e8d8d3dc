"""What a family of models is: config.json and checkpoint, in our terms.

Letters of a tensor's axes: V vocabulary, D hidden, N query heads, K key/value
heads, H head dimension, F feed-forward. "NH" is N and H merged.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Part:
  """Our array, and the rows of a checkpoint's tensor that hold it."""

  ours: str  # key of decoder.AXES
  theirs: tuple[str, ...]  # axes of their tensor
  axes: str  # axes of our array, without the layer axis


Tensors = Mapping[str, tuple[Part, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
  """One model_type of Hugging Face that the decoder computes.

  Attributes:
    model_type: of config.json.
    architecture: class of transformers.
    fields: fields of `decoder.Config` that every model of the family has.
    layer: tensors of a layer by their name behind "model.layers.N.". A tensor
      that holds several arrays lists them in the order of its rows.
    defaults: of transformers, for what a config.json may leave out.
    read: config.json -> further fields of `decoder.Config`.
    write: `decoder.Config` -> further contents of config.json.
    unsupported: config.json -> settings in it that the decoder does not have.
  """

  model_type: str
  architecture: str
  fields: Mapping[str, Any]
  layer: Tensors
  defaults: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: {"tie_word_embeddings": False}
  )
  read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda raw: {}
  write: Callable[[Any], dict[str, Any]] = lambda config: {}
  unsupported: Callable[[Mapping[str, Any]], list[str]] = lambda raw: []


def one(ours: str, theirs: tuple[str, ...], axes: str) -> tuple[Part, ...]:
  """A tensor that holds one array."""
  return (Part(ours, theirs, axes),)


OUTSIDE: Tensors = {
  "model.embed_tokens.weight": one("embed", ("V", "D"), "VD"),
  "model.norm.weight": one("final_norm", ("D",), "D"),
  "lm_head.weight": one("head", ("V", "D"), "DV"),
}
_QUERY = Part("layers/attention/q", ("NH", "D"), "DNH")
_KEY = Part("layers/attention/k", ("KH", "D"), "DKH")
_VALUE = Part("layers/attention/v", ("KH", "D"), "DKH")
_GATE = Part("layers/mlp/gate", ("F", "D"), "DF")
_UP = Part("layers/mlp/up", ("F", "D"), "DF")
NORMS: Tensors = {
  "input_layernorm.weight": one("layers/input_norm", ("D",), "D"),
  "post_attention_layernorm.weight": one("layers/post_norm", ("D",), "D"),
}
OUTPUTS: Tensors = {
  "self_attn.o_proj.weight": one("layers/attention/o", ("D", "NH"), "NHD"),
  "mlp.down_proj.weight": one("layers/mlp/down", ("D", "F"), "FD"),
}
INPUTS: Tensors = {
  "self_attn.q_proj.weight": (_QUERY,),
  "self_attn.k_proj.weight": (_KEY,),
  "self_attn.v_proj.weight": (_VALUE,),
  "mlp.gate_proj.weight": (_GATE,),
  "mlp.up_proj.weight": (_UP,),
}
FUSED_INPUTS: Tensors = {
  "self_attn.qkv_proj.weight": (_QUERY, _KEY, _VALUE),
  "mlp.gate_up_proj.weight": (_GATE, _UP),
}
QKV_BIAS: Tensors = {
  "self_attn.q_proj.bias": one("layers/attention/q_bias", ("NH",), "NH"),
  "self_attn.k_proj.bias": one("layers/attention/k_bias", ("KH",), "KH"),
  "self_attn.v_proj.bias": one("layers/attention/v_bias", ("KH",), "KH"),
}
QK_NORM: Tensors = {
  "self_attn.q_norm.weight": one("layers/attention/q_norm", ("H",), "H"),
  "self_attn.k_norm.weight": one("layers/attention/k_norm", ("H",), "H"),
}


def no_window(raw: Mapping[str, Any]) -> list[str]:
  """Qwen's sliding window, which its published models state and do not use."""
  if not raw.get("use_sliding_window") or raw.get("sliding_window") is None:
    return []
  kinds = raw.get("layer_types")
  full = raw.get("max_window_layers", 0) >= raw.get("num_hidden_layers", 0)
  if kinds is not None:
    full = set(kinds) == {"full_attention"}
  return [] if full else ["sliding-window attention is in use"]


def no_bias(raw: Mapping[str, Any]) -> list[str]:
  """Biases, which no published model of the family has."""
  names = ("attention_bias", "mlp_bias")
  return [f"{name} is set" for name in names if raw.get(name)]
