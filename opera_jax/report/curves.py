"""Converts metrics files to charts.

Known metrics go to named charts; every other metric gets a chart of its own,
collapsed, so that the page shows everything that was logged. A metric that
never changed has no chart, see `constants`. Metrics that depend on the clock
are left out.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

from opera_jax import clock_metrics
from opera_jax.report import views

# (title, unit, patterns of metric names, what is drawn); a metric joins the
# first that fits.
CHARTS = (
  (
    "Reward",
    "",
    ("reward/mean", "reward/total", "validation/reward*"),
    "Mean over a step's samples.",
  ),
  (
    "Terms of the reward",
    "",
    ("reward/r_self*", "reward/correct*"),
    "R_self = tanh(reflections that count / tau); right maths answers.",
  ),
  (
    "Reflections that count, a thought",
    "",
    ("reward/count*",),
    "Reflective steps that raise log P(reference).",
  ),
  (
    "log P(reference | prompt, completion)",
    "nats/token",
    ("reward/score*",),
    "The policy's own; raw, averaged over steps, and smoothed by it.",
  ),
  (
    "Spread of the reward in a group",
    "",
    ("reward/std", "frac_reward_zero_std"),
    "Standard deviation over a prompt's samples, and the share of prompts "
    "without any: those teach nothing.",
  ),
  (
    "Length of a completion",
    "tokens",
    ("completions/*_length", "completions/*/length*"),
    "With its stop token.",
  ),
  (
    "Cut off by the length limit",
    "share of completions",
    ("completions/clipped_ratio",),
    "",
  ),
  (
    "Loss",
    "nats/token",
    ("loss", "*/loss", "*/eval_loss", "*validation_loss"),
    "",
  ),
  (
    "KL to the initial model",
    "nats/token",
    ("kl",),
    "How far the policy has moved.",
  ),
  ("Entropy", "nats/token", ("entropy", "*/entropy"), "Of the next token."),
  (
    "Share of tokens clipped",
    "",
    ("clip_ratio/*",),
    "Whose probability moved beyond the clip range in an update.",
  ),
  (
    "Sampler against trainer",
    "nats",
    ("sampler_trainer/*diff",),
    "|difference| of a token's log-probability; 0.01 is good in bfloat16.",
  ),
  ("Held-out", "", ("held_out/*", "eval/*"), ""),
)
# The mean rank within a group is the same in every step, whatever is learnt.
CONSTANT = ("reward/r_ppl",)
_MAX_POINTS = 300


def charts(lines: Sequence[Mapping[str, Any]]) -> list[views.Chart]:
  """Builds the charts of one stage.

  Args:
    lines: its metrics as in the JSONL, one mapping per step with the key
      "step"; None stands for a value that was not finite.

  Returns:
    Charts with at least one point, in the order of `CHARTS`, then by name.
  """
  groups: dict[tuple[str, str], list[str]] = {
    (title, unit): [] for title, unit, _, _ in CHARTS
  }
  changing = set(_names(lines)) - set(constants(lines))
  for name in sorted(changing):
    groups.setdefault(_chart_of(name), []).append(name)
  notes = {title: note for title, _, _, note in CHARTS}
  drawn = []
  for (title, unit), members in groups.items():
    series = [_series(name, lines) for name in members]
    series = [line for line in series if any(y is not None for y in line.y)]
    if series:
      drawn.append(
        views.Chart(
          title,
          series,
          unit=unit,
          folded=title not in notes,
          note=notes.get(title, ""),
        )
      )
  return drawn


def constants(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Metrics of at least two steps that had one value in all of them."""
  found = {}
  for name in _names(lines):
    values = [line[name] for line in lines if name in line]
    if len(values) > 1 and len(set(values)) == 1 and _finite(values[0]):
      found[name] = values[0]
  return found


def _names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
  names = sorted({name for line in lines for name in line} - {"step"})
  return [
    name
    for name in names
    if name not in CONSTANT and not clock_metrics.depends_on_clock(name)
  ]


def _chart_of(name: str) -> tuple[str, str]:
  for title, unit, patterns, _ in CHARTS:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
      return title, unit
  # Metrics of different sizes flatten each other: one chart each.
  return name, ""


def _series(name: str, lines: Sequence[Mapping[str, Any]]) -> views.Series:
  """One metric; long series are averaged over blocks of steps."""
  points = [(line["step"], line[name]) for line in lines if name in line]
  width = math.ceil(len(points) / _MAX_POINTS)
  x, y = [], []
  for begin in range(0, len(points), max(width, 1)):
    block = points[begin : begin + width]
    known = [value for _, value in block if _finite(value)]
    x.append(sum(step for step, _ in block) / len(block))
    y.append(sum(known) / len(known) if known else None)
  return views.Series(label=name, x=x, y=y)


def _finite(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)
