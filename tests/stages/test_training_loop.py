"""The training loop logs what a held-out batch costs, when it should."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opera_jax import structs
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.stages import training_loop
from opera_jax.train import checkpoint, metrics, step
from opera_jax.train import state as train_state


def _logprob(params, batch):
  return params["w"] * jnp.ones(batch.tokens.shape), jnp.zeros(
    batch.tokens.shape
  )


def _batch(_, rows):
  whole = np.ones((len(rows), 4), np.int32)
  real = np.ones((len(rows), 4), np.float32)
  return structs.Batch(whole, whole, whole, real, real, real, real)


@pytest.mark.parametrize("stop", [None, 3])
def test_validation_follows_the_update_that_it_is_logged_with(tmp_path, stop):
  optimizer = optax.sgd(0.5)
  mesh = mesh_lib.create({"fsdp": -1})
  stage = types.SimpleNamespace(path=tmp_path, name="sft", begin=lambda: None)
  rows = 8

  def fit(steps, preemption):
    return training_loop.fit(
      stage,
      train_state.create({"w": jnp.zeros(())}, optimizer, jax.random.key(0)),
      step.make_sft_update(_logprob, optimizer),
      _batch,
      mesh=mesh,
      batch_size=rows,
      steps=steps,
      checkpoint_every=2,
      preemption=preemption,
      validate=lambda params: -params["w"],
      validate_every=2,
    )

  with checkpoint.Preemption() as preemption:
    if stop:
      asked = iter([False] * (stop - 1) + [True])
      early = types.SimpleNamespace(
        requested=lambda: next(asked), exit_code=lambda: 143
      )
      with pytest.raises(SystemExit):
        fit(5, early)
    params = fit(5, preemption)
  # The loss is -w, so that every update adds the rate.
  assert float(params["w"]) == 2.5
  lines = metrics.read(tmp_path / "metrics.jsonl")
  assert [line["sft/loss"] for line in lines] == [0.0, -0.5, -1.0, -1.5, -2.0]
  assert [line.get("sft/validation_loss") for line in lines] == [
    *(None, -1.0, None, -2.0, -2.5),
  ]
