"""Products of few tokens on a CPU against numpy in float64, and bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.models import small_batch_matmul

COUNTS = (2, 3, 5, 8, 9, 15, 16, 24, 33, 64, 100, 128)


@pytest.mark.parametrize(
  "inputs, outputs", [((64,), (8, 12)), ((8, 12), (300,)), ((256,), (7,))]
)
def test_few_tokens_are_multiplied_bit_for_bit_alike(inputs, outputs):
  rng = np.random.default_rng(0)
  size = int(np.prod(inputs))
  turned = rng.normal(size=(int(np.prod(outputs)), size)).astype(np.float32)
  x = rng.normal(size=(COUNTS[-1], *inputs)).astype(np.float32)

  @jax.jit
  def multiply(x, turned):
    weight = turned.T.reshape(*inputs, *outputs)
    return small_batch_matmul.small_batch_matmul(x, weight, len(inputs))

  every = multiply(x, turned)
  exact = x.reshape(-1, size).astype(np.float64) @ turned.T
  np.testing.assert_allclose(
    np.asarray(every).reshape(exact.shape), exact, rtol=1e-4, atol=1e-4
  )
  for count in COUNTS:
    np.testing.assert_array_equal(multiply(x[:count], turned), every[:count])
  # One is a product of a matrix with a vector, which adds up as it likes.
  np.testing.assert_allclose(
    multiply(x[:1], turned), every[:1], rtol=1e-4, atol=1e-4
  )


def test_few_tokens_may_have_several_leading_axes():
  x = jnp.arange(24.0).reshape(2, 3, 4)
  weight = jnp.arange(20.0).reshape(4, 5)
  got = small_batch_matmul.small_batch_matmul(x, weight)
  assert got.shape == (2, 3, 5)
  np.testing.assert_array_equal(got, np.asarray(x) @ np.asarray(weight))


def test_few_bfloat16_tokens_give_float32_where_asked():
  x = jnp.full((5, 3), 1.0, jnp.bfloat16)
  weight = jnp.full((3, 2), 1 + 2**-7, jnp.bfloat16)
  got = small_batch_matmul.small_batch_matmul(
    x, weight, preferred_element_type=jnp.float32
  )
  assert got.dtype == jnp.float32
  # Which bfloat16 does not hold.
  np.testing.assert_array_equal(got, np.full((5, 2), 3 * (1 + 2**-7)))
  assert small_batch_matmul.small_batch_matmul(x, weight).dtype == jnp.bfloat16
