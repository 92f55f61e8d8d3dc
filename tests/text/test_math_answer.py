"""Where a text states its final answer, and what of it is one."""

import growth
import pytest

from opera_jax.text import math_answer


@pytest.mark.parametrize(
  "text,answer,sure",
  [
    ("<think>5</think>It is 7.", "7", True),
    ("no thought, but 12 apples", "12", True),
    (r"<think>a</think>\boxed{3} or \boxed{4} of 9", "4", False),
    (r"\boxed{3}, so \boxed{3}", "3", True),
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
    (r"so \boxed{\{1, 2\}}", r"\{1, 2\}", True),
    (r"so \boxed {5}", "5", True),
    (r"so \fbox{5}", "5", True),
    (r"\boxed{5} and then \boxed{6", "6", False),
    ("it costs $1,234.50.", "$1,234.50", True),
    ("it costs $5 and not $6.", "$6", True),
    ("10-4 = 6 minus -3", "-3", False),
    ("we lose 7, that is minus 3", "-3", True),
    ("we lose 7, that is negative $3.", "-$3", True),
    ("It is \u00bd of it", "1/2", True),
    ("It is 1\u00bd of it", "1 1/2", True),
    ("about 1.5 \u00d7 10^3 of them", "1.5 \u00d7 10^3", True),
    ("at 12:30", "12:30", True),
    ("Answer: option B.", "B", True),
    ("Answer: (B) the 3 cats", "(B) the 3 cats", True),
    ("The answer is 5 or 6.", "5 or 6", True),
    ("we keep 10-4", "4", False),
    ("about 3/4 of it", "3/4", True),
    (r"equals \dfrac{2}{3}.", r"\dfrac{2}{3}", True),
    (r"equals $\frac{1+\sqrt{5}}{2}$.", r"\frac{1+\sqrt{5}}{2}", True),
    (r"so \[ x = 5 \] holds", "x = 5", True),
    ("rows 1,2", "2", False),
    ("there are 2, 3 or 5", "5", False),
    ("that is 5 + x", "5", False),
    ("the point (3, 4)", "(3, 4)", True),
    ("ABC2D", "2", False),
    ("<think>a</think>b<think>c</think> 8", "8", True),
    ("<think>a</think>It is 5 <think>6", "5", True),
    ("9 * 2 = 18\n#### 18", "18", True),
    ("#### Step 1\nwe get 7", "7", True),
    ("#### 18\nas I said in 2 lines", "18", True),
    ("The answer is 5. I used 3 steps.", "5", True),
    ("The Answer is: **5**. I used 3 steps.", "5", True),
    ("the answer to the first part is 5", "5", True),
    ("Answer: (B)\nas 3 is odd", "(B)", True),
    ("The answer is $\\frac12$ of 3", r"\frac12", False),
    ("The answer is 28 percent", "28 percent", True),
    ("The answer is $28$ percent", "28%", True),
    ("The answer is 2 + 3 = 5.", "5", True),
    ("The answer is not 5 but 7", "not 5 but 7", False),
    ("The answer is 4. So the answer is 5.", "5", True),
    ("The answer is 3.5.", "3.5", True),
    ("Answer: the largest is 34.", "34", True),
    ("Answer: the largest of the 5 is 34.", "34", False),
    ("Answer: it is not so that it is 34", "it is not so that it is 34", False),
    ("So it is $x$.", "x", True),
    ("It is $x$ or $y$.", "y", False),
    ("The answer is:\n\\[ 5 \\]", "5", True),
  ],
)
def test_final_answer(text, answer, sure):
  assert math_answer.final_answer(text) == math_answer.Stated(answer, sure)


@pytest.mark.parametrize(
  "text", ["<think>maybe 12", "<think>a</think>none", "", "no <think>5"]
)
def test_no_final_answer(text):
  assert math_answer.final_answer(text) is None


@pytest.mark.parametrize(
  "text,after",
  [
    ("<think>a</think>b", "b"),
    ("b", "b"),
    ("a</think>b", "b"),
    ("<think>a", None),
    ("<think>a</think>b<think>c", "b"),
    ("<think>a</think>b<think>c</think>d", "d"),
  ],
)
def test_after_thought(text, after):
  assert math_answer.after_thought(text) == after


@pytest.mark.parametrize(
  "reference,answer",
  [
    ("18", "18"),
    ("She has 9 * 2 = 18\n#### 18", "18"),
    ("#### 1\n#### -\u0662", "-2"),
    (r"so $\boxed{x+1}$.", "x+1"),
    ("So the answer is 5.", "5"),
    ("(3, 4)", "(3, 4)"),
    ("A", "A"),
    ("\u221e", "\u221e"),
    (r"\infty", r"\infty"),
    (r"\emptyset", r"\emptyset"),
    (r"\{\}", r"\{\}"),
    ("\u03c0", "\u03c0"),
  ],
)
def test_of_reference(reference, answer):
  assert math_answer.of_reference(reference).text == answer


@pytest.mark.parametrize(
  "reference",
  [
    "x ####  ", "####", "x #### .", "x #### $", "$", "$$", ".", "", " ", "-",
    "%", "...", "{}", "()", "**", r"\boxed{}", r"so \boxed{ } is 5",
    r"\boxed{$}", r"\text{}", r"\text{ }", r"\left(\right)", r"\$", "\u2212",
    r"\boxed{\text{}}", "?", "#### **",
  ],
)  # fmt: skip
def test_a_reference_without_an_answer_is_refused(reference):
  with pytest.raises(ValueError, match="needs a final answer, got"):
    math_answer.of_reference(reference)


UNITS = [
  "9", "1,111", "1 ", "$ 1 ", "$1$ ", r"\[ 1 ", r"\( 1", r"\boxed{", "{", "}",
  r"\boxed{1} ", "the answer is ", "answer: 5 ", "#### ", "####1\n", "-", "(1,",
  "1/", "1 / ", r"\frac{1}{", r"\frac12 ", " ", "\n", "<think>", "</think>",
  "\u00bd", "\uff15", "1e", "1:", "minus ", "1 or ", r"\text{", "= 1 ", r"\{ ",
  "\u0316\u0301", "1 1/",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_no_completion_takes_long_to_read(unit):
  def make(size):
    return unit * (size // len(unit)) + " 7"

  ratio = growth.twice_doubled(math_answer.final_answer, make, 50_000)
  assert ratio < growth.LINEAR


@pytest.mark.parametrize("unit", UNITS)
def test_no_reference_takes_long_to_read(unit):
  def call(text):
    math_answer.of_reference(text + "5")

  ratio = growth.twice_doubled(call, lambda n: unit * (n // len(unit)), 50_000)
  assert ratio < growth.LINEAR
