"""Packing loses no continuation, bounds the shapes and refuses bad input."""

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.scoring import packing

BUCKETS = {
  "batch_size": 8,
  "prefix_buckets": (16, 32),
  "slot_buckets": (1, 4),
  "continuation_buckets": (8, 16),
}


def test_packing_loses_nothing_and_bounds_shapes():
  rng = np.random.default_rng(2)
  prefixes = [rng.integers(0, 300, n) for n in (5, 12, 30, 16, 1, 24)]
  continuations = []
  for _ in range(30):  # more of a prefix than the largest slot bucket holds
    prefix = int(rng.integers(len(prefixes)))
    continuations.append(
      structs.Continuation(
        prefix=prefix,
        fork=int(rng.integers(1, len(prefixes[prefix]) + 1)),
        tokens=rng.integers(0, 300, int(rng.integers(1, 13))),
      )
    )
  batches = packing.pack(prefixes, continuations, **BUCKETS)
  assert sorted(i for b in batches for _, _, i in b.continuation_of) == list(
    range(len(continuations))
  )
  assert {t for b in batches for t in b.prefix_of} == set(range(len(prefixes)))
  for batch in batches:
    assert batch.token_BT.shape[1] in BUCKETS["prefix_buckets"]
    assert batch.input_BSG.shape[1] in BUCKETS["slot_buckets"]
    assert batch.input_BSG.shape[2] in BUCKETS["continuation_buckets"]
    for row, slot, index in batch.continuation_of:
      continuation = continuations[index]
      assert batch.prefix_of[row] == continuation.prefix
      context = prefixes[continuation.prefix][: continuation.fork]
      size, fork = len(continuation.tokens), continuation.fork
      inputs = batch.input_BSG[row, slot, :size]
      np.testing.assert_array_equal(
        inputs, [context[-1], *continuation.tokens[:-1]]
      )
      targets = batch.target_BSG[row, slot, :size]
      np.testing.assert_array_equal(targets, continuation.tokens)
      assert batch.prefix_length_BS[row, slot] == fork - 1


@pytest.mark.parametrize(
  "continuation, message",
  [
    (structs.Continuation(0, 0, np.array([1])), "forks at 0"),
    (structs.Continuation(0, 4, np.array([1])), "forks at 4"),
    (structs.Continuation(0, 1, np.array([], np.int32)), "at least one must"),
    (structs.Continuation(0, 1, np.array([5]), skip=1), "at least one must"),
    (structs.Continuation(1, 1, np.array([5])), "names prefix 1 of 1"),
    (structs.Continuation(0, 1, np.array([300])), "outside \\[0, 300\\)"),
    (structs.Continuation(0, 1, np.array([-1])), "outside \\[0, 300\\)"),
  ],
)
def test_bad_continuations_are_refused(continuation, message):
  with pytest.raises(ValueError, match=message):
    packing.check([np.array([1, 2, 3])], [continuation], 300)


def test_bad_prefixes_are_refused():
  with pytest.raises(ValueError, match="no tokens"):
    packing.check([np.array([], np.int32)], [], 300)
  with pytest.raises(ValueError, match="tokenizer and model"):
    packing.check([np.array([300])], [], 300)
