"""The published sizes, counted from shapes without allocating."""

import pytest

from opera_jax.models import decoder, presets

# As the checkpoints' files hold them, which model cards and the hub state.
COUNTS = {
  "Qwen/Qwen3-0.6B": 596_049_920,
  "Qwen/Qwen3-1.7B": 1_720_574_976,
  "Qwen/Qwen3-4B": 4_022_468_096,
  "Qwen/Qwen3-8B": 8_190_735_360,
  "Qwen/Qwen3-14B": 14_768_307_200,
  "Qwen/Qwen3-32B": 32_762_123_264,
  "Qwen/Qwen2.5-0.5B": 494_032_768,
  "Qwen/Qwen2.5-1.5B": 1_543_714_304,
  "Qwen/Qwen2.5-3B": 3_085_938_688,
  "Qwen/Qwen2.5-7B": 7_615_616_512,
  "HuggingFaceTB/SmolLM2-135M": 134_515_008,
  "HuggingFaceTB/SmolLM2-360M": 361_821_120,
  "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
  "meta-llama/Llama-3.2-1B": 1_235_814_400,
  "meta-llama/Llama-3.2-3B": 3_212_749_824,
  "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
  "google/gemma-3-270m": 268_098_176,
  "google/gemma-3-1b-pt": 999_885_952,
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_parameter_counts_are_the_published_ones(name):
  shapes = decoder.abstract(presets.PRESETS[name])[1]
  assert decoder.parameter_count(shapes) == COUNTS[name]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_table_says_the_same(name):
  config = presets.PRESETS[name]
  row = next(
    line
    for line in (presets.__doc__ or "").splitlines()
    if line.startswith(f"| {name.split('/')[1]} ")
  )
  cells = [cell.strip().replace(",", "") for cell in row.split("|")[2:-1]]
  assert cells == [
    str(round(COUNTS[name] / 1e6)),
    str(config.num_hidden_layers),
    str(config.hidden_size),
    str(config.num_attention_heads),
    str(config.num_key_value_heads),
    str(config.head_dim),
    "yes" if config.tie_word_embeddings else "no",
  ]


def test_every_preset_is_counted():
  assert presets.PRESETS.keys() == COUNTS.keys()
