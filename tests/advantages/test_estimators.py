"""Each advantage estimator against a few lines of arithmetic, and their
sums."""

import dataclasses
import importlib

import numpy as np
import pytest

from opera_jax.advantages import distillation, gae, group, inputs, sdpo

REWARD = [[0.2, 0.9, 0.4], [0.5, 0.5, 0.5]]
SEQUENCE = ("grpo", "dr_grpo", "rloo", "reinforce", "pairs")


def _estimator(name):
  return importlib.import_module(
    f"opera_jax.advantages.{name}"
  ).AdvantageEstimator


@pytest.mark.parametrize("name", SEQUENCE)
def test_sequence_estimators_give_one_number_to_every_token(make, name):
  case = make(REWARD)
  got = _estimator(name)().advantages(case)
  assert (
    _estimator(name)().scoring_requests(case.rollouts, case.reward_BN) == {}
  )
  for advantage, tokens in zip(got.advantage, case.logprob):
    assert advantage.shape == tokens.shape
    assert np.ptp(advantage) == 0
  if name in ("grpo", "dr_grpo", "rloo"):
    want = np.asarray(getattr(group, name)(case.reward_BN)).reshape(-1)
    np.testing.assert_allclose([a[0] for a in got.advantage], want, rtol=1e-6)


def test_reinforce_subtracts_the_mean_of_all_others(make):
  case = make(REWARD)
  got = [a[0] for a in _estimator("reinforce")().advantages(case).advantage]
  flat = np.reshape(REWARD, -1)
  want = [r - np.delete(flat, i).mean() for i, r in enumerate(flat)]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  bare = _estimator("reinforce")(baseline="none").advantages(case)
  np.testing.assert_allclose([a[0] for a in bare.advantage], flat)
  with pytest.raises(ValueError, match="critic"):
    _estimator("reinforce")(baseline="critic")


def test_grpo_by_the_spread_of_the_batch(make):
  """TRL calls it scale_rewards="batch"; Lite PPO."""
  case = make(REWARD)
  got = _estimator("grpo")(scale="batch").advantages(case).advantage
  reward = np.asarray(REWARD)
  want = (reward - reward.mean(axis=1, keepdims=True)) / (
    reward.std(ddof=1) + 1e-6
  )
  np.testing.assert_allclose(
    [a[0] for a in got], want.reshape(-1), rtol=1e-5, atol=1e-7
  )
  with pytest.raises(ValueError, match="'step'.*'group', 'batch'"):
    _estimator("grpo")(scale="step")


def test_reinforce_plus_plus_is_normalised_over_the_batch(make):
  case = make(REWARD)
  got = _estimator("reinforce")(baseline="none", normalise=True)
  flat = np.reshape(REWARD, -1)
  want = (flat - flat.mean()) / (flat.std(ddof=1) + 1e-6)
  np.testing.assert_allclose(
    [a[0] for a in got.advantages(case).advantage], want, rtol=1e-5
  )
  same = make([[0.5, 0.5], [0.5, 0.5]])
  assert not np.any(np.concatenate(got.advantages(same).advantage))


@pytest.mark.parametrize("batch", [True, False])
def test_gdpo_normalises_each_term_in_its_group_then_the_sum(make, batch):
  """Equations 4 to 6 of arXiv 2601.05242, one prompt and term at a time."""
  rng = np.random.default_rng(0)
  terms = {
    "correct": (1.0, rng.integers(0, 2, (3, 4)).astype(np.float32)),
    "length": (0.25, 1e3 * rng.normal(size=(3, 4)).astype(np.float32)),
    "same": (1.0, np.full((3, 4), 0.7, np.float32)),
  }
  case = dataclasses.replace(make(np.zeros((3, 4))), terms=terms)
  want = np.zeros((3, 4))
  for weight, term in terms.values():
    for b in range(3):
      if np.ptp(term[b]):
        centred = term[b] - term[b].mean()
        want[b] += weight * centred / (term[b].std(ddof=1) + 1e-6)
  if batch:
    want = (want - want.mean()) / (want.std(ddof=1) + 1e-6)
  estimator = _estimator("gdpo")(batch=batch)
  got = [a[0] for a in estimator.advantages(case).advantage]
  np.testing.assert_allclose(got, want.reshape(-1), rtol=1e-4, atol=1e-6)
  penalised = dataclasses.replace(
    case, penalty=[p + 0.1 for p in case.penalty[:-1]] + case.penalty[-1:]
  )
  with pytest.raises(ValueError, match="kl_in='loss'"):
    estimator.advantages(penalised)
  with pytest.raises(ValueError, match="epsilon above 0"):
    _estimator("gdpo")(epsilon=0.0)


def test_gdpo_weighs_each_prompt_by_its_own_sum(make):
  """As three runs of one prompt each, before the step's normalisation."""
  rng = np.random.default_rng(1)
  weight = {"correct": [2.0, 0.0, 1.0], "length": [0.0, 0.25, -3.0]}
  value = {n: rng.normal(size=(3, 4)).astype(np.float32) for n in weight}
  estimator = _estimator("gdpo")(batch=False)
  case = make(np.zeros((3, 4)))
  terms = {
    n: (np.asarray(weight[n], np.float32)[:, None], value[n]) for n in weight
  }
  got = [
    a[0]
    for a in estimator.advantages(
      dataclasses.replace(case, terms=terms)
    ).advantage
  ]
  for b in range(3):
    alone = {n: (weight[n][b], value[n]) for n in weight}
    want = estimator.advantages(dataclasses.replace(case, terms=alone))
    rows = slice(4 * b, 4 * b + 4)
    np.testing.assert_allclose(
      got[rows], [a[0] for a in want.advantage[rows]], rtol=1e-5, atol=1e-6
    )


def test_the_penalty_is_subtracted_from_the_reward(make):
  case = make(REWARD)
  penalty = [np.full(len(p), 0.1, np.float32) for p in case.penalty]
  taxed = dataclasses.replace(case, penalty=penalty)
  lengths = [len(p) for p in penalty]
  want = np.reshape(REWARD, -1) - 0.1 * np.asarray(lengths)
  np.testing.assert_allclose(taxed.returns().reshape(-1), want, rtol=1e-5)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
  rng = np.random.default_rng(0)
  reward, value = rng.normal(size=6), rng.normal(size=6)
  ahead = np.append(value[1:], 0)
  delta = reward + gamma * ahead - value
  want = [
    sum((gamma * lam) ** k * delta[t + k] for k in range(6 - t))
    for t in range(6)
  ]
  got = gae.estimate(reward, value, gamma=gamma, lam=lam)
  np.testing.assert_allclose(got, want)


def test_gae_at_one_is_return_minus_value(make):
  case = make(REWARD)
  value = [np.linspace(0, 1, len(p)) for p in case.logprob]
  case = dataclasses.replace(case, value=value)
  got = gae.AdvantageEstimator(whiten=False).advantages(case)
  for row, reward in enumerate(np.reshape(REWARD, -1)):
    np.testing.assert_allclose(
      got.advantage[row], reward - value[row], atol=1e-6
    )
    np.testing.assert_allclose(got.returns[row], reward, rtol=1e-5)
  white = np.concatenate(gae.AdvantageEstimator().advantages(case).advantage)
  np.testing.assert_allclose([white.mean(), white.std()], [0, 1], atol=1e-6)
  with pytest.raises(ValueError, match="config.rl.value_coef"):
    gae.AdvantageEstimator().advantages(make(REWARD))


def test_gae_of_an_empty_completion_is_empty():
  assert gae.estimate(np.zeros(0), np.zeros(0), gamma=1.0, lam=1.0).size == 0


def test_distillation_is_teacher_minus_student(make):
  case = make(REWARD)
  got = distillation.AdvantageEstimator().advantages(case)
  for a, t, s in zip(got.advantage, case.logprobs["teacher"], case.logprob):
    np.testing.assert_allclose(a, t - s, rtol=1e-6)
  request = distillation.AdvantageEstimator().scoring_requests(
    case.rollouts, case.reward_BN
  )["teacher"]
  assert request.model == "teacher"
  assert request.turns == ["q0"] * 3 + ["q1"] * 3


def test_sdpo_shows_the_best_other_success(make):
  case = make([[0.2, 0.9, 0.6], [0.1, 0.2, 0.3]])
  estimator = sdpo.AdvantageEstimator()
  np.testing.assert_array_equal(
    estimator.shown(case.reward_BN), [1, 2, 1, -1, -1, -1]
  )
  request = estimator.scoring_requests(case.rollouts, case.reward_BN)["teacher"]
  assert request.model == "ema"
  assert "text 2" in request.turns[1] and "text 1" not in request.turns[1]
  assert request.turns[4] == "q1"
  got = estimator.advantages(case)
  assert not np.concatenate(got.advantage[3:]).any()
  np.testing.assert_allclose(
    got.advantage[1], case.logprobs["teacher"][1] - case.logprob[1], rtol=1e-6
  )
  assert got.metrics["taught"] == 0.5


def test_pairs_are_best_and_worst_of_groups_with_spread(make):
  got = _estimator("pairs")().advantages(
    make([[0.2, 0.9, 0.9, 0.1], [1.0] * 4])
  )
  sides = [a[0] for a in got.advantage]
  assert sides == [0, 1, 0, -1, 0, 0, 0, 0]


def test_weighted_estimators_add_up_token_by_token(make):
  case = make(REWARD)
  one, two = (
    _estimator("grpo")().advantages(case),
    distillation.AdvantageEstimator().advantages(case),
  )
  got = inputs.combine({"grpo": (1.0, one), "distillation": (0.5, two)})
  for total, a, b in zip(got.advantage, one.advantage, two.advantage):
    np.testing.assert_allclose(total, a + 0.5 * b, rtol=1e-5, atol=1e-6)
  assert "advantage/distillation/kl" in got.metrics


def test_a_bad_advantage_names_its_completion(make):
  case = make(REWARD)
  one = _estimator("grpo")().advantages(case)
  one.advantage[4][0] = np.nan
  with pytest.raises(ValueError, match="'grpo' gives completion 4"):
    inputs.combine({"grpo": (1.0, one)})


def test_an_unknown_model_is_refused():
  with pytest.raises(ValueError, match="oracle"):
    inputs.ScoringRequest("oracle", [])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce",
                                  "pairs", "distillation", "sdpo"])  # fmt: skip
@pytest.mark.parametrize("reward", [[[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 1.0]]])
def test_degenerate_groups_are_finite(make, name, reward):
  got = _estimator(name)().advantages(make(reward, [0, 4]))
  assert [len(a) for a in got.advantage] == [0, 4]
  assert all(np.isfinite(a).all() for a in got.advantage)
  if name in ("grpo", "dr_grpo", "rloo") and np.ptp(reward) == 0:
    assert not got.advantage[1].any()
