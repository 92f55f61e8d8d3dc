"""Two lengths give a run its sizes, and what is set stays."""

import pytest

from opera_jax.configs import common, qwen3_8b, smollm2, tiny
from opera_jax.configs.methods import dapo
from opera_jax.run import sizes
from opera_jax.stages import config_check

DERIVED = (
  *("engine.prompt_buckets", "engine.cache_buckets", "engine.slots"),
  *("scoring.prefix_buckets", "scoring.slot_buckets"),
  *("scoring.continuation_buckets", "rl.row_buckets"),
  *("base.row_tokens", "sft.row_tokens", "synthesis.max_step_tokens"),
  *("synthesis.max_thought_tokens", "synthesis.max_answer_tokens"),
)


def _values(config):
  """The values of DERIVED, by field."""
  flat = {}
  for field in DERIVED:
    section, _, name = field.partition(".")
    flat[field] = config[section][name]
  return flat


def _sized(prompt, new, reference=0, **changes):
  config = common.get_config()
  config.max_prompt_tokens, config.rollout.max_new_tokens = prompt, new
  config.max_reference_tokens = reference or new
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in changes.items()}
  )
  return sizes.derive(config)


def test_the_papers_lengths_give_the_sizes_that_are_planned_by_hand():
  # What configs/common.py stated before sizes were derived.
  assert _values(sizes.derive(qwen3_8b.get_config())) == {
    "engine.prompt_buckets": (512, 1024, 2048, 4096, 6144),
    "engine.cache_buckets": (1_280, 2_560, 5_120, 10_240),
    "engine.slots": 16,
    "scoring.prefix_buckets": (1024, 2048, 4096, 8192, 16_384),
    "scoring.slot_buckets": (1, 4, 8),
    "scoring.continuation_buckets": (256, 512, 1024, 2048, 4096),
    "rl.row_buckets": (2048, 4096, 8192, 16_384),
    "base.row_tokens": 16_384,
    "sft.row_tokens": 16_384,
    "synthesis.max_step_tokens": 1024,
    "synthesis.max_thought_tokens": 8192,
    "synthesis.max_answer_tokens": 4096,
  }
  longer = sizes.derive(dapo.get_config())
  assert longer.rl.row_buckets == (4096, 8192, 16_384, 26_624)
  assert longer.engine.cache_buckets[-1] == 20_480


@pytest.mark.parametrize(
  ("prompt", "new"), [(1, 1), (60, 40), (96, 224), (700, 300), (6_144, 10_240)]
)
def test_every_length_fits_into_its_buckets(prompt, new):
  config = _sized(prompt, new)
  for field, longest in (
    ("engine.prompt_buckets", prompt),
    ("engine.cache_buckets", new),
    ("scoring.prefix_buckets", prompt + new),
    ("scoring.continuation_buckets", new),
    ("rl.row_buckets", prompt + new),
  ):
    buckets = _values(config)[field]
    assert config_check.ascending(buckets) == ""
    # Padding of the longest is less than a tile.
    assert longest <= buckets[-1] < longest + 128
    assert all(b >= 64 or b == buckets[-1] for b in buckets)
    # A length is padded to twice itself at the most, above the shortest.
    assert all(b <= 2 * a for a, b in zip(buckets, buckets[1:])), buckets
  assert config.sft.row_tokens >= prompt + new


def test_rows_of_several_completions_hold_completions_alone():
  assert _sized(512, 256).rl.row_buckets[-1] == 768
  shared = _sized(512, 256, rl__completions_per_row=4)
  assert shared.rl.row_buckets == (64, 128, 256)


def test_short_references_let_more_continuations_into_a_call():
  assert _sized(512, 512, 128).scoring.slot_buckets == (1, 4, 8, 16)
  assert _sized(512, 512, 32).scoring.slot_buckets == (1, 4, 8, 16, 32)


def test_rewriting_needs_room_for_the_reference_and_a_thought():
  config = _sized(512, 512, 128, synthesis__method="rewrite")
  assert config.engine.prompt_buckets[-1] >= 512 + 128 + 409


def test_what_is_set_stays():
  set_ = {
    field: value for field, value in _values(tiny.get_config()).items() if value
  }
  assert len(set_) == len(DERIVED)  # the demo's sizes are pinned
  assert _values(sizes.derive(tiny.get_config())) == set_
  given = _values(smollm2.get_config())
  pinned = {field: value for field, value in given.items() if value}
  assert len(pinned) == len(DERIVED) - 1  # it pretrains nothing
  assert pinned.items() <= _values(sizes.derive(smollm2.get_config())).items()
  config = _sized(512, 256, rl__row_buckets=(1_000,), engine__slots=3)
  assert config.rl.row_buckets == (1_000,) and config.engine.slots == 3


def test_the_config_that_is_given_stays_as_it_is():
  config = common.get_config()
  before = config.to_dict()
  plain = sizes.derive(before)
  assert plain == sizes.derive(config).to_dict()
  assert config.to_dict() == before == common.get_config().to_dict()
  assert not before["rl"]["row_buckets"]
  assert sizes.derive(plain) == plain
