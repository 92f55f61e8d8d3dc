"""CONTRIBUTING's worked examples are files that work as they stand."""

import dataclasses
import json
import re
import sqlite3
import types

import numpy as np
import pytest
from conftest import ROOT

import opera_jax.advantages
import opera_jax.rewards
from opera_jax import structs
from opera_jax.configs import tiny
from opera_jax.data import rows
from opera_jax.models import hf_config
from opera_jax.models.families import table
from opera_jax.rewards import compose
from opera_jax.rl import advantages, score

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
CODE = re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)
FLAGS = dict(re.findall(r'^--config\.(\S+?)="(.*)"$', TEXT, re.MULTILINE))


@pytest.fixture
def added(tmp_path, monkeypatch):
  """The files of the examples, where the packages find them."""
  for path, body in CODE:
    target = tmp_path / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(body)
  for package in (opera_jax.rewards, opera_jax.advantages):
    folder = tmp_path / package.__name__.replace(".", "/")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])


def test_the_examples_are_there():
  assert [path for path, _ in CODE] == [
    "opera_jax/rewards/brevity.py",
    "opera_jax/advantages/first_half.py",
    "configs/short_stories.py",
    "configs/methods/half_grpo.py",
    "opera_jax/models/families/mistral.py",
    "opera_jax/data/sqlite.py",
  ]
  assert set(FLAGS) == {"reward.terms", "rl.advantage"}


def _load(path):
  """The module of an example."""
  namespace: dict = {}
  exec(compile(dict(CODE)[path], path, "exec"), namespace)
  return namespace


def test_a_config_changes_what_it_says_and_nothing_else():
  made = _load("configs/short_stories.py")["get_config"]("smoke")
  base = tiny.get_config("smoke").copy_and_resolve_references().unlock()
  base.rl.samples, base.rollout.max_new_tokens = 16, 160
  assert made.is_locked and made.to_dict() == base.to_dict()


@pytest.mark.parametrize("arg, prompts", [("", 128), ("smoke", 4)])
def test_a_recipe_has_its_papers_sizes_and_a_smoke(added, arg, prompts):
  config = _load("configs/methods/half_grpo.py")["get_config"](arg)
  assert config.rl.prompts == prompts
  assert list(advantages.build(config.rl.advantage, {})) == ["first_half"]


def test_a_source_is_one_function_and_one_entry(tmp_path, monkeypatch):
  base = sqlite3.connect(tmp_path / "tasks.db")
  base.execute("CREATE TABLE tasks (prompt TEXT, reference TEXT)")
  base.executemany("INSERT INTO tasks VALUES (?, ?)", [("a", "b"), ("c", "d")])
  base.commit()
  base.close()
  rows_of = _load("opera_jax/data/sqlite.py")["rows_of"]
  assert re.search(r'^"sqlite:": sqlite\.rows_of$', TEXT, re.MULTILINE)
  monkeypatch.setitem(rows.SOURCES, "sqlite:", rows_of)
  assert list(rows.read(f"sqlite:{tmp_path}/tasks.db#tasks")) == [
    (1, {"prompt": "a", "reference": "b"}),
    (2, {"prompt": "c", "reference": "d"}),
  ]


@pytest.fixture
def mistral(monkeypatch):
  """The family of the example, registered by its line."""
  loaded = _load("opera_jax/models/families/mistral.py")
  (line,) = re.findall(r"^(mistral\.\w+),$", TEXT, re.MULTILINE)
  family = eval(line, {"mistral": types.SimpleNamespace(**loaded)})
  monkeypatch.setitem(table.FAMILIES, family.model_type, family)


@pytest.mark.parametrize("window", [7, None, "left out"])
def test_a_familys_config_is_transformers_there_and_back(
  mistral, tmp_path, window
):
  import transformers

  stated = {} if window == "left out" else {"sliding_window": window}
  raw = transformers.MistralConfig(**stated, head_dim=96).to_dict()
  if window == "left out":
    del raw["sliding_window"]
  (tmp_path / "config.json").write_text(json.dumps(raw))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  ours = hf_config.read(tmp_path)
  assert (ours.sliding_window or None) == theirs.sliding_window
  assert (ours.head_dim, ours.qk_norm) == (theirs.head_dim, False)
  written = hf_config.contents(ours, "float32")
  assert written["architectures"] == ["MistralForCausalLM"]
  (tmp_path / "config.json").write_text(json.dumps(written))
  again = transformers.AutoConfig.from_pretrained(tmp_path)
  assert again.sliding_window == theirs.sliding_window
  assert hf_config.read(tmp_path) == ours


@pytest.mark.slow
@pytest.mark.parametrize("window", [5, None])
def test_a_familys_logits_are_transformers(
  mistral, one_device, tmp_path, window
):
  import jax
  import jax.numpy as jnp
  import torch
  from flax import nnx
  from models import conftest as pairs

  from opera_jax.models import attention, decoder

  pair = pairs.read(
    pairs.torch_model("mistral", sliding_window=window), tmp_path, one_device
  )
  token_BT = np.random.default_rng(0).integers(0, 301, (2, 24))
  with torch.no_grad():
    theirs_BTV = pair.torch(torch.from_numpy(token_BT)).logits.numpy()

  def logits(config):
    model = nnx.merge(decoder.abstract(config)[0], pair.params)
    hidden_BTD, _ = model(
      jnp.asarray(token_BT),
      jnp.broadcast_to(jnp.arange(24), (2, 24)),
      attention.causal(jnp.ones((2, 24), jnp.int32)),
    )
    return np.asarray(hidden_BTD @ model.head_matrix()[0])

  with jax.set_mesh(one_device):
    ours_BTV = logits(pair.config)
    other_BTV = logits(dataclasses.replace(pair.config, sliding_window=9))
  np.testing.assert_allclose(ours_BTV, theirs_BTV, rtol=0, atol=1e-4)
  assert np.abs(other_BTV - theirs_BTV).max() > 0.1  # windows matter here


def test_one_file_and_one_line_are_enough(added):
  weights = compose.weights(FLAGS["reward.terms"])
  rewards = {n: compose.build(n, {}, 1.0) for n in weights}
  tokens = [np.arange(n, dtype=np.int32) for n in (4, 3)]
  samples = [structs.Sample(t, -0.5 * np.ones(len(t)), True) for t in tokens]
  rollouts = structs.Rollouts(
    prompts=[structs.Prompt("a", "math", "q", "7")],
    samples=2,
    prompt_ids=[tokens[0]],
    completions=samples,
    texts=["it is 7", "it is 8"],
    thoughts=None,
    encode=None,
    chat_prompt=None,
  )
  result = structs.LogprobResult([s.logprob for s in samples], [])
  total, parts = compose.weighted_sum(
    {n: r.rewards(rollouts, result) for n, r in rewards.items()}, weights
  )
  brevity = np.exp(-np.asarray([2.0, 1.5]) / 50)
  np.testing.assert_allclose(total, [[1, 0] + 0.1 * brevity], rtol=1e-5)
  np.testing.assert_allclose(parts["nats"], [[2.0, 1.5]])

  scored = score.Scored(total, parts, [], None, None, None, None, 0, rollouts)
  estimators = advantages.WeightedEstimators(FLAGS["rl.advantage"], {}, None)
  outcome = estimators.estimate(
    {},
    scored,
    [s.logprob for s in samples],
    penalty=[np.zeros(4), np.zeros(3)],
  )
  better, worse = outcome.advantage
  half = 2**-0.5
  np.testing.assert_allclose(better, half * np.asarray([1.5, 1.5, 1, 1]), 1e-4)
  np.testing.assert_allclose(worse, -half * np.asarray([1.5, 1.5, 1]), 1e-4)
