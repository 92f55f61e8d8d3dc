"""Packing is a matter of speed: loss and gradients are those of padded rows."""

import jax
import numpy as np
import optax
import pytest

from opera_jax.data import sft
from opera_jax.scoring import packed_rows
from opera_jax.train import state as train_state
from opera_jax.train import step


def _pairs(vocab, count=13):
  rng = np.random.default_rng(1)
  return [
    (
      rng.integers(3, vocab, rng.integers(1, 9)).astype(np.int32),
      rng.integers(3, vocab, rng.integers(1, 23)).astype(np.int32),
    )
    for _ in range(count)
  ]


def _loss_and_gradient(tiny_model, pairs, reduction, *, rows, **change):
  """Of one update on all pairs; SGD at rate 1 shows the gradient."""
  config, graphdef, params = tiny_model
  data = sft.build(
    pairs,
    row_length=32,
    batch_size=rows,
    epochs=1,
    seed=0,
    pad_id=7,
    **change,
  )
  assert data.counts["rows"] == rows and len(data) == 1
  update = step.make_sft_update(
    packed_rows.logprob_fn(graphdef), optax.sgd(1.0), reduction=reduction
  )
  before = jax.tree.map(np.array, params)
  state = train_state.create(
    jax.tree.map(jax.numpy.array, params), optax.sgd(1.0), jax.random.key(0)
  )
  state, values = update(state, data[0])
  gradient = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)
  return float(values["sft/loss"]), gradient


@pytest.mark.parametrize(
  "reduction",
  ["token_mean", pytest.param("sequence_mean", marks=pytest.mark.slow)],
)
def test_packed_equals_padded(tiny_model, reduction):
  pairs = _pairs(tiny_model[0].vocab_size)
  run = (tiny_model, pairs, reduction)
  want, want_gradient = _loss_and_gradient(*run, rows=13, packed=False)
  got, got_gradient = _loss_and_gradient(*run, rows=6, packed=True)
  assert abs(got - want) < 1e-5
  largest = max(float(abs(g).max()) for g in jax.tree.leaves(want_gradient))
  assert largest > 1e-2
  for a, b in zip(
    jax.tree.leaves(got_gradient), jax.tree.leaves(want_gradient), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_two_reductions_differ(tiny_model):
  pairs = _pairs(tiny_model[0].vocab_size)
  token, sequence = (
    _loss_and_gradient(tiny_model, pairs, name, rows=6, packed=True)[0]
    for name in ("token_mean", "sequence_mean")
  )
  assert abs(token - sequence) > 1e-4
