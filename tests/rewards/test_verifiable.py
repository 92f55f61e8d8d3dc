"""Right and wrong answers to maths tasks, by both methods.

`CASES` is our own table: what stands after the thought, the reference, whether
that is right, and how the exact comparison alone finds it: "told", or "asks"
where it cannot tell and leaves it to math-verify.
"""

import json
import pathlib
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest
from conftest import ROOT

from opera_jax import structs
from opera_jax.rewards import math_exact, math_pool, verifiable

CASES = [
  # Signs, money and how they are written.
  ("the answer is \u22125", "5", False, "told"),
  ("the answer is \u22125", "-5", True, "told"),
  ("the answer is \uff0d5", "-5", True, "told"),
  ("the answer is -5", "\u22125", True, "told"),
  ("-$5", "5", False, "told"),
  ("-$5", "-5", True, "told"),
  ("$-5$", "-5", True, "told"),
  (r"\boxed{-\$5}", "5", False, "told"),
  (r"\boxed{-5}", "5", False, "told"),
  (r"\boxed{+5}", "5", True, "told"),
  ("it costs $1,234.50.", "1234.5", True, "told"),
  (r"it costs \$1,234.50.", "1234.5", True, "told"),
  (r"\boxed{\$12}", "12", True, "told"),
  ("That is $5", "#### 5", True, "told"),
  ("That is 5€", "5", True, "told"),
  ("\u0665", "5", True, "told"),
  ("The answer is minus 5.", "5", False, "told"),
  ("We get negative 5.", "-5", True, "told"),
  ("The answer is 5 or 6.", "5", False, "told"),
  ("The answer is 5 to 6.", "6", False, "told"),
  ("The answer is not 5.", "5", False, "told"),
  # Fractions, and digits that are glued to a command.
  (r"$\frac12$", "12", False, "told"),
  (r"$\frac12$", "1/2", True, "told"),
  (r"\boxed{\frac12}", "0.5", True, "told"),
  (r"\boxed{\tfrac12}", "0.5", True, "told"),
  (r"$\tfrac12$", "0.5", True, "told"),
  (r"\boxed{\dfrac{1}{2}}", "0.5", True, "told"),
  (r"\boxed{\cfrac{1}{2}}", "0.5", True, "told"),
  (r"\boxed{\frac1{2}}", "0.5", True, "told"),
  (r"\boxed{\frac{2}{4}}", "0.5", True, "told"),
  (r"\boxed{-\frac{1}{2}}", "-0.5", True, "told"),
  (r"\boxed{\frac{-1}{2}}", "-0.5", True, "told"),
  (r"\boxed{\frac{1}{2}}", "-0.5", False, "told"),
  (r"\boxed{\frac{1}{0}}", "0", False, "asks"),
  (r"\boxed{1\frac{1}{2}}", "1.5", True, "told"),
  (r"\boxed{1\frac12}", r"\frac{3}{2}", True, "told"),
  (r"\boxed{-1\frac{1}{2}}", "-1.5", True, "told"),
  (r"\boxed{1\frac{1}{2}}", "0.5", False, "told"),
  ("It is 1 1/2", "1.5", True, "told"),
  (r"\boxed{\frac{x}{2}}", r"\frac{1}{2}x", True, "asks"),
  ("3/0", "1", False, "asks"),
  ("\\boxed{\u00bd}", "0.5", True, "told"),
  ("It is 1\u00bd", "1.5", True, "told"),
  (r"-\frac12", "1/2", False, "told"),
  (r"\( \frac{1}{2} \)", "0.5", True, "told"),
  # Separators, and pairs that are no numbers.
  (r"\boxed{(12345)}", "(12, 345)", False, "told"),
  (r"\boxed{(12, 345)}", "(12345)", False, "told"),
  (r"\boxed{(12, 345)}", "12345", False, "told"),
  (r"\boxed{12345}", "(12, 345)", False, "told"),
  (r"\boxed{(12, 345)}", "(12,345)", True, "told"),
  (r"\boxed{(12, 345)}", "(12, 346)", False, "told"),
  (r"\boxed{[12, 345]}", "(12, 345)", False, "asks"),
  (r"\boxed{(345, 12)}", "(12, 345)", False, "told"),
  (r"\boxed{\left(\frac12, 3\right)}", "(0.5, 3)", True, "told"),
  (r"\boxed{\{3, 1\}}", r"\{1, 3\}", True, "told"),
  (r"\boxed{\{3, 2\}}", r"\{1, 3\}", False, "asks"),
  (r"\boxed{\{3, 3\}}", r"\{1, 3\}", False, "asks"),
  (r"\boxed{3 \text{ and } 1}", "1, 3", True, "told"),
  (r"\boxed{(1, 2), (3, 4)}", "(3,4),(1,2)", True, "told"),
  (r"\boxed{(2, 1), (3, 4)}", "(3,4),(1,2)", False, "asks"),
  (r"\boxed{1, 3}", "1,3", True, "told"),
  (r"\boxed{12, 345}", "12345", False, "asks"),
  ("the point is (12, 345)", "345", False, "told"),
  ("the point is (12, 345)", "(12, 345)", True, "told"),
  (r"\boxed{1{,}000}", "1000", True, "told"),
  (r"\boxed{1,000}", "1000", True, "told"),
  (r"\boxed{1,\!000}", "1000", True, "told"),
  (r"\boxed{1\,000}", "1000", True, "told"),
  ("The answer is 1,000,000.", "1000000", True, "told"),
  ("The answer is 1,000", "1", False, "told"),
  ("rows 1,2", "1", False, "asks"),
  # Units, names and what else stands around a number.
  (r"\boxed{x=5}", "5", True, "told"),
  (r"\boxed{5}", "x=5", True, "told"),
  (r"\boxed{x=5}", "y=5", False, "asks"),
  (r"\boxed{x = 6}", "5", False, "told"),
  (r"\boxed{x = 2 + 4 = 6}", "6", True, "told"),
  (r"\boxed{(x, y) = (3, 2)}", "(3, 2)", True, "told"),
  (r"\boxed{f(x) = 2}", "2", True, "told"),
  (r"\boxed{x_1 = 2}", "2", True, "told"),
  (r"\boxed{2x + z = 1}", "1", True, "asks"),
  (r"\boxed{1}", "2x + z = 1", False, "asks"),
  (r"\boxed{5 cm}", "5", True, "told"),
  (r"\boxed{5\text{ cm}}", "5", True, "told"),
  (r"\boxed{5\,\mathrm{cm}}", "5 centimeters", True, "told"),
  (r"\boxed{5 cm}", "6 cm", False, "told"),
  (r"\boxed{5 cm}", "5 m", False, "told"),
  (r"\boxed{500 cm}", "5 m", True, "told"),
  (r"\boxed{60 minutes}", "1 hour", True, "told"),
  (r"\boxed{5 hours}", "5 days", False, "told"),
  (r"\boxed{5 cm}", "5 hours", False, "told"),
  (r"\boxed{5 m}", "5", True, "asks"),
  (r"\boxed{50 cents}", r"\$0.50", True, "told"),
  (r"\boxed{10000 cm^2}", "1 m^2", True, "told"),
  (r"\boxed{5\theta}", "5", False, "asks"),
  (r"\boxed{5 xy}", "5", False, "asks"),
  (r"\boxed{x = 5 \text{ cm}}", "5", True, "told"),
  (r"\boxed{5^{\circ}}", "5", True, "told"),
  (r"\boxed{15\text{ cm}^2}", "15", True, "told"),
  (r"\boxed{90^\circ}", "90", True, "told"),
  (r"\boxed{90^{\circ}}", "90 degrees", True, "told"),
  (r"\boxed{50\%}", "50", True, "told"),
  (r"\boxed{50\%}", "0.5", True, "told"),
  (r"\boxed{50\%}", "60%", False, "told"),
  (r"\boxed{5x}", "5", False, "asks"),
  ("The answer is 5 million.", "5", False, "told"),
  ("The answer is 5 million.", "5,000,000", True, "told"),
  ("The answer is 18.00 dollars", "#### 18", True, "told"),
  ("The answer is five.", "5", True, "told"),
  ("The answer is five.", "6", False, "told"),
  # Roots, powers, decimals.
  (r"\boxed{\sqrt{16}}", "4", True, "told"),
  (r"\boxed{2\sqrt{9}}", "6", True, "told"),
  (r"\boxed{\sqrt{17}}", "4", False, "asks"),
  (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True, "asks"),
  (r"\boxed{1.5\times10^{3}}", "1500", True, "told"),
  (r"\boxed{1.5 \cdot 10^3}", "1500", True, "told"),
  ("It is 0.5", "1/2", True, "told"),
  ("It is .5", "1/2", True, "told"),
  ("It is 0.3", "1/3", False, "asks"),
  ("It is 0.50", "0.5", True, "told"),
  ("It is 1,22", "1.23", False, "asks"),
  (r"\boxed{5 \times 10^{-3}}", "0.005", True, "told"),
  ("Answer: 1.5e3", "1500", True, "told"),
  ("Answer: 1.5e3", "1.5", False, "told"),
  ("It is 1.5 \u00d7 10^3 m", "1500", True, "told"),
  (r"\boxed{2^3}", "8", True, "asks"),
  (r"\boxed{\sqrt[3]{8}}", "2", True, "asks"),
  # Words and letters.
  ("The correct answer is option B.", "B", True, "told"),
  ("The correct answer is (B) 12.", "B", True, "told"),
  ("The correct answer is (B) 12.", "12", True, "told"),
  ("The correct answer is (B) 12.", "C", False, "told"),
  ("The answer is (A).", "A", True, "told"),
  ("(A)", "A", True, "told"),
  ("**A**", "A", True, "told"),
  ("A.", "A", True, "told"),
  ("(B)", "A", False, "told"),
  ("Paris", "Paris", True, "told"),
  ("<think>\nhm\n</think>\n\n(A)", "A", True, "told"),
  (r"\boxed{(A)}", "A", True, "told"),
  (r"\boxed{\text{(A)}}", "A", True, "told"),
  (r"\boxed{B}", "A", False, "told"),
  (r"\boxed{\text{Tuesday}}", "Tuesday", True, "told"),
  (r"\boxed{tuesday}", "Tuesday", True, "told"),
  (r"\boxed{\text{Monday}}", "Tuesday", False, "asks"),
  # Expressions.
  (r"\boxed{x + 1}", "x+1", True, "told"),
  (r"\boxed{x + 1}", "1+x", True, "asks"),
  (r"\boxed{x + 1}", "x+2", False, "asks"),
  (r"\boxed{[0,1)}", "[0, 1)", True, "told"),
  (r"\boxed{(0,1)}", "[0,1)", False, "asks"),
  (r"\boxed{3:2}", "3:2", True, "told"),
  (r"\boxed{3:2}", "2:3", False, "asks"),
  (r"\boxed{\pm 5}", "5", False, "asks"),
  (r"\boxed{5 \text{ or } 6}", "5", False, "told"),
  ("We find that $x \\geq 5$.", "x >= 5", True, "told"),
  (r"\boxed{x \leq 5}", "x >= 5", False, "asks"),
  (r"\boxed{\sqrt 2 + 1}", r"\sqrt{2}+1", True, "told"),
  (r"\boxed{\frac94\pi}", r"\frac{9}{4}\pi", True, "told"),
  ("So it is $\\text{even}$.", "even", True, "told"),
  ("It is $x$, or $y$.", "y", True, "asks"),
  # Where the answer stands.
  ("Answer: the largest of them is 34.", "34", True, "told"),
  ("The answer is $ \\frac{1}{2} $.", "0.5", True, "told"),
  ("The answer is 5. I used 3 steps.", "5", True, "told"),
  ("The answer is 5. I used 3 steps.", "3", False, "told"),
  ("The final answer is: $5$. I used 3 steps.", "5", True, "told"),
  ("**Answer:** 5\n\nI used 3 steps.", "5", True, "told"),
  ("The answer is 3 times 6 = 18.", "18", True, "told"),
  ("The answer is 4. No, the answer is 5.", "5", True, "told"),
  ("The answer is 4. No, the answer is 5.", "4", False, "told"),
  (r"The answer is 4, that is \boxed{5}.", "5", True, "told"),
  (r"\boxed{5}. The answer is 5. I used 3 steps.", "5", True, "told"),
  (r"\boxed{4}. The final answer is $5$.", "4", True, "told"),
  (r"\boxed{5} is the answer. I used 3 steps.", "5", True, "told"),
  (r"\boxed{4} no, \boxed{5}", "5", True, "told"),
  (r"\boxed{4} or \boxed{5}", "5", False, "asks"),
  (r"\boxed{4} and \boxed{5}", r"\{4, 5\}", True, "asks"),
  (r"\boxed{}, so 5", "5", True, "told"),
  ("She has 9 * 2 = 18\n#### 18", "18", True, "told"),
  ("#### Step 1\nadd 3 and 4: 7", "7", True, "told"),
  ("AZYUK2A", "2", False, "asks"),
  ("I cannot tell.", "5", False, "told"),
  ("", "5", False, "told"),
]
# Cases that math-verify alone decides otherwise.
OTHERWISE = {
  ("The answer is minus 5.", "5"),
  ("We get negative 5.", "-5"),
  ("The answer is 5 or 6.", "5"),
  ("The answer is not 5.", "5"),
  ("It is 1\u00bd", "1.5"),
  (r"\boxed{500 cm}", "5 m"),
  (r"\boxed{60 minutes}", "1 hour"),
  (r"\boxed{5 hours}", "5 days"),
  (r"\boxed{5 cm}", "5 hours"),
  (r"\boxed{10000 cm^2}", "1 m^2"),
  ("Answer: 1.5e3", "1500"),
  ("Answer: 1.5e3", "1.5"),
  ("It is 1.5 \u00d7 10^3 m", "1500"),
  ("The correct answer is (B) 12.", "B"),
  (r"\boxed{5 cm}", "5 m"),
  (r"\boxed{1\,000}", "1000"),
  (r"\boxed{1, 3}", "1,3"),
  (r"\boxed{4} no, \boxed{5}", "5"),
  (r"\boxed{4}. The final answer is $5$.", "4"),
  ("It is 1 1/2", "1.5"),
  ("the point is (12, 345)", "345"),
  ("the point is (12, 345)", "(12, 345)"),
  ("The answer is 5 million.", "5"),
  ("The answer is 5 million.", "5,000,000"),
}


@pytest.fixture(scope="module")
def verdicts():
  """Checks of all cases, by method."""
  texts = [f"<think>7</think>{text}" for text, *_ in CASES]
  references = [reference for _, reference, *_ in CASES]
  return {
    method: dict(
      zip(
        [case[:2] for case in CASES],
        verifiable.check_many(texts, references, method=method),
      )
    )
    for method in verifiable.METHODS
  }


@pytest.mark.parametrize("text,reference,right,how", CASES)
def test_exact(text, reference, right, how, verdicts):
  check = verdicts["exact"][text, reference]
  assert (check.right is True) == right
  assert check.cannot_tell == (how == "asks") and not check.failure
  assert math_exact.right(text, reference) is (right if how == "told" else None)


@pytest.mark.parametrize("text,reference,right,how", CASES)
def test_math_verify(text, reference, right, how, verdicts):
  check = verdicts["math_verify"][text, reference]
  expected = right != ((text, reference) in OTHERWISE)
  assert (check.right is True) == expected and not check.failure


def _fake(folder, body: str, monkeypatch):
  """Puts a module in math-verify's place, for new worker processes alone."""
  (folder / "math_verify.py").write_text(textwrap.dedent(body))
  monkeypatch.syspath_prepend(str(folder))
  monkeypatch.setattr(math_pool, "_IDLE", type(math_pool._IDLE)())


@pytest.fixture
def odd_library(tmp_path, monkeypatch):
  """A math-verify that does what the completion says."""
  _fake(
    tmp_path,
    """
    import os, time

    def parse(text, parsing_timeout, raise_on_error=False):
      if "unreadable" in text:
        raise KeyError("x")
      return [] if "empty" in text else [text]

    def verify(true, stated, timeout_seconds, raise_on_error=False):
      print("not a verdict")
      if "raise" in stated:
        raise ValueError("no")
      if "sleep" in stated:
        time.sleep(60)
      if "grow" in stated:
        bytearray(2**40)
      if "die" in stated:
        os._exit(3)
      return "right" in stated
    """,
    monkeypatch,
  )
  yield
  math_pool._dismiss()


def test_a_check_that_fails_to_run_is_counted_and_no_verdict(odd_library):
  texts = ["raise", "die", "unreadable", "right", "wrong", "empty", "raise 5"]
  with pytest.warns(RuntimeWarning, match="4 of 7 checks .*2 x ValueError"):
    checks = verifiable.check_many(texts, ["5"] * 7, method="math_verify")
  named = ["ValueError", "its process ended with code 3", "KeyError"]
  assert [c.failure for c in checks] == [*named, "", "", "", "ValueError"]
  # The exact comparison stands: words are no number, and 5 is 5.
  assert [c.right for c in checks] == [False] * 3 + [True, False, False, True]
  with pytest.warns(RuntimeWarning, match="4 of them are undecided"):
    checks = verifiable.check_many(texts, ["x+1"] * 7, method="math_verify")
  assert [c.right for c in checks] == [None] * 3 + [True, False, None, None]
  assert [c.cannot_tell for c in checks] == [c.right is None for c in checks]


def test_a_check_that_takes_all_memory_fails_alone(odd_library):
  pairs = [("x", "grow"), ("x", "right")]
  grown, right = math_pool.check(pairs, timeout=20, workers=1)
  assert (grown.right, grown.failure) == (None, "MemoryError")
  assert right.right is True


def test_real_references_and_answers(shared_data):
  path = shared_data / "gsm8k" / "train.jsonl"
  with path.open() as file:
    solutions = [json.loads(next(file))["answer"] for _ in range(1000)]
  for solution in solutions:
    answer = solution.rpartition("####")[2].strip()
    for text in (
      solution,
      f"The answer is {answer}. I took 3 steps.",
      f"so \\boxed{{{answer}}} of 12",
      f"It is ${answer}",
    ):
      assert math_exact.right(text, solution) is True, (text, answer)
    assert math_exact.right(f"It is 1{answer}", solution) is not True
    assert math_exact.right(f"It is -{answer}", solution) is False or (
      answer in ("0",) or answer.startswith("-")
    )


def test_overdue_checks_end_in_time_and_cost_no_other_check(odd_library):
  math_pool.check([("x", f"right {i}") for i in range(2)], timeout=1, workers=2)
  begin = time.monotonic()
  said = [f"{word} {i}" for i in range(4) for word in ("sleep", "right")]
  got = math_pool.check([("x", word) for word in said], timeout=1, workers=2)
  assert [g.failure for g in got] == ["no verdict in 1 s", ""] * 4
  assert [g.right for g in got] == [None, True] * 4
  # Two limits on each of two workers, and the start of light processes.
  assert time.monotonic() - begin < 2 * 1 + 6


def test_exact_asks_no_library_that_is_not_there(monkeypatch):
  monkeypatch.setattr(math_pool, "available", lambda: False)
  open_, sure = verifiable.check_many([r"\boxed{x+1}", "It is 5"], ["1+x", "5"])
  assert open_ == verifiable.Check(None, cannot_tell=True)
  assert sure == verifiable.Check(True)
  with pytest.raises(ValueError, match="needs the package math-verify"):
    verifiable.Reward(method="math_verify")


def test_a_library_that_cannot_be_loaded_is_one_error(tmp_path, monkeypatch):
  _fake(tmp_path, "raise ImportError('no sympy here')", monkeypatch)
  begin = time.monotonic()
  with pytest.raises(RuntimeError, match="cannot start: ImportError: no sympy"):
    verifiable.correct_many(["x"] * 50, ["1+x"] * 50, method="math_verify")
  assert time.monotonic() - begin < 30


def test_a_process_that_cannot_start_is_one_error(tmp_path, monkeypatch):
  monkeypatch.setattr(math_pool, "_IDLE", type(math_pool._IDLE)())
  gone = str(tmp_path / "gone.py")
  monkeypatch.setattr(math_pool.math_worker, "__file__", gone)
  with pytest.raises(RuntimeError, match="cannot start: its process ended"):
    verifiable.correct("x", "1+x", method="math_verify")


def test_a_script_on_standard_input_is_checked_like_any(tmp_path):
  script = r"""
  from opera_jax.rewards import verifiable
  print(verifiable.correct_many([r"\boxed{x+1}"] * 2, ["1+x", "2+x"]))
  """
  done = subprocess.run(
    [sys.executable, "-"],
    input=textwrap.dedent(script),
    env={"PYTHONPATH": str(ROOT), "PATH": ""},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (done.stdout, done.stderr) == ("[True, False]\n", "")


def test_a_worker_is_told_no_keys(monkeypatch):
  monkeypatch.setenv("JUDGE_API_KEY", "sk-secret")
  monkeypatch.setattr(math_pool, "_IDLE", type(math_pool._IDLE)())
  (outcome,) = math_pool.check([("1", "$1$")], timeout=20, workers=1)
  assert outcome.right
  (worker,) = math_pool._IDLE
  path = pathlib.Path(f"/proc/{worker._process.pid}/environ")
  environment = path.read_bytes()
  assert b"PATH=" in environment and b"secret" not in environment
  math_pool._dismiss()


@pytest.mark.slow
def test_a_worker_does_not_outlive_its_parent(tmp_path):
  script = r"""
  import sys, time
  from opera_jax.rewards import math_pool
  math_pool.check([("1", "$1$")], timeout=0.3, workers=1)
  (worker,) = math_pool._IDLE
  worker._process.stdin.write(b'["5", "$9^{9^{9^{9}}}$"]\n')
  time.sleep(1)
  print(worker._process.pid, flush=True)
  sys.stdin.read()
  """
  with subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(script)],
    env={"PYTHONPATH": str(ROOT)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as parent:
    worker = int(parent.stdout.readline())
    parent.kill()
  end = time.monotonic() + 60
  while pathlib.Path(f"/proc/{worker}/stat").exists():
    state = pathlib.Path(f"/proc/{worker}/stat").read_text().split()[2]
    if state == "Z":
      break
    assert time.monotonic() < end
    time.sleep(0.2)


@pytest.mark.parametrize("timeout", [5, 5.0, 2.5])
def test_time_limits_are_whole_or_not(timeout):
  ask = {"method": "math_verify", "timeout": timeout, "workers": 1}
  assert verifiable.check_many([r"\boxed{x+1}"], ["1+x"], **ask)[0].right


@pytest.mark.parametrize(
  "settings,said",
  [
    ({"method": "eval"}, "Unknown method 'eval'"),
    ({"timeout": 0}, "limit of a maths check is 0"),
    ({"timeout": -1.5}, "limit of a maths check is -1.5"),
    ({"timeout": float("nan")}, "limit of a maths check is nan"),
    ({"timeout": float("inf")}, "limit of a maths check is inf"),
    ({"timeout": "5"}, "limit of a maths check is '5'"),
    ({"timeout": True}, "limit of a maths check is True"),
    ({"timeout": None}, "limit of a maths check is None"),
    ({"workers": 0}, "have 0 processes"),
    ({"workers": 1.5}, "have 1.5 processes"),
  ],
)
def test_settings_are_checked_before_anything_runs(settings, said):
  with pytest.raises(ValueError, match=said):
    verifiable.Reward(**settings)
  with pytest.raises(ValueError, match=said):
    verifiable.correct_many([], [], **settings)


@pytest.mark.parametrize("method", verifiable.METHODS)
def test_a_reference_without_an_answer_is_refused(method):
  with pytest.raises(ValueError, match="needs a final answer"):
    verifiable.correct("7", " #### ", method=method)


HOSTILE = [
  r"\boxed{1e999999999}",
  r"\boxed{1e10000000}",
  "1e999999999",
  r"\boxed{9^{9^{9^{9}}}}",
  "9**9**9**9",
  r"\boxed{(10^{10^{10}})!}",
  r"\boxed{" + "9" * 100_000 + "}",
  "9" * 200_000,
  r"\boxed{" + "{" * 100_000,
  r"\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
  r"\boxed{" + r"\frac{1}{" * 300 + "1" + "}" * 301,
  "the answer is " * 20_000,
  "1 / " * 50_000,
  "$ 1 " * 50_000,
  r"\[ 1 " * 50_000,
]


@pytest.mark.parametrize(
  "method", ["exact", pytest.param("math_verify", marks=pytest.mark.slow)]
)
def test_whatever_a_completion_holds_costs_at_most_the_limit(method):
  math_pool.check([("1", "$1$")], timeout=0.3, workers=1)
  for text in HOSTILE:
    begin = time.monotonic()
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      check = verifiable.check_many(
        [text], ["5"], method=method, timeout=0.3, workers=1
      )[0]
    took = time.monotonic() - begin
    assert check.right is not True, text[:40]
    # The limit, and the start of a process in place of one that was ended.
    assert took < 0.3 + 5.0, (text[:40], took)


def test_only_maths_prompts_are_ever_right(rollouts):
  tasks = [
    structs.Prompt("a", "math", "q", "#### 4"),
    structs.Prompt("b", "open_ended", "q", "4"),
  ]
  case = rollouts([["4", "5"], ["4", "4"]], tasks)
  terms = verifiable.Reward().rewards(case, None)
  np.testing.assert_array_equal(terms["correct"], [[1, 0], [0, 0]])
  np.testing.assert_array_equal(terms["total"], terms["correct"])
  for name in ("cannot_tell", "check_failed", "undecided"):
    np.testing.assert_array_equal(terms[name], np.zeros((2, 2)))


def test_how_a_verdict_was_found_is_a_part(rollouts, odd_library):
  tasks = [structs.Prompt("a", "math", "q", "x+1")]
  case = rollouts([["right", "raise", "empty", "wrong"]], tasks)
  with pytest.warns(RuntimeWarning, match="1 of 4 checks"):
    terms = verifiable.Reward().rewards(case, None)
  assert {name: part.tolist() for name, part in terms.items()} == {
    "total": [[1, 0, 0, 0]],
    "correct": [[1, 0, 0, 0]],
    "cannot_tell": [[1, 1, 1, 1]],
    "check_failed": [[0, 1, 0, 0]],
    "undecided": [[0, 1, 1, 0]],
  }
  assert {part.dtype for part in terms.values()} == {np.dtype(np.float32)}
