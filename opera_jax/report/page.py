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
from opera_jax.report import names, plots, views

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
  sections = {
    "Before and after": _results(page.rows),
    "Curves": _charts(page.charts, page.constants),
    "Distributions": _histograms(page.histograms),
    "Prompts": _cards(page.cards),
    "Config": _config(page.config),
  }
  shown = {title: text for title, text in sections.items() if text}
  body = [
    f"<header><h1>{_text(page.title)}</h1>",
    f"<p>{_text(page.summary)}</p>" if page.summary else "",
    _contents(list(shown)),
    f'<div class="wide">{plots.chain(page.captions)}</div>',
    "</header>",
    *(
      f'<section id="{_anchor(title)}"><h2>{title}</h2>{text}</section>'
      for title, text in shown.items()
    ),
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


def colour_scale(cards: Sequence[views.PromptCard]) -> float:
  """The |delta| with full colour: the 95th percentile.

  A maximum would let one outlier make everything else pale. In nats per token;
  0.01 if there are no deltas.
  """
  deltas = [
    abs(step.delta)
    for card in cards
    for completion in card.completions
    for step in completion.steps
    if _scored(step.delta)
  ]
  return max(float(np.quantile(deltas, 0.95)), 0.01) if deltas else 0.01


def _anchor(title: str) -> str:
  return title.lower().replace(" ", "-")


def _contents(titles: Sequence[str]) -> str:
  if not titles:
    return ""
  links = "".join(
    f'<a href="#{_anchor(title)}">{title}</a>' for title in titles
  )
  return f'<nav aria-label="Contents">{links}</nav>'


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
    f"<p>Means over {_text(value.count)} held-out prompts with "
    f"{value.level:.0%} bootstrap intervals; a change is paired by prompt, "
    "against the stage to its left. A verdict names a direction only where the "
    "interval of the change excludes 0.</p>"
    '<div class="wide"><table class="results"><thead><tr><th>measure</th>'
    f"{heads}<th></th></tr></thead><tbody>{body}</tbody></table></div>"
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
    cells.append(
      f'<td data-stage="{_text(cell.stage)}"><b>{mean}</b> '
      f"<span>{interval}</span>{change}</td>"
    )
  return (
    f'<tr><th scope="row">{_text(row.measure.label)} {unit}</th>'
    f"{''.join(cells)}<td>{plots.interval_strip(row.cells)}</td></tr>"
  )


def _cards(cards: Sequence[views.PromptCard]) -> str:
  if not cards:
    return ""
  scale = colour_scale(cards)
  found = {
    name: None
    for card in cards
    for one in card.completions
    for name in one.terms
  }
  legend = "".join(
    f"<dt>{_text(names.label(name))}</dt><dd>{_text(names.meaning(name))}</dd>"
    for name in found
    if names.meaning(name)
  )
  if legend:
    legend = (
      "<details><summary>What the numbers mean</summary>"
      f"<dl>{legend}</dl></details>"
    )
  shown = "".join(_card(card, scale) for card in cards)
  return (
    "<p>The number beside a step says by how much the step changed the mean "
    "log-probability of the reference answer. A "
    '<span class="badge">reflective</span> step with a rise counts for the '
    "reward; magnitudes do not.</p>"
    '<div class="scale"><span>&#9660; less likely</span>'
    f"<span>&minus;{scale:.2f}</span>"
    '<i class="ramp"></i>'
    f"<span>+{scale:.2f} nats/token</span><span>&#9650; more likely</span>"
    f"</div>{legend}{shown}"
  )


def _card(card: views.PromptCard, scale: float) -> str:
  columns = "".join(
    _completion(completion, scale) for completion in card.completions
  )
  return (
    f'<article class="card">{_block("prompt", card.prompt)}'
    f"{_block('reference', card.reference)}"
    f'<div class="columns">{columns}</div></article>'
  )


def _completion(completion: views.CompletionView, scale: float) -> str:
  steps = "".join(_step(step, scale) for step in completion.steps)
  if completion.steps:
    steps = f'<ol class="steps">{steps}</ol>'
  else:
    steps = '<p class="none">No closed thought, so no steps.</p>'
  note = f' <span class="note">{_text(completion.note)}</span>'
  return (
    f'<div class="completion"><h3>{_text(completion.stage)}'
    f"{note if completion.note else ''}</h3>{_terms(completion.terms)}"
    f"{steps}{_block('answer', completion.answer)}</div>"
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


def _charts(
  sections: Mapping[str, Sequence[views.Chart]],
  constants: Mapping[str, Mapping[str, float]],
) -> str:
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
    same = constants.get(section, {})
    if same:
      listed = ", ".join(
        f"{name} = {value:.4g}" for name, value in same.items()
      )
      drawn.append(
        f"<details><summary>{len(same)} that never changed</summary>"
        f'<p class="said">{_text(listed)}</p></details>'
      )
  return "".join(drawn)


def _figures(charts: Sequence[views.Chart]) -> str:
  figures = "".join(plots.line_chart(chart) for chart in charts)
  return f'<div class="charts">{figures}</div>' if figures else ""


def _histograms(sections: Mapping[str, Sequence[views.Histogram]]) -> str:
  drawn = []
  for section, histograms in sections.items():
    figures = "".join(plots.histogram(one) for one in histograms)
    if figures:
      drawn.append(
        f'<h3>{_text(section)}</h3><div class="charts">{figures}</div>'
      )
  return "".join(drawn)


def _config(config: Mapping[str, object]) -> str:
  if not config:
    return ""
  rows = "".join(
    f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>'
    for name, value in config.items()
  )
  return (
    f"<details><summary>{len(config)} values</summary>"
    f'<div class="wide"><table>{rows}</table></div></details>'
  )


def _terms(terms: Mapping[str, float]) -> str:
  if not terms:
    return ""
  shown = "".join(
    f'<span title="{_text(names.meaning(name))}">'
    f"{_text(names.label(name))} <b>{value:.3g}</b></span>"
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
