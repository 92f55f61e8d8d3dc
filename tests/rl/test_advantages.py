"""What an advantage estimator is told: successes, penalties, and whom it may
request."""

import dataclasses

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.losses import kl
from opera_jax.rl import advantages, score


def _scored(terms):
  tokens = np.arange(2, dtype=np.int32)
  rollouts = structs.Rollouts(
    prompts=[
      structs.Prompt("a", "math", "q", "1"),
      structs.Prompt("b", "open_ended", "q", "r"),
    ],
    samples=2,
    prompt_ids=[tokens, tokens],
    completions=[structs.Sample(tokens, np.zeros(2, np.float32), True)] * 4,
    texts=["x"] * 4,
    thoughts=None,
    encode=None,
    chat_prompt=lambda text: tokens,
  )
  total = np.asarray([[1.2, -0.3], [0.4, 0.6]], np.float32)
  return score.Scored(total, terms, [], None, None, None, None, 0, rollouts)


def test_success_is_correctness_of_maths_and_else_the_reward():
  correct = np.asarray([[1.0, 0.0], [0.0, 0.0]])
  scored = _scored({"correct": correct})
  np.testing.assert_allclose(
    advantages.success(scored.rollouts, scored), [[1, 0], [0.4, 0.6]]
  )
  scored = _scored({})
  np.testing.assert_allclose(
    advantages.success(scored.rollouts, scored), [[1, 0], [0.4, 0.6]]
  )


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_penalties_are_weighed_estimates_of_each_token(name):
  rng = np.random.default_rng(0)
  old, ref = rng.normal(-1, 0.2, (2, 2, 3)).astype(np.float32)
  got = advantages.kl_penalties(list(old), list(ref), coef=0.5, estimator=name)
  np.testing.assert_allclose(got, 0.5 * getattr(kl, name)(old, ref), rtol=1e-5)
  none = advantages.kl_penalties(list(old), list(ref), coef=0.0, estimator=name)
  assert not np.any(none)


def test_a_model_that_the_run_lacks_is_refused():
  estimators = advantages.WeightedEstimators(
    "sdpo", {"sdpo": {"threshold": 0.2}}, None
  )
  with pytest.raises(ValueError, match="config.rl.ema"):
    estimators.estimate({"ema": None}, _scored({}), [], penalty=[])


@pytest.mark.parametrize(
  "rules, options, message",
  [
    ("karma", {}, "no advantage estimator 'karma'"),
    ("inputs", {}, "no advantage estimator 'inputs'"),
    ("oppo", {"oppo": {"faith": 1}}, "takes the settings.*'anchor'"),
    ("grpo, oppo", {}, "no term"),
  ],
)
def test_unknown_rules_are_refused(rules, options, message):
  with pytest.raises(ValueError, match=message):
    advantages.WeightedEstimators(rules, options, None)


def test_importance_weights_take_the_probability_as_drawn():
  """Under top p = 0.5 a token is twice as likely as the policy makes it."""
  tokens = np.zeros(3, np.int32)
  old = np.log([0.2, 0.4, 0.1]).astype(np.float32)
  drawn = np.log([0.4, 0.8, 0.02]).astype(np.float32)
  plain = structs.Sample(tokens, old, True)
  truncated = structs.Sample(tokens, old, True, truncated_logprob=drawn)
  advantage = [np.ones(3, np.float32)] * 2
  samples = [plain, truncated]
  token = {"level": "token", "mode": "truncate", "floor": 0.0}
  same, none = advantages.importance_weighted(
    advantage, old=[old] * 2, completions=samples, cap=0.0, **token
  )
  assert same is advantage and not none
  got, metrics = advantages.importance_weighted(
    advantage, old=[old] * 2, completions=samples, cap=2.0, **token
  )
  np.testing.assert_allclose(got[0], 1.0)
  np.testing.assert_allclose(got[1], [0.5, 0.5, 2.0], rtol=1e-5)
  want = [1.0, 1.0, 1.0, 0.5, 0.5, 2.0]
  assert metrics == pytest.approx(
    {
      "sampler_trainer/weight_mean": np.mean(want),
      "sampler_trainer/weight_min": 0.5,
      "sampler_trainer/weight_max": 2.0,
      "sampler_trainer/masked_ratio": 0.0,
      "sampler_trainer/capped_ratio": 1 / 6,
    }
  )
  masking = token | {"mode": "mask", "floor": 0.6}
  got, metrics = advantages.importance_weighted(
    advantage, old=[old] * 2, completions=samples, cap=2.0, **masking
  )
  np.testing.assert_array_equal(got[1], 0.0)
  assert metrics["sampler_trainer/masked_ratio"] == 0.5
  assert metrics["sampler_trainer/capped_ratio"] == 0.0


def test_the_spread_of_advantages_is_that_of_all_tokens():
  rows = [np.float32([1.0, 1.0]), np.float32([-2.0])]
  got = advantages.spread(rows)
  flat = np.concatenate(rows)
  assert got == pytest.approx(
    {
      f"advantage/{name}": getattr(flat, name)()
      for name in ("mean", "std", "min", "max")
    }
  )


def test_estimators_see_every_reward_with_its_weight():
  """Terms that a reward only reports are none."""
  format_BN = np.asarray([[1.0, 0.0], [0.0, 0.0]], np.float32)
  other_BN = np.asarray([[0.2, 0.4], [9.0, 7.0]], np.float32)
  scored = dataclasses.replace(
    _scored({"format": format_BN, "judge": other_BN, "steps": other_BN}),
    weights={"format": 0.5, "judge": 2.0},
  )
  zeros = [np.zeros(2, np.float32)] * 4
  estimators = advantages.WeightedEstimators(
    "gdpo", {"gdpo": {"batch": False}}, None
  )
  got = estimators.estimate({}, scored, zeros, penalty=zeros).advantage
  half = 0.5**0.5  # (1 - 0.5) / std of (0, 1) with ddof 1
  want = [(0.5 - 2.0) * half, (-0.5 + 2.0) * half, 2.0 * half, -2.0 * half]
  np.testing.assert_allclose([a[0] for a in got], want, rtol=1e-4)
