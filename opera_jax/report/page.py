"""Renders the self-contained HTML page of a run.

It has no scripts, links, fonts or external images, so the file can be mailed.
All text of models and data sets passes through `html.escape`, and the page's
policy forbids scripts.
"""

import html
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import numpy as np

from opera_jax import atomic_file
from opera_jax.evals import table
from opera_jax.report import plots, views

_POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
  "form-action 'none'; frame-src 'none'; object-src 'none'; base-uri 'none'"
)
# A content security policy cannot forbid these elements, so they are refused.
_NEVER = ("<meta", "<script", "<iframe", "<form", "<base", "<object", "<embed")


def write(path: str | os.PathLike, page: views.Page) -> None:
  """Renders a page to a file, atomically."""
  save(path, render(page))


def save(path: str | os.PathLike, document: str) -> None:
  """Writes HTML to a file, atomically."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # A model may emit a lone surrogate, which cannot be encoded.
  atomic_file.write(path, document, errors="replace")


def render(page: views.Page) -> str:
  """Renders the page as HTML."""
  body = [
    f"<header><h1>{_text(page.title)}</h1>",
    f"<p>{_text(page.summary)}</p>" if page.summary else "",
    plots.chain(page.captions),
    "</header>",
    _results(page.rows),
    _thoughts(page.thoughts),
    _samples(page.samples),
    _charts(page.charts),
    _config(page.config),
  ]
  return document(page.title, "".join(body))


def document(title: str, body: str) -> str:
  """Builds a complete HTML document in the report's style.

  Args:
    title: as plain text.
    body: as HTML, with untrusted text already escaped.

  Raises:
    ValueError: the body has an active element, so untrusted text was not
      escaped.
  """
  found = [name for name in _NEVER if name in body.lower()]
  if found:
    raise ValueError(
      f"The page of {title!r} would contain {found}; text of models and data "
      "must be escaped. Escape it where it is inserted."
    )
  style = pathlib.Path(__file__).with_name("style.css").read_text("utf-8")
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f"<title>{_text(title)}</title><style>{style}</style></head>"
    f"<body><main>{body}</main></body></html>\n"
  )


def colour_scale(thoughts: Sequence[views.ThoughtView]) -> float:
  """The |delta| with full colour: the 95th percentile.

  A maximum would let one outlier make everything else pale. In nats per token;
  0.01 if there are no deltas.
  """
  deltas = [
    abs(step.delta)
    for thought in thoughts
    for step in thought.steps
    if _scored(step.delta)
  ]
  return max(float(np.quantile(deltas, 0.95)), 0.01) if deltas else 0.01


def _results(rows: Sequence[table.Row]) -> str:
  if not rows:
    return ""
  stages = [cell.stage for cell in rows[0].cells]
  value = rows[0].cells[0].value
  heads = "".join(
    f'<th scope="col"><i class="swatch b{index % plots.COLOURS}"></i>'
    f"{_text(stage)}</th>"
    for index, stage in enumerate(stages)
  )
  body = "".join(_result_row(row) for row in rows)
  return (
    "<section><h2>Before and after</h2>"
    f"<p>Means over {_text(value.count)} held-out prompts with "
    f"{value.level:.0%} bootstrap intervals; a change is paired by prompt, "
    "against the stage to its left. A verdict names a direction only where the "
    "interval of the change excludes 0.</p>"
    '<div class="wide"><table class="results"><thead><tr><th>measure</th>'
    f"{heads}<th></th></tr></thead><tbody>{body}</tbody></table></div>"
    "</section>"
  )


def _result_row(row: table.Row) -> str:
  unit = f"<small>{_text(row.measure.unit)}</small>" if row.measure.unit else ""
  cells = []
  for cell in row.cells:
    change = ""
    if cell.change is not None:
      mood = {True: "good", False: "bad", None: "open"}[cell.good]
      change = (
        '<div class="change">change '
        f"{table.format_interval(cell.change, sign=True)}</div>"
        f'<div class="verdict {mood}">{_text(cell.verdict)}</div>'
      )
    value = table.format_interval(cell.value)
    mean, _, interval = value.partition(" ")
    cells.append(f"<td><b>{mean}</b> <span>{interval}</span>{change}</td>")
  return (
    f'<tr><th scope="row">{_text(row.measure.label)} {unit}</th>'
    f"{''.join(cells)}<td>{plots.interval_strip(row.cells)}</td></tr>"
  )


def _thoughts(thoughts: Sequence[views.ThoughtView]) -> str:
  if not thoughts:
    return ""
  scale = colour_scale(thoughts)
  shown = "".join(_thought(thought, scale) for thought in thoughts)
  return (
    "<section><h2>Thoughts, scored step by step</h2>"
    "<p>The number beside a step says by how much the step changed the mean "
    "log-probability of the reference answer. A "
    '<span class="badge">reflective</span> step with a rise counts for the '
    "reward; magnitudes do not.</p>"
    '<div class="scale"><span>&#9660; less likely</span>'
    f"<span>&minus;{scale:.2f}</span>"
    '<i class="ramp"></i>'
    f"<span>+{scale:.2f} nats/token</span><span>&#9650; more likely</span>"
    f"</div>{shown}</section>"
  )


def _thought(thought: views.ThoughtView, scale: float) -> str:
  steps = "".join(_step(step, scale) for step in thought.steps)
  if not thought.steps:
    steps = '<p class="none">No closed thought, so no steps.</p>'
  note = f' <span class="note">{_text(thought.note)}</span>'
  return (
    f"<article><h3>{_text(thought.stage)}{note if thought.note else ''}</h3>"
    f"{_terms(thought.terms)}"
    f"{_block('prompt', thought.prompt)}"
    f'<ol class="steps">{steps}</ol>'
    f"{_block('answer', thought.answer)}"
    f"{_block('reference', thought.reference)}</article>"
  )


def _step(step: views.StepView, scale: float) -> str:
  badge = '<span class="badge">reflective</span>' if step.reflective else ""
  if not _scored(step.delta):
    return (
      '<li class="step unscored"><div class="delta">not scored</div>'
      f'<div class="said">{badge}{_text(step.text)}</div></li>'
    )
  strength = min(abs(step.delta) / scale, 1.0)
  side = "up" if step.delta > 0 else "down" if step.delta < 0 else "flat"
  mark = {"up": "&#9650;", "down": "&#9660;", "flat": "="}[side]
  counts = ""
  if step.reflective and step.delta > 0:
    counts = '<span class="counts">counts</span>'
  return (
    f'<li class="step {side}" style="--a:{strength:.3f}">'
    f'<div class="delta">{mark} {step.delta:+.3f}{counts}</div>'
    f'<div class="said">{badge}{_text(step.text)}</div></li>'
  )


def _samples(samples: Sequence[views.SampleView]) -> str:
  if not samples:
    return ""
  shown = []
  for sample in samples:
    answers = "".join(
      f"<div><h4>{_text(answer.stage)}</h4>{_terms(answer.terms)}"
      f"{_block('thought', answer.thought)}{_block('answer', answer.answer)}"
      "</div>"
      for answer in sample.answers
    )
    shown.append(
      f"<article>{_block('prompt', sample.prompt)}"
      f'<div class="answers">{answers}</div>'
      f"{_block('reference', sample.reference)}</article>"
    )
  return f"<section><h2>Samples</h2>{''.join(shown)}</section>"


def _charts(sections: Mapping[str, Sequence[views.Chart]]) -> str:
  drawn = []
  for section, charts in sections.items():
    shown = _figures([chart for chart in charts if not chart.folded])
    folded = [chart for chart in charts if chart.folded]
    if shown or folded:
      drawn.append(f"<h3>{_text(section)}</h3>{shown}")
    if folded:
      drawn.append(
        f"<details><summary>{len(folded)} more</summary>"
        f"{_figures(folded)}</details>"
      )
  if not drawn:
    return ""
  return f"<section><h2>Curves</h2>{''.join(drawn)}</section>"


def _figures(charts: Sequence[views.Chart]) -> str:
  figures = "".join(plots.line_chart(chart) for chart in charts)
  return f'<div class="charts">{figures}</div>' if figures else ""


def _config(config: Mapping[str, object]) -> str:
  if not config:
    return ""
  rows = "".join(
    f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>'
    for name, value in config.items()
  )
  return (
    "<section><h2>Config</h2><details><summary>"
    f"{len(config)} values</summary><table>{rows}</table></details></section>"
  )


def _terms(terms: Mapping[str, float]) -> str:
  if not terms:
    return ""
  shown = "".join(
    f"<span>{_text(name)} <b>{value:.3g}</b></span>"
    for name, value in terms.items()
  )
  return f'<div class="terms">{shown}</div>'


def _block(label: str, text: str) -> str:
  return (
    f'<div class="block"><div class="label">{_text(label)}</div>'
    f'<div class="said">{_text(text) or "<i>empty</i>"}</div></div>'
  )


def _scored(delta: float | None) -> TypeGuard[float]:
  return delta is not None and math.isfinite(delta)


def _text(value: object) -> str:
  """Escapes a value for HTML."""
  return html.escape(str(value), quote=True)
