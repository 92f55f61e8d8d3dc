"""Plots learning curves of a grid: mean over seeds, band from minimum to
maximum."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SAMPLED = "rollout/tokens"
Lines = Sequence[Mapping[str, Any]]  # a cell's metrics, one line a step


def write(
  cells: Mapping[str, Sequence[Lines]],
  names: Sequence[str],
  path: str | os.PathLike,
  over: str = SAMPLED,
) -> None:
  """Plots every metric against the tokens so far, one line per method.

  Names are plotted literally; a dollar sign does not start a formula.

  Args:
    cells: by method, the metrics of each of its seeds.
    names: metrics; those that no cell has are left out.
    path: PNG to write.
    over: the metric with the tokens of a step.
  """
  import matplotlib

  with matplotlib.rc_context({"text.parse_math": False}):
    _draw(cells, names, path, over)


def _draw(
  cells: Mapping[str, Sequence[Lines]],
  names: Sequence[str],
  path: str | os.PathLike,
  over: str,
) -> None:
  from matplotlib import figure

  names = [
    n for n in names if any(n in l for c in cells.values() for l in c[0])
  ]
  picture = figure.Figure((5 * max(len(names), 1), 4.5), layout="constrained")
  axes = picture.subplots(1, max(len(names), 1), squeeze=False)[0]
  for axis, name in zip(axes, names):
    for index, (method, seeds) in enumerate(cells.items()):
      tokens_T, value_ST = series(seeds, name, over)
      style = {"color": f"C{index % 10}"}
      dash = "-" if index < 10 else "--"
      axis.plot(
        tokens_T,
        value_ST.mean(axis=0),
        dash,
        label=method if method[:1] != "_" else f" {method}",  # _ hides a line
        lw=1.5,
        **style,
      )
      axis.fill_between(
        tokens_T,
        value_ST.min(axis=0),
        value_ST.max(axis=0),
        alpha=0.15,
        **style,
      )
    axis.set(title=name, xlabel="tokens sampled" if over == SAMPLED else over)
  if names:
    axes[-1].legend(fontsize="small")
  picture.savefig(path, dpi=110)


def series(
  seeds: Sequence[Lines], name: str, over: str = SAMPLED, points: int = 40
) -> tuple[np.ndarray, np.ndarray]:
  """Interpolates a metric of several seeds at common token counts.

  Returns:
    (tokens [T], values [S, T]), up to the end of the shortest seed; empty if a
    seed lacks the metric.
  """
  known = [
    [
      (total, line[name])
      for total, line in zip(np.cumsum([line[over] for line in lines]), lines)
      if line.get(name) is not None
    ]
    for lines in seeds
  ]
  if not all(known):
    return np.zeros(0), np.zeros((len(known), 0))
  tokens_T = np.linspace(
    max(k[0][0] for k in known), min(k[-1][0] for k in known), points
  )
  return tokens_T, np.asarray(
    [np.interp(tokens_T, *np.transpose(pairs)) for pairs in known]
  )
