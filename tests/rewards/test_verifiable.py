"""What counts as the final answer, and as the right one."""

import pytest

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
