"""Scoring calls against counts made by hand."""

import pytest

from opera_jax.models import decoder
from opera_jax.plan import cost, scoring_calls

CONFIG = decoder.Config(
  vocab_size=64,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  intermediate_size=48,
)
# A prompt of 8, a thought of 64 and an answer of 16: 88 tokens; a reference
# of 4.
LENGTHS = {"longest_prompt": 96, "longest_response": 160}


def _count(slots, *, completions=6, continued=True):
  scoring = {
    "batch_size": 2,
    "prefix_buckets": (88,),
    "slot_buckets": (slots,),
    "continuation_buckets": (4, 16),
  }
  return scoring_calls.count(
    CONFIG,
    scoring,
    completions=completions,
    largest=cost.score(CONFIG, 2, 88, slots, 16),
    continued=continued,
    **LENGTHS,
  )


def test_the_packer_says_how_many_calls_there_are():
  # 25 continuations of each of 6 completions, 2 rows a call.
  assert _count(25).count == 3
  assert _count(8).count == 6 * 4 / 2
  assert _count(25, completions=5).count == 3


def test_work_is_in_calls_at_the_largest_shape():
  small, large = (
    cost.score(CONFIG, 2, 88, 25, length).total for length in (4, 16)
  )
  assert _count(25).work == pytest.approx(3 * small / large)


def test_useful_is_what_no_padding_and_no_repetition_computes():
  """Continuations see the prefix up to their fork, in steps of 2 tokens."""
  per_token = cost.layer_flops(CONFIG) + cost.head_flops(CONFIG)
  steps = {32 * i // 12 + after for i in range(12) for after in (0, 1)}
  forks = [*(8 + 2 * step for step in steps), 88]
  assert len(forks) == 25
  pairs = 88 * 89 / 2 + sum(4 * fork + 4 * 5 / 2 for fork in forks)
  needed = (88 + 25 * 4) * per_token + cost.attention_flops(CONFIG, pairs)
  calls = _count(8)
  computed = 12 * cost.score(CONFIG, 2, 88, 8, 4).total
  assert calls.useful == pytest.approx(6 * needed / computed)
  assert calls.useful < _count(25).useful < 1


def test_completions_alone_have_no_continuations():
  calls = _count(1, continued=False)
  assert calls.count == 3
  alone = cost.score(CONFIG, 1, 88, 0, 0).total
  assert calls.useful == pytest.approx(
    2 * alone / cost.score(CONFIG, 2, 88, 1, 4).total
  )
