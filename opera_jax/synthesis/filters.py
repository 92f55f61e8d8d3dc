"""Which synthesised traces become SFT data; every rejection is counted.

A trace is counted under the first rule that it breaks, in the order of
`reason`; outliers and the share to keep are judged among those that pass.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from opera_jax.data import traces
from opera_jax.synthesis import stop_words as stop_words_lib
from opera_jax.text import thought, words

_TAGS = ("<think>", "</think>")
_UNCLOSED = (stop_words_lib.TOO_LONG, stop_words_lib.TURN_ENDED)
_FEWEST = 10  # searched traces from which an outlier can be told
_NORMAL = 1.4826  # standard deviations of a normal in its median deviation


@dataclasses.dataclass(frozen=True)
class Rules:
  """Settings of the filters; a largest share of 1 rules nothing out.

  Attributes:
    min_reflections: fewest reflective steps of the thought.
    max_repeat: largest share of its steps that repeat an earlier one.
    ngram: words of an n-gram of the next two rules.
    max_ngram_repeat: largest share of the n-grams of thought and answer that
      repeat an earlier one.
    max_copied: largest share of the answer's n-grams that stand in the
      prompt; an answer that is the prompt's text is always copied.
    max_foreign: largest share of the letters of thought or answer that are of
      a script which neither prompt nor reference uses. A change between
      languages of one script goes unseen.
    think_tags: whether a think tag may stand in thought or answer.
    stop_words: words that open a sentence of thinking and hardly one of an
      answer.
    max_stop_words: most of them in the answer; with more, the thought goes on
      after it.
    min_thought_words: shortest thought; a Chinese character is a word.
    max_thought_words: longest, 0 for no limit.
    min_answer_words: shortest answer.
    max_answer_words: longest, 0 for no limit.
    max_deviation: how far a trace's perplexity may lie from the median, in
      robust standard deviations of its logarithm, either way; 0 for no
      limit. Its perplexity is the mean over its kept candidates.
    keep_share: of the traces that pass all this, the part kept, ordered by
      perplexity; traces that were never searched come last.
  """

  min_reflections: int = 1
  max_repeat: float = 0.2
  ngram: int = 8
  max_ngram_repeat: float = 0.5
  max_copied: float = 0.7
  max_foreign: float = 0.1
  think_tags: bool = False
  stop_words: tuple[str, ...] = ("Wait", "Hmm", "Let me think")
  max_stop_words: int = 1
  min_thought_words: int = 1
  max_thought_words: int = 0
  min_answer_words: int = 1
  max_answer_words: int = 0
  max_deviation: float = 6.0
  keep_share: float = 1.0

  def __post_init__(self):
    """Refuses shares that are none."""
    for name in ("max_repeat", "max_ngram_repeat", "max_copied", "max_foreign"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(
          f"{name} is a share, in [0, 1], got {getattr(self, name)}. Change "
          f"config.select.{name}."
        )
    if not 0 < self.keep_share <= 1:
      raise ValueError(
        f"keep_share is a share, in (0, 1], got {self.keep_share}. Change "
        "config.select.keep_share."
      )
    if self.ngram < 1 or self.max_deviation < 0:
      raise ValueError(
        f"ngram={self.ngram} must be at least 1 and max_deviation="
        f"{self.max_deviation} at least 0. Change config.select."
      )


def reason(
  trace: traces.Trace, rules: Rules, keywords: Sequence[str]
) -> str | None:
  """Why a trace is rejected, or None.

  Args:
    trace: a synthesised trace.
    rules: what it must keep to.
    keywords: reflection keywords, matched on word boundaries.
  """
  if trace.status in _UNCLOSED:
    return f"unclosed thought: {trace.status}"
  if trace.status != "complete":
    return trace.status
  if not trace.answer.strip():
    return "answer missing"
  texts = {"thought": trace.thought, "answer": trace.answer}
  for name, text in texts.items():
    if not rules.think_tags and any(tag in text for tag in _TAGS):
      return f"think tag in the {name}"
  if _stop_words(trace.answer, rules.stop_words) > rules.max_stop_words:
    return "thought goes on after the answer"
  steps = [s.strip() for s in trace.thought.split(thought.SEPARATOR)]
  steps = [s for s in steps if s]
  reflections = sum(thought.is_reflective(s.encode(), keywords) for s in steps)
  if reflections < rules.min_reflections:
    return f"fewer than {rules.min_reflections} reflections"
  if steps and 1 - len(set(steps)) / len(steps) > rules.max_repeat:
    return "repeated steps"
  said = {name: words.split(words.normal(text)) for name, text in texts.items()}
  for name in texts:
    low = getattr(rules, f"min_{name}_words")
    high = getattr(rules, f"max_{name}_words") or np.inf
    if len(said[name]) < low:
      return f"{name} too short"
    if len(said[name]) > high:
      return f"{name} has too many words"
  if _repeated(said.values(), rules.ngram) > rules.max_ngram_repeat:
    return "repeated n-grams"
  if _copied(said["answer"], trace.prompt, rules):
    return "answer copied from the prompt"
  known = words.scripts(trace.prompt + trace.reference)
  for name, text in texts.items():
    if _foreign(text, known) > rules.max_foreign:
      return f"language switch in the {name}"
  return None


def verdicts(
  candidates: Iterable[traces.Trace],
  rules: Rules,
  keywords: Sequence[str] = thought.KEYWORDS,
) -> tuple[list[str | None], dict[str, int]]:
  """Filters traces, then keeps the share of lowest kept-candidate perplexity.

  Every trace is looked at once and let go: what stays is a word and a number.

  Args:
    candidates: synthesised traces.
    rules: what they must keep to.
    keywords: see `reason`.

  Returns:
    Why each trace is rejected, None for those that are kept; and counts by
    reason ("kept" among them).

  Raises:
    ValueError: nothing kept.
  """
  why: list[str | None] = []
  passed: list[tuple[float, int]] = []
  for place, trace in enumerate(candidates):
    why.append(reason(trace, rules, keywords))
    if why[-1] is None:
      kept = [r.candidates[r.kept].perplexity for r in trace.rounds]
      passed.append((float(np.mean(kept)) if kept else np.inf, place))
  outside = _outliers(
    [perplexity for perplexity, _ in passed], rules.max_deviation
  )
  for (_, place), out in zip(passed, outside):
    if out:
      why[place] = "perplexity outlier"
  passed = sorted(one for one, out in zip(passed, outside) if not out)
  for _, place in passed[max(1, round(rules.keep_share * len(passed))) :]:
    why[place] = "perplexity"
  counts = collections.Counter(word for word in why if word is not None)
  if len(why) == counts.total():
    raise ValueError(
      f"No synthesised trace passed the filters: {dict(counts)}. Loosen "
      "config.select, or synthesise with a better base model."
    )
  return why, {"kept": len(why) - counts.total(), **counts}


def _stop_words(answer: str, stop_words: Sequence[str]) -> int:
  """Sentences of the answer that open with a stop word, exact case, whole
  word."""
  if not stop_words:
    return 0
  opening = "|".join(re.escape(word) for word in stop_words)
  return len(re.findall(rf"(?:^|\n|[.!?] )(?:{opening})\b", answer))


def _repeated(said: Iterable[Sequence[str]], n: int) -> float:
  """The share of n-grams, none across texts, that repeat an earlier one."""
  grams = [gram for text in said for gram in words.ngrams(text, n)]
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _copied(answer: Sequence[str], prompt: str, rules: Rules) -> bool:
  asked = words.split(words.normal(prompt))
  if list(answer) == asked:
    return True
  if len(answer) < rules.ngram:
    return False
  known = set(words.ngrams(asked, rules.ngram))
  grams = words.ngrams(answer, rules.ngram)
  return sum(gram in known for gram in grams) / len(grams) > rules.max_copied


def _foreign(text: str, known: collections.Counter[str]) -> float:
  """The share of letters in scripts that are not among the known ones."""
  found = words.scripts(text)
  return sum(n for name, n in found.items() if name not in known) / max(
    found.total(), 1
  )


def _outliers(perplexity: Sequence[float], most: float) -> list[bool]:
  """Which perplexities lie too far from the median; too few are all near."""
  log_N = np.log(perplexity)
  real_N = np.isfinite(log_N)
  if not most or real_N.sum() < _FEWEST:
    return [False] * len(perplexity)
  middle = np.median(log_N[real_N])
  scale = _NORMAL * np.median(np.abs(log_N[real_N] - middle))
  return (real_N & (np.abs(log_N - middle) > most * scale)).tolist()
