"""Sums are right, thoughts err, and answers tell the last belief."""

import re

from opera_jax.data import storyworld, sums
from opera_jax.rewards import verifiable
from opera_jax.run import tasks as tasks_lib


def test_references_are_right_and_seeded():
  made = sums.prompts(200, 0)
  assert made == sums.prompts(200, 0) and made != sums.prompts(200, 1)
  for task in made:
    a, b = map(int, re.findall(r"\d+", task.prompt))
    total = a + b if "gets" in task.prompt else a - b
    assert task.reference == str(total) and total >= 0
    assert task.task == "math"


def test_answers_tell_the_last_belief_and_some_are_wrong():
  tasks, right = sums.prompts(300, 0), 0
  for task, made in zip(tasks, sums.corpus(300, 0)):
    assert made.prompt == task.prompt
    steps = [s for s in made.thought.split("\n\n") if re.search(r"\d", s)]
    last = re.findall(r"\d+", steps[-1])[-1]
    assert last == re.findall(r"\d+", made.answer)[-1]
    right += verifiable.correct(made.answer, task.reference)
  assert 90 < right < 270


def _load(share, count=40):
  return tasks_lib.load(
    kind="storyworld", seed=0, synthesis=count, rl=count, held_out=count,
    documents=count, math_share=share, path="", fields={}, task_map={},
    default_task="", prompt_words=0, excerpt_words=0, math_path="",
    math_fields={}, math_answer="", math_limit=0, responses_path="",
  )  # fmt: skip


def test_a_share_of_the_tasks_is_sums():
  made = _load(0.25)
  for part in (made.synthesis, made.rl, made.held_out):
    assert sum(p.task == "math" for p in part) == 10 and len(part) == 40
  assert sum("apples" in d.prompt for d in made.documents) == 10
  assert _load(0.0).rl == storyworld.prompts(40, 2)
