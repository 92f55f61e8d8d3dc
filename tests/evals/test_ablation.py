"""Tables of a grid: means, paired differences, answers, probes."""

import numpy as np
import pytest

from opera_jax.evals import ablation


@pytest.fixture
def values():
  rng = np.random.default_rng(0)
  base = {s: rng.normal(0, 3, 30) for s in (0, 1, 2)}
  return {
    "sft": {0: {"facts": list(rng.normal(0, 3, 30))}},
    "opera": {s: {"facts": list(base[s])} for s in base},
    "better": {s: {"facts": list(base[s] + 0.5)} for s in base},
  }


def test_differences_are_paired_by_seed_and_prompt(values):
  got = ablation.difference(values, "better", "opera", "facts", resamples=200)
  assert got.mean == pytest.approx(0.5) and got.low == pytest.approx(0.5)
  against = ablation.difference(values, "opera", "sft", "facts", resamples=200)
  want = np.mean([v["facts"] for v in values["opera"].values()]) - np.mean(
    values["sft"][0]["facts"]
  )
  assert against.mean == pytest.approx(want)


def test_tables_name_every_row(values):
  text = ablation.results(
    values, {"facts": "facts", "correct": "right"}, baseline="opera",
    resamples=100,
  )  # fmt: skip
  lines = text.splitlines()
  assert len(lines) == 5 and "right" not in text
  assert "Δ" not in lines[3] and "Δ +0.5" in lines[4] and "±" in lines[4]
  cost = {"opera": {0: dict.fromkeys(ablation.COSTS, 1200.0)}}
  assert "1,200" in ablation.costs(cost)


def test_answers_say_when_nothing_is_told_apart(values):
  asked = [
    ("Is it better?", "better", "opera", "facts"),
    ("And this?", "opera", "sft", "facts"),
    ("Left out?", "ghost", "sft", "facts"),
  ]
  lines = ablation.answers(values, asked, resamples=200).splitlines()
  assert len(lines) == 2
  assert "not significant" not in lines[0] and "not significant" in lines[1]


def test_a_probe_paid_like_the_honest_sample_stands_out():
  text = ablation.probes({"r": {"honest": [1.0, 0.0], "cut": [0.5, 0.5],
                                "echo": [0.1, 0.2]}})  # fmt: skip
  assert "**0.500**" in text and "| 0.150 |" in text


def test_efficiency_is_the_mean_of_each_seeds_aes():
  def row(right, tokens):
    return {"correct": [right, 1.0], "math_tokens": [tokens, 10.0]}

  values = {"sft": {0: row(0.0, 30.0)}, "rl": {0: row(1.0, 10.0),
                                               1: row(0.0, 30.0)}}  # fmt: skip
  text = ablation.efficiency(values, "sft")
  # Seed 0: half as long (+.5), twice as right (+5); seed 1: the reference.
  assert "| rl | +2.75 |" in text and "| sft | +0.00 |" in text
  nothing = {"sft": {0: {"correct": [0.0, 0.0], "math_tokens": [3.0, 3.0]}}}
  assert ablation.efficiency(nothing, "sft") == ""
