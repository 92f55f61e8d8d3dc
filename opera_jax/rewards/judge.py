"""A rubric judge behind any OpenAI-compatible endpoint.

Rubric: four dimensions from 1 to 5, the mean brought to 0..1. Pairwise: each
sample against the next ones of its group, asked in both orders; the reward is
the share of comparisons won. The judge's bias for the first place and its
agreement with itself are counted, and what it cost.

The dimensions are those of the RL data filter of arXiv 2606.25757.
"""

import concurrent.futures
import dataclasses
import functools
import re
from typing import Any

import numpy as np

from opera_jax import structs
from opera_jax.rewards import endpoint as endpoint_lib

DIMENSIONS = (
  "constraint_strictness",
  "structural_integrity",
  "lexical_sophistication",
  "contextual_utility",
)
MODES = ("rubric", "pairwise")
RUBRIC = (
  "Grade the answer to the task against the reference, from 1 (poor) to 5 "
  "(excellent), on: constraint_strictness, structural_integrity, "
  "lexical_sophistication, contextual_utility. Reply with one JSON object "
  "with exactly these four keys and integer values.\n\n"
  "# Task\n{prompt}\n\n# Reference\n{reference}\n\n# Answer\n{answer}"
)
PAIRWISE = (
  "Which answer to the task is better? Weigh constraint strictness, "
  "structural integrity, lexical sophistication and contextual utility. "
  'Reply with one JSON object, {{"better": "A"}}, {{"better": "B"}} or '
  '{{"better": "tie"}}.\n\n'
  "# Task\n{prompt}\n\n# Reference\n{reference}\n\n# Answer A\n{first}\n\n"
  "# Answer B\n{second}"
)


@dataclasses.dataclass(frozen=True)
class Reward:
  """What the judge thinks of every sample, 0 to 1.

  Attributes:
    endpoint: base address, as in "https://host/v1".
    model: name of the judge's model.
    mode: "rubric" or "pairwise".
    opponents: samples that each sample is compared with in "pairwise".
    key_variable: environment variable that holds the key; "" sends none. The
      key itself is never stored, shown or logged.
    cache: folder of answers already paid for; "" keeps none.
    timeout: seconds a request may take.
    retries: further tries after a slow, failed or unreadable answer.
    backoff: seconds before the first of them; doubled each time.
    parallel: requests at a time.
    prompt_price: cost of a million prompt tokens, in your currency.
    completion_price: cost of a million completion tokens.
  """

  endpoint: str
  model: str
  mode: str = "rubric"
  opponents: int = 1
  key_variable: str = "OPENAI_API_KEY"
  cache: str = ""
  timeout: float = 60.0
  retries: int = 4
  backoff: float = 1.0
  parallel: int = 8
  prompt_price: float = 0.0
  completion_price: float = 0.0

  def __post_init__(self):
    """Refuses an unknown mode, and a pairing with nobody."""
    if self.mode not in MODES:
      raise ValueError(f"Unknown mode {self.mode!r}. Use one of {MODES}.")
    if self.opponents < 1 or self.parallel < 1:
      raise ValueError(
        "The judge needs at least 1 opponent and 1 request at a time, got "
        f"{self.opponents} and {self.parallel}."
      )

  @functools.cached_property
  def client(self) -> endpoint_lib.Client:
    """The connection, with its counters."""
    return endpoint_lib.Client(
      self.endpoint,
      self.model,
      key_variable=self.key_variable,
      cache=self.cache,
      timeout=self.timeout,
      retries=self.retries,
      backoff=self.backoff,
      prompt_price=self.prompt_price,
      completion_price=self.completion_price,
    )

  def questions(self, rollouts: structs.Rollouts) -> structs.Questions:
    """Nothing is priced."""
    return structs.Questions()

  def rewards(
    self, rollouts: structs.Rollouts, answers: structs.Answers
  ) -> dict[str, np.ndarray]:
    """`total`; the four dimensions, or the judge's bias and consistency; and
    `judge_cost`, the same for every sample; float32 [B, N].

    Raises:
      endpoint.EndpointError: no readable answer after all tries.
    """
    before = self.client.cost()
    if self.mode == "rubric":
      parts = self._rubric(rollouts)
    else:
      parts = self._pairwise(rollouts)
    shape = (len(rollouts.prompts), rollouts.samples)
    each = (self.client.cost() - before) / np.prod(shape)
    parts["judge_cost"] = np.full(shape, each)
    return {
      name: np.asarray(part, np.float32).reshape(shape)
      for name, part in parts.items()
    }

  def _rubric(self, rollouts: structs.Rollouts) -> dict[str, Any]:
    asked = [
      RUBRIC.format(answer=answer_text(text), **_task(rollouts, r))
      for r, text in enumerate(rollouts.texts)
    ]
    grades = self._ask(asked, read_grades)
    grade_RD = np.asarray([[g[d] for d in DIMENSIONS] for g in grades])
    parts = {d: grade_RD[:, i] for i, d in enumerate(DIMENSIONS)}
    return {"total": (grade_RD.mean(axis=1) - 1) / 4, **parts}

  def _pairwise(self, rollouts: structs.Rollouts) -> dict[str, Any]:
    samples = rollouts.samples
    if not self.opponents < samples:
      raise ValueError(
        f"Each of {samples} samples is to meet {self.opponents} others. Lower "
        "opponents, or raise config.rl.samples."
      )
    pairs = [
      (b * samples + n, b * samples + (n + d) % samples)
      for b in range(len(rollouts.prompts))
      for n in range(samples)
      for d in range(1, self.opponents + 1)
    ]
    asked = []
    for one, two in pairs:
      task = _task(rollouts, one)
      for first, second in ((one, two), (two, one)):
        asked.append(
          PAIRWISE.format(
            first=answer_text(rollouts.texts[first]),
            second=answer_text(rollouts.texts[second]),
            **task,
          )
        )
    said = self._ask(asked, read_choice)
    result = tally(pairs, said[0::2], said[1::2], len(rollouts.texts))
    rows = len(rollouts.texts)
    return {
      "total": result.win_R,
      "position_bias": np.full(rows, result.position_bias),
      "self_consistency": np.full(rows, result.self_consistency),
    }

  def _ask(self, asked: list[str], read) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
      return list(pool.map(lambda text: self.client.ask(text, read), asked))


@dataclasses.dataclass(frozen=True)
class Tally:
  """Outcome of comparisons asked in both orders."""

  win_R: np.ndarray  # float64 [R], share of comparisons won, ties half
  position_bias: float  # share of choices for the first place, less a half
  self_consistency: float  # share of pairs judged alike in both orders


def tally(
  pairs: list[tuple[int, int]],
  forward: list[float],
  backward: list[float],
  rows: int,
) -> Tally:
  """Counts wins; a pair's result is the mean of its two orders.

  Args:
    pairs: rows (one, two) compared.
    forward: 1 if the first place won, 0 if the second, 0.5 a tie, with `one`
      in the first place.
    backward: the same with `two` in the first place.
    rows: R; a row in no pair gets 0.5.
  """
  won_R, played_R = np.zeros(rows), np.zeros(rows)
  for (one, two), ahead, behind in zip(pairs, forward, backward, strict=True):
    result = (ahead + (1 - behind)) / 2
    won_R[one] += result
    won_R[two] += 1 - result
    played_R[[one, two]] += 1
  share_R = np.where(played_R > 0, won_R / np.maximum(played_R, 1), 0.5)
  agree = [a == 1 - b for a, b in zip(forward, backward)]
  return Tally(
    share_R,
    float(np.mean([*forward, *backward]) - 0.5) if pairs else 0.0,
    float(np.mean(agree)) if pairs else 1.0,
  )


def read_grades(reply: dict[str, Any]) -> dict[str, int]:
  """The four grades of a reply.

  Raises:
    ValueError: a dimension is missing, or is no whole number from 1 to 5.
  """
  for name in DIMENSIONS:
    if reply.get(name) not in (1, 2, 3, 4, 5):
      raise ValueError(
        f"The judge grades {name} as {reply.get(name)!r}; it must be a whole "
        "number from 1 to 5."
      )
  return {name: int(reply[name]) for name in DIMENSIONS}


def read_choice(reply: dict[str, Any]) -> float:
  """1 for "A", 0 for "B", 0.5 for "tie".

  Raises:
    ValueError: anything else.
  """
  known = {"A": 1.0, "B": 0.0, "tie": 0.5}
  if reply.get("better") not in known:
    raise ValueError(
      f"The judge says {reply.get('better')!r}; it must say A, B or tie."
    )
  return known[reply["better"]]


def answer_text(text: str) -> str:
  """What the judge sees: the text after the thought, all of it without one."""
  return re.sub(r"^.*?</think>", "", text, count=1, flags=re.DOTALL).strip()


def _task(rollouts: structs.Rollouts, row: int) -> dict[str, str]:
  task = rollouts.prompts[rollouts.owner(row)]
  return {"prompt": task.prompt, "reference": task.reference}
