"""The built-in task: short stories with given facts, generated from a seed.

A prompt states five facts (who, where, which object, what twist, how it ends).
A thought plans the story step by step and makes errors: a plain step may state
a wrong fact, and a reflective step ("Wait, ...") may correct a fact, break one,
or do nothing. The story uses the last version of each fact in the thought, and
is often wrong on facts that the thought never mentioned. So a good thought
improves the story, and the reward can detect it.

`facts_kept` is an independent measure: it reads only the story, and no reward
uses it.
"""

import dataclasses
import random

from opera_jax import structs

NAMES = (
    "Mira", "Tomas", "Anya", "Felix", "Nora", "Jonas", "Lena", "Oscar", "Ruth",
    "Pavel", "Ida", "Hugo",
)  # fmt: skip
ROLES = (
    "baker", "sailor", "tailor", "farmer", "painter", "nurse", "miller",
    "singer",
)  # fmt: skip
FACTS = {
    "where": (
        "the old mill", "the quiet harbor", "the snowy pass",
        "the night market", "the stone bridge", "the empty library",
        "the apple orchard", "the ruined tower", "the river ferry",
        "the village school", "the salt mine", "the glass house",
    ),
    "object": (
        "a brass key", "a red lantern", "a broken watch", "a silver flute",
        "a torn map", "a wooden box", "a blue scarf", "a rusty knife",
        "a clay bowl", "a paper crown", "a black stone", "a small mirror",
    ),
    "twist": (
        "the letter was forged", "the stranger was a brother",
        "the guard was asleep", "the gold was painted lead",
        "the storm was a signal", "the child knew the way",
        "the door was never locked", "the captain had lied",
        "the song was a code", "the dog had found it first",
        "the debt was long paid", "the twin had come instead",
    ),
    "ending": (
        "they share warm bread", "they plant a young tree",
        "they ring the great bell", "they burn the old papers",
        "they sail home at dawn", "they dance in the square",
        "they mend the broken gate", "they bury the past",
        "they open a little shop", "they write it all down",
        "they forgive each other", "they walk on alone",
    ),
}  # fmt: skip
SLOTS = ("who", *FACTS)

PROMPTS = (
  "Write a short story. Who: {who}. Where: {where}. Object: {object}. "
  "Twist: {twist}. Ending: {ending}.",
  "Tell a short story about {who} at {where} with {object}. "
  "Twist: {twist}. Ending: {ending}.",
  "I want a short story. Ending: {ending}. Twist: {twist}. "
  "Object: {object}. Where: {where}. Who: {who}.",
)
STORIES = {
  "open": (
    "{Who} came to {where} one morning, carrying {object}.",
    "One evening {who} reached {where} and held {object}.",
  ),
  "twist": (
    "Nobody knew yet that {twist}.",
    "Then it came out that {twist}.",
  ),
  "end": ("In the end {ending}.", "So, at last, {ending}."),
}
PLAIN = {
  "who": ("The story is about {}.", "I will write about {}."),
  "where": ("It takes place at {}.", "The scene is {}."),
  "object": ("The object is {}.", "There will be {}."),
  "twist": ("The twist is that {}.", "Later we learn that {}."),
  "ending": ("It ends when {}.", "At the end {}."),
}
RECALL = {
  "who": ("the story is about {}.", "it should be about {}."),
  "where": ("it should take place at {}.", "the scene is {}."),
  "object": ("the object should be {}.", "there must be {}."),
  "twist": ("the twist should be that {}.", "we must learn that {}."),
  "ending": ("it should end when {}.", "at the end {}."),
}
OPENERS = ("Wait,", "But", "Hmm,", "However,")
IDLE = (
  "maybe it could rain a little.",
  "a longer opening would be nice.",
  "the tone should stay warm.",
  "the words should be simple.",
  "I wonder how it feels.",
)


@dataclasses.dataclass(frozen=True)
class Noise:
  """Error rates of a generated thought; probabilities."""

  mention: float = 0.5  # a fact gets a plain step
  wrong: float = 0.4  # a plain step states a wrong value
  recover: float = 0.45  # a reflective step restates a broken or missed fact
  harm: float = 0.25  # a reflective step states a wrong value; else it idles
  reflections: tuple[float, ...] = (0.2, 0.3, 0.3, 0.2)  # of 0, 1, 2, 3
  remember: float = 0.4  # an unmentioned fact is right in the story
  cut: float = 0.15  # a thought is truncated without </think>
  retell: float = 0.15  # the story is repeated after the turn


def _draw(rng: random.Random, slot: str) -> str:
  if slot == "who":
    return f"{rng.choice(NAMES)} the {rng.choice(ROLES)}"
  return rng.choice(FACTS[slot])


def _other(rng: random.Random, slot: str, value: str) -> str:
  while True:
    other = _draw(rng, slot)
    if other != value:
      return other


def tell(facts: dict[str, str], rng: random.Random) -> str:
  """Writes a story with `facts`, in one of a few wordings."""
  parts = [rng.choice(STORIES[part]) for part in ("open", "twist", "end")]
  return " ".join(parts).format(Who=facts["who"], **facts)


def prompts(count: int, seed: int) -> list[structs.Prompt]:
  """`count` tasks with references; the facts are in `columns["facts"]`.

  Tasks of different seeds share values, not whole tasks, up to chance: there
  are 96 x 12^4 combinations.
  """
  out = []
  for i in range(count):
    rng = random.Random(f"prompt/{seed}/{i}")
    facts = {slot: _draw(rng, slot) for slot in SLOTS}
    out.append(
      structs.Prompt(
        id=f"story-{seed}-{i}",
        task="open_ended",
        prompt=rng.choice(PROMPTS).format(**facts),
        reference=tell(facts, rng),
        columns={"facts": facts},
      )
    )
  return out


def think(
  facts: dict[str, str], noise: Noise, rng: random.Random
) -> list[tuple[str, dict[str, str]]]:
  """Generates a noisy thought: steps, each with the facts believed after it."""
  belief: dict[str, str] = {}
  steps = []

  def step(text: str) -> None:
    steps.append((text, dict(belief)))

  plain = [slot for slot in SLOTS if rng.random() < noise.mention] or ["who"]
  count = rng.choices(range(len(noise.reflections)), noise.reflections)[0]
  # Reflections are placed anywhere after the first step, so that they do not
  # predict the end of the thought.
  order: list[str | None] = [*plain[1:], *(None for _ in range(count))]
  rng.shuffle(order)
  for slot in [plain[0], *order]:
    if slot is not None:
      wrong = rng.random() < noise.wrong
      belief[slot] = _other(rng, slot, facts[slot]) if wrong else facts[slot]
      step(rng.choice(PLAIN[slot]).format(belief[slot]))
      continue
    opener, draw = rng.choice(OPENERS), rng.random()
    broken = [s for s in SLOTS if belief.get(s) != facts[s]]
    if draw < noise.recover and broken:
      slot = rng.choice(broken)
      belief[slot] = facts[slot]
      text = rng.choice(RECALL[slot]).format(facts[slot])
    elif draw < noise.recover + noise.harm:
      slot = rng.choice(SLOTS)
      belief[slot] = _other(rng, slot, facts[slot])
      text = rng.choice(RECALL[slot]).format(belief[slot])
    else:
      text = rng.choice(IDLE)
    step(f"{opener} {text}")
  return steps


def document(
  prompt: structs.Prompt, noise: Noise, rng: random.Random
) -> structs.Document:
  """Generates one noisy document.

  Some thoughts end without </think>, and some stories are repeated after the
  turn, so that a base model learns to score a story at both places, as the
  reward needs.
  """
  facts = prompt.columns["facts"]
  steps = think(facts, noise, rng)
  cut = rng.random() < noise.cut
  if cut:
    steps = steps[: rng.randint(1, len(steps))]
  belief = steps[-1][1]
  for slot in SLOTS:
    if slot not in belief:
      kept = rng.random() < noise.remember
      belief[slot] = facts[slot] if kept else _draw(rng, slot)
  return structs.Document(
    prompt=prompt.prompt,
    thought="\n\n".join(text for text, _ in steps),
    answer=tell(belief, rng),
    closed=not cut,
    after=tell(belief, rng) if rng.random() < noise.retell else "",
  )


def corpus(
  count: int, seed: int, noise: Noise | None = None
) -> list[structs.Document]:
  """Generates pretraining documents: a task with a noisy thought and its
  story."""
  noise = noise or Noise()
  return [
    document(task, noise, random.Random(f"doc/{seed}/{i}"))
    for i, task in enumerate(prompts(count, seed))
  ]


def facts_kept(story: str, facts: dict[str, str]) -> dict[str, bool]:
  """Which facts a story keeps: it contains the given value and no other value.

  So a story that lists every value of a fact does not keep it.
  """
  text = story.lower()
  kept = {}
  for slot in SLOTS:
    if slot == "who":
      values = [f"{n} the {r}" for n in NAMES for r in ROLES]
    else:
      values = list(FACTS[slot])
    found = {value for value in values if value.lower() in text}
    kept[slot] = found == {facts[slot]}
  return kept
