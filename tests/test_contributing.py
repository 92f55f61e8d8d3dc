"""CONTRIBUTING's worked examples are files that work as they stand."""

import re

import numpy as np
import pytest
from conftest import ROOT

import opera_jax.advantages
import opera_jax.rewards
from opera_jax import structs
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
  ]
  assert set(FLAGS) == {"reward.terms", "rl.advantage"}


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
