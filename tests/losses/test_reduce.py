"""Normalisers do not see padding, packing or micro-batches."""

import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.losses import cross_entropy, reduce

KINDS = [("token_mean", None), ("sequence_mean", None), ("constant", 7.0)]
LENGTHS = (3, 5, 1, 4)


def _separate(pad_to):
  """One sequence a row; the first token of each is context."""
  generator = np.random.default_rng(0)
  loss = np.full((4, pad_to), np.nan, np.float32)
  mask = np.zeros((4, pad_to), np.float32)
  segments = np.zeros((4, pad_to), np.int32)
  for r, length in enumerate(LENGTHS):
    loss[r, 1 : length + 1] = generator.normal(size=length)
    mask[r, 1 : length + 1] = 1
    segments[r, : length + 1] = 1
  return loss, mask, segments


def _packed():
  """The same sequences, two a row."""
  loss, mask, segments = _separate(6)
  rows = []
  for array, fill in ((loss, np.nan), (mask, 0), (segments, 0)):
    out = np.full((2, 14), fill, array.dtype)
    for r, length in enumerate(LENGTHS):
      begin = 0 if r % 2 == 0 else LENGTHS[r - 1] + 1
      out[r // 2, begin : begin + length + 1] = array[r, : length + 1]
    rows.append(out)
  rows[2][:, 0:] = np.where(rows[2] > 0, rows[2], 0)
  for r in (0, 1):
    begin = LENGTHS[2 * r] + 1
    rows[2][r, begin : begin + LENGTHS[2 * r + 1] + 1] = 2
  return rows


def _loss(arrays, kind, constant):
  loss, mask, segments = map(jnp.asarray, arrays)
  weight = reduce.token_weight(kind, mask, segments, constant=constant)
  return reduce.weighted_sum(weight, loss)


def test_values_are_the_definitions():
  arrays = _separate(6)
  rows = [arrays[0][r, 1 : n + 1] for r, n in enumerate(LENGTHS)]
  want = {
    "token_mean": np.concatenate(rows).mean(),
    "sequence_mean": np.mean([row.mean() for row in rows]),
    "constant": np.concatenate(rows).sum() / 7,
  }
  for kind, constant in KINDS:
    np.testing.assert_allclose(
      _loss(arrays, kind, constant), want[kind], rtol=1e-6
    )


@pytest.mark.parametrize("kind,constant", KINDS)
def test_padding_and_packing_do_not_matter(kind, constant):
  want = _loss(_separate(6), kind, constant)
  np.testing.assert_allclose(
    _loss(_separate(11), kind, constant), want, rtol=1e-6
  )
  np.testing.assert_allclose(_loss(_packed(), kind, constant), want, rtol=1e-6)


def test_sequences_of_context_alone_do_not_count():
  loss, mask, segments = _separate(6)
  context = np.ones((1, 6), np.int32)
  more = (
    np.concatenate([loss, np.zeros((1, 6), np.float32)]),
    np.concatenate([mask, np.zeros((1, 6), np.float32)]),
    np.concatenate([segments, context]),
  )
  np.testing.assert_allclose(
    _loss(more, "sequence_mean", None),
    _loss((loss, mask, segments), "sequence_mean", None),
    rtol=1e-6,
  )


@pytest.mark.parametrize("kind,constant", KINDS)
def test_micro_batches_add_up(kind, constant):
  loss, mask, segments = _separate(6)
  weight = reduce.token_weight(kind, mask, segments, constant=constant)
  parts = sum(
    reduce.weighted_sum(weight[r : r + 1], jnp.asarray(loss[r : r + 1]))
    for r in range(4)
  )
  np.testing.assert_allclose(
    parts, _loss((loss, mask, segments), kind, constant), rtol=1e-6
  )


def test_empty_batch_weighs_nothing():
  zeros = jnp.zeros((2, 3))
  for kind, constant in KINDS:
    weight = reduce.token_weight(
      kind, zeros, zeros.astype(jnp.int32), constant=constant
    )
    assert reduce.weighted_sum(weight, zeros * jnp.nan) == 0


def test_bad_rules_are_refused():
  mask, segments = jnp.ones((1, 2)), jnp.ones((1, 2), jnp.int32)
  with pytest.raises(ValueError, match="Unknown reduction 'mean'"):
    reduce.token_weight("mean", mask, segments)
  with pytest.raises(ValueError, match="positive constant, got None"):
    reduce.token_weight("constant", mask, segments)


def test_cross_entropy_of_a_uniform_guess_is_log_v():
  logprob = jnp.full((1, 3), -jnp.log(8.0))
  np.testing.assert_allclose(
    cross_entropy.cross_entropy(logprob), np.log(8.0), rtol=1e-6
  )
