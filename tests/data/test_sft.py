"""SFT learns completions only, and knows what it left out."""

import numpy as np
import pytest

from opera_jax.data import sft


def pairs(count=12, seed=0):
  rng = np.random.default_rng(seed)
  return [
    (
      np.full(rng.integers(1, 5), 100 + i, np.int32),
      np.full(rng.integers(1, 5), 200 + i, np.int32),
    )
    for i in range(count)
  ]


def data(made, **change):
  arguments = {
    "batch_size": 2,
    "row_length": 16,
    "packed": False,
    "epochs": 3,
    "seed": 0,
    "pad_id": 7,
  }
  return sft.build(made, **(arguments | change))


@pytest.mark.parametrize("packed", [False, True])
def test_targets_are_the_completions(packed):
  made = data(pairs(), packed=packed)
  seen = {}
  for batch in made.start_at(0):
    assert batch.tokens.shape == (2, 16)
    real = batch.segments > 0
    assert ((batch.tokens >= 200) == (batch.loss_mask > 0)).all()
    assert (batch.tokens[~real] == 7).all()
    assert not batch.advantage.any() and not batch.old_logprob.any()
    for token in np.unique(batch.tokens[real]):
      seen[token] = seen.get(token, 0) + 1
  assert len(seen) == 24
  assert len(made) == -(-made.counts["rows"] * 3 // 2)
  if not packed:
    assert made.counts["rows"] == 12 and set(seen.values()) == {3}
  else:
    assert made.counts["rows"] < 12


def test_every_pair_is_seen_and_the_last_batch_is_padded():
  """15 pairs in batches of 8, one epoch: 8 and 7, none left out."""
  made = data(pairs(15), batch_size=8, epochs=1)
  first, last = made[0], made[1]
  assert len(made) == 2 and made.counts["kept"] == 15
  assert last.tokens.shape == first.tokens.shape
  assert ((last.segments > 0).any(1)).sum() == 7
  assert not last.segments[7].any() and not last.loss_mask[7].any()
  seen = np.concatenate([b.tokens[b.loss_mask > 0] for b in (first, last)])
  assert len(seen) == made.counts["target_tokens"]
  # A process may hold only padding rows.
  np.testing.assert_array_equal(
    made.part(1, np.asarray([7, 6])).tokens, last.tokens[[7, 6]]
  )


def test_batches_are_indexed_by_step():
  made = data(pairs(), packed=True)
  later = list(made.start_at(2))
  assert len(later) == len(made) - 2
  for step, batch in enumerate(later, start=2):
    assert np.array_equal(batch.tokens, made[step].tokens)
  with pytest.raises(IndexError):
    made[len(made)]


def test_long_pairs_are_dropped_and_counted():
  made = pairs(5)
  made.append((np.zeros(9, np.int32), np.zeros(8, np.int32)))
  made.append((np.zeros(8, np.int32), np.full(8, 200, np.int32)))
  counted = data(made)
  counts = counted.counts
  assert (counts["kept"], counts["too_long"], counts["rows"]) == (6, 1, 6)
  assert counts["tokens"] == sum(
    len(a) + len(b) for a, b in made if len(a) + len(b) <= 16
  )
  assert counts["target_tokens"] == sum(
    len(b) for a, b in made if len(a) + len(b) <= 16
  )


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_rows_than_a_batch_fill_it_with_padding(count):
  """Each update takes all pairs once; padding has no targets, so no weight."""
  few = data(pairs(count), batch_size=4, epochs=2)
  assert len(few) == 2 and few.counts["rows"] == count
  for step in range(2):
    batch = few[step]
    assert batch.tokens.shape[0] == 4
    assert batch.segments.any(axis=1).sum() == count
    assert not batch.segments[count:].any()
    assert not batch.loss_mask[count:].any()
    assert batch.loss_mask.sum() == few.counts["target_tokens"]


def test_bad_pairs():
  empty = np.zeros(0, np.int32)
  with pytest.raises(ValueError, match="Pair 1 has 0 prompt and 1 completion"):
    data([*pairs(1), (empty, np.ones(1, np.int32))])
  with pytest.raises(ValueError, match="Pair 0 has 1 prompt and 0 completion"):
    data([(np.ones(1, np.int32), empty)])
  with pytest.raises(ValueError, match="of 5 pairs 5 are longer than a row"):
    data(pairs(5), row_length=1)
  with pytest.raises(ValueError, match="of 0 pairs 0 are longer"):
    data([])
  with pytest.raises(ValueError, match="0 epochs"):
    data(pairs(5), epochs=0)


def test_a_share_of_the_pairs_is_held_out():
  every = pairs(20)
  train, held = sft.split(every, 0.25, seed=3)
  numbers = [[int(prompt[0]) for prompt, _ in part] for part in (train, held)]
  assert [len(part) for part in numbers] == [15, 5]
  assert sorted(sum(numbers, [])) == list(range(100, 120))
  assert all(part == sorted(part) for part in numbers)
  assert numbers[1] != list(range(115, 120))
  again, other = (
    [int(p[0]) for p, _ in sft.split(every, 0.25, seed=s)[1]] for s in (3, 4)
  )
  assert numbers[1] == again != other
  assert sft.split(every, 0.0, seed=3) == (every, [])
  with pytest.raises(ValueError, match="0.01 holds out none of 20"):
    sft.split(every, 0.01, seed=3)
