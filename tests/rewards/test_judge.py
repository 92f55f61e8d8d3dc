"""The judge's arithmetic, and what becomes of questions without an answer."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.configs.methods import judge as method
from opera_jax.rewards import compose, endpoint, judge, replies

from rewards import hostile_server  # isort: skip

GRADES = dict.fromkeys(judge.DIMENSIONS, 4)


@pytest.fixture
def server():
  with hostile_server.running(lambda question: json.dumps(GRADES)) as made:
    yield made


def _reward(server, **settings):
  given = {"timeout": 5.0, "backoff": 0.01, "parallel": 1} | settings
  return judge.Reward(endpoint=server.address, model="fake", **given)


def _never(text, answer=None):
  """Says nothing readable of answers with `text` in them."""
  answer = answer or json.dumps(GRADES)

  def say(question):
    return "I would rather not." if text in question else answer

  return say


def test_rubric_is_the_mean_of_four_grades(server, rollouts):
  server.say = lambda question: json.dumps(
    dict.fromkeys(judge.DIMENSIONS, 5 if "good" in question else 1)
    | {"contextual_utility": 3}
  )
  case = rollouts([["<think>x</think>good", "<think>good</think>bad"]])
  got = _reward(server, prompt_price=2.0, completion_price=5.0)
  terms = got.rewards(case, None)
  np.testing.assert_allclose(terms["total"], [[3.5 / 4, 0.5 / 4]])
  np.testing.assert_array_equal(terms["structural_integrity"], [[5, 1]])
  assert "x</think>" not in server.seen[0]  # the thought is not shown
  np.testing.assert_allclose(terms["judge_cost"].sum(), 2 * 250e-6, rtol=1e-5)
  assert terms["judge_failed"].sum() == terms["judge_unreadable"].sum() == 0


def test_a_failed_sample_takes_the_mean_of_its_group(server, rollouts):
  def say(question):
    if "mute" in question:
      return "no"
    grade = 5 if "good" in question else 1
    return json.dumps(dict.fromkeys(judge.DIMENSIONS, grade))

  server.say = say
  case = rollouts([["good", "good", "bad", "mute"], ["bad"] * 4])
  terms = _reward(server, retries=1).rewards(case, None)
  np.testing.assert_allclose(terms["total"][0], [1, 1, 0, 2 / 3], rtol=1e-6)
  np.testing.assert_array_equal(terms["total"][1], 0)
  np.testing.assert_array_equal(
    terms["judge_failed"], [[0, 0, 0, 1], [0, 0, 0, 0]]
  )
  # Two unreadable replies among eight samples.
  np.testing.assert_allclose(terms["judge_unreadable"], 2 / 8)
  # Its advantage over the group is 0; that of the judged is what it was.
  advantage_N = terms["total"][0] - terms["total"][0].mean()
  np.testing.assert_allclose(advantage_N, [1 / 3, 1 / 3, -2 / 3, 0], atol=1e-6)


def test_a_failed_group_takes_the_mean_of_all(server, rollouts):
  server.say = _never("mute")
  case = rollouts([["mute", "mute"], ["a", "b"], ["c", "d"]])
  terms = _reward(server, retries=0, max_failed=0.5).rewards(case, None)
  np.testing.assert_allclose(terms["total"], 0.75)
  total, _ = compose.weighted_sum({"judge": terms}, {"judge": 1.0})
  assert np.isfinite(total).all()


def test_fill_by_hand():
  nan = np.nan
  got = judge.fill(np.asarray([1, nan, 3, nan, nan, nan, 4, 4, 4]), 3)
  np.testing.assert_allclose(got, [1, 2, 3, 3.2, 3.2, 3.2, 4, 4, 4])
  np.testing.assert_array_equal(judge.fill(np.full(4, nan), 2), 0)


def test_too_many_failures_end_the_run_with_three_replies(server, rollouts):
  texts = [f"mute {k}" for k in range(8)] + ["fine"] * 12
  server.say = lambda question: (
    f"Never, {question[-6:]}!" if "mute" in question else json.dumps(GRADES)
  )
  with pytest.raises(endpoint.EndpointError) as failure:
    _reward(server, retries=0).rewards(rollouts([texts]), None)
  text = str(failure.value)
  assert "max_failed" in text and "a share of 0.1" in text
  assert text.count("Never, mute") == 3
  assert "it holds no JSON object" in text
  # It ends where the share is passed, not after all of them.
  assert len(server.seen) < 20


@pytest.mark.parametrize(
  "samples, mute, share, ends",
  [
    (4, 1, 0.1, False),  # one may always fail
    (4, 2, 0.1, True),
    (4, 1, 0.0, True),
    (20, 2, 0.1, False),
    (20, 3, 0.1, True),
    (4, 4, 1.0, True),  # all never
    (4, 3, 1.0, False),
  ],
)
def test_what_share_may_fail(server, rollouts, samples, mute, share, ends):
  server.say = _never("mute")
  case = rollouts([["mute"] * mute + ["fine"] * (samples - mute)])
  reward = _reward(server, retries=0, max_failed=share)
  if ends:
    with pytest.raises(endpoint.EndpointError):
      reward.rewards(case, None)
  else:
    assert reward.rewards(case, None)["judge_failed"].sum() == mute


def test_pairwise_asks_both_orders_and_reports_bias(server, rollouts):
  # The judge prefers the longer answer, but never lets "same" lose the first
  # place: biased there, consistent elsewhere.
  def say(question):
    first = question.split("# Answer A\n")[1].split("\n\n# Answer B")[0]
    second = question.split("# Answer B\n")[1]
    choice = "A" if len(first) >= len(second) else "B"
    return json.dumps({"better": choice})

  server.say = say
  case = rollouts([["a", "bbb", "cc", "dd"]])
  got = _reward(server, mode="pairwise", opponents=3).rewards(case, None)
  # Each pair is met twice (n, m) and (m, n), each in both orders.
  np.testing.assert_allclose(got["total"], [[0, 1, 0.5, 0.5]])
  assert len(server.seen) == 4 * 3 * 2
  # 2 of 12 comparisons are of equal lengths: always the first place.
  np.testing.assert_allclose(got["self_consistency"], 10 / 12)
  np.testing.assert_allclose(got["position_bias"], 2 / 24)


def test_a_comparison_counts_if_both_orders_were_answered(server, rollouts):
  def say(question):
    if "# Answer A\nmute" in question:
      return "no"
    first = question.split("# Answer A\n")[1].split("\n\n# Answer B")[0]
    second = question.split("# Answer B\n")[1]
    return json.dumps({"better": "A" if first > second else "B"})

  server.say = say
  case = rollouts([["b", "a", "c", "mute"]])
  reward = _reward(
    server, mode="pairwise", opponents=1, retries=0, max_failed=0.5
  )
  got = reward.rewards(case, None)
  # b > a and a < c counted; c against mute and mute against b did not.
  np.testing.assert_allclose(got["total"], [[1, 0, 1, 2 / 3]], rtol=1e-6)
  np.testing.assert_allclose(got["judge_failed"], [[0.5, 0, 0.5, 1]])
  assert got["position_bias"].max() == 0


def test_a_fair_judge_has_no_bias():
  got = judge.tally([(0, 1), (1, 2)], [1.0, 0.5], [0.0, 0.5], 4)
  np.testing.assert_allclose(got.win_R, [1, 0.25, 0.5, 0.5])
  assert got.position_bias == 0 and got.self_consistency == 1
  # One that always takes the first place settles nothing.
  got = judge.tally([(0, 1)], [1.0], [1.0], 2)
  np.testing.assert_allclose(got.win_R, [0.5, 0.5])
  assert got.position_bias == 0.5 and got.self_consistency == 0


PROMPTS = [structs.Prompt("a", "open_ended", "Tell a story.", "Once.")]


@pytest.mark.parametrize("mode", judge.MODES)
def test_the_probe_asks_once(server, mode):
  server.say = lambda question: json.dumps(GRADES | {"better": "A"})
  _reward(server, mode=mode, opponents=1).probe(PROMPTS)
  assert len(server.seen) == 1 and "Tell a story." in server.seen[0]


def test_the_probe_says_what_is_wrong(server, tmp_path):
  server.say = lambda question: "Hello!"
  with pytest.raises(endpoint.EndpointError, match="no JSON.*Hello"):
    _reward(server, retries=0).probe(PROMPTS)
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="cache.*cannot be written"):
    _reward(server, cache=str(tmp_path / "file" / "cache")).probe(PROMPTS)


def test_without_its_package_the_judge_says_how_to_install_it(
  server, monkeypatch
):
  monkeypatch.setitem(sys.modules, "openai", None)
  monkeypatch.delitem(sys.modules, "opera_jax.rewards.chat", raising=False)
  with pytest.raises(
    ImportError, match=r"opera-jax\[judge\].*requirements-judge.txt"
  ):
    _reward(server).probe(PROMPTS)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"mode": "vibes"}, "Unknown mode 'vibes'"),
    ({"length_field": "n"}, "Unknown length_field 'n'"),
    ({"opponents": 0}, "opponents is 0"),
    ({"parallel": 0}, "parallel is 0"),
    ({"timeout": 0}, "timeout is 0"),
    ({"timeout": float("nan")}, "timeout is nan"),
    ({"timeout": "60"}, "timeout is '60'"),
    ({"retries": -1}, "retries is -1"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"temperature": 3}, "temperature is 3"),
    ({"max_failed": 1.5}, "max_failed is 1.5"),
    ({"max_failed": True}, "max_failed is True"),
    ({"reply_bytes": 1}, "reply_bytes is 1"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    judge.Reward("http://x", "m", **settings)


def test_more_opponents_than_samples_are_refused(server, rollouts):
  with pytest.raises(ValueError, match="opponents"):
    _reward(server, mode="pairwise", opponents=2).rewards(
      rollouts([["a", "b"]]), None
    )


@pytest.mark.parametrize(
  "grade",
  [True, None, "4", 0, 6, -1, 4.5, [4], {"x": 4}, 10**4000, 1e999, ["4"] * 99],
  ids=lambda grade: str(type(grade).__name__),
)
def test_what_is_no_grade(grade):
  with pytest.raises(replies.Unreadable, match="whole number from 1 to 5"):
    judge.read_grades(GRADES | {"contextual_utility": grade})


@pytest.mark.parametrize("choice", [None, True, "C", ["A"], {"A": 1}, "a", 1])
def test_what_is_no_choice(choice):
  with pytest.raises(replies.Unreadable, match="must say A, B or tie"):
    judge.read_choice({"better": choice})
  with pytest.raises(replies.Unreadable):
    judge.read_choice({})


def test_grades_are_whole_numbers():
  got = judge.read_grades(GRADES | {"contextual_utility": 2.0, "note": "x"})
  assert got["contextual_utility"] == 2
  assert type(got["contextual_utility"]) is int


def test_the_config_states_every_setting():
  config = method.get_config("smoke").reward.options.judge
  fields = dataclasses.fields(judge.Reward)
  assert set(config) == {field.name for field in fields}
  for field in fields:
    if field.default is not dataclasses.MISSING:
      assert config[field.name] == field.default, field.name
