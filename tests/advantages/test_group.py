"""Group-relative advantages against numpy and at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.advantages import group

RULES = [group.grpo, group.dr_grpo, group.rloo]


def _rewards():
  return np.random.default_rng(0).uniform(0, 1, (3, 5)).astype(np.float32)


@pytest.mark.parametrize("ddof", [0, 1])
def test_grpo_is_the_standard_score(ddof):
  reward = _rewards()
  mean = reward.mean(1, keepdims=True)
  want = (reward - mean) / (reward.std(1, ddof=ddof, keepdims=True) + 1e-6)
  np.testing.assert_allclose(
    group.grpo(reward, ddof=ddof), want, rtol=1e-4, atol=1e-6
  )


def test_grpo_of_two_samples_is_one_over_root_two():
  """With ddof=1; ddof=0 would give 1."""
  got = group.grpo(np.asarray([[0.0, 1.0]]))
  np.testing.assert_allclose(got, [[-0.70711, 0.70711]], atol=1e-4)


def test_dr_grpo_and_rloo():
  reward = _rewards()
  np.testing.assert_allclose(
    group.dr_grpo(reward), reward - reward.mean(1, keepdims=True), atol=1e-6
  )
  want = np.zeros_like(reward)
  for b, n in np.ndindex(reward.shape):
    want[b, n] = reward[b, n] - np.delete(reward[b], n).mean()
  np.testing.assert_allclose(group.rloo(reward), want, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_equal_groups_give_zero_and_finite_gradients(rule):
  reward = jnp.full((2, 3), 0.1)
  np.testing.assert_array_equal(rule(reward), 0.0)
  gradient = jax.grad(lambda r: (rule(r) * jnp.arange(3.0)[None]).sum())(reward)
  assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("rule", RULES)
def test_one_sample_is_refused(rule):
  with pytest.raises(
    ValueError,
    match="needs at least 2 samples a prompt, got 1. Raise config.rl.samples.",
  ):
    rule(np.zeros((4, 1)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_reward_names_its_sample(rule, bad):
  reward = _rewards()
  reward[2, 3] = bad
  with pytest.raises(ValueError, match="prompt 2, sample 3 is"):
    rule(reward)


def test_jit_agrees():
  reward = jnp.asarray(_rewards())
  np.testing.assert_allclose(
    jax.jit(group.grpo)(reward), group.grpo(reward), atol=1e-6
  )


_ULP = float(np.spacing(np.float32(0.3)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ulps", [1, 2, 4])
def test_rounding_is_no_spread(rule, ulps):
  """Rewards are float32 sums: equal ones may differ in the last bits."""
  reward = np.asarray([[0.3] * 7 + [0.3 + ulps * _ULP]], np.float32)
  assert reward.max() > reward.min()
  np.testing.assert_array_equal(rule(reward), 0.0)
  assert not group.has_different_rewards(reward).any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("level", [0.0, 0.3, -7.1, 1e3])
@pytest.mark.parametrize("step", [1e-5, 1e-2])
def test_a_groups_advantages_sum_to_zero(rule, level, step):
  step *= max(abs(level), 1.0)
  reward = np.full((3, 8), level, np.float32)
  reward[0, 0] += step
  reward[1, :7] += step
  reward[2] += step * np.random.default_rng(0).normal(size=8)
  got = np.asarray(rule(reward), np.float64)
  assert group.has_different_rewards(reward).all()
  assert (got.max(1) > 0).all() and (got.min(1) < 0).all()
  size = np.abs(got).sum(1)
  np.testing.assert_array_less(np.abs(got.sum(1)), 1e-6 * size)
