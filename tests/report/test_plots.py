"""Charts put numbers where they belong."""

import re

import numpy as np
import pytest

from opera_jax.evals import bootstrap, table
from opera_jax.report import curves, plots, views


def _points(svg):
  return [
    [tuple(map(float, point.split(","))) for point in points.split()]
    for points in re.findall(r'points="([^"]*)"', svg)
  ]


def test_a_line_rises_to_the_right_and_up():
  chart = views.Chart("t", [views.Series("a", [1, 2, 3], [0.0, 5.0, 10.0])])
  (line,) = _points(plots.line_chart(chart))
  (x0, y0), (x1, y1), (x2, y2) = line
  assert x0 < x1 < x2 and y0 > y1 > y2
  np.testing.assert_allclose([x1, y1], [(x0 + x2) / 2, (y0 + y2) / 2], atol=0.1)


def test_gaps_break_the_line_and_lone_points_are_dots():
  y = [1.0, 2.0, None, 3.0, None, 4.0, 5.0]
  chart = views.Chart("t", [views.Series("a", range(7), y)])
  svg = plots.line_chart(chart)
  assert [len(line) for line in _points(svg)] == [2, 2]
  assert svg.count("<circle") == 1


def test_every_series_has_its_colour_and_its_name():
  series = [views.Series(f"m{i}", [1, 2], [i, i + 1.0]) for i in range(3)]
  svg = plots.line_chart(views.Chart("t", series))
  for i in range(3):
    assert f'class="line c{i}"' in svg and f"m{i}</span>" in svg


def test_nothing_known_draws_nothing():
  chart = views.Chart("t", [views.Series("a", [1], [None])])
  assert plots.line_chart(chart) == ""


@pytest.mark.parametrize(
  "low,high", [(0, 1), (-3.2, 4.1), (1e-6, 3e-6), (5, 5), (0, 0), (-1e6, 2e5)]
)
def test_ticks_span_the_data_with_few_equal_steps(low, high):
  got = plots.ticks(low, high, 4)
  assert got[0] <= low and got[-1] >= high
  assert 2 <= len(got) <= 8
  steps = np.diff(got)
  np.testing.assert_allclose(steps, steps[0])


def test_strips_share_a_scale():
  def cell(stage, mean):
    value = bootstrap.Interval(mean, mean - 0.1, mean + 0.1, 9)
    return table.Cell(stage, value, None, "", None)

  svg = plots.interval_strip([cell("base", 0.0), cell("rl", 1.0)])
  first, second = map(float, re.findall(r'cx="([\d.]+)"', svg))
  assert first < 30 and second > 90


LINES = [
  {"step": 1, "reward/mean": 0.1, "reward/r_ppl": 0.5, "step_time": 2.0},
  {"step": 2, "reward/mean": None, "reward/r_ppl": 0.6, "optim/x": 3.0},
  {"step": 3, "reward/mean": 0.3, "reward/r_self": 0.2, "empty": None},
  {"step": 4, "lr": 0.1, "kl": 0.0},
  {"step": 5, "lr": 0.1, "kl": 0.5},
]


def test_metrics_join_their_charts_and_none_is_lost():
  charts = curves.charts(LINES)
  shown = {chart.title: chart for chart in charts}
  reward = shown["Reward"].series[0]
  assert (reward.x, reward.y) == ([1, 2, 3], [0.1, None, 0.3])
  labels = [line.label for line in shown["Terms of the reward"].series]
  assert labels == ["reward/r_self"]
  assert shown["optim/x"].folded and not shown["optim/x"].note
  assert not shown["Terms of the reward"].folded and shown["Reward"].note
  every = {line.label for chart in charts for line in chart.series}
  assert every == {"reward/mean", "reward/r_self", "optim/x", "kl"}


def test_what_never_changed_has_no_chart_and_is_listed():
  """Ranks in a group have one mean by construction: neither."""
  assert curves.constants(LINES) == {"lr": 0.1}


def _shares(svg):
  """Heights of each histogram's bins, as fractions of its highest."""
  outlines = re.findall(r'<polyline class="line c\d" points="([^"]*)"', svg)
  found = []
  for outline in outlines:
    y = [float(point.split(",")[1]) for point in outline.split()]
    height = y[0] - np.asarray(y[1:-1:2])
    found.append(height / height.max())
  return found


def test_a_histogram_shows_shares_over_common_bins():
  values = {"base": [0, 0, 0, 1], "rl": [1, 2, float("nan")]}
  svg = plots.histogram(views.Histogram("count", values))
  base, rl = _shares(svg)
  np.testing.assert_allclose(base, [1, 1 / 3, 0], atol=0.01)
  np.testing.assert_allclose(rl, [0, 1, 1], atol=0.01)
  assert "base, 4 completions, mean 0.25" in svg
  assert "rl, 2 completions, mean 1.5" in svg


@pytest.mark.parametrize(
  "values", [[0.5], [3, 3], [0, 500], [-1.5, 2.25, 7.0], [1e-12, 1.0], [1e9]]
)
def test_bins_hold_every_value(values):
  edges = plots.bin_edges(np.asarray(values, float), 20)
  assert (np.diff(edges) > 0).all() and len(edges) <= 21
  assert np.histogram(values, edges)[0].sum() == len(values)


def test_shares_between_whole_percents_are_labelled_as_they_are():
  values = list(range(10)) * 12  # a bin each, 10 % high: ticks every 2.5 %
  svg = plots.histogram(views.Histogram("count", {"rl": values}))
  labels = re.findall(r'text-anchor="end">([^<]*)%<', svg)
  assert labels == ["0.0", "2.5", "5.0", "7.5", "10.0"]


def test_a_histogram_of_nothing_draws_nothing():
  assert plots.histogram(views.Histogram("x", {"base": [float("nan")]})) == ""


def test_long_metrics_are_averaged():
  lines = [{"step": i, "sft/loss": float(i)} for i in range(1000)]
  (chart,) = curves.charts(lines)
  (series,) = chart.series
  assert len(series.x) <= 300
  assert np.mean(series.y[:-1]) == pytest.approx(np.mean(series.x[:-1]))
  assert series.y[0] == 1.5


def test_no_metrics_no_charts():
  assert curves.charts([]) == []
