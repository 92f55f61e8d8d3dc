"""A user's error is told from a bug by who raised it."""

import json
import runpy

import numpy as np
import pytest

from opera_jax import file_lock, user_errors
from opera_jax.rewards import compose
from opera_jax.run import workdir


def _caught(work):
  with pytest.raises(Exception, match=".*") as caught:  # whatever it is
    work()
  return caught.value


def _lack():
  raise KeyError("ours, and a bug all the same")


def _assert():
  assert not 1


def _own_file(folder, line):
  (folder / "mine.py").write_text(f"def work():\n  {line}\n")
  return runpy.run_path(str(folder / "mine.py"))["work"]


def test_what_we_raise_is_a_message(tmp_path):
  for work in (
    lambda: compose.weights("2*"),
    lambda: workdir.parse_stages("evalute", ("evaluate",)),
    lambda: file_lock.holder(tmp_path),
    _own_file(tmp_path, "raise ValueError('no')"),
    _own_file(tmp_path, "raise ImportError('no') from KeyError()"),
  ):
    error = _caught(work)
    assert user_errors.is_message(error), error


def test_what_the_system_says_of_a_file_is_a_message(tmp_path):
  for path in (tmp_path, tmp_path / "none"):
    assert user_errors.is_message(_caught(path.read_text))


@pytest.mark.parametrize(
  "work",
  [
    lambda: np.zeros(3) + np.zeros(4),  # ValueError of C in our own line
    lambda: np.zeros(3).reshape(2, 2),
    lambda: np.stack([]),  # ValueError of a library's `raise`
    lambda: int("x"),
    lambda: json.loads("{"),
    lambda: [].remove(1),
    lambda: {}["x"],
    lambda: [][1],
    lambda: len(3),
    lambda: 1 / 0,
    _lack,
    _assert,
  ],
)
def test_the_rest_are_bugs(work):
  assert not user_errors.is_message(_caught(work))


def test_an_error_that_was_never_raised_is_none():
  assert not user_errors.is_message(ValueError("no traceback"))
