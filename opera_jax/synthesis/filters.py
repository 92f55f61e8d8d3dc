"""Filters synthesised traces for SFT, and counts rejections by reason.

A trace is rejected by the first rule that it breaks, in the order of `reason`.
The perplexity rules are then applied to the traces that passed.
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
_MIN_FOR_OUTLIERS = 10  # searched traces
_MAD_TO_STD = 1.4826  # of a normal distribution


@dataclasses.dataclass(frozen=True)
class Rules:
  """Settings of the filters; a maximum fraction of 1 disables its rule.

  Attributes:
    min_reflections: minimum number of reflective steps of the thought.
    max_repeat: maximum fraction of steps that repeat an earlier step.
    ngram: words of an n-gram, for the next two rules.
    max_ngram_repeat: maximum fraction of the n-grams of thought and answer that
      repeat an earlier n-gram.
    max_copied: maximum fraction of the answer's n-grams that occur in the
      prompt; an answer equal to the prompt is always rejected.
    max_foreign: maximum fraction of the letters of thought or answer in a
      script that neither prompt nor reference uses. A switch between languages
      of the same script is not detected.
    think_tags: whether thought and answer may contain think tags.
    stop_words: words that often begin a sentence of a thought and rarely one of
      an answer.
    max_stop_words: maximum number of them in the answer; more mean that the
      thought continues after </think>.
    min_thought_words: minimum length of the thought; a Chinese character counts
      as a word.
    max_thought_words: maximum length, 0 for no limit.
    min_answer_words: minimum length of the answer.
    max_answer_words: maximum length, 0 for no limit.
    max_deviation: maximum distance of a trace's log perplexity from the median,
      in robust standard deviations; 0 for no limit. The perplexity of a trace
      is the mean over its kept candidates.
    keep_share: fraction of the passing traces to keep, lowest perplexity first;
      traces without search rounds come last.
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
    """Refuses fractions outside [0, 1] and other invalid settings."""
    for name in ("max_repeat", "max_ngram_repeat", "max_copied", "max_foreign"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(
          f"{name} is a fraction in [0, 1], got {getattr(self, name)}. Change "
          f"config.select.{name}."
        )
    if not 0 < self.keep_share <= 1:
      raise ValueError(
        f"keep_share is a fraction in (0, 1], got {self.keep_share}. Change "
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
  """The reason why a trace is rejected, or None if it passes.

  Perplexity rules are not included; see `verdicts`.

  Args:
    trace: a synthesised trace.
    rules: settings.
    keywords: reflection keywords, matched as whole words.
  """
  if trace.status in stop_words_lib.UNCLOSED:
    return f"unclosed thought: {trace.status}"
  if trace.status != "complete":
    return trace.status
  if not trace.answer.strip():
    return "answer missing"
  texts = {"thought": trace.thought, "answer": trace.answer}
  for name, text in texts.items():
    if not rules.think_tags and any(tag in text for tag in _TAGS):
      return f"think tag in the {name}"
  if _count_stop_words(trace.answer, rules.stop_words) > rules.max_stop_words:
    return "thought goes on after the answer"
  steps = [s.strip() for s in trace.thought.split(thought.SEPARATOR)]
  steps = [s for s in steps if s]
  reflections = sum(thought.is_reflective(s.encode(), keywords) for s in steps)
  if reflections < rules.min_reflections:
    return f"fewer than {rules.min_reflections} reflections"
  if steps and 1 - len(set(steps)) / len(steps) > rules.max_repeat:
    return "repeated steps"
  words_of = {
    name: words.split(words.normal(text)) for name, text in texts.items()
  }
  for name in texts:
    low = getattr(rules, f"min_{name}_words")
    high = getattr(rules, f"max_{name}_words") or np.inf
    if len(words_of[name]) < low:
      return f"{name} too short"
    if len(words_of[name]) > high:
      return f"{name} has too many words"
  if _repeated(words_of.values(), rules.ngram) > rules.max_ngram_repeat:
    return "repeated n-grams"
  if _copied(words_of["answer"], trace.prompt, rules):
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
  """Filters traces by all rules.

  The traces are read as a stream: only a reason and a perplexity are stored for
  each of them.

  Args:
    candidates: synthesised traces.
    rules: settings.
    keywords: see `reason`.

  Returns:
    For each trace the reason why it is rejected, None if it is kept; and the
    number of traces by reason, with "kept" for those that pass.

  Raises:
    ValueError: no trace passed.
  """
  reasons: list[str | None] = []
  passed: list[tuple[float, int]] = []  # (perplexity, index of the trace)
  for index, trace in enumerate(candidates):
    reasons.append(reason(trace, rules, keywords))
    if reasons[-1] is None:
      kept = [r.candidates[r.kept].perplexity for r in trace.rounds]
      passed.append((float(np.mean(kept)) if kept else np.inf, index))
  outliers = _outliers(
    [perplexity for perplexity, _ in passed], rules.max_deviation
  )
  for (_, index), is_outlier in zip(passed, outliers):
    if is_outlier:
      reasons[index] = "perplexity outlier"
  passed = sorted(
    trace for trace, is_outlier in zip(passed, outliers) if not is_outlier
  )
  for _, index in passed[max(1, round(rules.keep_share * len(passed))) :]:
    reasons[index] = "perplexity"
  counts = collections.Counter(r for r in reasons if r is not None)
  if len(reasons) == counts.total():
    raise ValueError(
      f"No synthesised trace passed the filters: {dict(counts)}. Loosen "
      "config.select, or synthesise with a better base model."
    )
  return reasons, {"kept": len(reasons) - counts.total(), **counts}


def _count_stop_words(answer: str, stop_words: Sequence[str]) -> int:
  """Number of sentences of the answer that begin with a stop word (exact case,
  whole word)."""
  if not stop_words:
    return 0
  opening = "|".join(re.escape(word) for word in stop_words)
  return len(re.findall(rf"(?:^|\n|[.!?] )(?:{opening})\b", answer))


def _repeated(texts: Iterable[Sequence[str]], n: int) -> float:
  """The fraction of n-grams within texts that repeat an earlier one."""
  grams = [gram for text in texts for gram in words.ngrams(text, n)]
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _copied(answer: Sequence[str], prompt: str, rules: Rules) -> bool:
  """Whether the answer is the prompt or repeats too many of its n-grams."""
  prompt_words = words.split(words.normal(prompt))
  if list(answer) == prompt_words:
    return True
  if len(answer) < rules.ngram:
    return False
  known = set(words.ngrams(prompt_words, rules.ngram))
  grams = words.ngrams(answer, rules.ngram)
  return sum(gram in known for gram in grams) / len(grams) > rules.max_copied


def _foreign(text: str, known: collections.Counter[str]) -> float:
  """The fraction of letters whose script is not in `known`."""
  found = words.scripts(text)
  return sum(n for name, n in found.items() if name not in known) / max(
    found.total(), 1
  )


def _outliers(perplexity: Sequence[float], max_deviation: float) -> list[bool]:
  """Which perplexities are too far from the median.

  None of them is if fewer than `_MIN_FOR_OUTLIERS` are finite.
  """
  log_N = np.log(perplexity)
  real_N = np.isfinite(log_N)
  if not max_deviation or real_N.sum() < _MIN_FOR_OUTLIERS:
    return [False] * len(perplexity)
  median = np.median(log_N[real_N])
  scale = _MAD_TO_STD * np.median(np.abs(log_N[real_N] - median))
  return (real_N & (np.abs(log_N - median) > max_deviation * scale)).tolist()
