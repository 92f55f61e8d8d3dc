"""Sizes of published models by their hub id, from their config.json files.

A plan reads them, so that it needs no network; a run reads the checkpoint's own
config.json. Base and chat models of one size have the same values, so that one
line stands for both. Parameters in millions:

| model                 | params | layers | hidden | heads | kv | head | tied |
|-----------------------|-------:|-------:|-------:|------:|---:|-----:|------|
| Qwen3-0.6B            |    596 |     28 |  1,024 |    16 |  8 |  128 | yes  |
| Qwen3-1.7B            |  1,721 |     28 |  2,048 |    16 |  8 |  128 | yes  |
| Qwen3-4B              |  4,022 |     36 |  2,560 |    32 |  8 |  128 | yes  |
| Qwen3-8B              |  8,191 |     36 |  4,096 |    32 |  8 |  128 | no   |
| Qwen3-14B             | 14,768 |     40 |  5,120 |    40 |  8 |  128 | no   |
| Qwen3-32B             | 32,762 |     64 |  5,120 |    64 |  8 |  128 | no   |
| Qwen2.5-0.5B          |    494 |     24 |    896 |    14 |  2 |   64 | yes  |
| Qwen2.5-1.5B          |  1,544 |     28 |  1,536 |    12 |  2 |  128 | yes  |
| Qwen2.5-3B            |  3,086 |     36 |  2,048 |    16 |  2 |  128 | yes  |
| Qwen2.5-7B            |  7,616 |     28 |  3,584 |    28 |  4 |  128 | no   |
| SmolLM2-135M          |    135 |     30 |    576 |     9 |  3 |   64 | yes  |
| SmolLM2-360M          |    362 |     32 |    960 |    15 |  5 |   64 | yes  |
| SmolLM2-1.7B          |  1,711 |     24 |  2,048 |    32 | 32 |   64 | yes  |
| Llama-3.2-1B          |  1,236 |     16 |  2,048 |    32 |  8 |   64 | yes  |
| Llama-3.2-3B          |  3,213 |     28 |  3,072 |    24 |  8 |  128 | yes  |
| Phi-3.5-mini-instruct |  3,821 |     32 |  3,072 |    32 | 32 |   96 | no   |
| gemma-3-270m          |    268 |     18 |    640 |     4 |  1 |  256 | yes  |
| gemma-3-1b-pt         |  1,000 |     26 |  1,152 |     4 |  1 |  256 | yes  |

The searched factors of Phi-3.5's LongRoPE stand in its checkpoint alone.
"""

from typing import Any

from opera_jax.models import decoder, rope
from opera_jax.models.families import table


def _config(
  family: str,
  vocab: int,
  sizes: tuple[int, int, int, int, int, int],
  **fields: Any,
) -> decoder.Config:
  layers, hidden, heads, kv_heads, head_dim, intermediate = sizes
  return decoder.Config(
    family=family,
    vocab_size=vocab,
    num_hidden_layers=layers,
    hidden_size=hidden,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head_dim,
    intermediate_size=intermediate,
    **{**table.FAMILIES[family].fields, **fields},
  )


def _qwen3(
  layers: int, hidden: int, heads: int, intermediate: int, *, tied: bool
) -> decoder.Config:
  return _config(
    "qwen3",
    151_936,
    (layers, hidden, heads, 8, 128, intermediate),
    rope_theta=1e6,
    tie_word_embeddings=tied,
  )


def _qwen2(vocab: int, *sizes: int, tied: bool) -> decoder.Config:
  return _config(
    "qwen2",
    vocab,
    _six(sizes),
    rope_theta=1e6,
    tie_word_embeddings=tied,
    max_position_embeddings=32_768,
  )


def _smollm2(*sizes: int, theta: float) -> decoder.Config:
  return _config(
    "llama",
    49_152,
    _six(sizes),
    rope_theta=theta,
    rms_norm_eps=1e-5,
    max_position_embeddings=8_192,
  )


def _llama(*sizes: int) -> decoder.Config:
  return _config(
    "llama",
    128_256,
    _six(sizes),
    rope_theta=5e5,
    rms_norm_eps=1e-5,
    max_position_embeddings=131_072,
    rope_scaling=rope.Scaling(
      "llama3", factor=32.0, original_max_position_embeddings=8_192
    ),
  )


def _gemma3(*sizes: int) -> decoder.Config:
  return _config(
    "gemma3_text",
    262_144,
    _six(sizes),
    rope_theta=1e6,
    rope_local_theta=1e4,
    hidden_act="gelu_pytorch_tanh",
    query_scale=256**-0.5,
    sliding_window=512,
    sliding_window_pattern=6,
    max_position_embeddings=32_768,
  )


def _six(sizes: tuple[int, ...]) -> tuple[int, int, int, int, int, int]:
  """Layers, width, heads, key-value heads, their size, feed-forward width."""
  layers, hidden, heads, kv_heads, head_dim, intermediate = sizes
  return layers, hidden, heads, kv_heads, head_dim, intermediate


_QWEN3 = {
  "0.6B": _qwen3(28, 1_024, 16, 3_072, tied=True),
  "1.7B": _qwen3(28, 2_048, 16, 6_144, tied=True),
  "4B": _qwen3(36, 2_560, 32, 9_728, tied=True),
  "8B": _qwen3(36, 4_096, 32, 12_288, tied=False),
  "14B": _qwen3(40, 5_120, 40, 17_408, tied=False),
  "32B": _qwen3(64, 5_120, 64, 25_600, tied=False),
}
_QWEN2 = {
  "0.5B": _qwen2(151_936, 24, 896, 14, 2, 64, 4_864, tied=True),
  "1.5B": _qwen2(151_936, 28, 1_536, 12, 2, 128, 8_960, tied=True),
  "3B": _qwen2(151_936, 36, 2_048, 16, 2, 128, 11_008, tied=True),
  "7B": _qwen2(152_064, 28, 3_584, 28, 4, 128, 18_944, tied=False),
}
_SMOLLM2 = {
  "135M": _smollm2(30, 576, 9, 3, 64, 1_536, theta=1e5),
  "360M": _smollm2(32, 960, 15, 5, 64, 2_560, theta=1e5),
  "1.7B": _smollm2(24, 2_048, 32, 32, 64, 8_192, theta=1.3e5),
}
_LLAMA = {
  "1B": _llama(16, 2_048, 32, 8, 64, 8_192),
  "3B": _llama(28, 3_072, 24, 8, 128, 8_192),
}
_PHI3 = _config(
  "phi3",
  32_064,
  (32, 3_072, 32, 32, 96, 8_192),
  rope_theta=1e4,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
  max_position_embeddings=131_072,
)
_GEMMA3 = {
  "270m": _gemma3(18, 640, 4, 1, 256, 2_048),
  "1b": _gemma3(26, 1_152, 4, 1, 256, 6_912),
}


def find(hub_id: str) -> decoder.Config | None:
  """The sizes of a model by its id, of the base or the chat model; else None.

  Args:
    hub_id: with a revision or without.
  """
  name = hub_id.partition("@")[0]
  for ending in ("-Instruct", "-Base"):
    name = name.removesuffix(ending)
  if name.endswith("1b-it"):  # Gemma's base model has an ending too
    name = name.removesuffix("-it") + "-pt"
  name = name.removesuffix("-it")
  return PRESETS.get(name, PRESETS.get(hub_id.partition("@")[0]))


PRESETS: dict[str, decoder.Config] = {
  **{f"Qwen/Qwen3-{size}": c for size, c in _QWEN3.items()},
  **{f"Qwen/Qwen2.5-{size}": c for size, c in _QWEN2.items()},
  **{f"HuggingFaceTB/SmolLM2-{size}": c for size, c in _SMOLLM2.items()},
  **{f"meta-llama/Llama-3.2-{size}": c for size, c in _LLAMA.items()},
  "microsoft/Phi-3.5-mini-instruct": _PHI3,
  "google/gemma-3-270m": _GEMMA3["270m"],
  "google/gemma-3-1b-pt": _GEMMA3["1b"],
}
