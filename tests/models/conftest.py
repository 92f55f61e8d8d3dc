"""Qwen3 of transformers with random weights, and the same in our arrays."""

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
}


@dataclasses.dataclass(frozen=True)
class Pair:
  """One set of weights in both frameworks."""

  torch: Any
  config: Any
  graphdef: Any
  params: Any
  path: Any  # where transformers saved it


def torch_model(**changes):
  """A float32 model whose attention is sharp and whose norms all differ."""
  import torch
  import transformers

  torch.manual_seed(0)
  torch.set_num_threads(1)
  config = transformers.Qwen3Config(**{**ODD, **changes})
  config._attn_implementation = "eager"
  model = transformers.Qwen3ForCausalLM(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.uniform_(0.5, 1.5)
      else:
        parameter.normal_(0.0, 1.2 * parameter.shape[1] ** -0.5)
  return model


def read(model, folder, mesh) -> Pair:
  """Saves a torch model and loads it into ours."""
  from opera_jax.models import decoder, hf_checkpoint
  from opera_jax.sharding import rules

  model.save_pretrained(folder)
  config = hf_checkpoint.config_from_hf(folder)
  graphdef, _ = decoder.abstract(config)
  params = hf_checkpoint.load(folder, config, mesh, rules.TRAIN)
  return Pair(model, config, graphdef, params, folder)


FAST = "grouped"  # the others run with the slow tests


@pytest.fixture(
  scope="session",
  params=[
    pytest.param(name, marks=[] if name == FAST else [pytest.mark.slow])
    for name in CASES
  ],
)
def pair(request, tmp_path_factory, one_device) -> Pair:
  """Each case in turn."""
  folder = tmp_path_factory.mktemp(request.param)
  return read(torch_model(**CASES[request.param]), folder, one_device)
