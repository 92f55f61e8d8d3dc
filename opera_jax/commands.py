"""The commands of an installed copy: `opera-rl`, `opera-plan`, `opera-chat`.

Each is `python -m opera_jax.experiments.NAME`: the driver is the main module,
so its help, its flags and its own processes are the same.
"""

import os
import runpy
import sys


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
