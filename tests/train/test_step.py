"""Updates: identities, and what must not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opera_jax import structs
from opera_jax.train import optimizer as optimizers
from opera_jax.train import state as train_state
from opera_jax.train import step

VOCABULARY = 11


def _logprob_fn(params, batch):
  """A bigram model: token t given token t - 1."""
  logits_RTV = params["table"][jnp.roll(batch.tokens, 1, axis=1)]
  logprob_RTV = jax.nn.log_softmax(logits_RTV)
  entropy_RT = -jnp.sum(jnp.exp(logprob_RTV) * logprob_RTV, axis=-1)
  picked = jnp.take_along_axis(logprob_RTV, batch.tokens[..., None], axis=-1)
  return picked[..., 0], entropy_RT


def _params(seed=0):
  table = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY))
  return {"table": jnp.asarray(table, jnp.float32)}


def _batch(rows=8, width=6, seed=0):
  generator = np.random.default_rng(seed)
  length_R = generator.integers(3, width + 1, rows)
  column_T = np.arange(width)
  real_RT = column_T < length_R[:, None]
  batch = structs.Batch(
    tokens=jnp.asarray(generator.integers(0, VOCABULARY, (rows, width))),
    positions=jnp.broadcast_to(jnp.arange(width), (rows, width)),
    segments=jnp.asarray(real_RT.astype(np.int32)),
    loss_mask=jnp.asarray((real_RT & (column_T > 0)).astype(np.float32)),
    advantage=jnp.asarray(
      np.repeat(generator.normal(size=(rows, 1)), width, 1), jnp.float32
    ),
    old_logprob=jnp.zeros((rows, width)),
    ref_logprob=jnp.zeros((rows, width)),
  )
  old, _ = _logprob_fn(_params(1), batch)
  ref, _ = _logprob_fn(_params(2), batch)
  return batch.replace(old_logprob=old, ref_logprob=ref)


def _sgd_step(make, batch, **settings):
  """Parameters' change under plain descent is minus the gradient."""
  optimizer = optax.sgd(1.0)
  params = _params()
  state = train_state.create(params, optimizer, jax.random.key(0))
  before = np.asarray(params["table"])
  after, metrics = make(_logprob_fn, optimizer, **settings)(state, batch)
  return before - np.asarray(after.params["table"]), after, metrics


def test_first_update_is_reinforce():
  batch = _batch()
  old, _ = _logprob_fn(_params(), batch)
  batch = batch.replace(old_logprob=old)
  gradient, state, metrics = _sgd_step(
    step.make_policy_update, batch, kl_coef=0.0, reduction="token_mean"
  )

  def reinforce(params):
    logprob, _ = _logprob_fn(params, batch)
    total = jnp.sum(batch.loss_mask * batch.advantage * logprob)
    return -total / jnp.sum(batch.loss_mask)

  want = jax.grad(reinforce)(_params())["table"]
  np.testing.assert_allclose(gradient, want, atol=1e-6)
  assert state.step == 1
  assert metrics["policy/ratio_mean"] == 1.0
  assert metrics["approx_kl"] == 0.0
  np.testing.assert_allclose(
    metrics["grad_norm"], np.linalg.norm(want), rtol=1e-5
  )


def test_policy_loss_is_the_slow_sum():
  batch = _batch()
  _, _, metrics = _sgd_step(
    step.make_policy_update, batch, kl_coef=0.5, clip_high=0.3
  )
  logprob, _ = map(np.asarray, _logprob_fn(_params(), batch))
  rows = []
  for r in range(8):
    token_losses = []
    for t in np.flatnonzero(np.asarray(batch.loss_mask[r])):
      ratio = np.exp(logprob[r, t] - batch.old_logprob[r, t])
      a, d = batch.advantage[r, t], batch.ref_logprob[r, t] - logprob[r, t]
      loss = max(-a * ratio, -a * np.clip(ratio, 0.8, 1.3))
      loss = min(loss, -3 * a) if a < 0 else loss
      token_losses.append(loss + 0.5 * (np.exp(d) - d - 1))
    rows.append(np.mean(token_losses))
  np.testing.assert_allclose(metrics["loss"], np.mean(rows), rtol=1e-5)


@pytest.mark.parametrize(
  "reduction,constant",
  [("token_mean", None), ("sequence_mean", None), ("constant", 40.0)],
)
def test_micro_batches_do_not_matter(reduction, constant):
  settings = {"reduction": reduction, "constant": constant}
  whole, _, want = _sgd_step(step.make_policy_update, _batch(), **settings)
  for parts in (2, 8):
    split, _, got = _sgd_step(
      step.make_policy_update, _batch(), micro_batches=parts, **settings
    )
    np.testing.assert_allclose(split, whole, atol=1e-6)
    assert got.keys() == want.keys()
    for name in want:
      np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def test_eight_devices_do_not_matter():
  whole, _, want = _sgd_step(step.make_policy_update, _batch(16))
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  optimizer = optax.sgd(1.0)
  state = train_state.create(_params(), optimizer, jax.random.key(0))
  state = jax.device_put(state, everywhere)
  update = step.make_policy_update(
    _logprob_fn, optimizer, micro_batches=2, state_sharding=everywhere
  )
  after, got = update(state, jax.device_put(_batch(16), rows))
  change = np.asarray(_params()["table"]) - np.asarray(after.params["table"])
  np.testing.assert_allclose(change, whole, atol=1e-6)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def test_what_is_no_target_may_hold_anything():
  batch = _batch()
  want, _, _ = _sgd_step(step.make_policy_update, batch)
  hole = jnp.where(batch.loss_mask > 0, 0.0, jnp.nan)
  dirty = batch.replace(
    advantage=batch.advantage + hole,
    old_logprob=batch.old_logprob + hole,
    ref_logprob=batch.ref_logprob + hole,
  )
  got, _, metrics = _sgd_step(step.make_policy_update, dirty)
  np.testing.assert_array_equal(got, want)
  step.check_finite(metrics, 1)


def test_sft_learns_the_sequence():
  batch = _batch(4)
  optimizer = optimizers.adamw(0.1, weight_decay=0.0)
  state = train_state.create(_params(), optimizer, jax.random.key(0))
  update = step.make_sft_update(_logprob_fn, optimizer, micro_batches=2)
  losses = []
  for _ in range(20):
    state, metrics = update(state, batch)
    losses.append(float(metrics["sft/loss"]))
  logprob, _ = _logprob_fn(_params(), batch)
  want = -jnp.sum(logprob * batch.loss_mask) / jnp.sum(batch.loss_mask)
  np.testing.assert_allclose(losses[0], want, rtol=1e-5)
  assert metrics["sft/tokens"] == batch.loss_mask.sum()
  assert losses[-1] < losses[0] - 0.5
  assert state.step == 20


def test_validation_is_the_mean_over_targets_of_any_split():
  """Sums and counts of two batches make the mean of both."""
  batch = _batch(4)
  logprob, _ = _logprob_fn(_params(), batch)
  mask = np.asarray(batch.loss_mask)
  want = -np.sum(np.asarray(logprob) * mask) / mask.sum()
  loss = step.make_validation_loss(_logprob_fn)
  halves = [jax.tree.map(lambda x, p=p: x[p::2], batch) for p in (0, 1)]
  totals, counts = zip(*(loss(_params(), half) for half in halves))
  np.testing.assert_allclose(sum(totals) / sum(counts), want, rtol=1e-5)
  assert sum(counts) == mask.sum()
  joined = step.make_validation_loss(
    _logprob_fn, join=lambda trained, frozen: {**trained, **frozen}
  )
  total, count = joined({}, batch, _params())
  np.testing.assert_allclose(total / count, want, rtol=1e-5)


def test_rows_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="8 rows do not divide into 3"):
    _sgd_step(step.make_policy_update, _batch(), micro_batches=3)


def test_non_finite_numbers_stop_the_run():
  batch = _batch()
  batch = batch.replace(old_logprob=batch.old_logprob - jnp.inf)
  _, _, metrics = _sgd_step(step.make_policy_update, batch)
  with pytest.raises(step.NonFiniteError, match="Step 7: grad_norm = nan"):
    step.check_finite(metrics, 7)


def test_gspo_on_policy_is_reinforce_too():
  batch = _batch()
  old, _ = _logprob_fn(_params(), batch)
  batch = batch.replace(old_logprob=old)
  settings = {"kl_coef": 0.0, "reduction": "sequence_mean"}
  want, _, _ = _sgd_step(step.make_policy_update, batch, **settings)
  got, _, _ = _sgd_step(
    step.make_policy_update,
    batch,
    loss="gspo",
    clip_low=3e-4,
    clip_high=4e-4,
    **settings,
  )
  np.testing.assert_allclose(got, want, atol=1e-6)
  with pytest.raises(ValueError, match="Unknown loss 'ppo'"):
    _sgd_step(step.make_policy_update, batch, loss="ppo")


def test_approx_kl_is_k3_of_old_against_new():
  batch = _batch()
  _, _, metrics = _sgd_step(
    step.make_policy_update, batch, kl_coef=0.0, reduction="token_mean"
  )
  new, _ = _logprob_fn(_params(), batch)
  gap = np.asarray(new - batch.old_logprob, np.float64)
  k3 = (np.exp(gap) - 1 - gap)[np.asarray(batch.loss_mask) > 0]
  np.testing.assert_allclose(metrics["approx_kl"], k3.mean(), rtol=1e-5)


def test_the_learning_rate_is_that_of_the_update():
  optimizer = optax.sgd(1.0)
  state = train_state.create(_params(), optimizer, jax.random.key(0))
  update = step.make_policy_update(
    _logprob_fn, optimizer, kl_coef=0.0, schedule=lambda i: 0.5 / (i + 1)
  )
  rates = []
  for _ in range(3):
    state, metrics = update(state, _batch())
    rates.append(float(metrics["learning_rate"]))
  np.testing.assert_allclose(rates, [0.5, 0.25, 0.5 / 3], rtol=1e-6)


def test_entropy_bonus_adds_its_gradient():
  batch = _batch()
  plain, _, _ = _sgd_step(step.make_policy_update, batch)
  bonus, _, _ = _sgd_step(step.make_policy_update, batch, entropy_coef=0.1)

  def mean_entropy(params):
    _, entropy = _logprob_fn(params, batch)
    rows = (entropy * batch.loss_mask).sum(1) / batch.loss_mask.sum(1)
    return rows.mean()

  want = -0.1 * jax.grad(mean_entropy)(_params())["table"]
  np.testing.assert_allclose(bonus - plain, want, atol=1e-6)


def test_critic_and_teacher_join_the_loss():
  batch = _batch()
  shape = (*batch.tokens.shape, 2)
  rng = np.random.default_rng(5)
  top_ids = jnp.asarray(rng.integers(0, VOCABULARY, shape))
  extra = {
    "value": jnp.zeros(shape[:2]),
    "returns": jnp.asarray(rng.normal(size=shape[:2]), jnp.float32),
    "top_ids": top_ids,
    "top_logprob": jnp.full(shape, -2.0),
  }
  batch = batch.replace(extra=extra)

  def heads(params, batch):
    logits = params["table"][jnp.roll(batch.tokens, 1, axis=1)]
    table = jax.nn.log_softmax(logits)
    out = {
      "value": logits.mean(-1),
      "top_logprob": jnp.take_along_axis(
        table, batch.extra["top_ids"], axis=-1
      ),
    }
    return *_logprob_fn(params, batch), out

  def run(**settings):
    state = train_state.create(_params(), optax.sgd(1.0), jax.random.key(0))
    update = step.make_policy_update(heads, optax.sgd(1.0), **settings)
    return update(state, batch)[1]

  plain = run()
  for micro_batches in (1, 2):
    both = run(
      value_coef=0.5, divergence_coef=2.0, micro_batches=micro_batches,
      reduction="token_mean",
    )  # fmt: skip
    base = run(reduction="token_mean")
    np.testing.assert_allclose(
      both["loss"],
      base["loss"]
      + 0.5 * both["policy/value_loss"]
      + 2.0 * both["policy/divergence"],
      rtol=1e-5,
    )
  assert "policy/value_loss" not in plain


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_dpo_update_is_the_gradient_of_the_pairs(micro_batches):
  batch = _batch()
  mask = np.asarray(batch.loss_mask).copy()
  mask[[1, 5]] = 0  # a pair without spread
  batch = batch.replace(loss_mask=jnp.asarray(mask))
  got, _, metrics = _sgd_step(
    step.make_preference_update,
    batch,
    beta=0.5,
    micro_batches=micro_batches,
  )

  def slow(params):
    logprob, _ = _logprob_fn(params, batch)
    total = 0.0
    for p in (0, 2, 3):
      gains = [
        jnp.sum((logprob - batch.ref_logprob)[r] * mask[r]) for r in (p, p + 4)
      ]
      total -= jax.nn.log_sigmoid(0.5 * (gains[0] - gains[1]))
    return total / 3

  np.testing.assert_allclose(metrics["loss"], slow(_params()), rtol=1e-5)
  np.testing.assert_allclose(got, jax.grad(slow)(_params())["table"], atol=1e-5)


@pytest.mark.parametrize("loss", ["clipped", "gspo"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_degenerate_groups_have_finite_gradients(loss, reduction):
  """All right or all wrong (no advantage), and responses without tokens."""
  batch = _batch()
  mask = np.asarray(batch.loss_mask).copy()
  mask[[0, 3]] = 0
  for advantage in (jnp.zeros_like(batch.advantage), batch.advantage):
    gradient, _, metrics = _sgd_step(
      step.make_policy_update,
      batch.replace(loss_mask=jnp.asarray(mask), advantage=advantage),
      loss=loss,
      reduction=reduction,
      entropy_coef=0.01,
    )
    assert np.isfinite(gradient).all()
    step.check_finite(metrics, 1)
  gradient, _, metrics = _sgd_step(
    step.make_policy_update,
    batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask)),
    loss=loss,
    reduction=reduction,
  )
  assert not gradient.any()
