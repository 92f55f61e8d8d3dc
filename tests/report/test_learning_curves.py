"""Seeds of different pace are compared at equal sampled tokens."""

import numpy as np
import pytest

from opera_jax.report import learning_curves


def _lines(tokens, slope):
  """One metric that rises by `slope` a token."""
  total = np.cumsum(tokens)
  return [
    {"rollout/tokens": n, "reward/mean": slope * t, "gap": None}
    for n, t in zip(tokens, total)
  ]


def test_values_are_read_at_common_token_counts():
  seeds = [_lines([10] * 9, 1.0), _lines([30] * 4, 2.0)]
  tokens, value = learning_curves.series(seeds, "reward/mean", points=7)
  assert tokens[0] == 30 and tokens[-1] == 90
  np.testing.assert_allclose(value, [tokens, 2 * tokens])
  tokens, value = learning_curves.series(seeds, "gap")
  assert tokens.size == 0 and value.shape == (2, 0)


def test_a_picture_is_written(tmp_path):
  path = tmp_path / "curves.png"
  cells = {"a": [_lines([10] * 5, 1.0)] * 2, "b": [_lines([20] * 5, 0.5)]}
  learning_curves.write(cells, ("reward/mean", "nowhere"), path)
  assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["$x_", "a $\\frac{ b$", "_hidden", "100%"])
def test_any_name_can_be_drawn(tmp_path, name):
  """A label that matplotlib takes for broken maths ended the run."""
  line = [
    {"rollout/tokens": 10.0, name: 0.5},
    {"rollout/tokens": 10.0, name: 1},
  ]
  path = tmp_path / "curves.png"
  learning_curves.write({name: [line], "b": [line]}, [name], path)
  assert path.stat().st_size > 1000
