"""The commands of an installed copy, and how every command starts and ends.

`opera-rl`, `opera-plan` and `opera-chat` are each
`python -m opera_jax.experiments.NAME`: the driver is the main module, so its
help, its flags and its own processes are the same.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from opera_jax import user_errors

# `--help` lists --debug as the driver's own.
flags.disclaim_key_flags()


def run(main: Callable[[Any], None], *, resumes: bool = True) -> None:
  """Runs a driver's `main` in place of `absl.app.run`.

  An error that is a message (see `user_errors`) is printed alone, with exit
  status 1; `--debug` shows its traceback too. A bug keeps its traceback. Ctrl-C
  ends with one line and status 130; inside `checkpoint.Preemption` the run
  saves first.

  Args:
    main: takes the arguments that are no flags.
    resumes: whether the same command goes on where this one ended.
  """
  debug = flags.DEFINE_bool("debug", False, "Show the traceback of any error.")

  def without_usage(argv: Any) -> None:
    try:
      main(argv)
    except app.UsageError as error:  # absl would print every flag before it
      raise flags.Error(str(error)) from error

  try:
    app.run(without_usage, flags_parser=flags.FLAGS)
  except KeyboardInterrupt:
    rest = " The same command goes on from what is saved." if resumes else ""
    sys.stderr.write(f"\nCtrl-C: ended.{rest}\n")
    sys.exit(128 + signal.SIGINT)
  except Exception as error:
    asked = debug.value if flags.FLAGS.is_parsed() else "--debug" in sys.argv
    message = isinstance(error, flags.Error) or user_errors.is_message(error)
    if asked or not message:
      raise
    sys.stderr.write(f"{error}\n")
    sys.exit(1)


def opera_rl() -> None:
  """The whole method; see `experiments/opera_rl.py`."""
  _run("opera_rl")


def plan() -> None:
  """Whether a run fits a TPU slice; see `experiments/plan.py`."""
  _run("plan")


def chat() -> None:
  """A checkpoint tried by hand; see `experiments/chat.py`."""
  _run("chat")


def _run(driver: str) -> None:
  # Functions named in a config lie in the working directory, where python -m
  # looks first. Last here: no file there takes the place of a package.
  sys.path.append(os.getcwd())
  runpy.run_module(
    f"opera_jax.experiments.{driver}", run_name="__main__", alter_sys=True
  )
