"""Prompts are drawn by the spread of their last rewards, and resumed so."""

import json
import types

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.data import batching, mixture
from opera_jax.rl import prompt_sampling


def _prompts(count, name=""):
  return [
    structs.Prompt(f"{name}{i}", "math", "", "", set=name) for i in range(count)
  ]


def _scored(prompts, reward, **terms):
  return types.SimpleNamespace(
    rollouts=types.SimpleNamespace(prompts=prompts),
    total_BN=np.asarray(reward, np.float32),
    terms={n: np.asarray(v, np.float32) for n, v in terms.items()},
    open_ended_B=np.asarray([p.task == "open_ended" for p in prompts]),
  )


def _sampler(method, prompts, weights=None, seen=None):
  return prompt_sampling.build(
    method,
    prompts,
    weights or {},
    batch_size=4,
    batches=30,
    seed=7,
    floor=0.05,
    seen=seen or {},
  )


def test_the_variance_is_p_times_one_minus_p():
  """Of maths prompts by `correct`, of others by the reward, at most 1/4."""
  maths = _prompts(5)
  correct = [[1] * k + [0] * (4 - k) for k in range(5)]
  found = prompt_sampling.variances(
    _scored(maths, np.full((5, 4), 9.0), correct=correct)
  )
  for k in range(5):
    assert found[f"{k}"] == pytest.approx(k / 4 * (1 - k / 4))
  opened = [structs.Prompt(str(i), "open_ended", "", "") for i in range(3)]
  reward = [[0.1, 0.2, 0.4, 0.9], [0.3] * 4, [-5.0, 5.0, 9.0, 2.0]]
  found = prompt_sampling.variances(
    _scored(opened, reward, correct=np.zeros((3, 4)))
  )
  by_hand = sum((x - 0.4) ** 2 for x in reward[0]) / 4
  assert found["0"] == pytest.approx(by_hand)
  assert found["1"] == pytest.approx(0, abs=1e-12) and found["2"] == 0.25


def _chi_square(counts, probability) -> float:
  expected = counts.sum() * np.asarray(probability)
  return float(((counts - expected) ** 2 / expected).sum())


def test_draws_follow_the_formula():
  """Chi-square over 20,000 draws; 27.9 is the 0.001 bound for 9 degrees."""
  prompts = _prompts(10)
  seen = {str(i): p * (1 - p) for i, p in enumerate(np.linspace(0, 1, 8))}
  want = np.asarray([seen.get(str(i), 0.25) + 0.05 for i in range(10)])
  counts = np.zeros(10)
  for index in range(20_000):
    counts[prompt_sampling.draw(want, 1, (7, index, 0))] += 1
  assert _chi_square(counts, want / want.sum()) < 27.9
  assert _chi_square(counts, np.full(10, 0.1)) > 300
  # The sampler draws with these weights.
  sampler = _sampler("pass_rate", prompts, seen=seen)
  for index in range(5):
    np.testing.assert_array_equal(
      sampler.batch(index), prompt_sampling.draw(want, 4, (7, index, 0))
    )


def test_later_draws_are_proportional_among_those_left():
  weight = np.asarray([4.0, 2.0, 1.0, 1.0])
  pairs = np.zeros((4, 4))
  for index in range(20_000):
    first, second = prompt_sampling.draw(weight, 2, (index,))
    pairs[first, second] += 1
  want = np.asarray(
    [
      [a / 8 * b / (8 - a) * (i != j) for j, b in enumerate(weight)]
      for i, a in enumerate(weight)
    ]
  )
  off = ~np.eye(4, dtype=bool)
  assert not pairs[~off].any()
  assert _chi_square(pairs[off], want[off]) < 31.3  # 0.001, 11 degrees


def _steps(sampler, prompts, begin, end):
  """The batches of some steps, whose rewards depend on prompt and step."""
  drawn = []
  for step in range(begin, end):
    batch = sampler.batch(step)
    drawn.append(batch.tolist())
    correct = [
      [(int(i) * 7 + step + n) % 3 == 0 for n in range(4)] for i in batch
    ]
    sampler.observe(
      _scored([prompts[i] for i in batch], correct, correct=correct)
    )
  return drawn


def test_resumed_from_json_draws_what_a_straight_run_draws():
  prompts = _prompts(20)
  straight = _sampler("pass_rate", prompts)
  want = _steps(straight, prompts, 0, 30)
  killed = _sampler("pass_rate", prompts)
  first = _steps(killed, prompts, 0, 11)
  seen = json.loads(json.dumps(killed.variances))
  resumed = _sampler("pass_rate", prompts, seen=seen)
  assert first + _steps(resumed, prompts, 11, 30) == want
  assert resumed.variances == straight.variances
  # The rewards matter: without them other prompts come.
  forgot = _sampler("pass_rate", prompts)
  assert _steps(forgot, prompts, 11, 30) != want[11:]


def test_sets_keep_their_shares():
  prompts = [*_prompts(9, "a"), *_prompts(50, "b")]
  sampler = _sampler("pass_rate", prompts, {"a": 3.0, "b": 1.0})
  for batch in _steps(sampler, prompts, 0, 30):
    assert sorted(prompts[i].set for i in batch) == ["a", "a", "a", "b"]
    assert len(set(batch)) == 4


def test_uniform_is_the_shuffled_order_and_keeps_no_state():
  prompts = _prompts(10)
  sampler = _sampler("uniform", prompts)
  order = batching.batch_order(10, 4, epochs=12, seed=7)
  assert _steps(sampler, prompts, 0, 30) == [b.tolist() for b in order]
  assert sampler.variances == {}
  both = [*_prompts(9, "a"), *_prompts(50, "b")]
  weights = {"a": 3.0, "b": 1.0}
  mixed = mixture.mixed_order([p.set for p in both], weights, 4, 30, seed=7)
  sampler = _sampler("uniform", both, weights)
  assert _steps(sampler, both, 0, 30) == [b.tolist() for b in mixed]
