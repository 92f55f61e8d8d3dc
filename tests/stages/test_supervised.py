"""A base model can be loaded instead of trained."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from opera_jax.configs import tiny
from opera_jax.models import decoder, hf_checkpoint
from opera_jax.run import setup
from opera_jax.stages import supervised
from opera_jax.train import checkpoint


def test_a_checkpoint_becomes_the_base_model(tmp_path):
  config = tiny.get_config("smoke")
  run = setup.setup(
    tmp_path / "run",
    temperature=1.0,
    **{name: config[name] for name in setup.SECTIONS},
  )
  _, params = decoder.create(run.model, seed=9)
  hf_checkpoint.save(tmp_path / "model", params, run.model)
  recipe = supervised.Recipe(**config.base)
  with checkpoint.Preemption() as preemption:
    for _ in range(2):
      supervised.base(run, recipe, preemption, path=str(tmp_path / "model"))
  # Its ends: what generation_config.json says, for every later stage.
  assert run.tokenizer.end_ids == (run.tokenizer.end_id,)
  assert run.sampling(max_new_tokens=4).stop_ids == run.tokenizer.end_ids
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(run.load("base"))):
    np.testing.assert_array_equal(a, b)
  assert dataclasses.asdict(recipe)["epochs"] == config.base.epochs


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_all_ends_of_a_checkpoint_stop_and_are_exported(tmp_path, file):
  config = tiny.get_config("smoke").copy_and_resolve_references()
  folder = tmp_path / "model"
  for name, checkpoint_path in (("first", ""), ("run", str(folder))):
    config.checkpoint = checkpoint_path
    run = setup.setup(
      tmp_path / name,
      temperature=1.0,
      **{name: config[name] for name in setup.SECTIONS},
    )
    if checkpoint_path:
      break
    params = decoder.create(run.model, seed=9)[1]
    hf_checkpoint.save(folder, params, run.model, run.tokenizer)
    (folder / "generation_config.json").unlink()
    named = folder / file
    said = json.loads(named.read_text()) if named.exists() else {}
    named.write_text(json.dumps(said | {"eos_token_id": [260, 41, 7]}))
  ends = run.tokenizer.end_ids
  assert ends[0] == run.tokenizer.end_id and set(ends) == {
    *ends[:1],
    260,
    41,
    7,
  }
  assert run.sampling(max_new_tokens=4).stop_ids == ends
  _, params = decoder.create(run.model, seed=9)
  hf_checkpoint.save(tmp_path / "out", params, run.model, run.tokenizer)
  said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert said["eos_token_id"] == list(ends)


def test_told_to_stop_a_loading_ends_at_the_next_tensor(tmp_path, monkeypatch):
  config = tiny.get_config("smoke")
  run = setup.setup(
    tmp_path / "run",
    temperature=1.0,
    **{name: config[name] for name in setup.SECTIONS},
  )
  _, params = decoder.create(run.model, seed=9)
  hf_checkpoint.save(tmp_path / "model", params, run.model)
  recipe, path = supervised.Recipe(**config.base), str(tmp_path / "model")
  read, tensors = hf_checkpoint._read, []

  def told(*given):
    tensors.append(1)
    if len(tensors) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return read(*given)

  monkeypatch.setattr(hf_checkpoint, "_read", told)
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
