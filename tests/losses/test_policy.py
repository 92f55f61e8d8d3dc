"""The clipped surrogate against REINFORCE, numpy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.losses import exponent, policy


def _rows(seed=0, shape=(3, 5), spread=1.0):
  generator = np.random.default_rng(seed)
  logprob = -generator.uniform(0.1, 3.0, shape).astype(np.float32)
  old = logprob + spread * generator.normal(size=shape).astype(np.float32)
  advantage = generator.normal(size=shape).astype(np.float32)
  return logprob, old, advantage


def _slow(logprob, old, advantage, low, high, dual):
  loss = np.zeros_like(logprob)
  for i in np.ndindex(loss.shape):
    ratio, a = np.exp(logprob[i] - old[i]), advantage[i]
    loss[i] = -min(a * ratio, a * min(max(ratio, 1 - low), 1 + high))
    if a < 0 and dual is not None:
      loss[i] = min(loss[i], -a * dual)
  return loss


def test_on_policy_gradient_is_reinforce():
  table = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)
  token = jnp.asarray([1, 0, 6, 3])
  advantage = jnp.asarray([1.5, -2.0, 0.3, -0.1])

  def logprob_fn(table):
    return jax.nn.log_softmax(table)[jnp.arange(4), token]

  old = logprob_fn(table)

  def surrogate(table):
    return policy.clipped_surrogate(logprob_fn(table), old, advantage)[0].sum()

  def reinforce(table):
    return -(advantage * logprob_fn(table)).sum()

  np.testing.assert_allclose(
    jax.grad(surrogate)(table), jax.grad(reinforce)(table), atol=1e-6
  )


@pytest.mark.parametrize("dual", [None, 3.0, 1.5])
def test_values_are_the_definition(dual):
  logprob, old, advantage = _rows()
  loss, aux = policy.clipped_surrogate(
    logprob, old, advantage, clip_low=0.2, clip_high=0.28, dual_clip=dual
  )
  want = _slow(logprob, old, advantage, 0.2, 0.28, dual)
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(aux["ratio"], np.exp(logprob - old), rtol=1e-5)


@pytest.mark.parametrize("dual", [None, 3.0])
def test_gradient_is_the_finite_difference(dual):
  logprob, old, advantage = _rows(seed=3)

  def total(logprob):
    loss, _ = policy.clipped_surrogate(logprob, old, advantage, dual_clip=dual)
    return loss.sum()

  gradient = jax.grad(total)(jnp.asarray(logprob))
  wide = [x.astype(np.float64) for x in (logprob, old, advantage)]
  for i in np.ndindex(logprob.shape):
    step = np.zeros(logprob.shape)
    step[i] = 1e-6
    up = _slow(wide[0] + step, *wide[1:], 0.2, 0.2, dual).sum()
    down = _slow(wide[0] - step, *wide[1:], 0.2, 0.2, dual).sum()
    np.testing.assert_allclose(gradient[i], (up - down) / 2e-6, atol=1e-4)


def test_dual_clip_bounds_the_loss_of_a_bad_token_and_stops_its_gradient():
  def total(logprob):
    return policy.clipped_surrogate(
      logprob, jnp.asarray([-5.0]), jnp.asarray([-2.0]), dual_clip=3.0
    )[0].sum()

  assert total(jnp.asarray([-0.1])) == 6.0
  assert jax.grad(total)(jnp.asarray([-0.1])) == 0.0
  assert jax.grad(total)(jnp.asarray([-4.5])) > 0.0


def test_flags_mark_the_tokens_that_lost_their_gradient():
  old = jnp.zeros(6)
  logprob = jnp.log(jnp.asarray([1.5, 0.5, 1.5, 0.5, 4.0, 1.0]))
  advantage = jnp.asarray([1.0, 1.0, -1.0, -1.0, -1.0, 1.0])

  def total(logprob):
    loss, aux = policy.clipped_surrogate(logprob, old, advantage)
    return loss.sum(), aux

  gradient, aux = jax.grad(total, has_aux=True)(logprob)
  assert aux["clip_high"].tolist() == [1, 0, 0, 0, 0, 0]
  assert aux["clip_low"].tolist() == [0, 0, 0, 1, 0, 0]
  assert aux["clip_dual"].tolist() == [0, 0, 0, 0, 1, 0]
  flagged = aux["clip_high"] + aux["clip_low"] + aux["clip_dual"]
  np.testing.assert_array_equal(gradient == 0, flagged == 1)


@pytest.mark.parametrize(
  "bounds", [{"clip_low": 0.0}, {"clip_high": -0.1}, {"dual_clip": 1.1}]
)
def test_bounds_out_of_range_are_refused(bounds):
  with pytest.raises(ValueError, match="clip"):
    policy.clipped_surrogate(*_rows(), **bounds)


def test_gspo_is_the_sequence_ratio():
  rng = np.random.default_rng(3)
  now, old = rng.normal(-1, 0.3, (2, 3, 5))
  mask = np.asarray([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
  advantage = np.asarray([[2.0], [-1.0], [5.0]])

  def loss(now):
    ratio = policy.sequence_ratio(
      now, jnp.asarray(old), jnp.asarray(mask), jnp.ones((3, 5), jnp.int32)
    )
    per_token, _ = policy.clipped_surrogate(
      ratio,
      jnp.zeros((3, 5)),
      jnp.broadcast_to(jnp.asarray(advantage), (3, 5)),
      clip_low=0.05,
      clip_high=0.1,
      dual_clip=None,
    )
    count = np.maximum(mask.sum(1, keepdims=True), 1)
    return (per_token * mask / count).sum()

  want = 0.0
  for r in range(2):
    s = np.exp((now[r] - old[r])[mask[r] > 0].mean())
    a = advantage[r, 0]
    want += max(-a * s, -a * np.clip(s, 0.95, 1.1))
  now = now.astype(np.float32)
  np.testing.assert_allclose(loss(jnp.asarray(now)), want, rtol=1e-5)
  gradient = jax.grad(loss)(jnp.asarray(now))
  for place in np.ndindex(now.shape):
    step = np.zeros_like(now)
    step[place] = 1e-2
    slope = (
      loss(jnp.asarray(now + step)) - loss(jnp.asarray(now - step))
    ) / 2e-2
    np.testing.assert_allclose(gradient[place], slope, atol=2e-3)


def test_importance_weights_are_cut():
  old, sampler = np.log([0.5, 0.5, 0.1]), np.log([0.5, 0.1, 0.4])
  np.testing.assert_allclose(
    policy.importance_weight(old, sampler, 2.0), [1.0, 2.0, 0.25], rtol=1e-6
  )
  with pytest.raises(ValueError, match="importance_cap"):
    policy.importance_weight(old, sampler, 0.0)
  with pytest.raises(ValueError, match="'tokens' and 'truncate'"):
    policy.importance_weight(old, sampler, 2.0, level="tokens")


@pytest.mark.parametrize(
  ("level", "mode", "cap", "floor", "want"),
  [
    ("token", "mask", 2.0, 0.0, [1.0, 0.0, 0.25]),
    ("token", "mask", 8.0, 0.5, [1.0, 5.0, 0.0]),
    # 1 * 5 * 0.25
    ("sequence", "truncate", 2.0, 0.0, [1.25] * 3),
    ("sequence", "truncate", 1.2, 0.0, [1.2] * 3),
    ("sequence", "mask", 1.2, 0.0, [0.0] * 3),
    ("sequence", "mask", 2.0, 1.3, [0.0] * 3),
    ("sequence", "mask", 2.0, 1.2, [1.25] * 3),
  ],
)
def test_importance_weights_of_every_level_and_mode(
  level, mode, cap, floor, want
):
  old, sampler = np.log([0.5, 0.5, 0.1]), np.log([0.5, 0.1, 0.4])
  got = policy.importance_weight(
    old, sampler, cap, level=level, mode=mode, floor=floor
  )
  np.testing.assert_allclose(got, want, rtol=1e-6)


_EXTREMES = (-1e4, -120.0, -89.0, -20.5, -1.0, 0.0)


@pytest.mark.parametrize("dual", [None, 3.0])
def test_extremes_have_finite_losses_and_gradients(dual):
  """Every pair of extreme log-probabilities, every sign of advantage."""
  grid = np.asarray(
    [
      (now, old, advantage)
      for now in _EXTREMES
      for old in _EXTREMES
      for advantage in (-1e3, -1.0, 0.0, 1.0, 1e3)
    ],
    np.float32,
  )
  now, old, advantage = grid.T

  def total(now):
    loss, aux = policy.clipped_surrogate(now, old, advantage, dual_clip=dual)
    return loss.sum(), (loss, aux)

  gradient, (loss, aux) = jax.grad(total, has_aux=True)(jnp.asarray(now))
  assert np.isfinite(loss).all() and np.isfinite(gradient).all()
  assert np.isfinite(aux["ratio"]).all()
  beyond = np.abs(now - old) > exponent.BOUND
  np.testing.assert_array_equal(aux["ratio_bounded"], beyond)
  np.testing.assert_array_equal(np.asarray(gradient)[beyond], 0.0)


def test_extreme_sequences_have_finite_gspo_gradients():
  def total(now):
    old = jnp.asarray([[0.0] * 4, [-120.0] * 4, [-1e4] * 4])
    ratio = policy.sequence_ratio(
      now, old, jnp.ones((3, 4)), jnp.ones((3, 4), jnp.int32)
    )
    loss, _ = policy.clipped_surrogate(
      ratio, jnp.zeros((3, 4)), -jnp.ones((3, 4)), dual_clip=None
    )
    return loss.sum()

  value, gradient = jax.value_and_grad(total)(jnp.zeros((3, 4)))
  assert np.isfinite(value) and np.isfinite(gradient).all()
