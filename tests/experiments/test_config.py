"""Configs are locked, spelled right, and every field is read by something."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from opera_jax.configs import common, tiny
from opera_jax.experiments import opera_rl
from opera_jax.models import decoder, lora
from opera_jax.rl import learner, score
from opera_jax.rollout import engine, sampling
from opera_jax.run import setup, tasks
from opera_jax.scoring import logprob_scorer
from opera_jax.sharding import rules, runtime
from opera_jax.stages import (
  cold_start,
  dataset_card,
  evaluate,
  pool,
  supervised,
)
from opera_jax.synthesis import filters, rl_filter

CONFIGS = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  if path.stem
  not in ("__init__", "common", "ablations", "cold_start", "evidence")
)


def _keywords(function) -> set[str]:
  return set(inspect.signature(function).parameters) - {"self"}


def _fields(record) -> set[str]:
  return {field.name for field in dataclasses.fields(record)}


def _tokenizer_keywords() -> set[str]:
  given = {"workdir", "tasks", "checkpoint", "settings", "redo", "other"}
  return _keywords(setup._tokenizer) - given


# Sections handed over whole: a field that the receiver lacks is a TypeError.
WHOLE = {
  "runtime": _keywords(runtime.start) - {"folder"},
  "mesh": set(rules.MESH_AXES),
  "tokenizer": _tokenizer_keywords(),
  "model": _fields(decoder.Config)
  - {"lora"}  # a stage's, see below
  - {"rope_scaling"},  # a checkpoint's
  "data": _keywords(tasks.load) - {"seed", "needs"},
  "pool": _fields(pool.Settings),
  "base": _fields(supervised.Recipe) - {"lora", "init"},
  "sft": _fields(supervised.Recipe),
  "engine": _keywords(engine.Engine) - {"graphdef", "config", "mesh"},
  "rollout": _fields(sampling.Sampling)
  - {"stop_ids", "vocab_size"},  # of the tokenizer
  "scoring": _keywords(logprob_scorer.LogprobScorer)
  - {"graphdef", "vocab_size", "mesh", "temperature"},
  "reward": _keywords(score.RewardScorer)
  - {"logprob_scorer", "tokenizer", "cache_dir"},
  "synthesis": _fields(cold_start.Search),
  "select": _fields(filters.Rules) | {"rl"},
  "card": _fields(dataset_card.Card),
  "evaluate": _fields(evaluate.Settings) - {"max_new_tokens"},
}
WHOLE_WITHIN = {
  "select.rl": _fields(rl_filter.Rules),
  "sft.lora": _keywords(lora.settings),
  "rl.lora": _keywords(lora.settings),
}


def _read_in_driver() -> set[str]:
  """Dotted fields that the drivers name: config.seed, rl.steps, ..."""
  return {
    ast.unparse(node).removeprefix("config.")
    for name in ("opera_rl", "pool")
    for node in ast.walk(
      ast.parse((ROOT / "experiments" / f"{name}.py").read_text())
    )
    if isinstance(node, ast.Attribute)
  }


def test_every_field_is_read():
  read, unread = _read_in_driver() | set(setup.SECTIONS), []
  read |= {f"rl.{name}" for name in learner.SETTINGS}
  for name, value in common.get_config().items():
    if name in WHOLE:
      assert name in read, name
      assert set(value) == WHOLE[name], name
    elif isinstance(value, ConfigDict):
      unread += [f"{name}.{f}" for f in value if f"{name}.{f}" not in read]
    elif name not in read:
      unread.append(name)
  for name, fields in WHOLE_WITHIN.items():
    section, _, inner = name.partition(".")
    assert set(common.get_config()[section][inner]) == fields, name
  assert not unread


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_locked_and_hold_common_fields_only(name):
  config = importlib.import_module(f"opera_jax.configs.{name}").get_config()
  assert config.is_locked
  known = common.get_config()
  assert set(config) == set(known)
  for section, value in known.items():
    if isinstance(value, ConfigDict) and section not in ("data",):
      assert set(config[section]) == set(value), section


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("stages", "sft,polish", "polish"),
    ("model.num_key_value_heads", 3, "multiple of model.num_key_value_heads"),
    ("mesh.tensor", 3, "config.mesh"),
    ("data.kind", "books", "config.data.kind"),
    ("engine.prompt_slots", 0, "config.engine.prompt_slots"),
    ("scoring.batch_size", 12, "config.scoring.batch_size"),
    ("rl.samples", 1, "config.rl.samples"),
    ("rl.mini_batch", 3, "config.rl.mini_batch"),
    ("base.batch_size", 12, "config.base.batch_size"),
    ("tokenizer.path", "no/such/folder", "tokenizer.json"),
    ("synthesis.template", "Think.", "'Think.' holds {prompt} 0 times"),
    ("synthesis.template", "none.txt", "synthesis.template=none.txt: no such"),
    ("synthesis.method", "polish", "config.synthesis.method is 'polish'"),
    ("select.max_copied", 1.5, "config.select.max_copied"),
    ("select.rl.band", (3.0, 2.0), "config.select.rl.band"),
  ],
)
def test_a_wrong_value_is_named_before_any_work(
  field, value, message, tmp_path
):
  config = tiny.get_config("smoke")
  config.update_from_flattened_dict({field: value})
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    opera_rl.opera(config, str(tmp_path))
  assert not (tmp_path / "base").exists()


def test_an_unknown_field_fails_with_its_nearest_name(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.opera_rl"),
      "--config=configs/tiny.py:smoke",
      f"--workdir={tmp_path}",
      "--config.rl.learning_rat=1",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  assert done.returncode != 0
  assert "did you mean config.rl.learning_rate?" in done.stderr


DRIVERS = sorted(
  path.stem
  for path in (ROOT / "experiments").glob("*.py")
  if path.stem != "__init__"
)


@pytest.mark.parametrize("name", DRIVERS)
def test_a_command_imports_jax_when_it_needs_it(name):
  """--help and a mistyped flag answer at once, torch beside it or not."""
  heavy = "{'jax', 'torch', 'flax', 'orbax', 'scipy', 'transformers'}"
  done = subprocess.run(
    [
      *(sys.executable, "-c"),
      f"import sys, opera_jax.experiments.{name}; "
      f"print({heavy} & set(sys.modules))",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
  )
  assert done.stdout.strip() == "set()"
