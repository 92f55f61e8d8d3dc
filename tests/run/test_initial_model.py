"""A stage starts from any model of the run's sizes and tokenizer."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from opera_jax.configs import tiny
from opera_jax.models import decoder, hf_checkpoint
from opera_jax.run import initial_model, setup
from opera_jax.run import workdir as workdir_lib


def _config(**changes):
  config = tiny.get_config("smoke").unlock()
  config.data.documents = 40
  config.data.synthesis, config.data.rl, config.data.held_out = 12, 8, 4
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """A run whose SFT has finished, by its words, and its parameters."""
  run = setup.from_config(tmp_path_factory.mktemp("first"), _config())
  params = jax.device_put(
    decoder.create(run.model, seed=5)[1],
    jax.tree.map(lambda x: x.sharding, run.initial()),
  )
  run.stage("sft", sft={"epochs": 1}).finish({"model": run.save("sft", params)})
  return run, params


def _same(one, two):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_array_equal(a, b)


def test_another_runs_model_comes_with_its_tokenizer(first, tmp_path):
  run, params = first
  name = str(run.workdir / "sft")
  # Other documents would train another tokenizer.
  config = _config(**{"rl.init": name, "data.documents": 60})
  second = setup.from_config(tmp_path / "second", config)
  assert second.tokenizer_digest[1] == run.tokenizer_digest[1]
  assert second.tokenizer.encode("A fox.").tolist() == (
    run.tokenizer.encode("A fox.").tolist()
  )
  _same(second.load(name), params)
  stage = second.stage("rl", models=(name,))
  stage.begin()
  digests = workdir_lib.made_from(second.workdir, "rl")
  assert digests["init/model"] == run.model_digest("sft")
  # A third run starts from the second, which has no model of its own yet.
  stage.finish({"model": second.save("rl", second.load(name))})
  third = setup.from_config(
    tmp_path / "third", _config(**{"rl.init": str(second.workdir / "rl")})
  )
  assert third.tokenizer_digest[1] == run.tokenizer_digest[1]
  # What has finished does not need the model that it started from.
  stage = third.stage("rl", models=(str(second.workdir / "rl"),))
  stage.finish({})
  second.workdir.rename(tmp_path / "moved")
  again = setup.from_config(
    tmp_path / "third", _config(**{"rl.init": str(second.workdir / "rl")})
  )
  gone = again.stage("rl", models=(str(second.workdir / "rl"),))
  assert gone.finished()


def test_a_checkpoint_is_the_model_that_was_exported(first, tmp_path):
  run, params = first
  hf_checkpoint.save(tmp_path / "out", params, run.model, run.tokenizer)
  name = str(tmp_path / "out")
  config = _config(**{"checkpoint": name, "rl.init": name})
  second = setup.from_config(tmp_path / "second", config)
  _same(second.load(name), params)
  second.stage("rl", models=(name,)).begin()
  weights = tmp_path / "out" / "config.json"
  weights.write_text(weights.read_text() + " ")
  with pytest.raises(ValueError, match=r"init/model \(.*out\): sha256"):
    second.stage("rl", models=(name,))


def test_a_model_that_does_not_fit_is_refused(first, tmp_path):
  run, params = first
  name = str(run.workdir / "sft")
  for changes, said in (
    ({"model.hidden_size": 64}, "hidden_size is 128 there and 64 here"),
    ({"tokenizer.think": ("<a>", "</a>")}, "tokenizer.think is .* None there"),
  ):
    with pytest.raises(ValueError, match=said):
      setup.from_config(
        tmp_path / "second", _config(**{"rl.init": name}, **changes)
      )
  # With a checkpoint of its own the run has another tokenizer.
  other = setup.from_config(tmp_path / "o", _config(**{"data.documents": 60}))
  hf_checkpoint.save(tmp_path / "out", params, run.model, other.tokenizer)
  config = _config(**{"checkpoint": str(tmp_path / "out"), "rl.init": name})
  with pytest.raises(ValueError, match="its tokenizer is .* and the run's"):
    setup.from_config(tmp_path / "third", config)


@pytest.mark.parametrize(
  "sft, rl, models, stages, base",
  [
    ("", "", ("base", "sft", "rl"), "rl", True),
    ("", "base", ("base", "rl"), "rl", True),
    ("", "runs/a/sft", ("runs/a/sft", "rl"), "rl,evaluate", False),
    ("runs/a/sft", "", ("runs/a/sft", "sft", "rl"), "sft,rl", False),
    ("runs/a/sft", "sft", ("runs/a/sft", "sft", "rl"), "synthesize", True),
    ("", "runs/a/sft", ("runs/a/sft", "rl"), "sft,rl", True),
    ("", "runs/a/sft", ("runs/a/sft", "rl"), "base,rl", True),
    ("", "", ("base", "sft", "rl"), "report", False),
  ],
)
def test_the_lineage_of_a_run(sft, rl, models, stages, base):
  config = _config(**{"sft.init": sft, "rl.init": rl})
  assert initial_model.lineage(config) == models
  assert initial_model.reads_base(config, set(stages.split(","))) == base


def test_a_teacher_may_be_the_base_model():
  config = _config(**{"rl.init": "runs/a/sft", "rl.teacher": "base"})
  assert initial_model.reads_base(config, {"rl"})


def test_what_a_name_means(first, tmp_path, monkeypatch):
  run, _ = first
  monkeypatch.chdir(tmp_path)
  assert initial_model.other_run(str(run.workdir / "sft")) == (
    run.workdir.resolve(), "sft",
  )  # fmt: skip
  for name in ("base", "sft"):
    pathlib.Path(name).mkdir()  # a folder of that name changes nothing
    assert not initial_model.is_checkpoint(name)
    assert initial_model.other_run(name) is None
  assert initial_model.is_checkpoint("Qwen/Qwen3-0.6B@main")
  pathlib.Path("runs").mkdir()
  assert not initial_model.is_checkpoint("runs/first")


def test_a_name_that_leads_nowhere(first, tmp_path, monkeypatch):
  run, _ = first
  monkeypatch.chdir(tmp_path)
  fault = initial_model.fault

  def says(name, allowed=("base", "sft")):
    return fault("config.rl.init", name, allowed)

  assert not says("base") and not says(str(run.workdir / "sft"))
  assert not says("Qwen/Qwen3-0.6B")
  assert "cannot start from; use 'base'" in says("sft", allowed=("base",))
  wrong = str(run.workdir / "stf")
  assert f"did you mean '{run.workdir}/sft'" in says(wrong)
  assert "did you mean 'base'" in says("bsae")
  (tmp_path / "loop").symlink_to("loop")
  assert "did you mean" not in says("loop")
  own = fault("config.rl.init", wrong.replace("stf", "sft"), ("base",), ".")
  assert not own
  own = fault(
    "config.rl.init", f"{run.workdir}/sft", ("base",), f"{run.workdir}/sft/.."
  )
  assert "a stage of this very run; use 'base'" in own
  (tmp_path / "half" / "sft").mkdir(parents=True)
  workdir_lib.Stage(tmp_path / "half", "sft", {}).begin()
  assert "has left no model" in says(str(tmp_path / "half" / "sft"))


def test_a_model_that_has_lost_its_files_is_named(first, tmp_path):
  run, _ = first
  lost = tmp_path / "lost"
  shutil.copytree(run.workdir, lost)
  name = str(lost / "sft")
  config = _config(**{"rl.init": name})
  second = setup.from_config(tmp_path / "second", config)
  shutil.rmtree(lost / "sft" / "model")
  with pytest.raises(FileNotFoundError, match="model/ from a copy"):
    second.load(name)
  with pytest.raises(FileNotFoundError, match="add base to config.stages"):
    second.load("base")
  (lost / "sft" / "SETTINGS.json").unlink()
  with pytest.raises(ValueError, match=r"has lost its stage's SETTINGS\.json"):
    setup.from_config(tmp_path / "third", config)


def test_a_folder_is_enough_to_load_its_models(first):
  """Without the data set, checkpoint and reward that it was made with."""
  run, params = first
  gone = _config(
    **{
      "data.kind": "jsonl",
      "data.path": "gone.jsonl",
      "checkpoint": "gone",
      "reward.terms": "gone_module:reward",
    }
  )
  before = sorted(run.workdir.rglob("*"))
  again = setup.of_workdir(run.workdir, gone, "sft")
  assert again.model == run.model
  _same(again.load("sft"), params)
  assert again.tokenizer.encode("A fox.").tolist() == (
    run.tokenizer.encode("A fox.").tolist()
  )
  assert sorted(run.workdir.rglob("*")) == before
  with pytest.raises(FileNotFoundError, match="'rl' has not begun.*--stage"):
    setup.of_workdir(run.workdir, gone, "rl")
