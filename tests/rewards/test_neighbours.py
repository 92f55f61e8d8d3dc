"""SAR, entropy, length and format against their formulas in plain numpy."""

import numpy as np
import pytest

from opera_jax.rewards import entropy, format, length, sar

THINK = "<think>\nWait.\n</think>\n\n"


def test_sar_is_one_minus_exp_of_minus_mean_gain(rollouts, result):
  case = rollouts([["abc", "defgh"], ["i", "jk"]])
  request = sar.Reward().logprob_request(case)
  assert len(request.prefixes) == 4
  assert bytes(request.prefixes[0].astype(np.uint8)) == b"<>abc"
  logprobs = result(case, request)
  for form in sar.FORMS:
    got = sar.Reward(form).rewards(case, logprobs)
    for r in range(4):
      given = logprobs.completion_logprob[r]
      bare = logprobs.prefix_logprob[r][2:]
      ppl_given, ppl = np.exp(-given.mean()), np.exp(-bare.mean())
      want = {
        "ratio": np.clip((ppl - ppl_given) / ppl, -1, 1),
        "difference": np.clip(ppl - ppl_given, -1, 1),
        "log": np.clip(np.mean(given - bare), -1, 1),
      }[form]
      np.testing.assert_allclose(got["total"].flat[r], want, rtol=1e-4)
    v = logprobs.completion_logprob[1] - logprobs.prefix_logprob[1][2:]
    np.testing.assert_allclose(got["gain"][0, 1], v.mean(), rtol=1e-4)
  ratio = sar.Reward().rewards(case, logprobs)
  np.testing.assert_allclose(
    ratio["total"], np.clip(1 - np.exp(-ratio["gain"]), -1, 1), rtol=1e-4
  )
  assert (np.abs(ratio["total"]) < 1).any()


def test_sar_of_an_empty_answer_is_zero():
  assert sar.self_aligned([np.zeros(0)], [np.zeros(0)])[0] == 0
  with pytest.raises(ValueError, match="odds"):
    sar.Reward("odds")


def test_entropy_is_the_mean_log_probability(rollouts, result):
  case = rollouts([["abc", ""]])
  logprobs = result(case)
  got = entropy.Reward().rewards(case, logprobs)["total"]
  np.testing.assert_allclose(
    got, [[logprobs.completion_logprob[0].mean(), 0]], 1e-6
  )


def test_o1_pruner():
  got = length.o1_pruner(np.asarray([[10, 20, 60], [5, 5, 5]]))
  want = [-np.clip((n - 30) / n, -1, 1) for n in (10, 20, 60)]
  np.testing.assert_allclose(got, [want, [0, 0, 0]], rtol=1e-6)
  assert np.isfinite(length.o1_pruner(np.asarray([[0, 3]]))).all()


def test_efficient_reasoner():
  size = np.asarray([[10, 20, 40], [10, 20, 40], [7, 7, 9]])
  right = np.asarray([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
  got = length.efficient(size, right)
  want = [
    -2 * (1 / (1 + np.exp(-(n - 15) / (5 + 1e-5))) - 0.5) for n in (10, 20)
  ]
  np.testing.assert_allclose(got[0], [*want, 0], rtol=1e-5)
  np.testing.assert_array_equal(got[1], 0)
  mean, deviation = np.mean([7, 7, 9]), np.std([7, 7, 9])
  want = -2 * (1 / (1 + np.exp(-(9 - mean) / (deviation + 1e-5))) - 0.5)
  np.testing.assert_allclose(got[2, 2], want, rtol=1e-5)


def test_overlong_falls_in_the_buffer_alone():
  got = length.overlong(np.asarray([[5, 16, 18, 20, 24]]), 20, 4)
  np.testing.assert_allclose(got, [[0, 0, -0.5, -1, -2]])


def test_length_reward_counts_tokens_and_right_answers(rollouts):
  case = rollouts([["is 4", "it is 4", "5"]])
  got = length.Reward("efficient").rewards(case, None)["total"]
  np.testing.assert_array_equal(got[0] != 0, [True, True, False])
  got = length.Reward("overlong", limit=6, buffer=2).rewards(case, None)
  np.testing.assert_allclose(got["total"], [[0, -1.5, 0]])
  for bad in ({"kind": "short"}, {"buffer": 0}, {"limit": 3, "buffer": 4}):
    with pytest.raises(ValueError, match="kind|buffer"):
      length.Reward(**bad)


@pytest.mark.parametrize(
  "text, fine",
  [
    (THINK + "4", True),
    (THINK, False),
    ("4", False),
    ("<think>\n\n</think>\n\n4", False),
    (THINK + THINK + "4", False),
    ("so " + THINK + "4", False),
    ("<think> 4", False),
  ],
)
def test_format(text, fine, rollouts):
  assert format.well_formed(text) is fine
  for finished in (True, False):
    case = rollouts([[text]], finished=finished)
    got = format.Reward().rewards(case, None)["total"]
    assert got[0, 0] == (fine and finished)
