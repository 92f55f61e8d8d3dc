"""Converts metrics files to charts.

Known metrics go to named charts; every other metric gets a chart of its own,
collapsed, so that the page shows everything that was logged. Metrics that
depend on the clock are left out.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

from opera_jax import clock_metrics
from opera_jax.report import views

# (title, unit, patterns of metric names); a metric joins the first that fits.
CHARTS = (
  ("Loss", "nats/token", ("loss", "*/loss", "*/eval_loss")),
  ("Reward, mean over samples", "", ("reward/mean", "reward/total")),
  (
    "Parts of the reward",
    "",
    ("reward/r_ppl*", "reward/r_self*", "reward/correct*"),
  ),
  ("Improving reflections a thought", "", ("reward/count*",)),
  ("log P(reference | x, z, y)", "nats/token", ("reward/score*",)),
  ("KL to the SFT model", "nats/token", ("kl",)),
  ("Entropy", "nats/token", ("entropy", "*/entropy")),
  ("Length", "tokens", ("completions/*_length",)),
  ("Share of tokens clipped", "", ("clip_ratio/*",)),
  ("Held-out", "", ("held_out/*", "eval/*")),
)
_MAX_POINTS = 300


def charts(lines: Sequence[Mapping[str, Any]]) -> list[views.Chart]:
  """Builds the charts of one stage.

  Args:
    lines: its metrics as in the JSONL, one mapping per step with the key
      "step"; None stands for a value that was not finite.

  Returns:
    Charts with at least one point, in the order of `CHARTS`, then by name.
  """
  names = sorted({name for line in lines for name in line} - {"step"})
  names = [name for name in names if not clock_metrics.depends_on_clock(name)]
  groups: dict[tuple[str, str], list[str]] = {
    (title, unit): [] for title, unit, _ in CHARTS
  }
  for name in names:
    groups.setdefault(_chart_of(name), []).append(name)
  named = {title for title, _, _ in CHARTS}
  drawn = []
  for (title, unit), members in groups.items():
    series = [_series(name, lines) for name in members]
    series = [line for line in series if any(y is not None for y in line.y)]
    if series:
      folded = title not in named
      drawn.append(views.Chart(title, series, unit=unit, folded=folded))
  return drawn


def _chart_of(name: str) -> tuple[str, str]:
  for title, unit, patterns in CHARTS:
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
