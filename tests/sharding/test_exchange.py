"""Values that must be the same on every process."""

import json

import jax
import numpy as np
import pytest

from opera_jax.sharding import exchange


@pytest.fixture
def other(monkeypatch):
  """`other(values)`: a second process that brings these."""

  def bring(values):
    told = []

    def record(mine):
      told.append(mine)
      return [mine]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(exchange, "gather", record)
    exchange.check_same(values, "")
    monkeypatch.setattr(exchange, "gather", lambda mine: [mine, told[0]])

  return bring


def test_equal_values_pass(other):
  values = {"total": np.asarray([[0.5, -0.0]], np.float32)}
  other(values)
  exchange.check_same(values, "differs")


@pytest.mark.parametrize(
  "mine", [{"total": [0.5, 1.0000001]}, {"total": [0.5, 1.0], "more": [1.0]}]
)
def test_a_bit_or_a_name_that_differs_is_refused(other, mine):
  other({"total": np.asarray([0.5, 1.0], np.float32)})
  arrays = {name: np.asarray(x, np.float32) for name, x in mine.items()}
  with pytest.raises(RuntimeError, match="my reward.*differs"):
    exchange.check_same(arrays, "my reward")


def test_one_process_compares_nothing(monkeypatch):
  monkeypatch.setattr(exchange, "gather", json.loads)  # would raise
  exchange.check_same({"x": np.zeros(1)}, "")
