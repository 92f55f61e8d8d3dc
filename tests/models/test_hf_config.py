"""config.json of Hugging Face: read as published, refused when not ours."""

import json

import pytest

from opera_jax.models import hf_checkpoint, presets

PUBLISHED = {
  "architectures": ["Qwen3ForCausalLM"],
  "attention_bias": False,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 1024,
  "intermediate_size": 3072,
  "max_position_embeddings": 40960,
  "max_window_layers": 28,
  "model_type": "qwen3",
  "num_attention_heads": 16,
  "num_hidden_layers": 28,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": None,
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}


def _read_config(folder, **changes):
  (folder / "config.json").write_text(json.dumps({**PUBLISHED, **changes}))
  return hf_checkpoint.config_from_hf(folder)


def test_a_published_config_is_read(tmp_path):
  assert _read_config(tmp_path) == presets.PRESETS["Qwen/Qwen3-0.6B"]
  assert _read_config(tmp_path, rope_theta=5e6).rope_theta == 5e6
  moved = {"rope_theta": 7e5, "rope_type": "default"}
  read = _read_config(tmp_path, rope_theta=None, rope_parameters=moved)
  assert read.rope_theta == 7e5
  # Stated but not in use, as in several published files.
  _read_config(tmp_path, sliding_window=4096)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"attention_bias": True}, "attention_bias"),
    ({"model_type": "qwen3_moe"}, "mixture of experts"),
    ({"model_type": "gemma3"}, "images too"),
    ({"model_type": "qwen33"}, "Did you mean 'qwen3'"),
    ({"model_type": None}, "models of gemma3_text, llama, .* are read"),
    ({"num_experts": 128}, "mixture of experts"),
    ({"hidden_act": "gelu"}, "gelu"),
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
      "rope scaling 'yarn'",
    ),
    ({"rope_scaling": {"type": "linear"}}, "by its factor, got 0"),
    ({"rope_scaling": {"type": "llama3"}}, "by its factor, got 0"),
    ({"num_attention_heads": 0}, "num_attention_heads=0; a size"),
    ({"hidden_size": "wide"}, "hidden_size='wide'; a size"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (
      {
        "use_sliding_window": True,
        "sliding_window": 4096,
        "max_window_layers": 14,
      },
      "sliding-window",
    ),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ({"rope_theta": None}, "rope_theta is missing"),
  ],
)
def test_other_models_are_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    _read_config(tmp_path, **changes)


def test_all_that_is_unsupported_comes_in_one_error(tmp_path):
  with pytest.raises(ValueError, match="gelu.*attention_bias"):
    _read_config(tmp_path, attention_bias=True, hidden_act="gelu")
