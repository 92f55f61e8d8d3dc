"""Generates small sums: tasks with a checkable answer, to mix with storyworld.

A prompt asks for a sum or a difference of two small numbers. The thought has
storyworld's errors: a plain step may state a wrong result, and a reflective
step may correct it, break it, or do nothing. The answer is the last result of
the thought.
"""

import random

from opera_jax import structs
from opera_jax.data import storyworld

LARGEST = 4
PROMPTS = (
  "{name} has {a} apples and {verb} {b}. How many apples now?",
  "How many apples has {name} with {a}, who {verb} {b}?",
)
PLAIN = ("It is {a} {sign} {b}, so {c}.", "{a} {sign} {b} is {c}.")
RECALL = ("{a} {sign} {b} should be {c}.", "it must be {c}.")
ANSWERS = ("The answer is {c}.", "So the answer is {c}.")


def prompts(count: int, seed: int) -> list[structs.Prompt]:
  """Generates `count` maths tasks; the reference is only the number."""
  out = []
  for i in range(count):
    rng = random.Random(f"sum/{seed}/{i}")
    values = _draw(rng)
    out.append(
      structs.Prompt(
        id=f"sum-{seed}-{i}",
        task="math",
        prompt=rng.choice(PROMPTS).format(**values),
        reference=str(values["c"]),
        columns={"values": values},
      )
    )
  return out


def corpus(
  count: int, seed: int, noise: storyworld.Noise | None = None
) -> list[structs.Document]:
  """Generates pretraining documents: a sum with a noisy thought and its
  answer."""
  noise = noise or storyworld.Noise()
  return [
    document(task, noise, random.Random(f"sumdoc/{seed}/{i}"))
    for i, task in enumerate(prompts(count, seed))
  ]


def document(
  prompt: structs.Prompt, noise: storyworld.Noise, rng: random.Random
) -> structs.Document:
  """Generates one noisy document; some thoughts are truncated, as in
  storyworld."""
  values = prompt.columns["values"]
  true = values["c"]
  wrong = rng.random() < noise.wrong
  belief = _other(rng, true) if wrong else true
  steps = [rng.choice(PLAIN).format(**values | {"c": belief})]
  count = rng.choices(range(len(noise.reflections)), noise.reflections)[0]
  for _ in range(count):
    opener, draw = rng.choice(storyworld.OPENERS), rng.random()
    if draw < noise.recover:
      belief = true
    elif draw < noise.recover + noise.harm:
      belief = _other(rng, true)
    else:
      steps.append(f"{opener} {rng.choice(storyworld.IDLE)}")
      continue
    text = rng.choice(RECALL).format(**values | {"c": belief})
    steps.append(f"{opener} {text}")
  return structs.Document(
    prompt=prompt.prompt,
    thought="\n\n".join(steps),
    answer=rng.choice(ANSWERS).format(c=belief),
    closed=rng.random() >= noise.cut,
  )


def mixed(
  stories: list, sums: list, seed: int
) -> list[structs.Prompt] | list[structs.Document]:
  """Shuffles stories and sums by the seed; without sums, stories keep their
  order."""
  if not sums:
    return stories
  out = [*stories, *sums]
  random.Random(f"mixed/{seed}").shuffle(out)
  return out


def _draw(rng: random.Random) -> dict:
  a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
  more = rng.random() < 0.5
  if not more:
    a, b = max(a, b), min(a, b)
  return {
    "name": rng.choice(storyworld.NAMES),
    "a": a,
    "b": b,
    "c": a + b if more else a - b,
    "sign": "plus" if more else "minus",
    "verb": "gets" if more else "loses",
  }


def _other(rng: random.Random, value: int) -> int:
  """A wrong value near the right one."""
  return value + rng.choice([d for d in (-2, -1, 1, 2) if value + d >= 0])
