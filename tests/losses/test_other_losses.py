"""DPO, the critic's loss and Jensen-Shannon against numpy and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.losses import distillation, preference, value


def _slopes(fn, x, size=1e-2):
  """Central differences of a scalar function, in float32."""
  out = np.zeros_like(x)
  for place in np.ndindex(x.shape):
    step = np.zeros_like(x)
    step[place] = size
    out[place] = (fn(jnp.asarray(x + step)) - fn(jnp.asarray(x - step))) / (
      2 * size
    )
  return out


def test_dpo_is_the_slow_formula():
  rng = np.random.default_rng(0)
  better, worse, ref_b, ref_w = rng.normal(-20, 3, (4, 5)).astype(np.float32)
  loss, margin = preference.dpo(better, worse, ref_b, ref_w, beta=0.3)
  gain = 0.3 * ((better - ref_b) - (worse - ref_w))
  np.testing.assert_allclose(loss, np.log1p(np.exp(-gain)), rtol=1e-4)
  np.testing.assert_allclose(margin, gain, rtol=1e-4)

  def total(b):
    return preference.dpo(b, worse, ref_b, ref_w, beta=0.3)[0].sum()

  np.testing.assert_allclose(
    jax.grad(total)(jnp.asarray(better)), _slopes(total, better, 0.1), atol=2e-3
  )
  with pytest.raises(ValueError, match="positive beta"):
    preference.dpo(better, worse, ref_b, ref_w, beta=0.0)


def test_dpo_at_the_reference_is_log_two():
  same = jnp.zeros(3)
  loss, _ = preference.dpo(same, same, same, same)
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_pairs_are_halves_and_ignore_what_has_no_weight():
  rows = jnp.asarray([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0], [7.0, 8.0]])
  weight = jnp.asarray([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
  better, worse = preference.paired_sums(rows, weight)
  np.testing.assert_array_equal(better, [3, 3])
  np.testing.assert_array_equal(worse, [11, 0])
  with pytest.raises(ValueError, match="even number of rows, got 3"):
    preference.paired_sums(rows[:3], weight[:3])


def test_value_loss_is_the_slow_formula():
  rng = np.random.default_rng(1)
  v, old, target = rng.normal(size=(3, 2, 4)).astype(np.float32)
  got = value.clipped_value(v, old, target, clip=0.2)
  for place in np.ndindex(v.shape):
    near = old[place] + min(max(v[place] - old[place], -0.2), 0.2)
    want = max((v[place] - target[place]) ** 2, (near - target[place]) ** 2) / 2
    np.testing.assert_allclose(got[place], want, rtol=1e-5)

  def total(v):
    return value.clipped_value(v, old, target).sum()

  np.testing.assert_allclose(
    jax.grad(total)(jnp.asarray(v)), _slopes(total, v, 1e-3), atol=2e-2
  )
  with pytest.raises(ValueError, match="positive"):
    value.clipped_value(v, old, target, clip=0.0)


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_jensen_shannon_is_the_slow_formula(alpha):
  rng = np.random.default_rng(2)
  full = np.exp(rng.normal(size=(2, 6)))
  student, teacher = full / full.sum(-1, keepdims=True)
  top = np.argsort(-teacher)[:3]
  s, t = (np.append(p[top], 1 - p[top].sum()) for p in (student, teacher))
  m = alpha * t + (1 - alpha) * s
  want = (
    alpha * (t * np.log(t / m)).sum() + (1 - alpha) * (s * np.log(s / m)).sum()
  )
  at = (None, None)
  log_s, log_t = (
    np.log(p[top]).astype(np.float32)[at] for p in (student, teacher)
  )
  got = distillation.top_k_jensen_shannon(log_s, log_t, alpha=alpha)
  np.testing.assert_allclose(got, [[want]], rtol=1e-4)

  def total(x):
    return distillation.top_k_jensen_shannon(x, log_t, alpha=alpha).sum()

  np.testing.assert_allclose(
    jax.grad(total)(jnp.asarray(log_s)), _slopes(total, log_s), atol=2e-3
  )
  same = distillation.top_k_jensen_shannon(log_t, log_t, alpha=alpha)
  np.testing.assert_allclose(same, 0.0, atol=1e-6)


def test_bad_input_is_refused():
  x = jnp.zeros((1, 1, 2)) - 1.0
  with pytest.raises(ValueError, match="alpha"):
    distillation.top_k_jensen_shannon(x, x, alpha=1.0)
  with pytest.raises(ValueError, match="same tokens"):
    distillation.top_k_jensen_shannon(x, x[:, :, :1])
