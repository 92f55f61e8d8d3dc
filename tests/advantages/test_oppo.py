"""Beliefs telescope, follow Bayes where they should, and keep their signs."""

import numpy as np
import pytest

from opera_jax.advantages import group, oppo

REWARD = [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("belief", oppo.BELIEFS)
def test_advantages_telescope(make, belief):
  inputs = make(REWARD)
  rule = oppo.AdvantageEstimator(belief=belief, anchor=False, scale="none")
  got = rule.advantages(inputs)
  start = np.repeat(np.mean(REWARD, axis=1), 3)
  for row, advantage in enumerate(got.advantage):
    step = np.clip(
      inputs.logprobs["with_answer"][row] - inputs.logprob[row], -5, 5
    ).astype(np.float64)
    v = start[row]
    for log_lambda in step:  # ten lines of plain arithmetic
      if belief == "odds":
        odds = v / (1 - v) * np.exp(log_lambda)
        v = odds / (1 + odds)
      else:
        v = min(v * np.exp(log_lambda), 1 - 1e-6)
    np.testing.assert_allclose(advantage.sum(), v - start[row], atol=1e-5)


def test_probability_belief_is_exact_bayes_and_odds_is_biased():
  """A coin is fair (fails) or loaded (succeeds); the marginal is known.

  p(head | success) = .9, p(head | failure) = .3, prior 0.4. The policy's own
  probability of a head is the mixture under the current posterior.
  """
  p = {True: 0.9, False: 0.3}
  rng = np.random.default_rng(1)
  prior = 0.4
  biases = []
  for _ in range(50):
    tokens = rng.random(4) < p[bool(rng.random() < prior)]
    posterior, evidence = [prior], []
    for head in tokens:
      v = posterior[-1]
      given = {s: p[s] if head else 1 - p[s] for s in p}
      marginal = v * given[True] + (1 - v) * given[False]
      evidence.append(np.log(given[True]) - np.log(marginal))
      posterior.append(v * given[True] / marginal)
    exact = oppo.beliefs(np.asarray(evidence), prior, belief="probability")
    np.testing.assert_allclose(exact, posterior, rtol=1e-6)
    odds = oppo.beliefs(np.asarray(evidence), prior, belief="odds")
    biases.append(np.abs(odds - posterior)[1:].max())
    # The odds update moves in the same direction, but less: logit V + log
    # lambda is logit(V lambda) + log((1 - V lambda) / (1 - V)).
    want = np.log(prior / (1 - prior)) + np.cumsum(evidence)
    np.testing.assert_allclose(odds[1:], 1 / (1 + np.exp(-want)), rtol=1e-6)
  assert np.mean(biases) > 0.05


def test_belief_drifts_down_under_the_policy():
  """E[log lambda] <= 0: tokens are drawn from the denominator."""
  rng = np.random.default_rng(0)
  policy, oracle = np.asarray([0.5, 0.3, 0.2]), np.asarray([0.2, 0.5, 0.3])
  tokens = rng.choice(3, 200, p=policy)
  value = oppo.beliefs(np.log(oracle / policy)[tokens], 0.5)
  assert value[-1] < 0.01


def test_anchoring_takes_the_sign_of_the_sequence(make):
  inputs = make(REWARD)
  got = oppo.AdvantageEstimator(scale="none").advantages(inputs)
  free = oppo.AdvantageEstimator(scale="none", anchor=False).advantages(inputs)
  sequence = np.asarray(group.grpo(inputs.reward_BN)).reshape(-1)
  for a, f, s in zip(got.advantage, free.advantage, sequence):
    assert (np.sign(a) == np.sign(s)).all()
    np.testing.assert_allclose(np.abs(a), np.abs(f))
  assert any((np.sign(f) != np.sign(s)).any() for f, s in
             zip(free.advantage, sequence))  # fmt: skip


def test_token_normalisation_is_a_standard_score_and_can_flip_signs(make):
  inputs = make(REWARD)
  raw = oppo.AdvantageEstimator(scale="none").advantages(inputs).advantage
  got = oppo.AdvantageEstimator(scale="tokens").advantages(inputs).advantage
  for begin in (0, 3):
    every = np.concatenate(raw[begin : begin + 3])
    want = (every - every.mean()) / (every.std() + 1e-6)
    np.testing.assert_allclose(
      np.concatenate(got[begin : begin + 3]), want, atol=1e-4
    )
  flipped = [
    (np.sign(a) != np.sign(b)).any() for a, b in zip(raw, got) if a.any()
  ]
  assert any(flipped)


@pytest.mark.parametrize("anchor", [True, False])
def test_rescaling_sums_to_reward_minus_v0(make, anchor):
  inputs = make(REWARD)
  got = oppo.AdvantageEstimator(scale="outcome", anchor=anchor).advantages(
    inputs
  )
  start = np.repeat(np.mean(REWARD, axis=1), 3)
  want = np.reshape(REWARD, -1) - start
  np.testing.assert_allclose([a.sum() for a in got.advantage], want, atol=1e-5)


def test_evidence_is_clipped_and_counted(make):
  with_answer = [np.asarray([-0.1, -99.0], np.float32)] * 2
  inputs = make([[0.0, 1.0]], [2, 2], with_answer=with_answer)
  got = oppo.AdvantageEstimator(
    evidence_clip=1.0, scale="none", anchor=False
  ).advantages(inputs)
  ratio = np.stack(with_answer) - np.stack(inputs.logprob)
  assert got.metrics["clipped"] == (np.abs(ratio) > 1).mean() > 0
  assert got.metrics["evidence"] == pytest.approx(ratio.mean(), rel=1e-5)
  log_odds = np.clip(ratio, -1, 1).sum(axis=1)  # V_0 = 1/2
  want = 1 / (1 + np.exp(-log_odds)) - 0.5
  np.testing.assert_allclose([a.sum() for a in got.advantage], want, rtol=1e-5)
  assert got.metrics["drift"] == pytest.approx(want.mean(), rel=1e-5)


@pytest.mark.parametrize("belief", oppo.BELIEFS)
@pytest.mark.parametrize("scale", oppo.SCALES)
@pytest.mark.parametrize(
  "reward, lengths",
  [
    ([[1.0, 1.0]], [3, 2]),
    ([[0.0, 0.0]], [3, 2]),
    ([[0.0, 1.0]], [0, 2]),
    ([[1.0, 0.0]], [400, 1]),
  ],
)
def test_degenerate_groups_are_finite(make, belief, scale, reward, lengths):
  with_answer = [np.full(c, -30.0, np.float32) for c in lengths]
  inputs = make(reward, lengths, with_answer=with_answer)
  got = oppo.AdvantageEstimator(belief=belief, scale=scale).advantages(inputs)
  for advantage, length in zip(got.advantage, lengths):
    assert advantage.shape == (length,)
    assert np.isfinite(advantage).all()


def test_the_oracles_prompts(make):
  inputs = make(REWARD)
  requests = oppo.AdvantageEstimator().scoring_requests(
    inputs.rollouts, inputs.reward_BN
  )
  assert requests["with_answer"].model == "policy"
  assert "answer is: 0" in requests["with_answer"].turns[0]
  assert "answer is: 1" in requests["with_answer"].turns[3]
  requests = oppo.AdvantageEstimator(oracle="teacher").scoring_requests(
    inputs.rollouts, None
  )
  assert requests["without_answer"].turns[0] == "q0"
  assert {request.model for request in requests.values()} == {"teacher"}
  prefix = inputs.rollouts.after(requests["without_answer"].turns)[0]
  np.testing.assert_array_equal(prefix[:4], np.frombuffer(b"<q0>", np.uint8))


@pytest.mark.parametrize(
  "bad", [{"oracle": "god"}, {"belief": "faith"}, {"scale": "big"},
          {"evidence_clip": 0.0}],
)  # fmt: skip
def test_unknown_names_are_refused(bad):
  with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
    oppo.AdvantageEstimator(**bad)
