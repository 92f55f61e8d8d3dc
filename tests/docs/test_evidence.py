"""The page of the recorded runs is what its values say."""

import json

import pytest
from conftest import ROOT

from scripts.docs import evidence

FOLDER = ROOT / "docs" / "evidence"
VALUES = json.loads((FOLDER / "values.json").read_text())


@pytest.mark.parametrize("prompts", ["storyworld", "real_tasks"])
def test_the_page_holds_the_tables_of_its_values(prompts):
  values = evidence.by_seed(VALUES[prompts])
  assert evidence.results(values).strip() in (FOLDER / "README.md").read_text()


def test_what_fell_and_what_did_not_rise_is_said():
  def model(facts, finished):
    return {0: {"facts": facts, "finished": finished}}

  values = {
    "base": model([3.0, 4.0, 3.0], [0.2, 0.4, 0.3]),
    "sft": model([1.0, 2.0, 1.0], [0.9, 1.0, 0.8]),
    "rl": model([1.0, 2.0, 1.0], [1.0, 1.1, 0.9]),
  }
  said = evidence.not_better(values, {"facts": "facts", "finished": "ends"})
  assert [line.partition(":")[0] for line in said] == [
    "- facts fell from base to sft",
    "- facts did not rise from sft to rl",
  ]
