"""Every method config builds, and takes one step of RL."""

import importlib
import json
import shutil

import numpy as np
import pytest
from conftest import ROOT

from configs import common
from experiments import opera_rl
from opera_jax.rewards import compose
from opera_jax.stages import crediting, learner
from opera_jax.train import metrics

METHODS = sorted(
  path.stem
  for path in (ROOT / "configs" / "methods").glob("*.py")
  if path.stem not in ("__init__", "base")
)


def _config(name, arg):
  return importlib.import_module(f"configs.methods.{name}").get_config(arg)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("arg", ["", "smoke", "ablation"])
def test_configs_name_real_parts(name, arg):
  config = _config(name, arg)
  assert config.is_locked and set(config) == set(common.get_config())
  assert set(config.rl) == set(common.get_config().rl)
  options = config.reward.options.to_dict()
  for part in compose.weights(config.reward.parts):
    compose.build(part, options.get(part, {}), 1.0)
  crediting.Creditor(config.rl.credit, config.rl.credit_options, None)
  assert config.rl.loss in learner.LOSSES
  assert config.rl.prompts % config.rl.mini_batch == 0
  assert set(options) <= set(compose.weights(config.reward.parts))
  text = importlib.import_module(f"configs.methods.{name}").__doc__
  cited = ("arXiv", "Williams", "teacher", "taught")
  assert any(word in text for word in cited), text


def test_an_unknown_size_is_refused():
  with pytest.raises(ValueError, match="'huge'"):
    _config("opera", "huge")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """A run up to SFT, which every method starts from."""
  folder = tmp_path_factory.mktemp("begun")
  config = _config("opera", "smoke").unlock()
  config.stages = "synthesize,select,sft"
  opera_rl.opera(config, str(folder))
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [m for m in METHODS if m != "judge"])
def test_one_step_of_each_method(name, begun, tmp_path):
  for stage in ("tokenizer", "base", "sft"):
    shutil.copytree(begun / stage, tmp_path / stage)
  config = _config(name, "smoke").unlock()
  config.stages = "rl"
  opera_rl.opera(config, str(tmp_path))
  (line,) = metrics.read(tmp_path / "rl" / "metrics.jsonl")
  assert json.loads((tmp_path / "rl" / "DONE.json").read_text())["steps"] == 1
  assert np.isfinite(line["policy/loss"])
  for part in compose.weights(config.reward.parts):
    assert f"reward/{part}" in line
  if config.rl.value_coef:
    assert line["policy/value_loss"] >= 0
  if config.rl.divergence_coef:
    assert line["policy/divergence"] >= 0
  if config.rl.draws > 1:
    assert 1 <= line["rollout/draws"] <= 10
