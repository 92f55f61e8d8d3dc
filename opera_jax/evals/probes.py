"""Builds completions that try to exploit a reward.

Each probe degrades one honest sample in one way. If a reward gives the probe at
least as much as the honest sample, it can be exploited that way.
"""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from opera_jax import structs
from opera_jax.text import thought as thought_lib
from opera_jax.text import tokenizer as tokenizer_lib

NAMES = (
  "honest",
  "keywords",
  "prompt_copied",
  "reference_echoed",
  "thought_cut",
  "thought_repeated",
  "steps_shuffled",
)


@dataclasses.dataclass(frozen=True)
class Text:
  """A completion's steps and answer."""

  steps: tuple[str, ...]
  answer: str


def read(text: str, separator: str = thought_lib.SEPARATOR) -> Text:
  """Splits a completion into steps and answer; no steps without a closed
  thought."""
  _, opened, rest = text.partition("<think>")
  thought, closed, answer = rest.partition("</think>")
  if not opened or not closed:
    return Text((), text.strip())
  steps = [s.strip() for s in thought.split(separator)]
  return Text(tuple(s for s in steps if s), answer.strip())


def make(
  honest: Text,
  prompt: structs.Prompt,
  *,
  keywords: Sequence[str] = thought_lib.KEYWORDS,
  seed: int = 0,
) -> dict[str, Text]:
  """Builds every probe by name, the honest completion first.

  Args:
    honest: completion of the policy.
    prompt: its task.
    keywords: of the reflective states.
    seed: of the shuffle.
  """
  shuffled = list(honest.steps)
  random.Random(f"{prompt.id}/{seed}").shuffle(shuffled)
  if shuffled == list(honest.steps):
    shuffled.reverse()
  return {
    "honest": honest,
    "keywords": Text(tuple(f"{word}." for word in keywords), "So."),
    "prompt_copied": Text(honest.steps, prompt.prompt),
    "reference_echoed": Text(
      (*honest.steps, f"{keywords[0]} {prompt.reference}"), prompt.reference
    ),
    "thought_cut": Text((), honest.answer),
    "thought_repeated": Text(honest.steps * 3, honest.answer),
    "steps_shuffled": Text(tuple(shuffled), honest.answer),
  }


def sample(
  text: Text,
  tokenizer: tokenizer_lib.Tokenizer,
  separator: str = thought_lib.SEPARATOR,
) -> structs.Sample:
  """Converts a probe to a sample; only our own tags become special tokens."""
  tokens = tokenizer.completion(separator.join(text.steps), text.answer)
  return structs.Sample(tokens, np.zeros(len(tokens), np.float32), True)
