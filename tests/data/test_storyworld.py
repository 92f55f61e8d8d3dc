"""The embedded task is made from a seed; its checker cannot be flattered."""

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
  noise = storyworld.Noise(remember=0.0, cut=0.0, retell=0.5)
  tasks = storyworld.prompts(300, 4)
  right = wrong = 0
  for task, made in zip(tasks, storyworld.corpus(300, 4, noise)):
    assert made.prompt == task.prompt
    for slot, value in task.columns["facts"].items():
      told = storyworld.facts_kept(
        made.answer,
        {slot: value}
        | {s: v for s, v in task.columns["facts"].items() if s != slot},
      )[slot]
      last = [s for s in made.thought.split("\n\n") if value in s]
      right += told and bool(last)
      wrong += told and not last
    if made.after:
      facts = task.columns["facts"]
      assert storyworld.facts_kept(made.after, facts) == (
        storyworld.facts_kept(made.answer, facts)
      )
  # Told right without a thought of it only by luck, 1 draw in 12 or 96.
  assert right > 400
  assert wrong < 150


def test_cut_thoughts_are_told_from_what_was_believed_so_far():
  noise = storyworld.Noise(cut=1.0)
  for made in storyworld.corpus(50, 6, noise):
    assert not made.closed
  assert all(
    d.closed for d in storyworld.corpus(50, 6, storyworld.Noise(cut=0.0))
  )


def test_reflections_sometimes_recover_a_fact_and_sometimes_do_not():
  recovered = other = 0
  for task, made in zip(storyworld.prompts(300, 5), storyworld.corpus(300, 5)):
    for step in made.thought.split("\n\n"):
      if thought.is_reflective(step.encode()):
        hit = any(value in step for value in task.columns["facts"].values())
        recovered, other = recovered + hit, other + (not hit)
  assert recovered > 100
  assert other > 100
