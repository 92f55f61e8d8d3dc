"""Renders the page of a prompt pool: rejected prompts, and the clusters."""

import dataclasses
import html
import os
from collections.abc import Mapping, Sequence

from opera_jax.report import page

_WIDTH, _HEIGHT, _MARGIN = 720, 480, 14
_LONGEST = 400  # characters of a prompt that are shown


@dataclasses.dataclass(frozen=True)
class Cluster:
  """One cluster of prompts; the largest comes first."""

  size: int
  taken: int
  tasks: Mapping[str, int]
  nearest: Sequence[str]  # prompts nearest to the centre, raw text


@dataclasses.dataclass(frozen=True)
class Point:
  """A prompt in the plot, x and y in [-1, 1]."""

  x: float
  y: float
  cluster: int
  taken: bool


@dataclasses.dataclass(frozen=True)
class View:
  """The data of the page, with raw text; rendering escapes it."""

  counts: Mapping[str, int]  # "read", reasons of rejection, "kept"
  embedder: str
  silhouette: Mapping[int, float]  # of each number of clusters that was tried
  clusters: Sequence[Cluster]
  points: Sequence[Point]
  rejected: Mapping[str, Sequence[tuple[str, str]]]  # reason -> (prompt, why)


def write(path: str | os.PathLike, view: View) -> None:
  """Renders the page to a file, atomically."""
  page.save(path, render(view))


def render(view: View) -> str:
  """Renders the page as HTML."""
  kept, read = view.counts["kept"], view.counts["read"]
  return page.document(
    "Prompt pool",
    "<header><h1>Prompt pool</h1>"
    f"<p>{kept:,} of {read:,} prompts, sampled from {len(view.clusters)} "
    f"clusters of embeddings by {_text(view.embedder)}.</p></header>"
    f"{_counts(view.counts)}{_map(view)}{_silhouette(view.silhouette)}"
    f"{_clusters(view.clusters)}{_rejected(view.rejected)}",
  )


def _counts(counts: Mapping[str, int]) -> str:
  rows = "".join(
    f'<tr><th scope="row">{_text(name)}</th><td class="count">{count:,}</td>'
    f"<td>{_bar(count, counts['read'])}</td></tr>"
    for name, count in counts.items()
    if name != "clusters"
  )
  return (
    "<section><h2>From read to kept</h2><p>A prompt is counted under the "
    "first rule that it breaks.</p>"
    f'<table class="counts">{rows}</table></section>'
  )


def _bar(part: int, whole: int) -> str:
  share = 100 * part / max(whole, 1)
  return f'<i class="bar" style="width:{1.6 * share:.1f}px"></i>'


def _map(view: View) -> str:
  dots = "".join(
    f'<circle stroke="{_colour(p.cluster)}" '
    f'fill="{_colour(p.cluster) if p.taken else "none"}" '
    f'cx="{_across(p.x):.1f}" cy="{_down(p.y):.1f}" r="3"/>'
    for p in view.points
  )
  labels = []
  for index in range(len(view.clusters)):
    mine = [p for p in view.points if p.cluster == index]
    if mine:
      # Label the point nearest to the mean, since the mean may lie outside a
      # curved cluster.
      x = sum(p.x for p in mine) / len(mine)
      y = sum(p.y for p in mine) / len(mine)
      at = min(mine, key=lambda p: (p.x - x) ** 2 + (p.y - y) ** 2)
      labels.append(
        f'<text class="place" x="{_across(at.x):.1f}" '
        f'y="{_down(at.y) + 4:.1f}">{index + 1}</text>'
      )
  return (
    "<section><h2>Map</h2><p>t-SNE of "
    f"{len(view.points):,} prompts: neighbours are alike, distances between "
    "groups mean little. Filled dots are in the pool, rings are not; numbers "
    "are those of the clusters below.</p>"
    f'<figure class="chart"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
    f'aria-label="Map of the prompts">{dots}{"".join(labels)}</svg></figure>'
    "</section>"
  )


def _silhouette(tried: Mapping[int, float]) -> str:
  if not tried:
    return ""
  best = max(tried, key=tried.__getitem__)
  cells = "".join(
    f"<tr><th scope='row'>{k}{' (chosen)' if k == best else ''}</th>"
    f'<td class="count">{score:.3f}</td></tr>'
    for k, score in tried.items()
  )
  return (
    "<section><h2>Number of clusters</h2><p>Mean silhouette on a sample, from "
    "-1 to 1; the highest was taken. Near 0 the clusters run into one another."
    f'</p><table class="counts">{cells}</table></section>'
  )


def _clusters(clusters: Sequence[Cluster]) -> str:
  largest = max(c.size for c in clusters)
  rows = []
  for index, one in enumerate(clusters):
    tasks = ", ".join(f"{n:,} {_text(t)}" for t, n in one.tasks.items())
    nearest = "".join(f"<li>{_text(_cut(text))}</li>" for text in one.nearest)
    rows.append(
      f'<tr><th scope="row"><i class="swatch" '
      f'style="height:12px;background:{_colour(index)}"></i>'
      f"{index + 1}</th>"
      f'<td class="count">{one.taken:,} of {one.size:,}'
      f"{_bar(one.size, 2 * largest)}<small>{tasks}</small></td>"
      f'<td><ol class="nearest said">{nearest}</ol></td></tr>'
    )
  return (
    "<section><h2>Clusters</h2><p>Prompts taken of those there, and the ones "
    "nearest to the centre.</p>"
    f'<div class="wide"><table class="clusters">{"".join(rows)}</table></div>'
    "</section>"
  )


def _rejected(rejected: Mapping[str, Sequence[tuple[str, str]]]) -> str:
  if not rejected:
    return ""
  parts = []
  for reason, shown in rejected.items():
    items = "".join(
      f"<li>{_text(_cut(text))} <small>{_text(why)}</small></li>"
      for text, why in shown
    )
    parts.append(
      f"<details><summary>{_text(reason)}: the first {len(shown)}</summary>"
      f'<ol class="nearest said">{items}</ol></details>'
    )
  return (
    "<section><h2>Rejected</h2><p>All of them stand in rejected.jsonl, each "
    f"with its reason.</p>{''.join(parts)}</section>"
  )


def _across(x: float) -> float:
  return _MARGIN + (x + 1) / 2 * (_WIDTH - 2 * _MARGIN)


def _down(y: float) -> float:
  return _MARGIN + (1 - y) / 2 * (_HEIGHT - 2 * _MARGIN)


def _colour(index: int) -> str:
  """Hues in steps of the golden angle, so that neighbouring numbers differ."""
  return f"hsl({round(index * 137.508) % 360},60%,50%)"


def _cut(text: str) -> str:
  return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "\u2026"


def _text(value: object) -> str:
  return html.escape(str(value), quote=True)
