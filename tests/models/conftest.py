"""Models of transformers with random weights, and the same in our arrays."""

import dataclasses
from typing import Any

import pytest

# Every setting that has broken a port: head_dim is not hidden / heads, the
# vocabulary is no multiple of 128, neither theta nor epsilon is the default.
ODD = {
  "vocab_size": 301,
  "hidden_size": 48,
  "num_hidden_layers": 4,
  "num_attention_heads": 8,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "intermediate_size": 80,
  "rms_norm_eps": 1e-5,
  "rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0},
  "tie_word_embeddings": False,
  "max_position_embeddings": 512,
}
CASES = {
  "grouped": {},
  "ungrouped": {"num_key_value_heads": 8},
  "tied": {"tie_word_embeddings": True},
  "tied_ungrouped_other_theta": {
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
  },
  "qwen2": {"family": "qwen2", "head_dim": None, "num_attention_heads": 4},
  "llama3": {
    "family": "llama",
    "rope_parameters": {
      "rope_type": "llama3",
      "rope_theta": 500.0,
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 64,
    },
  },
  "phi3_short": {
    "family": "phi3",
    "head_dim": None,
    "num_attention_heads": 4,
    "rope_parameters": {
      "rope_type": "longrope",
      "rope_theta": 5_000.0,
      "short_factor": [1.0, 1.1, 1.3, 1.5, 1.9, 2.5],
      "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 16.0],
      "original_max_position_embeddings": 128,
    },
    "original_max_position_embeddings": 128,
  },
  # Windows that end inside every sequence, and a layer that sees everything.
  "gemma3": {
    "family": "gemma3_text",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "sliding_window": 5,
    "query_pre_attn_scalar": 37,
    "layer_types": [
      *("sliding_attention", "sliding_attention"),
      *("full_attention", "sliding_attention"),
    ],
    "rope_parameters": {
      "full_attention": {
        "rope_type": "linear",
        "factor": 4.0,
        "rope_theta": 5_000.0,
      },
      "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
    },
  },
}
CASES["gemma3_tied"] = CASES["gemma3"] | {"tie_word_embeddings": True}
# Every sequence is longer than the short factors are for.
CASES["phi3_long"] = CASES["phi3_short"] | {
  "rope_parameters": CASES["phi3_short"]["rope_parameters"]
  | {"original_max_position_embeddings": 4, "attention_factor": 1.2},
  "original_max_position_embeddings": 4,
}


@dataclasses.dataclass(frozen=True)
class Pair:
  """One set of weights in both frameworks."""

  torch: Any
  config: Any
  graphdef: Any
  params: Any
  path: Any  # where transformers saved it


def torch_model(family="qwen3", **changes):
  """A float32 model whose attention is sharp and whose norms all differ."""
  import torch
  import transformers

  torch.manual_seed(0)
  torch.set_num_threads(1)
  fields = {k: v for k, v in {**ODD, **changes}.items() if v is not None}
  # Ends that random weights would soon draw.
  fields |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
  config = transformers.AutoConfig.for_model(family, **fields)
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  lowest = -0.5 if family == "gemma3_text" else 0.5  # weights of norms
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.uniform_(lowest, lowest + 1)
      else:
        parameter.normal_(0.0, 1.2 * parameter.shape[1] ** -0.5)
  return model


def read(model, folder, mesh, **fields) -> Pair:
  """Saves a torch model and loads it into ours, with other fields."""
  from opera_jax.models import decoder, hf_checkpoint
  from opera_jax.sharding import rules

  model.save_pretrained(folder)
  config = hf_checkpoint.config_from_hf(folder)
  config = dataclasses.replace(config, **fields)
  graphdef, _ = decoder.abstract(config)
  params = hf_checkpoint.load(folder, config, mesh, rules.TRAIN)
  return Pair(model, config, graphdef, params, folder)


FAST = ("grouped",)  # the others run with the slow tests


@pytest.fixture(
  scope="session",
  params=[
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
    for name in CASES
  ],
)
def pair(request, tmp_path_factory, one_device) -> Pair:
  """Each case in turn."""
  folder = tmp_path_factory.mktemp(request.param)
  model = torch_model(**CASES[request.param])
  factors = "long" if request.param == "phi3_long" else "short"
  return read(model, folder, one_device, rope_factors=factors)
