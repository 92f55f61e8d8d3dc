"""The published sizes, counted from shapes without allocating."""

import pytest

from opera_jax.models import decoder, presets

# In all, and outside embedding and head; model cards state the latter as
# 0.44, 1.4, 3.6, 6.95, 13.2 and 31.2 billion.
COUNTS = {
  "0.6b": (596_049_920, 0.44e9),
  "1.7b": (1_720_574_976, 1.4e9),
  "4b": (4_022_468_096, 3.6e9),
  "8b": (8_190_735_360, 6.95e9),
  "14b": (14_768_307_200, 13.2e9),
  "32b": (32_762_123_264, 31.2e9),
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_parameter_counts_are_the_published_ones(name):
  config = presets.PRESETS[name]
  total, inside = COUNTS[name]
  assert decoder.parameter_count(decoder.abstract(config)[1]) == total
  tables = (
    config.vocab_size
    * config.hidden_size
    * (1 if config.tie_word_embeddings else 2)
  )
  assert abs(total - tables - inside) < 0.012 * inside


def test_every_preset_is_counted():
  assert presets.PRESETS.keys() == COUNTS.keys()
