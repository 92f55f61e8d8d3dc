"""Matmuls of few tokens on a CPU: numpy in float64, and equal bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.models import small_batch_matmul

COUNTS = (2, 3, 5, 8, 9, 15, 16, 24, 33, 64, 100, 128)


@pytest.mark.parametrize("inputs, outputs", [(64, 96), (96, 300), (256, 7)])
def test_a_token_does_not_depend_on_how_many_there_are(inputs, outputs):
  rng = np.random.default_rng(0)
  weight_OI = rng.normal(size=(outputs, inputs)).astype(np.float32)
  x = rng.normal(size=(COUNTS[-1], inputs)).astype(np.float32)
  multiply = jax.jit(small_batch_matmul.small_batch_matmul)
  every = multiply(x, weight_OI)
  exact = x.astype(np.float64) @ weight_OI.T
  np.testing.assert_allclose(every, exact, rtol=1e-4, atol=1e-4)
  for count in COUNTS:
    np.testing.assert_array_equal(multiply(x[:count], weight_OI), every[:count])
  # A single token is a matrix-vector product, which sums in another order.
  np.testing.assert_allclose(
    multiply(x[:1], weight_OI), every[:1], rtol=1e-4, atol=1e-4
  )


def test_x_may_have_several_leading_axes():
  x = jnp.arange(24.0).reshape(2, 3, 4)
  weight_OI = jnp.arange(20.0).reshape(5, 4)
  got = small_batch_matmul.small_batch_matmul(x, weight_OI)
  assert got.shape == (2, 3, 5)
  np.testing.assert_array_equal(got, np.asarray(x) @ np.asarray(weight_OI).T)


def test_bfloat16_operands_give_float32_on_request():
  x = jnp.full((5, 3), 1.0, jnp.bfloat16)
  weight_OI = jnp.full((2, 3), 1 + 2**-7, jnp.bfloat16)
  got = small_batch_matmul.small_batch_matmul(
    x, weight_OI, preferred_element_type=jnp.float32
  )
  assert got.dtype == jnp.float32
  # bfloat16 cannot represent this sum.
  np.testing.assert_array_equal(got, np.full((5, 2), 3 * (1 + 2**-7)))
  got = small_batch_matmul.small_batch_matmul(x, weight_OI)
  assert got.dtype == jnp.bfloat16
