"""Intervals: their coverage, and what pairing is for."""

import numpy as np
import pytest

from opera_jax.evals import bootstrap


def test_the_interval_is_the_normal_one_for_many_prompts():
  values = np.random.default_rng(0).normal(3.0, 2.0, 900)
  got = bootstrap.mean_interval(values)
  half = 1.96 * values.std() / 30
  assert got.mean == pytest.approx(values.mean())
  assert got.count == 900
  np.testing.assert_allclose(
    [got.low, got.high], [got.mean - half, got.mean + half], atol=0.01
  )


def test_coverage_is_the_level():
  generator = np.random.default_rng(1)
  hits = 0
  for i in range(300):
    values = generator.exponential(1.0, 60)
    got = bootstrap.mean_interval(values, level=0.9, resamples=300, seed=i)
    hits += got.low <= 1.0 <= got.high
  assert 0.83 <= hits / 300 <= 0.94


def test_pairing_finds_a_small_change_among_different_prompts():
  generator = np.random.default_rng(2)
  before = generator.normal(0, 5, 200)
  after = before + 0.2 + generator.normal(0, 0.3, 200)
  first = bootstrap.mean_interval(before)
  second = bootstrap.mean_interval(after)
  assert first.high > second.low
  change = bootstrap.paired_difference(after, before)
  assert change.excludes_zero() and change.low > 0


def test_equal_values_have_no_width():
  got = bootstrap.paired_difference(np.ones(9), np.ones(9))
  assert (got.mean, got.low, got.high) == (0, 0, 0)
  assert not got.excludes_zero()


def test_the_same_seed_gives_the_same_interval_whatever_the_block(monkeypatch):
  values = np.random.default_rng(3).normal(size=50)
  want = bootstrap.mean_interval(values, resamples=101, seed=5)
  monkeypatch.setattr(bootstrap, "_BLOCK", 200)
  assert bootstrap.mean_interval(values, resamples=101, seed=5) == want
  assert bootstrap.mean_interval(values, resamples=101, seed=6) != want


def test_one_prompt_says_nothing_of_its_spread():
  got = bootstrap.mean_interval(np.asarray([2.0]))
  assert got.mean == 2.0 and np.isnan(got.low) and not got.excludes_zero()


@pytest.mark.parametrize(
  "values,message",
  [
    (np.zeros(0), "one number a prompt"),
    (np.zeros((2, 2)), "one number a prompt"),
    (np.asarray([1.0, np.nan]), "prompt 1 is nan"),
  ],
)
def test_bad_values_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    bootstrap.mean_interval(values)


def test_other_bad_input_is_refused():
  with pytest.raises(ValueError, match="same prompts"):
    bootstrap.paired_difference(np.zeros(3), np.zeros(4))
  with pytest.raises(ValueError, match="0 < level < 1"):
    bootstrap.mean_interval(np.zeros(3), level=95)
