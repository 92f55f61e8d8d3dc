"""The installed commands are the drivers, from any folder."""

import importlib.util
import os
import runpy
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

from opera_jax import commands

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
  "scripts"
]


def test_each_command_runs_a_driver(monkeypatch):
  ran = []
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.setattr(
    runpy, "run_module", lambda name, **how: ran.append((name, how))
  )
  for target in SCRIPTS.values():
    module, _, function = target.partition(":")
    assert module == commands.__name__
    getattr(commands, function)()
  assert [name for name, _ in ran] == [
    f"opera_jax.experiments.{name}" for name in ("opera_rl", "plan", "chat")
  ]
  for name, how in ran:
    assert importlib.util.find_spec(name)
    assert how == {"run_name": "__main__", "alter_sys": True}


def test_functions_lie_in_the_working_directory_and_hide_nothing(tmp_path):
  """`my_module` is found there; `numpy.py` there takes no one's place."""
  (tmp_path / "my_module.py").write_text("value = 3\n")
  (tmp_path / "numpy.py").write_text("raise SystemExit('taken')\n")
  (tmp_path / "opera_jax.py").write_text("raise SystemExit('taken')\n")
  script = (
    "import runpy; from opera_jax import commands\n"
    "def run_module(*_, **__):\n"
    "  import numpy, opera_jax, my_module\n"
    "  print(numpy.ones(1), my_module.value)\n"
    "runpy.run_module = run_module\n"
    "commands.opera_rl()\n"
  )
  done = subprocess.run(
    [sys.executable, "-P", "-c", script],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert done.stdout.strip() == "[1.] 3", done.stderr


SCRIPT = """
import sys
from absl import app
from opera_jax import commands
def main(_):
  {work}
commands.run(main)
"""


def _ended(tmp_path, work, *flags):
  script = tmp_path / "script.py"
  script.write_text(SCRIPT.format(work=work))
  return subprocess.run(
    [sys.executable, "-P", str(script), *flags],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


@pytest.mark.parametrize(
  "work, said",
  [
    ("raise ValueError('lower it')", "lower it\n"),
    ("raise app.UsageError('name a slice')", "name a slice\n"),
    (
      "open('/none/x')",
      "[Errno 2] No such file or directory: '/none/x'\n",
    ),
  ],
)
def test_a_users_error_is_one_message_unless_asked_for_more(
  tmp_path, work, said
):
  done = _ended(tmp_path, work)
  assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
  done = _ended(tmp_path, work, "--debug")
  assert done.returncode == 1
  assert "Traceback" in done.stderr and said in done.stderr


def test_a_flag_that_is_none_is_named_with_the_nearest(tmp_path):
  done = _ended(tmp_path, "pass", "--debg")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "Did you mean: debug" in done.stderr


@pytest.mark.parametrize(
  "work", ["{}['x']", "int('x')", "len(3)", "raise KeyError('ours')"]
)
def test_a_bug_keeps_its_traceback(tmp_path, work):
  done = _ended(tmp_path, work)
  assert done.returncode == 1
  assert "Traceback" in done.stderr and f"  {work}" in done.stderr


def test_ctrl_c_is_one_line(tmp_path):
  done = _ended(tmp_path, "raise KeyboardInterrupt")
  assert done.returncode == 130
  assert done.stderr == (
    "\nCtrl-C: ended. The same command goes on from what is saved.\n"
  )


@pytest.mark.parametrize(
  "function, said",
  [
    ("opera_rl", ("pipeline, top to bottom", "--config:", "--workdir:")),
    ("opera_rl", ("--[no]debug:", "Show the traceback")),
    ("plan", ("Checks whether a run fits", "--topology:", "--config:")),
    ("chat", ("Chat with a checkpoint", "--prompt:", "--config:")),
  ],
)
def test_help_is_the_drivers_own(tmp_path, function, said):
  done = subprocess.run(
    [
      *(sys.executable, "-P", "-c"),
      f"from opera_jax import commands; commands.{function}()",
      "--help",
    ],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  for words in said:
    assert words in done.stdout, done.stdout + done.stderr
