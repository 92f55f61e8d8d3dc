"""Draws inline SVG: line charts, interval strips, the diagram of the stages.

Colours are classes of the page's style sheet, so that a drawing follows the
light or dark theme. All labels are escaped.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from opera_jax.evals import table
from opera_jax.report import views

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
COLOURS = 6  # classes c0 .. c5 of the style sheet


def line_chart(chart: views.Chart) -> str:
  """Draws a chart with title, legend, axes and lines.

  A missing value interrupts the line; an isolated point is a dot.
  """
  known = [
    (x, y)
    for series in chart.series
    for x, y in zip(series.x, series.y)
    if y is not None
  ]
  if not known:
    return ""
  x_ticks = ticks(min(x for x, _ in known), max(x for x, _ in known), 5)
  y_ticks = ticks(min(y for _, y in known), max(y for _, y in known), 4)
  # The x axis ends with the data, the y axis with its ticks.
  x_range = (min(x for x, _ in known), max(x for x, _ in known))
  parts, to_x, to_y = _axes(
    chart.title,
    x_range,
    x_ticks,
    {tick: _number(tick, y_ticks) for tick in y_ticks},
  )
  parts.append(
    f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" '
    f'y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(chart.x_label)}'
    "</text>"
  )
  for index, series in enumerate(chart.series):
    parts.append(_line(series, index % COLOURS, to_x, to_y))
  parts.append("</svg>")
  labels = [series.label for series in chart.series]
  return _figure(chart.title, chart.unit, chart.note, "".join(parts), labels)


def histogram(chart: views.Histogram, bins: int = 20) -> str:
  """Draws distributions as steps over common bins; the height is a share.

  Values that are not finite are left out. Whole numbers of a small range get a
  bin each.
  """
  kept = {
    label: np.asarray([v for v in values if math.isfinite(v)], float)
    for label, values in chart.values.items()
  }
  kept = {label: values for label, values in kept.items() if values.size}
  if not kept:
    return ""
  edges = bin_edges(np.concatenate(list(kept.values())), bins)
  shares = {
    label: np.histogram(values, edges)[0] / values.size
    for label, values in kept.items()
  }
  x_ticks = ticks(edges[0], edges[-1], 5)
  y_ticks = ticks(0.0, max(float(share.max()) for share in shares.values()), 4)
  percent = [100 * tick for tick in y_ticks]

  parts, to_x, to_y = _axes(
    chart.title,
    (edges[0], edges[-1]),
    x_ticks,
    {tick: f"{_number(100 * tick, percent)}%" for tick in y_ticks},
  )
  for index, share in enumerate(shares.values()):
    colour = index % COLOURS
    points = [(to_x(edges[0]), to_y(0.0))]
    for low, high, height in zip(edges, edges[1:], share):
      points += [(to_x(low), to_y(height)), (to_x(high), to_y(height))]
    points.append((to_x(edges[-1]), to_y(0.0)))
    outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(
      f'<polygon class="area f{colour}" points="{outline}"/>'
      f'<polyline class="line c{colour}" points="{outline}"/>'
    )
  parts.append("</svg>")
  labels = [
    f"{label}, {values.size:,} completions, mean {values.mean():.3g}"
    for label, values in kept.items()
  ]
  return _figure(chart.title, chart.unit, chart.note, "".join(parts), labels)


def _axes(
  title: str,
  x_range: tuple[float, float],
  x_ticks: Sequence[float],
  y_labels: Mapping[float, str],
) -> tuple[list[str], Callable[[float], float], Callable[[float], float]]:
  """Opens a drawing with its grid and ticks.

  Args:
    title: for screen readers.
    x_range: values at the left and the right end of the x axis.
    x_ticks: of which those within the range are drawn.
    y_labels: label by tick, ascending; the y axis ends with its ticks.

  Returns:
    The parts so far, and the functions from a value to its place in x and y.
  """
  y_ticks = list(y_labels)

  def to_x(x: float) -> float:
    return _place(x, *x_range, _LEFT, _WIDTH - _RIGHT)

  def to_y(y: float) -> float:
    return _place(y, y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)

  parts = [
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
    f'aria-label="{html.escape(title)}">'
  ]
  for tick, label in y_labels.items():
    y = to_y(tick)
    parts.append(
      f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
      f'y2="{y:.1f}"/><text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" '
      f'text-anchor="end">{label}</text>'
    )
  for tick in x_ticks:
    if x_range[0] <= tick <= x_range[1]:
      parts.append(
        f'<text class="tick" x="{to_x(tick):.1f}" '
        f'y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">'
        f"{_number(tick, x_ticks)}</text>"
      )
  return parts, to_x, to_y


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
  """Edges of about `bins` bins that hold all values, ascending.

  Args:
    values: finite, at least one.
    bins: most bins.
  """
  low, high = float(values.min()), float(values.max())
  if (values == np.round(values)).all() and high - low < bins:
    return np.arange(low - 0.5, high + 1.0)
  if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
    pad = abs(low) * 0.1 or 0.5
    return np.linspace(low - pad, high + pad, 4)
  return np.linspace(low, high, bins + 1)


def _figure(
  title: str, unit: str, note: str, drawing: str, labels: Sequence[str]
) -> str:
  """A drawing with its title, unit, explanation and legend."""
  small = f" <small>{html.escape(unit)}</small>" if unit else ""
  legend = "".join(
    f'<span><i class="swatch b{index % COLOURS}"></i>{html.escape(label)}'
    "</span>"
    for index, label in enumerate(labels)
  )
  said = f'<p class="about">{html.escape(note)}</p>' if note else ""
  return (
    f'<figure class="chart"><figcaption>{html.escape(title)}{small}'
    f"</figcaption>{said}{drawing}"
    f'<div class="legend">{legend}</div></figure>'
  )


def interval_strip(cells: Sequence[table.Cell]) -> str:
  """Draws a dot with a whisker per stage, top to bottom, on one scale."""
  bounds = [
    bound
    for cell in cells
    for bound in (cell.value.low, cell.value.mean, cell.value.high)
    if math.isfinite(bound)
  ]
  low, high = min(bounds), max(bounds)
  height = 12 * len(cells) + 4
  parts = [f'<svg class="strip" viewBox="0 0 120 {height}" aria-hidden="true">']
  for index, cell in enumerate(cells):
    y = 8 + 12 * index
    colour = index % COLOURS
    if math.isfinite(cell.value.low):
      left = _place(cell.value.low, low, high, 6, 114)
      right = _place(cell.value.high, low, high, 6, 114)
      parts.append(
        f'<line class="line c{colour}" x1="{left:.1f}" x2="{right:.1f}" '
        f'y1="{y}" y2="{y}"/>'
      )
    middle = _place(cell.value.mean, low, high, 6, 114)
    parts.append(
      f'<circle class="dot f{colour}" cx="{middle:.1f}" cy="{y}" r="3.5">'
      f"<title>{html.escape(cell.stage)}</title></circle>"
    )
  return "".join([*parts, "</svg>"])


# (name, column, row); arrows run along each row, and to the next row.
_CHAIN = (
  ("prompts", 0, 0),
  ("base model", 1, 0),
  ("synthesis", 2, 0),
  ("selection", 3, 0),
  ("SFT", 4, 0),
  ("rollouts", 0, 1),
  ("OPERA reward", 1, 1),
  ("group advantage", 2, 1),
  ("policy update", 3, 1),
  ("evaluation", 4, 1),
)


def chain(captions: Mapping[str, str]) -> str:
  """Draws the stages as boxes, and the RL loop.

  Args:
    captions: a short line under a stage's name, by name; names are those of
      the boxes: "prompts", "base model", "synthesis", "selection", "SFT",
      "rollouts", "OPERA reward", "group advantage", "policy update",
      "evaluation".

  Raises:
    ValueError: a caption's name is not a box.
  """
  unknown = sorted(set(captions) - {name for name, _, _ in _CHAIN})
  if unknown:
    raise ValueError(
      f"No stage of the chain is called {unknown[0]!r}. Use one of "
      f"{[name for name, _, _ in _CHAIN]}."
    )
  wide, gap, tall, lead = 150, 28, 46, 96
  parts = [
    '<svg class="chain" viewBox="0 0 870 196" role="img" '
    'aria-label="The chain of stages"><defs><marker id="tip" markerWidth="7" '
    'markerHeight="7" refX="6" refY="3.5" orient="auto">'
    '<path class="tip" d="M0,0 L7,3.5 L0,7 z"/></marker></defs>'
  ]
  for name, column, row in _CHAIN:
    loop = " loop" if row == 1 and column < 4 else ""
    x, y = 4 + column * (wide + gap), 4 + row * lead
    parts.append(
      f'<rect class="box{loop}" x="{x}" y="{y}" width="{wide}" '
      f'height="{tall}" rx="8"/>'
    )
    caption = captions.get(name, "")
    middle = x + wide / 2
    parts.append(
      f'<text class="name" x="{middle}" y="{y + (20 if caption else 28)}">'
      f"{html.escape(name)}</text>"
    )
    if caption:
      parts.append(
        f'<text class="note" x="{middle}" y="{y + 37}">{html.escape(caption)}'
        "</text>"
      )
    if column < 4:
      start, level = x + wide + 2, y + tall / 2
      parts.append(_arrow(f"M{start},{level} H{start + gap - 5}"))
  last = 4 + 4 * (wide + gap) + wide / 2
  first = 4 + wide / 2
  parts.append(_arrow(f"M{last},{tall + 6} V{tall + 27} H{first} V{lead + 2}"))
  update, below = 4 + 3 * (wide + gap) + wide / 2, lead + tall + 6
  parts.append(_arrow(f"M{update},{below} V{below + 20} H{first} V{below + 2}"))
  parts.append(
    f'<text class="note" x="{(first + update) / 2}" y="{below + 36}">'
    "every step: sample, score, compare, update</text></svg>"
  )
  return "".join(parts)


def ticks(low: float, high: float, count: int) -> list[float]:
  """About `count` round numbers that span [low, high]; at least 2."""
  if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
    pad = abs(low) * 0.1 or 1.0
    low, high = low - pad, high + pad
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = min(
    (power * nice for nice in (1, 2, 2.5, 5, 10)),
    key=lambda size: abs(size - raw),
  )
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [index * step for index in range(first, last + 1)]


def _line(
  series: views.Series,
  colour: int,
  to_x: Callable[[float], float],
  to_y: Callable[[float], float],
) -> str:
  """Draws the uninterrupted segments of one series."""
  runs, run = [], []
  for x, y in [*zip(series.x, series.y), (0.0, None)]:
    if y is not None:
      run.append((to_x(x), to_y(y)))
    elif run:
      runs.append(run)
      run = []
  parts = []
  for run in runs:
    if len(run) == 1:
      (x, y) = run[0]
      parts.append(
        f'<circle class="dot f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
      )
    else:
      points = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
      parts.append(f'<polyline class="line c{colour}" points="{points}"/>')
  return "".join(parts)


def _place(
  value: float, low: float, high: float, start: float, stop: float
) -> float:
  share = 0.5 if high <= low else (value - low) / (high - low)
  return start + share * (stop - start)


def _arrow(path: str) -> str:
  return f'<path class="arrow" d="{path}" marker-end="url(#tip)"/>'


def _number(value: float, all_ticks: Sequence[float]) -> str:
  """Formats a tick with enough decimals to distinguish neighbours."""
  step = all_ticks[1] - all_ticks[0]
  largest = max(abs(all_ticks[0]), abs(all_ticks[-1]))
  if largest >= 1e5 or largest < 1e-2:
    return f"{value:.1e}" if value else "0"
  decimals = 0
  while decimals < 6 and abs(round(step, decimals) - step) > 1e-9 * step:
    decimals += 1
  return (
    f"{value:.{decimals}f}".replace("-0.0", "0.0")
    if value == 0
    else (f"{value:.{decimals}f}")
  )
