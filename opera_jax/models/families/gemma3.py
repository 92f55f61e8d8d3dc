"""Gemma 3, text (arXiv 2503.19786): 270M, 1B, and larger ones' text models.

Five of six layers see a window; they rotate with a base of their own. Norms
stand before and behind attention and MLP, and multiply by 1 + weight.
"""

from collections.abc import Mapping
from typing import Any

from opera_jax.models import sliding_window
from opera_jax.models.families import family

_SLIDING, _FULL = "sliding_attention", "full_attention"


def _pattern(raw: Mapping[str, Any]) -> int | None:
  """Every so-manieth layer sees everything; None if there is no such number."""
  layers = raw.get("num_hidden_layers", 0)
  kinds = raw.get("layer_types")
  if kinds is None:
    return raw.get(
      "sliding_window_pattern", raw.get("_sliding_window_pattern", 6)
    )
  if _FULL not in kinds:
    return 0
  pattern = kinds.index(_FULL) + 1
  return pattern if list(kinds) == _kinds(layers, pattern) else None


def _kinds(layers: int, pattern: int) -> list[str]:
  slides = [sliding_window.slides(i, pattern) for i in range(layers)]
  return [_SLIDING if slide else _FULL for slide in slides]


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
  ropes = raw.get("rope_parameters") or {}
  local = ropes.get(_SLIDING, {}).get("rope_theta")
  return {
    "hidden_act": raw.get("hidden_activation")
    or raw.get("hidden_act", "gelu_pytorch_tanh"),
    "query_scale": float(raw.get("query_pre_attn_scalar", 256)) ** -0.5,
    # None is no window; transformers reads a missing key as 4,096.
    "sliding_window": raw.get("sliding_window", 4_096) or 0,
    "sliding_window_pattern": _pattern(raw),
    "rope_local_theta": float(local or raw.get("rope_local_base_freq", 1e4)),
  }


def _write(config: Any) -> dict[str, Any]:
  return {
    "attention_bias": False,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "hidden_activation": config.hidden_act,
    "layer_types": _kinds(
      config.num_hidden_layers, config.sliding_window_pattern
    ),
    "query_pre_attn_scalar": round(config.query_scale**-2),  # a whole number
    "rope_local_base_freq": config.rope_local_theta,
    "sliding_window": config.sliding_window,
    "sliding_window_pattern": config.sliding_window_pattern,
  }


def _unsupported(raw: Mapping[str, Any]) -> list[str]:
  wrong = family.no_bias(raw)
  for name in ("final_logit_softcapping", "attn_logit_softcapping"):
    if raw.get(name):
      wrong.append(f"{name} is {raw[name]}")
  if raw.get("use_bidirectional_attention"):
    wrong.append("use_bidirectional_attention is set")
  if _pattern(raw) is None:
    wrong.append("its windowed layers follow no regular pattern")
  local = (raw.get("rope_parameters") or {}).get(_SLIDING, {})
  if local.get("rope_type", "default") != "default":
    wrong.append(f"windowed layers have rope scaling {local['rope_type']!r}")
  return wrong


_NORMS = {
  "input_layernorm.weight": "layers/input_norm",
  "post_attention_layernorm.weight": "layers/attention_out_norm",
  "pre_feedforward_layernorm.weight": "layers/post_norm",
  "post_feedforward_layernorm.weight": "layers/mlp_out_norm",
}
GEMMA3 = family.Family(
  model_type="gemma3_text",
  architecture="Gemma3ForCausalLM",
  fields={
    "qk_norm": True,
    "norm_offset": True,
    "output_norms": True,
    "embedding_scale": True,
  },
  layer={
    **{name: family.one(ours, ("D",), "D") for name, ours in _NORMS.items()},
    **family.INPUTS,
    **family.OUTPUTS,
    **family.QK_NORM,
  },
  defaults={
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
  },
  read=_read,
  write=_write,
  unsupported=_unsupported,
)
