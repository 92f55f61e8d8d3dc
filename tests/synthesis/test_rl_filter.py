"""RL keeps what the policy neither masters nor fails."""

import pytest

from opera_jax import structs
from opera_jax.synthesis import rl_filter

MATHS = [structs.Prompt(f"m{k}", "math", "1 + 1?", "2") for k in range(5)]
OPEN = [
  structs.Prompt(f"o{s}", "open_ended", "Tell.", "r", {"score": s})
  for s in (1, 2.0, 2.5, 3, 4.5)
]
RIGHT = {f"m{k}": k for k in range(5)}


def test_exactly_k_of_n_and_a_band():
  rules = rl_filter.Rules(samples=4, right=(1, 2), judge="column:score")
  why, counts = rl_filter.verdicts(
    MATHS + OPEN,
    rules,
    right=RIGHT,
    score=rl_filter.column_scores(OPEN, rules.judge),
  )
  assert why == [
    "0 of 4 right", None, None, "3 of 4 right", "4 of 4 right",
    "score below 2", None, None, None, "score above 3",
  ]  # fmt: skip
  assert counts["kept"] == 5 and sum(counts.values()) == 10


def test_a_rule_that_is_off_keeps_everything():
  assert not rl_filter.Rules().active()
  none = {"right": {}, "score": {}}
  why, _ = rl_filter.verdicts(MATHS + OPEN, rl_filter.Rules(), **none)
  assert why == [None] * 10
  judged = rl_filter.Rules(judge="column:score")
  score = rl_filter.column_scores(OPEN, judged.judge)
  why, _ = rl_filter.verdicts(MATHS + OPEN, judged, right={}, score=score)
  assert why[:5] == [None] * 5 and None not in (why[5], why[9])


def test_errors():
  with pytest.raises(ValueError, match="'m0'.*column 'grade', which is None"):
    rl_filter.column_scores(MATHS, "column:grade")
  with pytest.raises(ValueError, match="No RL prompt passed.*0 of 8 right"):
    rl_filter.verdicts(
      MATHS[:1], rl_filter.Rules(samples=8), right=RIGHT, score={}
    )
  with pytest.raises(ValueError, match=r"Of 4 samples none can have \(5,\)"):
    rl_filter.Rules(samples=4, right=(5,))
  with pytest.raises(ValueError, match="band of scores"):
    rl_filter.Rules(band=(3.0, 2.0))
