"""Formats the results of a grid of methods and seeds as Markdown.

Shape key: S seeds, B prompts.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from opera_jax.evals import bootstrap, seeds, table

Values = Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]]
COSTS = {
  "sampled_tokens": "tokens sampled",
  "scored_tokens": "tokens scored",
  "traces": "traces kept",
  "seconds": "seconds",
}


def stacked(values: Values, row: str, measure: str) -> np.ndarray:
  """Stacks a row's values of a measure: float64 [S, B], seeds in order."""
  by_seed = values[row]
  return np.asarray([by_seed[s][measure] for s in sorted(by_seed)], np.float64)


def results(
  values: Values,
  measures: Mapping[str, str],
  *,
  baseline: str,
  resamples: int,
) -> str:
  """Formats mean, interval and deviation over seeds, and the paired difference.

  Args:
    values: by row and seed, per-prompt numbers of every measure.
    measures: measure -> heading; measures that no row has are left out.
    baseline: the row that all others are compared with.
    resamples: of the bootstrap.

  Returns:
    A Markdown table with one row per method.
  """
  first = next(iter(values.values()))
  present = [m for m in measures if m in next(iter(first.values()))]
  lines = [
    "| method | seeds | " + " | ".join(measures[m] for m in present) + " |",
    "|---" * (len(present) + 2) + "|",
  ]
  for row, by_seed in values.items():
    cells = []
    for name in present:
      mine_SB = stacked(values, row, name)
      whole = seeds.crossed_interval(mine_SB, resamples=resamples)
      cell = table.format_interval(whole)
      if len(by_seed) > 1:
        cell += f" ±{mine_SB.mean(axis=1).std(ddof=1):.2g}"
      if row != baseline and baseline in values:
        change = difference(values, row, baseline, name, resamples=resamples)
        cell += f"<br>Δ {table.format_interval(change, sign=True)}"
      cells.append(cell)
    lines.append(f"| {row} | {len(by_seed)} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def difference(
  values: Values, row: str, other: str, measure: str, *, resamples: int
) -> bootstrap.Interval:
  """The paired difference over seeds and prompts.

  A row with one seed (a model that was not trained in the grid) is compared
  with every seed of the other row.
  """
  mine_SB, other_SB = (stacked(values, r, measure) for r in (row, other))
  count = max(len(mine_SB), len(other_SB))
  mine_SB, other_SB = (
    np.repeat(x, count, axis=0) if len(x) == 1 else x
    for x in (mine_SB, other_SB)
  )
  return seeds.compare(mine_SB, other_SB, resamples=resamples)


def costs(cost: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
  """Formats the mean cost per cell, one row per method; missing costs are left
  out."""
  first = next(iter(next(iter(cost.values())).values()))
  present = [name for name in COSTS if name in first]
  lines = [
    "| method | " + " | ".join(COSTS[name] for name in present) + " |",
    "|---" * (len(present) + 1) + "|",
  ]
  for row, by_seed in cost.items():
    means = [np.mean([c[name] for c in by_seed.values()]) for name in present]
    lines.append(f"| {row} | " + " | ".join(f"{m:,.0f}" for m in means) + " |")
  return "\n".join(lines)


def efficiency(values: Values, reference: str) -> str:
  """Formats the AES of every row on maths, see `seeds.aes`: mean and deviation
  over seeds.

  Args:
    values: see `results`; needs the measures "correct" and "math_tokens".
    reference: the row that accuracy and length are compared with.

  Returns:
    A Markdown table; "" if there is no maths, or if the reference has accuracy
    0, since AES divides by it.
  """
  first = next(iter(values[reference].values()))
  if "correct" not in first or not stacked(values, reference, "correct").any():
    return ""
  base = [
    stacked(values, reference, name).mean()
    for name in ("correct", "math_tokens")
  ]
  lines = ["| method | AES | ± over seeds |", "|---|---|---|"]
  for row in values:
    accuracy_S = stacked(values, row, "correct").mean(axis=1)
    length_S = stacked(values, row, "math_tokens").mean(axis=1)
    score_S = [seeds.aes(a, n, *base) for a, n in zip(accuracy_S, length_S)]
    deviation = f"{np.std(score_S, ddof=1):.2f}" if len(score_S) > 1 else ""
    lines.append(f"| {row} | {np.mean(score_S):+.2f} | {deviation} |")
  return "\n".join(lines)


def answers(
  values: Values, questions: Sequence[Sequence[str]], *, resamples: int
) -> str:
  """Formats the answer to each question in one line.

  Args:
    values: see `results`.
    questions: (text, row, other row, measure) each; one whose rows or measure
      are missing is left out.
    resamples: of the bootstrap.
  """
  lines = []
  for text, row, other, measure in questions:
    known = row in values and other in values
    if not known or measure not in next(iter(values[row].values())):
      continue
    change = difference(values, row, other, measure, resamples=resamples)
    sure = "" if change.excludes_zero() else " (not significant)"
    lines.append(
      f"- {text} {measure}, {row} less {other}: "
      f"{table.format_interval(change, sign=True)}{sure}"
    )
  return "\n".join(lines)


def probes(answered: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
  """Formats each reward's mean on each probe; bold if it is at least that of
  the honest sample."""
  names = list(next(iter(answered.values())))
  lines = ["| reward | " + " | ".join(names) + " |"]
  lines.append("|---" * (len(names) + 1) + "|")
  for reward, by_probe in answered.items():
    honest = float(np.mean(by_probe["honest"]))
    cells = []
    for name in names:
      mean = float(np.mean(by_probe[name]))
      gamed = name != "honest" and mean >= honest
      cells.append(f"**{mean:.3f}**" if gamed else f"{mean:.3f}")
    lines.append(f"| {reward} | " + " | ".join(cells) + " |")
  return "\n".join(lines)
