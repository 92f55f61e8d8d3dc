"""A learner with frozen parameters trains what is left, and a critic."""

import dataclasses

import jax
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.configs import tiny
from opera_jax.models import decoder, lora
from opera_jax.rl import learner
from opera_jax.train import optimizer
from opera_jax.train import state as train_state

SETTINGS = lora.Settings(rank=2, targets=("q", "down"), base_dtype="float32")


def _batch(rows=2, length=12):
  draw = np.random.default_rng(0)
  shape = (rows, length)
  real = {
    name: draw.normal(size=shape).astype(np.float32)
    for name in ("advantage", "value", "returns")
  }
  logprob = np.full(shape, -5.0, np.float32)
  return structs.Batch(
    tokens=draw.integers(0, 300, shape).astype(np.int32),
    positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
    segments=np.ones(shape, np.int32),
    loss_mask=np.ones(shape, np.float32),
    advantage=real["advantage"],
    old_logprob=logprob,
    ref_logprob=logprob,
    extra={name: real[name] for name in ("value", "returns")},
  )


def _build(graphdef, **changes):
  rl = tiny.get_config("smoke").rl
  return learner.build(
    graphdef,
    optimizer.adamw(1e-2),
    temperature=1.0,
    kl_coef=0.1,
    join=lora.combine,
    **{name: rl[name] for name in learner.SETTINGS} | changes,
  )


@pytest.mark.parametrize(
  "value_coef", [pytest.param(0.0, marks=pytest.mark.slow), 0.5]
)
def test_an_adapter_and_a_critic_are_trained_on_a_frozen_base(
  tiny_model, value_coef
):
  config = dataclasses.replace(tiny_model[0], lora=SETTINGS)
  graphdef, created = decoder.create(config, seed=0)
  adapter, _ = lora.split(created)
  base = tiny_model[2]
  learn = _build(graphdef, value_coef=value_coef, ema=0.5)
  before = jax.tree.map(np.asarray, (adapter, base))
  state = train_state.create(
    learn.initial(adapter, config.hidden_size),
    learn.optimizer,
    jax.random.key(0),
  )
  for _ in range(2):  # B is 0 at first, so A moves from the second update on
    state, metrics = learn.update(state, _batch(), base)
  assert np.isfinite(metrics["loss"])
  trained = state.params["policy"] if value_coef else state.params
  for old, new in zip(jax.tree.leaves(before[0]), jax.tree.leaves(trained)):
    assert np.abs(old - new).max() > 1e-3
  if value_coef:
    assert state.params["value"]["kernel"].any()
    values = learn.values(learn.whole(state.params, base), _batch())
    assert np.isfinite(values).all() and values.any()
  adapter, frozen = lora.split(learn.policy(state.params, base))
  for got, want in zip(
    jax.tree.leaves((adapter, frozen)), jax.tree.leaves((trained, before[1]))
  ):
    np.testing.assert_array_equal(got, want)
  # The EMA is of the adapter alone; the base is the policy's.
  mean, frozen = lora.split(learn.mean(state.opt_state, base))
  for got, old, new in zip(
    *map(jax.tree.leaves, (mean, before[0], trained)), strict=True
  ):
    assert 0 < np.abs(got - old).max() < np.abs(new - old).max()
  for got, want in zip(jax.tree.leaves(frozen), jax.tree.leaves(base)):
    assert got is want
