"""The embedded task is made from a seed, and its checker cannot be flattered."""

import random

from opera_jax.data import storyworld
from opera_jax.text import thought


def test_same_seed_same_world():
  assert storyworld.prompts(5, 1) == storyworld.prompts(5, 1)
  assert storyworld.prompts(5, 1) != storyworld.prompts(5, 2)
  # A longer list begins with the shorter one, so data sizes can be changed.
  assert storyworld.prompts(9, 1)[:5] == storyworld.prompts(5, 1)
  assert storyworld.corpus(5, 1) == storyworld.corpus(5, 1)


def test_references_keep_every_fact_and_prompts_state_them():
  for task in storyworld.prompts(200, 0):
    facts = task.columns["facts"]
    assert all(storyworld.facts_kept(task.reference, facts).values())
    for value in facts.values():
      assert value in task.prompt


def test_checker_counts_facts_and_refuses_lists():
  (task,) = storyworld.prompts(1, 0)
  facts = task.columns["facts"]
  wrong = dict(facts, where="the old mill")
  if facts["where"] == "the old mill":
    wrong["where"] = "the salt mine"
  told = storyworld.tell(wrong, random.Random(0))
  kept = storyworld.facts_kept(told, facts)
  assert kept == {slot: slot != "where" for slot in storyworld.SLOTS}
  everything = " ".join(v for pool in storyworld.FACTS.values() for v in pool)
  kept = storyworld.facts_kept(everything, facts)
  assert not any(kept.values())
  assert not any(storyworld.facts_kept("", facts).values())


def test_story_tells_what_the_thought_believed_last():
  noise = storyworld.Noise(remember=0.0, unclosed=0.0)
  good = bad = 0
  for i, (task, text) in enumerate(storyworld.corpus(300, 4, noise)):
    head, _, story = text.partition("</think>")
    for value in task.columns["facts"].values():
      steps = [s for s in head.split("\n\n") if value in s]
      good += bool(steps) and value in story
    bad += "<think>\n" not in head or not story.strip()
    assert i < 300
  assert good > 300
  assert bad == 0


def test_reflections_sometimes_recover_a_fact_and_sometimes_do_not():
  recovered = other = 0
  for task, text in storyworld.corpus(300, 5):
    for step in text.partition("</think>")[0].split("\n\n"):
      if thought.is_reflective(step.encode()):
        facts = task.columns["facts"].values()
        hit = any(value in step for value in facts)
        recovered, other = recovered + hit, other + (not hit)
  assert recovered > 100
  assert other > 100
