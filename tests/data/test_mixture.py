"""Every set gets its share of RL's prompts, whatever its size."""

import collections

import numpy as np
import pytest

from opera_jax.data import batching, mixture


def test_sets_are_called_after_their_sources():
  sources = {
    "data/train.jsonl": "train",
    "my tasks.v2.jsonl.gz": "my_tasks_v2",
    "hf:openai/gsm8k:main#test": "gsm8k",
    "hf:a/b@1234": "b",
    "tfds:gsm8k:1.0.0": "gsm8k",
    "saved/": "saved",
  }
  for source, name in sources.items():
    assert mixture.parse([(source, 2)]) == [mixture.Set(name, source, 2.0)]
  assert mixture.parse([("a/x.jsonl", 1, "first")])[0].name == "first"


@pytest.mark.parametrize(
  ("mix", "message"),
  [
    (("a.jsonl", 1.0), "needs a comma"),
    ([("a.jsonl",)], "(source, weight)"),
    ([("a.jsonl", 0.0)], "weight of 'a.jsonl' is 0.0"),
    ([("a.jsonl", float("nan"))], "above 0"),
    ([("a.jsonl", True)], "above 0"),
    ([("a.jsonl", 1, "a b")], "name of 'a.jsonl' is 'a b'"),
    ([("12.jsonl", 1)], "must be a letter"),
    ([("math.jsonl", 1)], "kind of task"),
    ([("a/x.jsonl", 1), ("b/x.jsonl", 2)], 'another name: ("b/x.jsonl", 2'),
    ([("a.jsonl", 1), ("a.jsonl", 1, "b")], "given twice"),
  ],
)
def test_what_is_no_mix_is_refused(mix, message):
  with pytest.raises(ValueError) as error:
    mixture.parse(mix)
  assert message in str(error.value)


@pytest.mark.parametrize("seed", range(12))
def test_every_prefix_has_the_shares_to_within_one(seed):
  rng = np.random.default_rng(seed)
  weights = rng.exponential(size=rng.integers(1, 9)) ** 2 + 1e-3
  chosen = mixture.set_sequence(weights, 600)
  counts = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
  owed = np.arange(1, 601)[:, None] * weights / weights.sum()
  assert np.abs(counts - owed).max() < 1
  np.testing.assert_array_equal(mixture.set_sequence(weights, 50), chosen[:50])


def test_whole_shares_are_exact_in_every_batch():
  sets = ["small"] * 5 + ["large"] * 500 + ["other"] * 30
  weights = {"small": 3.0, "large": 4.0, "other": 1.0}
  for batch in mixture.mixed_order(sets, weights, 8, 50, seed=1):
    found = collections.Counter(sets[i] for i in batch)
    assert found == {"small": 3, "large": 4, "other": 1}


def test_a_set_is_passed_through_and_no_batch_repeats():
  sets = ["a"] * 7 + ["b"] * 40
  weights = {"a": 1.0, "b": 1.3}
  order = mixture.mixed_order(sets, weights, 10, 60, seed=3)
  assert all(len(set(batch.tolist())) == 10 for batch in order)
  for name in weights:
    items = [i for i, one in enumerate(sets) if one == name]
    drawn = [i for batch in order for i in batch.tolist() if sets[i] == name]
    for begin in range(0, len(drawn) - len(items), len(items)):
      assert sorted(drawn[begin : begin + len(items)]) == items
  # The step alone says what comes: more batches begin with the same ones.
  longer = mixture.mixed_order(sets, weights, 10, 90, seed=3)
  np.testing.assert_array_equal(longer[:60], order)
  other = mixture.mixed_order(sets, weights, 10, 60, seed=4)
  assert not np.array_equal(other, order)


def test_one_set_is_drawn_as_without_a_mix():
  order = batching.batch_order(11, 4, epochs=8, seed=5)
  mixed = mixture.mixed_order(["a"] * 11, {"a": 2.0}, 4, len(order), seed=5)
  np.testing.assert_array_equal(np.stack(list(order)), mixed)


def test_a_set_too_small_for_a_batch_is_refused():
  sets = ["a"] * 3 + ["b"] * 90
  with pytest.raises(ValueError, match="Set 'a' .* has 3 prompts .* up to 4 "):
    mixture.mixed_order(sets, {"a": 1.0, "b": 1.0}, 8, 5, seed=0)
  with pytest.raises(ValueError, match="Set 'c' .* has 0 prompts"):
    mixture.mixed_order(sets, {"b": 1.0, "c": 1.0}, 8, 5, seed=0)


def test_quotas_follow_the_weights_and_small_sets_give_all():
  weights = {"a": 2.0, "b": 1.0, "c": 1.0}
  assert mixture.quotas({"a": 90, "b": 90, "c": 90}, weights, 40) == {
    "a": 20,
    "b": 10,
    "c": 10,
  }
  assert mixture.quotas({"a": 90, "b": 4, "c": 90}, weights, 40) == {
    "a": 24,
    "b": 4,
    "c": 12,
  }
  everything = {"a": 1, "b": 2, "c": 3}
  assert mixture.quotas(everything, weights, 40) == everything
