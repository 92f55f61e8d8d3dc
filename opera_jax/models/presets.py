"""Sizes of the published dense Qwen3 models, from their config.json files.

Base and chat models of one size have the same values. All of them have a padded
vocabulary of 151,936, head_dim 128, rope_theta 1e6 and rms_norm_eps 1e-6.

| size | parameters     | layers | hidden | heads | key/value | tied |
|------|----------------|--------|--------|-------|-----------|------|
| 0.6b |    596,049,920 |     28 |  1,024 |    16 |         8 | yes  |
| 1.7b |  1,720,574,976 |     28 |  2,048 |    16 |         8 | yes  |
| 4b   |  4,022,468,096 |     36 |  2,560 |    32 |         8 | yes  |
| 8b   |  8,190,735,360 |     36 |  4,096 |    32 |         8 | no   |
| 14b  | 14,768,307,200 |     40 |  5,120 |    40 |         8 | no   |
| 32b  | 32,762,123,264 |     64 |  5,120 |    64 |         8 | no   |
"""

from opera_jax.models import decoder


def _preset(
  layers: int, hidden: int, heads: int, intermediate: int, *, tied: bool
) -> decoder.Config:
  return decoder.Config(
    vocab_size=151_936,
    hidden_size=hidden,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=intermediate,
    rope_theta=1_000_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=tied,
  )


PRESETS: dict[str, decoder.Config] = {
  "0.6b": _preset(28, 1_024, 16, 3_072, tied=True),
  "1.7b": _preset(28, 2_048, 16, 6_144, tied=True),
  "4b": _preset(36, 2_560, 32, 9_728, tied=True),
  "8b": _preset(36, 4_096, 32, 12_288, tied=False),
  "14b": _preset(40, 5_120, 40, 17_408, tied=False),
  "32b": _preset(64, 5_120, 64, 25_600, tied=False),
}
