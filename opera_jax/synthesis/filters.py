"""Which synthesised traces become SFT data; every rejection is counted."""

import collections
from collections.abc import Iterable, Sequence

import numpy as np

from opera_jax.data import traces
from opera_jax.text import thought


def reason(
  trace: traces.Trace,
  *,
  min_reflections: int,
  max_repeat: float,
  keywords: Sequence[str],
) -> str | None:
  """Why a trace is rejected, or None.

  Args:
    trace: a synthesised trace.
    min_reflections: fewest reflective steps of its thought.
    max_repeat: largest share of its steps that repeat an earlier one.
    keywords: reflection keywords, matched on word boundaries.
  """
  if trace.status != "complete":
    return trace.status
  if not trace.answer:
    return "answer missing"
  steps = [s.strip() for s in trace.thought.split(thought.SEPARATOR)]
  steps = [s for s in steps if s]
  reflections = sum(thought.is_reflective(s.encode(), keywords) for s in steps)
  if reflections < min_reflections:
    return f"fewer than {min_reflections} reflections"
  if steps and 1 - len(set(steps)) / len(steps) > max_repeat:
    return "repeated steps"
  return None


def verdicts(
  candidates: Iterable[traces.Trace],
  *,
  min_reflections: int = 1,
  max_repeat: float = 0.2,
  keep_share: float = 1.0,
  keywords: Sequence[str] = thought.KEYWORDS,
) -> tuple[list[str | None], dict[str, int]]:
  """Filters traces, then keeps the share of lowest kept-candidate perplexity.

  Every trace is looked at once and let go: what stays is a word and a number.

  Args:
    candidates: synthesised traces.
    min_reflections: see `reason`.
    max_repeat: see `reason`.
    keep_share: of the traces that pass, the part kept, ordered by the mean
      perplexity of their kept candidates; traces that were never searched
      come last.
    keywords: see `reason`.

  Returns:
    Why each trace is rejected, None for those that are kept; and counts by
    reason ("kept" among them).

  Raises:
    ValueError: keep_share outside (0, 1], or nothing kept.
  """
  if not 0 < keep_share <= 1:
    raise ValueError(
      f"keep_share is a share, in (0, 1], got {keep_share}. Change "
      "config.select.keep_share."
    )
  why: list[str | None] = []
  passed: list[tuple[float, int]] = []
  for place, trace in enumerate(candidates):
    why.append(
      reason(
        trace,
        min_reflections=min_reflections,
        max_repeat=max_repeat,
        keywords=keywords,
      )
    )
    if why[-1] is None:
      kept = [r.candidates[r.kept].perplexity for r in trace.rounds]
      passed.append((float(np.mean(kept)) if kept else np.inf, place))
  for _, place in sorted(passed)[max(1, round(keep_share * len(passed))) :]:
    why[place] = "perplexity"
  counts = collections.Counter(word for word in why if word is not None)
  if len(why) == counts.total():
    raise ValueError(
      f"No synthesised trace passed the filters: {dict(counts)}. Loosen "
      "config.select, or synthesise with a better base model."
    )
  return why, {"kept": len(why) - counts.total(), **counts}
