"""KL estimators against their formulas and against the true divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.losses import kl


def test_k3_is_its_formula():
  generator = np.random.default_rng(0)
  logprob, ref = -generator.uniform(0, 4, (2, 3, 5))
  want = np.exp(ref - logprob) - (ref - logprob) - 1
  got = kl.k3(jnp.asarray(logprob, jnp.float32), jnp.asarray(ref, jnp.float32))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  assert np.all(np.asarray(got) >= 0)


@pytest.mark.parametrize("name,tolerance", [("k1", 1e-5), ("k3", 1e-5)])
def test_k1_and_k3_are_unbiased(name, tolerance):
  generator = np.random.default_rng(1)
  p, q = jax.nn.log_softmax(generator.normal(size=(2, 9)))
  truth = jnp.sum(jnp.exp(p) * (p - q))
  estimate = jnp.sum(jnp.exp(p) * kl.estimator(name)(p, q))
  np.testing.assert_allclose(estimate, truth, atol=tolerance)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_gradient_vanishes_at_the_reference(name):
  ref = jnp.asarray([-0.5, -3.0])
  fn = kl.estimator(name)
  gradient = jax.grad(lambda x: fn(x, ref).sum())(ref)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
  assert np.all(jax.grad(lambda x: fn(x, ref).sum())(ref + 0.1) > 0)


def test_small_divergences_keep_their_digits():
  got = kl.k3(jnp.asarray([-1.0]), jnp.asarray([-1.0 + 1e-3]))
  np.testing.assert_allclose(got, [5e-7], rtol=0.1)


def test_unknown_estimator_is_refused():
  with pytest.raises(ValueError, match="Unknown KL estimator 'k4'"):
    kl.estimator("k4")


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_extremes_are_finite(name):
  levels = np.asarray([-1e4, -120.0, -100.0, -89.0, -20.5, -1.0, 0.0])
  now, ref = (x.ravel() for x in np.meshgrid(levels, levels))
  now, ref = jnp.asarray(now, jnp.float32), jnp.asarray(ref, jnp.float32)
  estimate = kl.estimator(name)
  gradient = jax.grad(lambda x: estimate(x, ref).sum())(now)
  assert np.isfinite(estimate(now, ref)).all()
  assert np.isfinite(gradient).all()
  if name != "k1":
    assert (np.asarray(estimate(now, ref)) >= 0).all()


def test_k1_is_refused_as_a_loss_and_why():
  """Its gradient at fixed samples does not know the reference."""
  now = jnp.asarray([-1.0, -2.0])
  for ref in (jnp.asarray([-1.0, -2.0]), jnp.asarray([-9.0, -0.1])):
    gradient = jax.grad(lambda x, ref=ref: kl.k1(x, ref).sum())(now)
    np.testing.assert_array_equal(gradient, 1.0)
  with pytest.raises(ValueError, match=r'kl_estimator="k2" or "k3"'):
    kl.estimator("k1", in_loss=True)
  assert kl.estimator("k1") is kl.k1


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_gradients_in_a_loss_point_to_the_reference(name):
  """In the mean over samples of the policy, lowering them nears it."""
  ref = jnp.log(jnp.asarray([0.6, 0.3, 0.1]))
  logits = jnp.asarray([0.0, 0.5, 1.0])
  estimate = kl.estimator(name, in_loss=True)

  def divergence(logits):
    logprob = jax.nn.log_softmax(logits)
    return (jnp.exp(logprob) * (logprob - ref)).sum()

  def expected(logits):  # of the gradient at fixed samples
    logprob = jax.nn.log_softmax(logits)
    weight = jax.lax.stop_gradient(jnp.exp(logprob))
    return (weight * estimate(logprob, ref)).sum()

  step = logits - 0.05 * jax.grad(expected)(logits)
  assert divergence(step) < divergence(logits) - 1e-3
