"""The evaluation table: stages side by side, with verdicts in words."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax.evals import bootstrap


@dataclasses.dataclass(frozen=True)
class Measure:
  """A measure per prompt, and its good direction."""

  key: str  # name in the arrays
  label: str  # "facts kept"
  better: str = "higher"  # "higher", "lower" or "neither"
  unit: str = ""  # "nats/token", "tokens", "" for a fraction or a count

  def __post_init__(self):
    """Refuses an unknown direction."""
    if self.better not in ("higher", "lower", "neither"):
      raise ValueError(
        f"Measure {self.key!r}: better is {self.better!r}. Use 'higher', "
        "'lower' or 'neither'."
      )


@dataclasses.dataclass(frozen=True)
class Cell:
  """One measure of one stage."""

  stage: str
  value: bootstrap.Interval
  change: bootstrap.Interval | None  # to the previous stage; None for the first
  verdict: str  # "facts kept rose", "facts kept did not rise", ...
  good: (
    bool | None
  )  # None without a significant change, or if neither direction is better


@dataclasses.dataclass(frozen=True)
class Row:
  """One measure over all stages."""

  measure: Measure
  cells: tuple[Cell, ...]


def assemble(
  values: Mapping[str, Mapping[str, np.ndarray]],
  measures: Sequence[Measure],
  *,
  level: float = 0.95,
  resamples: int = 2000,
  seed: int = 0,
) -> list[Row]:
  """Computes means, intervals and paired changes of every measure and stage.

  Args:
    values: per-prompt arrays [B] by stage, then by measure; stages in training
      order ("base", "sft", "rl"), prompts in the same order everywhere.
    measures: the rows.
    level: coverage of the intervals.
    resamples: bootstrap resamples.
    seed: of the bootstrap.

  Returns:
    One row per measure. A change is relative to the previous stage; the verdict
    states in words what its interval supports.

  Raises:
    ValueError: a stage lacks a measure, or `bootstrap` raises.
  """
  settings: dict[str, Any] = {
    "level": level,
    "resamples": resamples,
    "seed": seed,
  }
  rows = []
  for measure in measures:
    cells: list[Cell] = []
    before = None
    for stage, arrays in values.items():
      if measure.key not in arrays:
        raise ValueError(
          f"Stage {stage!r} has no measure {measure.key!r}, only "
          f"{sorted(arrays)}. Evaluate it, or leave the measure out."
        )
      now = np.asarray(arrays[measure.key])
      value = bootstrap.mean_interval(now, **settings)
      change = None
      if before is not None:
        change = bootstrap.paired_difference(now, before, **settings)
      text, good = verdict(measure, change)
      cells.append(Cell(stage, value, change, text, good))
      before = now
    rows.append(Row(measure, tuple(cells)))
  return rows


def verdict(
  measure: Measure, change: bootstrap.Interval | None
) -> tuple[str, bool | None]:
  """Returns the verdict on a change in words, and whether it is good.

  A direction is stated only if the interval excludes 0.
  """
  if change is None:
    return "", None
  label = measure.label
  if not change.excludes_zero():
    missed = {
      "higher": f"{label} did not rise",
      "lower": f"{label} did not fall",
      "neither": f"no change in {label} shown",
    }
    return missed[measure.better], None
  rose = change.low > 0
  text = f"{label} {'rose' if rose else 'fell'}"
  if measure.better == "neither":
    return text, None
  return text, rose == (measure.better == "higher")


def as_markdown(rows: Sequence[Row]) -> str:
  """Formats the table as Markdown; intervals in square brackets."""
  if not rows:
    return ""
  stages = [cell.stage for cell in rows[0].cells]
  lines = [
    "| measure | " + " | ".join(stages) + " | verdicts |",
    "|---" * (len(stages) + 2) + "|",
  ]
  for row in rows:
    cells = [format_interval(cell.value) for cell in row.cells]
    words = "; ".join(
      f"{cell.stage}: {cell.verdict}" for cell in row.cells if cell.verdict
    )
    unit = f" ({row.measure.unit})" if row.measure.unit else ""
    lines.append(
      f"| {row.measure.label}{unit} | {' | '.join(cells)} | {words} |"
    )
  return "\n".join(lines)


def format_interval(interval: bootstrap.Interval, *, sign: bool = False) -> str:
  """`0.412 [0.38, 0.44]`: about three digits of the mean, as many decimals
  in the bounds; a plus before a positive change where `sign`; the mean alone
  where there is no interval."""
  scale = max(abs(interval.mean), abs(interval.high - interval.low), 1e-12)
  decimals = int(np.clip(2 - np.floor(np.log10(scale)), 0, 4))
  form = f"{'+' if sign else ''}.{decimals}f"
  mean = format(interval.mean, form)
  if not np.isfinite(interval.low):
    return mean
  return f"{mean} [{format(interval.low, form)}, {format(interval.high, form)}]"
