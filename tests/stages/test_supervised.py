"""A base model can be loaded instead of trained."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from configs import tiny
from opera_jax.models import qwen3, qwen3_params
from opera_jax.stages import setup, supervised
from opera_jax.train import checkpoint


def test_a_checkpoint_becomes_the_base_model(tmp_path):
  config = tiny.get_config("smoke")
  run = setup.setup(
    tmp_path / "run",
    temperature=1.0,
    **{name: config[name] for name in setup.SECTIONS},
  )
  _, params = qwen3.create(run.model, seed=9)
  qwen3_params.save(tmp_path / "model", params, run.model)
  recipe = supervised.Recipe(**config.base)
  with checkpoint.Preemption() as preemption:
    for _ in range(2):
      supervised.base(run, recipe, preemption, path=str(tmp_path / "model"))
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(run.load("base"))):
    np.testing.assert_array_equal(a, b)
  assert dataclasses.asdict(recipe)["epochs"] == config.base.epochs


def test_told_to_stop_a_loading_ends_at_the_next_tensor(tmp_path, monkeypatch):
  config = tiny.get_config("smoke")
  run = setup.setup(
    tmp_path / "run",
    temperature=1.0,
    **{name: config[name] for name in setup.SECTIONS},
  )
  _, params = qwen3.create(run.model, seed=9)
  qwen3_params.save(tmp_path / "model", params, run.model)
  recipe, path = supervised.Recipe(**config.base), str(tmp_path / "model")
  read, tensors = qwen3_params._read, []

  def told(*given):
    tensors.append(1)
    if len(tensors) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return read(*given)

  monkeypatch.setattr(qwen3_params, "_read", told)
  with (
    checkpoint.Preemption() as preemption,
    pytest.raises(SystemExit) as left,
  ):
    supervised.base(run, recipe, preemption, path=path)
  assert left.value.code == 143 and len(tensors) == 3
  with checkpoint.Preemption() as preemption:
    supervised.base(run, recipe, preemption, path=path)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(run.load("base"))):
    np.testing.assert_array_equal(a, b)
