"""The moving mean follows the parameters and changes no update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opera_jax.train import ema


def test_the_mean_is_the_recursion_and_the_updates_are_the_optimizers():
  params = {"w": jnp.asarray([1.0, -2.0])}
  plain, wrapped = optax.adam(0.1), ema.with_ema(optax.adam(0.1), 0.25)
  plain_state, state = plain.init(params), wrapped.init(params)
  mean = np.asarray(params["w"])
  for step in range(5):
    grads = {"w": jnp.asarray([0.3 * step, 1.0])}
    want, plain_state = plain.update(grads, plain_state, params)
    got, state = jax.jit(wrapped.update)(grads, state, params)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)
    params = optax.apply_updates(params, got)
    mean = 0.75 * mean + 0.25 * np.asarray(params["w"])
    np.testing.assert_allclose(state.mean["w"], mean, rtol=1e-5)
  with pytest.raises(ValueError, match="rate in"):
    ema.with_ema(optax.adam(0.1), 0.0)
