"""Validation: what counts as better, what is kept, what is measured."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.rl import score, validation

SETTINGS = {
  "every": 2,
  "prompts": 3,
  "samples": 2,
  "metric": "reward",
  "patience": 0,
  "keep_best": True,
}


def test_the_last_prompts_are_held_out():
  every = [structs.Prompt(str(i), "math", "q", "1") for i in range(8)]
  train, held = validation.Settings(**SETTINGS).split(every)
  assert [p.id for p in train] == list("01234")
  assert [p.id for p in held] == list("567")
  off = validation.Settings(**SETTINGS | {"every": 0})
  assert off.split(every) == (every, [])


def test_the_best_is_the_first_of_the_highest():
  found, seen = validation.Progress(), []
  for step, value in enumerate([0.5, 0.5, -1.0, 0.7, 0.2], start=1):
    found = found.after(value, step)
    seen.append((found.best, found.best_step, found.misses))
  assert seen == [
    (0.5, 1, 0),
    (0.5, 1, 1),
    (0.5, 1, 2),
    (0.7, 4, 0),
    (0.7, 4, 1),
  ]


def test_best_parameters_outlive_a_kill_before_the_checkpoint(tmp_path):
  """A run wrote step 4 and died before a checkpoint named it; the resumed run
  still finds step 2, and writes step 4 again."""
  trees = {step: {"w": jnp.full(3, float(step))} for step in (1, 2, 4)}
  for step, tree in trees.items():
    validation.save_best(tmp_path, step, tree)
    if step == 2:
      validation.clean(tmp_path)
  like = {"w": jnp.zeros(3)}
  assert validation.load_best(tmp_path, 2, like)["w"][0] == 2
  again = {"w": jnp.full(3, 4.5)}
  validation.save_best(tmp_path, 4, again)
  assert validation.load_best(tmp_path, 4, like)["w"][0] == 4.5
  validation.clean(tmp_path)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4"]
  with pytest.raises(FileNotFoundError, match="step 3.*config.redo=rl"):
    validation.load_best(tmp_path, 3, like)


def _measure(metric):
  prompts = [
    structs.Prompt("a", "math", "q", "1"),
    structs.Prompt("b", "open_ended", "q", "r"),
  ]
  groups = [
    [
      structs.Sample(np.zeros(n, np.int32), np.zeros(n, np.float32), n < 5)
      for n in sizes
    ]
    for sizes in ((2, 4), (5, 5))
  ]
  asked = []

  def sample(params, tokens, settings, key, **more):
    asked.append((params, key, more["samples"], more["ids"]))
    return groups

  scored = score.Scored(
    total_BN=np.asarray([[1.0, 0.0], [0.5, 0.25]]),
    terms={
      "correct": np.asarray([[1.0, 0.0], [9.0, 9.0]]),
      "score": np.asarray([[9.0, 9.0], [-2.0, -4.0]]),
    },
    prefixes=[],
    logprobs=None,
    thoughts=None,
    deltas_RJ=None,
    open_ended_B=np.asarray([False, True]),
    separate_tokens=0,
    rollouts=None,
  )
  got = validation.measure(
    types.SimpleNamespace(sample=sample),
    types.SimpleNamespace(score=lambda *_, **__: scored),
    prompts,
    [None, None],
    params="train",
    rollout_params="rollout",
    settings=None,
    key=jax.random.key(3),
    samples=2,
    metric=metric,
  )
  assert asked == [("rollout", jax.random.key(3), 2, ["a", "b"])]
  return got


def test_metrics_are_means_over_the_prompts_that_a_term_is_of():
  value, line = _measure("score")
  assert value == -3.0
  assert line == {
    "validation/reward": 0.4375,
    "validation/correct": 0.5,
    "validation/score": -3.0,
    "validation/length": 4.0,
    "validation/finished": 0.5,
  }
  assert _measure("reward")[0] == 0.4375
  with pytest.raises(ValueError, match="'judge'.*'correct', 'reward'"):
    _measure("judge")
