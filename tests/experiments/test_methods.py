"""Every method config builds, and takes one step of RL."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from opera_jax.configs import common
from opera_jax.rewards import compose
from opera_jax.rl import advantages, learner
from opera_jax.train import metrics

METHODS = sorted(
  path.stem
  for path in (ROOT / "configs" / "methods").glob("*.py")
  if path.stem not in ("__init__", "base")
)


def _config(name, arg):
  module = importlib.import_module(f"opera_jax.configs.methods.{name}")
  return module.get_config(arg)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("arg", ["", "smoke", "ablation"])
def test_configs_name_real_parts(name, arg):
  config = _config(name, arg)
  assert config.is_locked and set(config) == set(common.get_config())
  assert set(config.rl) == set(common.get_config().rl)
  options = config.reward.options.to_dict()
  for part in compose.weights(config.reward.terms):
    compose.build(part, options.get(part, {}), 1.0)
  advantages.WeightedEstimators(
    config.rl.advantage, config.rl.advantage_options, None
  )
  assert config.rl.loss in learner.LOSSES
  assert config.rl.prompts % config.rl.mini_batch == 0
  assert set(options) <= set(compose.weights(config.reward.terms))
  text = importlib.import_module(f"opera_jax.configs.methods.{name}").__doc__
  cited = ("arXiv", "Williams", "teacher", "taught")
  assert any(word in text for word in cited), text


def test_an_unknown_size_is_refused():
  with pytest.raises(ValueError, match="'huge'"):
    _config("opera", "huge")


ONE_STEP = [name for name in METHODS if name != "judge"]
# One process on one device, as on a laptop, so that programs are shared.
SCRIPT = """
import importlib, pathlib, shutil, sys
from opera_jax.experiments import opera_rl

def config(name, stages):
  module = importlib.import_module(f"opera_jax.configs.methods.{name}")
  made = module.get_config("smoke").unlock()
  made.stages = stages
  return made

folder = pathlib.Path(sys.argv[1])
opera_rl.opera(config("opera", "synthesize,select,sft"), str(folder / "start"))
for name in sys.argv[2:]:
  for stage in ("tokenizer", "base", "sft"):
    shutil.copytree(folder / "start" / stage, folder / name / stage)
  opera_rl.opera(config(name, "rl"), str(folder / name))
"""


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
  """Folders of one RL step of every method, from one SFT model."""
  folder = tmp_path_factory.mktemp("methods")
  env = dict(os.environ, XLA_FLAGS="")
  env["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".jax_cache")
  subprocess.run(
    [sys.executable, "-c", SCRIPT, str(folder), *ONE_STEP],
    cwd=ROOT,
    env=env,
    check=True,
    timeout=1500,
  )
  return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_of_each_method(name, stepped):
  config = _config(name, "smoke")
  (line,) = metrics.read(stepped / name / "rl" / "metrics.jsonl")
  done = json.loads((stepped / name / "rl" / "DONE.json").read_text())
  assert done["steps"] == 1
  assert np.isfinite(line["loss"])
  for part in compose.weights(config.reward.terms):
    assert f"reward/{part}" in line
  if config.rl.value_coef:
    assert line["policy/value_loss"] >= 0
  if config.rl.divergence_coef:
    assert line["policy/divergence"] > -1e-6  # 0 but for rounding
  if config.rl.max_resamples:
    assert 0 <= line["rollout/resamples"] <= 9
