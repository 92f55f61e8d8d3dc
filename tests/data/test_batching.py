"""Rows keep every token; the order is a function of seed and step."""

import numpy as np
import pytest

from opera_jax.data import batching


def test_buckets():
  assert batching.bucket_sizes(64, 512) == [64, 96, 128, 192, 256, 384, 512]
  assert batching.bucket_sizes(100, 300) == [128, 192, 256, 300]
  assert batching.bucket_sizes(1, 6) == [1, 2, 3, 4, 6]
  assert batching.bucket_sizes(5, 5) == [5]
  assert batching.bucket(65, [64, 96, 128]) == 96
  assert batching.bucket(0, [128, 64]) == 64
  with pytest.raises(ValueError, match="Length 129 is beyond .*larger bucket"):
    batching.bucket(129, [64, 96, 128])
  with pytest.raises(ValueError, match="Buckets from 8 to 4"):
    batching.bucket_sizes(8, 4)


def test_pad_rows():
  rows = [np.asarray([1, 2, 3]), np.asarray([], np.int32), np.asarray([9])]
  tokens, length = batching.pad_rows(rows, [2, 4, 8], pad_id=7)
  assert tokens.tolist() == [[1, 2, 3, 7], [7] * 4, [9, 7, 7, 7]]
  assert length.tolist() == [3, 0, 1]
  assert tokens.dtype == length.dtype == np.int32
  assert batching.pad_rows(rows, 6, 0)[0].shape == (3, 6)
  with pytest.raises(ValueError, match="Length 3"):
    batching.pad_rows(rows, 2, 0)


def random_sequences(seed, count, longest):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, longest + 1, count)
  sequences = [rng.integers(1, 100, n).astype(np.int32) for n in lengths]
  masks = [(np.arange(n) >= rng.integers(1, n)) * 1 for n in lengths]
  return sequences, masks


def test_pack_keeps_sequences_whole_and_separate():
  sequences, masks = random_sequences(0, 50, 16)
  batch = batching.pack(sequences, masks, 16, pad_id=0)
  found = []
  for row in range(len(batch.tokens)):
    segments = batch.segments[row]
    assert (np.diff(segments[segments > 0]) >= 0).all()
    for segment in range(1, segments.max() + 1):
      where = segments == segment
      size = where.sum()
      assert batch.positions[row, where].tolist() == list(range(size))
      found.append(
        (
          batch.tokens[row, where].tolist(),
          batch.loss_mask[row, where].tolist(),
        )
      )
    empty = segments == 0
    assert not batch.loss_mask[row, empty].any()
    assert not batch.tokens[row, empty].any()
  given = [(s.tolist(), m.tolist()) for s, m in zip(sequences, masks)]
  assert sorted(found) == sorted(given)


def test_pack_is_tight():
  lengths = [len(s) for s in random_sequences(1, 200, 16)[0]]
  rows = batching.first_fit(lengths, 16)
  assert sorted(i for row in rows for i in row) == list(range(200))
  fill = [sum(lengths[i] for i in row) for row in rows]
  assert max(fill) <= 16
  assert len(rows) <= 1.25 * sum(lengths) / 16 + 1
  assert batching.first_fit([], 16) == []


def test_sequences_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="Sequence 1 has 17 tokens"):
    batching.first_fit([3, 17], 16)
  with pytest.raises(ValueError, match="Sequence 0 has 0 tokens"):
    batching.first_fit([0], 16)
  tokens = [np.asarray([1, 2])]
  with pytest.raises(ValueError, match="first token has no context"):
    batching.pack(tokens, [np.asarray([1, 1])], 4, 0)
  with pytest.raises(ValueError, match="loss mask of 3"):
    batching.pack(tokens, [np.asarray([0, 1, 1])], 4, 0)
  with pytest.raises(ValueError, match="cannot start at 2"):
    batching.assemble([[0, 0]], tokens, [np.asarray([0, 1])], 3, 0)


def test_order_is_a_function_of_seed_and_step():
  order = batching.batch_order(10, 3, epochs=6, seed=5)
  other = batching.batch_order(10, 3, epochs=3, seed=5)
  assert len(order) == 20 and len(other) == 10
  for step in (6, 2):
    assert other[step].tolist() == order[step].tolist()
  drawn = np.concatenate([order[step] for step in range(20)])
  epochs = drawn.reshape(6, 10)
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
  seeded = batching.batch_order(10, 3, epochs=6, seed=6)
  assert [seeded[s].tolist() for s in range(3)] != [
    order[s].tolist() for s in range(3)
  ]


@pytest.mark.parametrize("n, size", [(6, 4), (5, 4), (5, 5), (7, 3), (4, 4)])
def test_no_batch_holds_an_item_twice(n, size):
  """Also where a batch straddles two epochs, each still a permutation."""
  epochs = 12
  order = batching.batch_order(n, size, epochs=epochs, seed=1)
  batches = [order[step].tolist() for step in range(len(order))]
  assert all(len(set(batch)) == len(batch) for batch in batches)
  drawn = np.concatenate(batches)
  assert all(
    sorted(epoch) == list(range(n))
    for epoch in drawn.reshape(epochs, n).tolist()
  )
  # Read from the middle on, as after a resume, it is the same.
  later = batching.batch_order(n, size, epochs=epochs, seed=1)
  assert later[len(order) - 2].tolist() == batches[-2]


def test_the_last_batch_holds_the_remainder():
  order = batching.batch_order(15, 8, epochs=1, seed=0)
  assert [len(order[step]) for step in range(len(order))] == [8, 7]
  seen = sorted(i for step in range(2) for i in order[step].tolist())
  assert seen == list(range(15))
  with pytest.raises(IndexError, match="outside the 2 steps"):
    order[2]


def test_order_of_too_few_items():
  with pytest.raises(ValueError, match="2 items, batches of 3"):
    batching.batch_order(2, 3, epochs=2, seed=0)
  with pytest.raises(ValueError, match="0 epochs"):
    batching.batch_order(3, 3, epochs=0, seed=0)
