"""What counts as the final answer, and as the right one."""

import time

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.rewards import verifiable


@pytest.mark.parametrize(
  "text,answer",
  [
    ("<think>5</think>It is 7.", "7"),
    ("<think>maybe 12", None),
    ("no thought, but 12 apples", "12"),
    ("<think>a</think>none", None),
    (r"<think>a</think>\boxed{3} or \boxed{4} of 9", "4"),
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"so \boxed{\text{Tuesday}}.", "Tuesday"),
    ("it costs $1,234.50.", "1234.50"),
    ("10-4 = 6 minus -3", "-3"),
    ("we keep 10-4", "4"),
    ("about 3/4 of it", "3/4"),
    (r"equals \dfrac{2}{3}.", r"\frac{2}{3}"),
    ("rows 1,2", "2"),
    ("<think>a</think>b<think>c</think> 8", "8"),
  ],
)
def test_final_answer(text, answer):
  assert verifiable.final_answer(text) == answer


@pytest.mark.parametrize(
  "text,reference,right",
  [
    ("<think>x</think>The answer is 18.", "She has 9 * 2 = 18\n#### 18", True),
    ("<think>x</think>The answer is 18.00 dollars", "#### 18", True),
    ("The answer is 1,000", "1000", True),
    ("It is 0.5", "1/2", True),
    (r"\boxed{\frac{2}{4}}", "0.5", True),
    (r"\boxed{-\frac{1}{2}}", "-0.5", True),
    (r"\boxed{x + 1}", "x+1", True),
    (r"\boxed{x + 1}", "1+x", False),
    ("The answer is 19", "#### 18", False),
    ("<think>18", "#### 18", False),
    (r"\boxed{50\%}", "50", True),
    ("3/0", "1", False),
  ],
)
def test_correct(text, reference, right):
  assert verifiable.correct(text, reference) is right


def test_math_verify_knows_equal_expressions():
  pytest.importorskip("math_verify")
  sure = {"reference": "1+x", "method": "math_verify"}
  assert verifiable.correct(r"\boxed{x + 1}", **sure)
  assert not verifiable.correct(r"\boxed{x + 2}", **sure)


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="needs a final answer"):
    verifiable.correct("7", " #### ")
  with pytest.raises(ValueError, match="Unknown method 'eval'"):
    verifiable.correct("7", "7", method="eval")


def _warm():
  """Loads this module in the other process."""


def _forever(truth, answer, timeout):
  """Hears no signal of math-verify."""
  import time

  if truth == "1+x":
    time.sleep(60)
  return truth == "y+2"


def test_an_overdue_answer_falls_back_and_the_rest_goes_on(monkeypatch):
  monkeypatch.setattr(verifiable.math_worker, "equal", _forever)
  monkeypatch.setattr(verifiable.math_worker, "warm", _warm)
  begin = time.monotonic()
  got = verifiable.correct_many(
    [r"\boxed{x+1}", r"\boxed{2+y}", "7", "no answer"],
    ["1+x", "y+2", "7", "8"],
    method="math_verify",
    timeout=0,
    workers=1,
  )
  assert got == [False, True, True, False]
  assert time.monotonic() - begin < 40


def test_only_maths_prompts_are_ever_right(rollouts):
  tasks = [
    structs.Prompt("a", "math", "q", "#### 4"),
    structs.Prompt("b", "open_ended", "q", "4"),
  ]
  case = rollouts([["4", "5"], ["4", "4"]], tasks)
  parts = verifiable.Reward().rewards(case, None)
  np.testing.assert_array_equal(parts["correct"], [[1, 0], [0, 0]])
  np.testing.assert_array_equal(parts["total"], parts["correct"])
