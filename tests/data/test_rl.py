"""Rows of an update: values at their tokens, groups together, pairs apart."""

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.data import rl


def _rows(advantages, begins=(2, 3, 2, 1)):
  sizes = [len(a) for a in advantages]
  prefixes = [
    np.arange(b + s, dtype=np.int32) + 10 * r
    for r, (b, s) in enumerate(zip(begins, sizes))
  ]
  half = [np.full(size, -0.5, np.float32) for size in sizes]
  place = rl.one_per_row(begins, sizes, (8,))
  rows = rl.build_batch(place, prefixes, half, half)
  return rl.with_advantages(rows, place, advantages)


def _advantages(*values):
  return [np.full(n + 1, v, np.float32) for n, v in enumerate(values)]


def test_advantages_are_on_completion_tokens():
  batch = _rows([np.asarray([1.0, 2.0, 3.0], np.float32)], begins=(2,))
  np.testing.assert_array_equal(batch.advantage[0], [0, 0, 1, 2, 3, 0, 0, 0])
  np.testing.assert_array_equal(batch.loss_mask[0], [0, 0, 1, 1, 1, 0, 0, 0])
  assert batch.extra == {}


def test_scatter_keeps_trailing_axes():
  place = rl.one_per_row([1, 0], [2, 1], (4,))
  values = [np.ones((2, 3)), np.ones((1, 3))]
  got = place.scatter(values)
  assert got.shape == (2, 4, 3)
  np.testing.assert_array_equal(got[:, :, 0], [[0, 1, 1, 0], [1, 0, 0, 0]])
  for own, value in zip(place.gather(got), values, strict=True):
    np.testing.assert_array_equal(own, value)


def test_completions_share_a_prompt():
  """Two prompts of 2 and 3 tokens, two samples each, in rows of two."""
  prefixes = [
    np.asarray(row, np.int32)
    for row in ([1, 2, 3], [1, 2, 4, 5], [6, 7, 8, 9], [6, 7, 8, 10, 11, 12])
  ]
  sizes = [1, 2, 1, 3]
  place = rl.several_per_row(sizes, 2, 4, (3, 8))
  advantages = [np.full(n, n, np.float32) for n in sizes]
  batch = rl.build_batch(place, prefixes, advantages, advantages)
  assert not batch.advantage.any()
  batch = rl.with_advantages(batch, place, advantages)
  assert (batch.prefix_length, batch.num_continuations) == (4, 2)
  np.testing.assert_array_equal(
    batch.tokens,
    [[1, 2, 0, 0, 3, 0, 0, 4, 5, 0], [6, 7, 8, 0, 9, 0, 0, 10, 11, 12]],
  )
  np.testing.assert_array_equal(
    batch.positions,
    [[0, 1, 2, 3, 2, 3, 4, 2, 3, 4], [0, 1, 2, 3, 3, 4, 5, 3, 4, 5]],
  )
  np.testing.assert_array_equal(
    batch.segments,
    [[1, 1, 0, 0, 2, 0, 0, 3, 3, 0], [1, 1, 1, 0, 2, 0, 0, 3, 3, 3]],
  )
  np.testing.assert_array_equal(
    batch.advantage,
    [[0, 0, 0, 0, 1, 0, 0, 2, 2, 0], [0, 0, 0, 0, 1, 0, 0, 3, 3, 3]],
  )
  with pytest.raises(ValueError, match="9"):
    rl.several_per_row([9], 1, 4, (3, 8))


def test_mini_batches_split_extra_arrays_too():
  batch = _rows(_advantages(1, 2, 3, 4))
  batch = batch.replace(extra={"value": np.arange(4.0)[:, None]})
  one, two = rl.mini_batches(batch, 2)
  np.testing.assert_array_equal(two.extra["value"][:, 0], [2, 3])
  np.testing.assert_array_equal(two.tokens, batch.tokens[2:])
  assert one.tokens.shape[0] == 2
  with pytest.raises(ValueError, match="4 rows do not divide into 3"):
    rl.mini_batches(batch, 3)


def test_pairs_put_chosen_rows_first():
  # Groups of 2: (rejected, chosen), then one with equal rewards; first in two
  # mini-batches, then in one.
  batch = _rows(_advantages(-1, 1, 0, 0))
  one, two = rl.mini_batches(rl.pairs(batch, 2, 2), 2)
  np.testing.assert_array_equal(one.tokens, batch.tokens[[1, 0]])
  assert one.loss_mask.any(axis=1).all()
  assert not two.loss_mask.any()
  both = rl.pairs(batch, 2, 1)
  np.testing.assert_array_equal(both.tokens[[0, 2]], batch.tokens[[1, 0]])
  np.testing.assert_array_equal(
    both.loss_mask.any(axis=1), [True, False, True, False]
  )


def _numbered(groups, samples):
  """Rows whose only token is their number; those of a group are consecutive."""
  tokens = np.arange(groups * samples, dtype=np.int32)[:, None]
  zeros = np.zeros(tokens.shape, np.float32)
  return structs.Batch(tokens, tokens, tokens, zeros, zeros, zeros, zeros)


def _groups(batch, samples):
  rows = batch.tokens[:, 0].reshape(-1, samples)
  np.testing.assert_array_equal(
    rows - rows[:, :1], [range(samples)] * len(rows)
  )
  return (rows[:, 0] // samples).tolist()


def test_later_passes_shuffle_whole_groups_by_their_seed():
  batch = _numbered(12, 3)
  settings = {"epochs": 3, "balance": False}
  ones = [1] * 12
  orders = [
    _groups(one, 3)
    for one in rl.passes(batch, ones, 4, seed=(0, 5), **settings)
  ]
  assert orders[0] == list(range(12))
  assert orders[1] != orders[0] and orders[2] not in orders[:2]
  assert all(sorted(order) == orders[0] for order in orders)
  again = rl.passes(batch, ones, 4, seed=(0, 5), **settings)
  assert [_groups(one, 3) for one in again] == orders
  other = rl.passes(batch, ones, 4, seed=(0, 6), **settings)
  assert [_groups(one, 3) for one in other][1] != orders[1]


@pytest.mark.parametrize("seed", range(5))
def test_balanced_mini_batches_have_about_equal_tokens(seed):
  """Within the largest group, as Graham proves without a limit of groups."""
  rng = np.random.default_rng(seed)
  tokens = rng.geometric(0.02, 24).tolist()
  (one,) = rl.passes(
    _numbered(24, 2), tokens, 4, epochs=1, balance=True, seed=(0, 0)
  )
  order = _groups(one, 2)
  assert sorted(order) == list(range(24))
  sums = np.asarray(tokens)[order].reshape(4, 6).sum(axis=1)
  plain = np.reshape(tokens, (4, 6)).sum(axis=1)
  assert np.ptp(sums) <= max(tokens)
  assert np.ptp(sums) < 0.5 * np.ptp(plain)
