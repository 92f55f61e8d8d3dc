"""Optimizers and schedules against torch, transformers and formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opera_jax.models import decoder
from opera_jax.train import checkpoint, optimizer
from opera_jax.train import state as train_state


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


def test_linear_falls_in_a_straight_line_to_its_final_fraction():
  rate = optimizer.schedule(2.0, 100, warmup_fraction=0.1, decay="linear")
  want = [2.0 * (1 - 0.9 * (i - 10) / 90) for i in range(10, 100)]
  np.testing.assert_allclose(
    [float(rate(i)) for i in range(10, 100)], want, rtol=1e-5
  )
  np.testing.assert_allclose(float(rate(1000)), 0.2, rtol=1e-5)


def _params(seed=0):
  """Two stacked matrices, one of them with heads, an embedding and a norm."""
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(draw.normal(size=shape), jnp.float32),
    {
      "embed": (160, 130),
      "layers": {
        "input_norm": (2, 130),
        "attention": {"q": (2, 130, 4, 32)},
        "mlp": {"down": (2, 200, 130)},
      },
    },
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _walk(name, params, steps, **settings):
  """Parameters after some updates by fixed gradients, without clipping."""
  ours = optimizer.build(
    name, 0.1, max_grad_norm=None, matrices=decoder.matrix_axes, **settings
  )
  state = ours.init(params)
  update = jax.jit(ours.update)
  for i in range(steps):
    updates, state = update(_params(10 + i), state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_lion_is_its_formula():
  """Algorithm 2 of arXiv 2302.06675."""
  got = _walk("lion", _params(), 3, weight_decay=0.2)["embed"]
  want, m = np.asarray(_params()["embed"]), 0.0
  for i in range(3):
    g = np.asarray(_params(10 + i)["embed"])
    want = want - 0.1 * (np.sign(0.9 * m + 0.1 * g) + 0.2 * want)
    m = 0.99 * m + 0.01 * g
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # imports transformers
def test_adafactor_is_that_of_transformers():
  """Of a matrix and a vector; theirs factors the last two axes."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")

  def pick(tree):
    return [tree["embed"], tree["layers"]["input_norm"][0]]

  params = pick(_params())
  got = params
  ours = optimizer.build("adafactor", 0.1, max_grad_norm=None, weight_decay=0.2)
  state = ours.init(got)
  theirs = [torch.nn.Parameter(torch.tensor(np.asarray(p))) for p in params]
  adafactor = transformers.optimization.Adafactor(
    theirs, lr=0.1, scale_parameter=False, relative_step=False, weight_decay=0.2
  )
  for i in range(3):
    grads = pick(_params(10 + i))
    updates, state = ours.update(grads, state, got)
    got = optax.apply_updates(got, updates)
    for parameter, grad in zip(theirs, grads):
      parameter.grad = torch.tensor(np.asarray(grad))
    adafactor.step()
  for mine, parameter, start in zip(got, theirs, params):
    moved = np.abs(np.asarray(mine) - start).max()
    other = parameter.detach().numpy()
    assert np.abs(np.asarray(mine) - other).max() < 1e-5 * moved


def test_the_first_step_of_muon_is_torchs():
  """On the matrices, whose heads count as one axis; AdamW on the rest."""
  torch = pytest.importorskip("torch")
  start, grads = _params(), _params(10)
  got = _walk("muon", start, 1, weight_decay=0.0)
  for part, name, flat in (
    ("attention", "q", (130, 128)),
    ("mlp", "down", (200, 130)),
  ):
    for layer in range(2):
      before, grad, after = (
        np.array(tree["layers"][part][name][layer]).reshape(flat)
        for tree in (start, grads, got)
      )
      parameter = torch.nn.Parameter(torch.tensor(before))
      parameter.grad = torch.tensor(grad)
      torch.optim.Muon(
        [parameter], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
      ).step()
      want = parameter.detach().numpy() - before
      # Torch iterates in bfloat16.
      error = np.linalg.norm(after - before - want) / np.linalg.norm(want)
      assert error < 0.02
      # Every singular value of the orthogonalised gradient is near 1.
      scale = 0.1 * 0.2 * max(flat) ** 0.5
      singular = np.linalg.svd(after - before, compute_uv=False) / scale
      assert singular.min() > 0.3 and singular.max() < 1.3
  moved = np.abs(got["embed"] - start["embed"])
  np.testing.assert_allclose(moved, np.median(moved), rtol=1e-3)


@pytest.mark.parametrize(
  ("name", "dtype"),
  [(n, "float32") for n in optimizer.NAMES]
  + [("lion", "bfloat16"), ("muon", "bfloat16")],
)
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path, name, dtype):
  ours = optimizer.build(
    name,
    optimizer.schedule(0.1, 4, decay="cosine"),
    moment_dtype=dtype,
    matrices=decoder.matrix_axes,
  )

  @jax.jit
  def advance(state):
    grads = jax.tree.map(lambda x: jnp.sin(37 * x), state.params)
    updates, opt_state = ours.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(params=params, opt_state=opt_state)

  first = train_state.create(_params(), ours, jax.random.key(0))
  straight = half = advance(advance(first))
  saves = checkpoint.Checkpoints(tmp_path)
  saves.save(2, half, {})
  _, restored, _ = saves.restore(first)
  saves.close()
  for _ in range(2):
    straight, restored = advance(straight), advance(restored)
  floating = {
    str(x.dtype)
    for x in jax.tree.leaves(straight.opt_state)
    if x.ndim and jnp.issubdtype(x.dtype, jnp.floating)
  }
  assert dtype in floating
  jax.tree.map(
    np.testing.assert_array_equal,
    (straight.params, straight.opt_state),
    (restored.params, restored.opt_state),
  )


@pytest.mark.parametrize(
  ("name", "settings", "said"),
  [
    ("adam", {}, "Unknown optimizer 'adam'"),
    ("adafactor", {"moment_dtype": "bfloat16"}, "Set it to 'float32'"),
    ("lion", {"moment_dtype": "int8"}, "one of"),
    ("muon", {}, "Pass matrices="),
  ],
)
def test_optimizers_that_cannot_be_are_refused(name, settings, said):
  with pytest.raises(ValueError, match=said):
    optimizer.build(name, 0.1, **settings)


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
