"""The table says what the intervals allow, and nothing more."""

import numpy as np
import pytest

from opera_jax.evals import bootstrap, table

FACTS = table.Measure("facts", "facts kept")
LENGTH = table.Measure("length", "thought length", "neither", "tokens")
LOSS = table.Measure("loss", "held-out loss", "lower", "nats/token")


def _values(shift):
  generator = np.random.default_rng(0)
  base = generator.normal(2, 1, 200)
  noise = generator.normal(0, 0.1, (2, 200))
  return {
    "base": {"facts": base, "length": 9 * base, "loss": base},
    "sft": {
      "facts": base + shift + noise[0],
      "length": 9 * base + shift + noise[0],
      "loss": base + shift + noise[0],
    },
  }


@pytest.mark.parametrize(
  "measure,shift,words,good",
  [
    (FACTS, 0.5, "facts kept rose", True),
    (FACTS, -0.5, "facts kept fell", False),
    (FACTS, 0.0, "facts kept did not rise", None),
    (LOSS, 0.5, "held-out loss rose", False),
    (LOSS, -0.5, "held-out loss fell", True),
    (LOSS, 0.0, "held-out loss did not fall", None),
    (LENGTH, 0.5, "thought length rose", None),
    (LENGTH, 0.0, "no change in thought length shown", None),
  ],
)
def test_verdicts(measure, shift, words, good):
  (row,) = table.assemble(_values(shift), [measure])
  first, second = row.cells
  assert (first.stage, first.change, first.verdict) == ("base", None, "")
  assert (second.verdict, second.good) == (words, good)


def test_cells_are_the_bootstrap():
  values = _values(0.3)
  (row,) = table.assemble(values, [FACTS], resamples=100, seed=4)
  after, before = values["sft"]["facts"], values["base"]["facts"]
  assert row.cells[1].value == bootstrap.mean_interval(
    after, resamples=100, seed=4
  )
  assert row.cells[1].change == bootstrap.paired_difference(
    after, before, resamples=100, seed=4
  )


def test_markdown_holds_every_stage_and_verdict():
  text = table.as_markdown(table.assemble(_values(0.5), [FACTS, LOSS]))
  assert text.splitlines()[0] == "| measure | base | sft | verdicts |"
  assert "sft: facts kept rose" in text
  assert "held-out loss (nats/token)" in text
  assert table.as_markdown([]) == ""


@pytest.mark.parametrize(
  "interval,sign,text",
  [
    ((0.41234, 0.38, 0.44444), False, "0.412 [0.380, 0.444]"),
    ((12.34, 11.0, 13.0), True, "+12.3 [+11.0, +13.0]"),
    ((1234.5, 1200.0, 1300.0), False, "1234 [1200, 1300]"),
    ((0.0, 0.0, 0.0), False, "0.0000 [0.0000, 0.0000]"),
    ((2.0, np.nan, np.nan), False, "2.00"),
    ((0.0001, -0.2, 0.2), True, "+0.000 [-0.200, +0.200]"),
  ],
)
def test_intervals_show_the_digits_that_count(interval, sign, text):
  got = table.format_interval(bootstrap.Interval(*interval, 9), sign=sign)
  assert got == text


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="Stage 'base' has no measure 'x'"):
    table.assemble(_values(0.0), [table.Measure("x", "x")])
  with pytest.raises(ValueError, match="better is 'up'"):
    table.Measure("facts", "facts kept", "up")
