"""A stage says how far it is, how long it takes, and what it does."""

import io
import time

import jax
import jax.numpy as jnp
import pytest

from opera_jax.sharding import compile_log
from opera_jax.train import progress as progress_lib


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_without_a_terminal_there_are_lines():
  file = io.StringIO()
  with progress_lib.Progress(
    4, "RL", done=1, seconds_between_lines=0.0, file=file
  ) as progress:
    progress.update(tokens=100)
    progress.phase("scoring")
    progress.show({"reward": "0.41", "KL": "0.002"})
    progress.update(2, tokens=100)
  lines = file.getvalue().splitlines()
  assert len(lines) == 2  # the end is said once
  assert lines[0].startswith("RL: 2/4 steps, ")
  for word in ("tokens/s", "steps/s", "< 1 min left"):
    assert word in lines[0]
  assert lines[-1].startswith("RL: 4/4 steps") and "left" not in lines[-1]
  assert lines[-1].endswith("reward 0.41, KL 0.002")


def test_a_long_step_says_what_it_does():
  file = io.StringIO()
  with progress_lib.Progress(
    2, "RL", seconds_of_silence=0.5, file=file
  ) as progress:
    progress.phase("sampling")
    time.sleep(2.5)
  lines = file.getvalue().splitlines()
  assert lines[0].startswith("RL: 0/2 steps") and lines[0].endswith(
    "; sampling"
  )


def test_on_a_terminal_there_is_a_bar():
  file = _Terminal()
  with progress_lib.Progress(2, "SFT", file=file) as progress:
    progress.phase("updating")
    progress.show({"loss": "1.5"})
    progress.update(1, tokens=10)
    time.sleep(1.2)
    progress.update(1, tokens=10)
  text = file.getvalue()
  assert "SFT: 100%" in text and "tokens/s" in text
  assert "loss 1.5; updating" in text
  assert text.rstrip().endswith("loss 1.5]")


@pytest.mark.parametrize(
  "seconds,said",
  [
    (20, "< 1 min left"),
    (60, "0:01 h left"),
    (3_725, "1:02 h left"),
    (90_000, "25:00 h left"),
  ],
)
def test_remaining_time(seconds, said):
  assert progress_lib.remaining(seconds) == said


def test_what_is_compiled_is_named_while_it_is():
  compile_log.spans()

  def triple(x):
    return x * 3

  lowered = jax.jit(triple).lower(jnp.ones(3))
  assert compile_log.compiling() == "triple"
  lowered.compile()
  assert compile_log.compiling() == ""
