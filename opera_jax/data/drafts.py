"""Builds pretraining documents with thoughts for prompts that have none.

The thought of an open-ended document consists of a few sentences of one
response to the prompt. Some start with a reflection word, some come from a
response to another prompt. The answer is the head of a response with a higher
score. So a small base model learns the format of thinking, and a step that
stays on the prompt is informative about the answer. Some thoughts end without
</think>, and some documents continue after the turn with another response: at
these places the reward later scores a reference.

The thought of a maths document is its worked solution, sometimes with a check
of a sum; then it states the answer.
"""

import dataclasses
import os
import pathlib
import random
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from opera_jax import structs
from opera_jax.data import rows

# prompt id -> (judged quality, text) of each response
Responses = dict[str, list[tuple[float, str]]]

OPENERS = ("Wait,", "But", "Hmm,", "However,")
CHECKS = (
  "Wait, let me check that: {}.",
  "Hmm, is that right? {}.",
  "But first check the sum: {}.",
)
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]*]*\s+|\n+")
_SENTENCE_END = re.compile(r"(?<!\s\d)(?<!\s\d\d)[.!?][\"')\]*]*$")
_MARKUP = re.compile(r"^\s*(?:#+|[-*>]|\d+[.)])\s+|\*\*|__|`")
_SUM = re.compile(r"<<([^<>]*)>>")
# Words that are lowercased after a reflection word; names are not.
_LOWERED = frozenset((
  "A", "An", "And", "As", "At", "By", "For", "From", "He", "His", "How", "If",
  "In", "It", "Its", "My", "On", "One", "Our", "She", "So", "Some", "That",
  "The", "Their", "There", "These", "They", "This", "Those", "To", "We", "What",
  "When", "While", "With", "You", "Your",
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Noise:
  """Error rates of a generated thought."""

  steps: tuple[int, int] = (2, 4)  # minimum and maximum sentences of a thought
  words: tuple[int, int] = (5, 20)  # minimum and maximum words of a step
  reflective: float = (
    0.5  # probability that a step starts with a reflection word
  )
  astray: float = 0.3  # probability that a step comes from another prompt
  cut: float = 0.15  # probability that </think> is missing
  again: float = 0.15  # probability that another response follows
  checked: float = 0.5  # probability that a maths thought checks a sum


def excerpt(text: str, words: int) -> str:
  """The head of a text: at most `words` words, whole sentences if possible.

  The text is cut after the last sentence that ends in the second half of those
  words, or else after the last word. Inner white space is unchanged.

  Args:
    text: any text.
    words: maximum number of words; 0 keeps everything.
  """
  found = [word.span() for word in re.finditer(r"\S+", text)]
  if not words or len(found) <= words:
    return text.strip()
  for begin, end in reversed(found[(words + 1) // 2 - 1 : words]):
    # The rule also looks at the characters before the word.
    if _SENTENCE_END.search(text[max(0, begin - 3) : end]):
      return text[:end].strip()
  return text[: found[words - 1][1]].strip()


def read_responses(
  path: str | pathlib.Path,
  ids: Collection[str],
  read: rows.Read | None = None,
) -> tuple[Responses, int]:
  """Reads scored responses to some prompts.

  Args:
    path: a file of `id`, `score`, `response` that `rows.read` reads.
    ids: of the prompts; other lines of the file are skipped.
    read: see `prompts.load`.

  Returns:
    The responses by prompt, and the number of skipped empty ones.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a malformed line, a truncated file, or no response to any of the
      prompts.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(
      f"{path}: no such file of responses. Mend config.data.responses_path, "
      'or set it to "" to draft from the references.'
    )
  found: Responses = {}
  wanted, seen, empty = frozenset(ids), 0, 0
  for line, row in rows.read(os.fspath(path), read):
    seen = line
    identity, score, response = _response(f"{path}:{line}:", row)
    if identity not in wanted:
      continue
    if response.strip():
      found.setdefault(identity, []).append((score, response))
    else:
      empty += 1
  if not found:
    raise ValueError(
      f"{path}: none of its {seen} lines answers one of the {len(wanted)} "
      "open-ended training prompts; ids must agree. Set the id column in "
      'config.data.fields, or set config.data.responses_path to "".'
    )
  return found, empty


def open_ended(
  prompts: Sequence[structs.Prompt],
  responses: Responses,
  *,
  count: int,
  seed: int,
  words: int,
  noise: Noise | None = None,
) -> list[structs.Document]:
  """Builds open-ended documents, cycling through the prompts.

  Args:
    prompts: open-ended training prompts. A prompt without responses uses its
      reference.
    responses: of any prompts, see `read_responses`.
    count: documents.
    seed: of all choices.
    words: maximum words of an answer, see `excerpt`.
    noise: error rates of the thoughts.
  """
  noise = noise or Noise()
  rng = random.Random(f"drafts/{seed}")
  pools = [responses.get(p.id) or [(1.0, p.reference)] for p in prompts]
  split: dict[str, list[str]] = {}

  def passage(pool: list[tuple[float, str]], text: str | None = None) -> str:
    text = rng.choice(pool)[1] if text is None else text
    if text not in split:
      split[text] = sentences(text, noise.words)
    return rng.choice(split[text])

  out = []
  for i in range(count):
    said = set()
    prompt, pool = prompts[i % len(prompts)], pools[i % len(prompts)]
    drawn = rng.sample(pool, 2) if len(pool) > 1 else pool * 2
    (_, draft), (_, answer) = sorted(drawn, key=lambda item: item[0])
    steps = []
    for _ in range(rng.randint(*noise.steps)):
      if rng.random() < noise.astray:
        step = passage(rng.choice(pools))
      else:
        step = passage(pool, draft)
      opened = rng.random() < noise.reflective
      if step not in said:
        said.add(step)
        steps.append(_opened(rng.choice(OPENERS), step) if opened else step)
    after = rng.choice(pool)[1] if rng.random() < noise.again else ""
    out.append(
      structs.Document(
        prompt=prompt.prompt,
        thought="\n\n".join(steps),
        answer=excerpt(answer, words),
        closed=rng.random() >= noise.cut,
        after=excerpt(after, words),
      )
    )
  return out


def maths(
  prompts: Sequence[structs.Prompt],
  *,
  count: int,
  seed: int,
  noise: Noise | None = None,
) -> list[structs.Document]:
  """Builds maths documents from worked solutions.

  Args:
    prompts: maths tasks with a worked solution, see `solution`.
    count: documents.
    seed: of all choices.
    noise: its `checked` is the probability of a check.
  """
  noise = noise or Noise()
  rng = random.Random(f"maths/{seed}")
  out = []
  for i in range(count):
    prompt = prompts[i % len(prompts)]
    steps = []
    checked = rng.random() < noise.checked
    for line in filter(str.strip, solution(prompt).split("\n")):
      steps.append(_SUM.sub("", line).strip())
      sums = _SUM.findall(line)
      if checked and sums:
        steps.append(rng.choice(CHECKS).format(sums[-1].replace("=", " = ")))
        checked = False
    answer = prompt.reference.rpartition("####")[2].strip()
    out.append(
      structs.Document(
        prompt=prompt.prompt,
        thought="\n\n".join(steps),
        answer=f"The answer is {answer}.",
      )
    )
  return out


def solution(prompt: structs.Prompt) -> str:
  """The worked solution of a maths task; "" if only the answer is known."""
  text = str(prompt.columns.get("solution", prompt.reference))
  return text.partition("####")[0].strip() if "####" in text else ""


def sentences(text: str, words: tuple[int, int]) -> list[str]:
  """Sentences of a text without markup whose number of words is in a range;
  returns at least one."""
  plain = [_MARKUP.sub("", piece).strip() for piece in _SENTENCE.split(text)]
  fewest, most = words
  fitting = [
    piece
    for piece in plain
    if fewest <= len(piece.split()) <= most and _SENTENCE_END.search(piece)
  ]
  return fitting or [excerpt(" ".join(" ".join(plain).split()), most)]


def _response(place: str, row: Mapping[str, Any]) -> tuple[str, float, str]:
  lacking = [n for n in ("id", "score", "response") if n not in row]
  if lacking:
    raise ValueError(
      f"{place} not a response: the row has no {lacking}. A line needs id, "
      "score and response. Mend or drop the line."
    )
  identity, score, response = row["id"], row["score"], row["response"]
  number = isinstance(score, int | float) and not isinstance(score, bool)
  if not number or not isinstance(response, str):
    raise ValueError(
      f"{place} score is {score!r} and response is a "
      f"{type(response).__name__}; they must be a finite number and text. "
      "Mend or drop the line."
    )
  return str(identity), float(score), response


def _opened(opener: str, step: str) -> str:
  first, space, rest = step.partition(" ")
  if first in _LOWERED:
    first = first.lower()
  return f"{opener} {first}{space}{rest}"
