"""Rewards add up by weight; every part is kept, and names are checked."""

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.rewards import compose, length, sar

TERMS = {
  "sar": {"total": np.asarray([[0.5, -0.5]]), "gain": np.asarray([[1.0, 2.0]])},
  "verifiable": {"total": np.asarray([[1.0, 0.0]])},
}
WEIGHT = {"sar": 0.2, "verifiable": 1.0}


def test_weights_are_read_from_one_line():
  assert compose.weights("opera + verifiable") == {
    "opera": 1.0,
    "verifiable": 1.0,
  }
  assert compose.weights("verifiable + 0.2*sar") == {
    "verifiable": 1.0,
    "sar": 0.2,
  }
  assert compose.weights("-1.5e-1*a.b:c + 0*opera") == {
    "a.b:c": -0.15,
    "opera": 0.0,
  }


@pytest.mark.parametrize("text", ["", "sar +", "2 sar", "sar + sar", "a,b"])
def test_what_is_no_sum_is_refused(text):
  with pytest.raises(ValueError, match="no term of a weighted sum"):
    compose.weights(text)


def test_a_prompt_takes_the_sum_of_its_set_or_task():
  """Against one weighted sum per prompt."""
  sums = compose.Sums.parse(
    "verifiable + 0.5*sar",
    {"math": "2*verifiable", "gsm": "a.b:c + 0*sar", "open_ended": "-1*sar"},
  )
  assert sums.names() == ["verifiable", "sar", "a.b:c"]
  prompts = [
    structs.Prompt("", "math", "", ""),
    structs.Prompt("", "math", "", "", set="gsm"),
    structs.Prompt("", "open_ended", "", "", set="other"),
  ]
  rng = np.random.default_rng(0)
  rewards = {
    name: {"total": rng.normal(size=(3, 4)).astype(np.float32)}
    for name in sums.names()
  }
  weight = sums.weights(prompts)
  total, terms = compose.weighted_sum(rewards, weight)
  own = [{"verifiable": 2.0}, {"a.b:c": 1.0}, {"sar": -1.0}]
  for b, weights in enumerate(own):
    want = sum(w * rewards[n]["total"][b] for n, w in weights.items())
    np.testing.assert_allclose(total[b], want, rtol=1e-6)
  assert total.dtype == np.float32 and set(terms) == set(rewards)
  # Without sums of their own all prompts have the default's numbers.
  plain = compose.Sums.parse("verifiable + 0.5*sar", {})
  assert plain.weights(prompts) == {"verifiable": 1.0, "sar": 0.5}
  only = compose.Sums.parse("sar", {"gsm": "verifiable"})
  assert only.of(prompts[0]) == {"sar": 1.0}


def test_a_broken_sum_of_a_task_is_named():
  with pytest.raises(ValueError, match="by_task.math: 'sar,' in 'sar,'"):
    compose.Sums.parse("sar", {"math": "sar,"})


def test_totals_add_up_and_parts_are_kept():
  total, terms = compose.weighted_sum(TERMS, WEIGHT)
  assert total.dtype == np.float32
  np.testing.assert_allclose(total, [[1.1, -0.1]], rtol=1e-6)
  assert set(terms) == {"sar", "gain", "verifiable"}
  np.testing.assert_allclose(terms["gain"], [[1.0, 2.0]])


def test_a_reward_of_weight_zero_is_measured_and_not_paid():
  total, terms = compose.weighted_sum(TERMS, WEIGHT | {"sar": 0.0})
  np.testing.assert_array_equal(total, [[1, 0]])
  assert "sar" in terms


def test_rewards_are_found_by_file_name():
  assert compose.build("sar", {"form": "log"}, 1.0) == sar.Reward("log")
  assert compose.build("length", {}, 1.0) == length.Reward()
  assert compose.build("os.path:join", {}, 1.0).path == "os.path:join"
  for name in ("kindness", "compose", "os:no_such_function", "nowhere:f"):
    with pytest.raises(ValueError, match=name):
      compose.build(name, {}, 1.0)
  with pytest.raises(ValueError, match="takes the settings.*'form'"):
    compose.build("sar", {"shape": "round"}, 1.0)


def test_nan_names_its_sample():
  broken = {"sar": {"total": np.asarray([[0.0, np.nan]])}}
  with pytest.raises(ValueError, match="'sar' of prompt 0, sample 1 is nan"):
    compose.weighted_sum(broken, WEIGHT)


def test_terms_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"has shape \(1, 3\)"):
    compose.weighted_sum(
      TERMS | {"verifiable": {"total": np.zeros((1, 3))}}, WEIGHT
    )
  with pytest.raises(ValueError, match="Two rewards have a term 'gain'"):
    compose.weighted_sum(TERMS | {"verifiable": TERMS["sar"]}, WEIGHT)
