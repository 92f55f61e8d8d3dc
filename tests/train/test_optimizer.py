"""AdamW and its schedule against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opera_jax.train import optimizer


@pytest.mark.parametrize("gradient_scale", [0.01, 100.0])
def test_adamw_is_torchs(gradient_scale):
  torch = pytest.importorskip("torch")
  generator = np.random.default_rng(0)
  start = {
    "norm": generator.normal(size=4).astype(np.float32),
    "weight": generator.normal(size=(3, 4)).astype(np.float32),
  }
  rate = optimizer.schedule(1e-2, 10, warmup_fraction=0.4)
  ours = optimizer.adamw(rate)
  params = jax.tree.map(jnp.asarray, start)
  state = ours.init(params)
  theirs = {
    name: torch.nn.Parameter(torch.tensor(value))
    for name, value in start.items()
  }
  adamw = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.01)
  warmup = torch.optim.lr_scheduler.LambdaLR(
    adamw, lambda i: min((i + 1) / 4, 1)
  )
  for _ in range(7):
    grads = {
      name: (gradient_scale * generator.normal(size=value.shape)).astype(
        np.float32
      )
      for name, value in start.items()
    }
    updates, state = ours.update(
      jax.tree.map(jnp.asarray, grads), state, params
    )
    params = optax.apply_updates(params, updates)
    for name, parameter in theirs.items():
      parameter.grad = torch.tensor(grads[name])
    torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
    adamw.step()
    warmup.step()
  for name, parameter in theirs.items():
    np.testing.assert_allclose(
      params[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_matrices_alone_decay_when_asked():
  params = {"norm": jnp.ones(4), "weight": jnp.ones((2, 2))}
  ours = optimizer.adamw(0.1, weight_decay=0.5, decay_matrices_only=True)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = ours.update(zeros, ours.init(params), params)
  np.testing.assert_array_equal(updates["norm"], 0.0)
  np.testing.assert_allclose(updates["weight"], -0.05, rtol=1e-6)


def test_warm_up_then_constant():
  rate = optimizer.schedule(1.0, 10, warmup_fraction=0.4)
  got = [float(rate(i)) for i in range(10)]
  np.testing.assert_allclose(got, [0.25, 0.5, 0.75] + [1.0] * 7)


def test_cosine_falls_to_its_final_fraction():
  rate = optimizer.schedule(2.0, 100, warmup_fraction=0.1, decay="cosine")
  np.testing.assert_allclose(float(rate(10)), 2.0, rtol=1e-6)
  np.testing.assert_allclose(float(rate(55)), 2.0 * 0.55, rtol=1e-5)
  np.testing.assert_allclose(float(rate(1000)), 0.2, rtol=1e-5)


@pytest.mark.parametrize(
  "arguments",
  [
    {"total_steps": 0},
    {"total_steps": 5, "warmup_fraction": 1.5},
    {"total_steps": 5, "decay": "square"},
  ],
)
def test_bad_schedules_are_refused(arguments):
  with pytest.raises(ValueError, match="got|Unknown"):
    optimizer.schedule(1.0, **arguments)


def test_bfloat16_moments_follow_float32_ones():
  """A gradient of steady size: the second moment must still find it."""
  draw = np.random.default_rng(0)
  params = {"weight": jnp.zeros((64, 64))}
  exact = optimizer.adamw(1e-3, b2=0.999, max_grad_norm=None)
  small = optimizer.adamw(
    1e-3, b2=0.999, max_grad_norm=None, moment_dtype="bfloat16"
  )
  states = [exact.init(params), small.init(params)]
  steps = [jax.jit(exact.update), jax.jit(small.update)]
  for size in [1.0] * 200 + [0.1] * 400:
    sign = draw.choice([-size, size], (64, 64))
    grads = {"weight": jnp.asarray(sign, jnp.float32)}
    states = [step(grads, s, params)[1] for step, s in zip(steps, states)]
  want, got = (s[0].nu["weight"] for s in states)
  assert got.dtype == states[1][0].mu["weight"].dtype == jnp.bfloat16
  # To the nearest, it would have stayed where the large gradients left it.
  got = np.asarray(got, np.float32)
  assert abs(got.mean() / float(want.mean()) - 1) < 0.01
  np.testing.assert_allclose(got, want, rtol=0.2)


def test_unknown_moments_are_refused():
  with pytest.raises(ValueError, match="float16.*moment_dtype"):
    optimizer.adamw(1e-3, moment_dtype="float16")
