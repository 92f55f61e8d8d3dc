"""`--config` takes files of the working directory, and shipped ones."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = """
from absl import app, flags
from opera_jax import config_flag
config = config_flag.define("configs/tiny.py")
def main(_):
  c = config.value
  print(c.rl.steps, c.reward.terms, flags.FLAGS["config"].config_filename)
app.run(main)
"""


def _run(folder, *arguments):
  return subprocess.run(
    [sys.executable, "-P", "-c", SCRIPT, *arguments],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


@pytest.mark.parametrize(
  "arguments, said",
  [
    ((), "20 opera + verifiable configs/tiny.py"),
    (("--config.rl.steps=3",), "3 opera + verifiable configs/tiny.py"),
    (
      ("--config=configs/methods/sar.py:smoke", "--config.rl.steps=2"),
      "2 verifiable + 0.2*sar + 0*opera configs/methods/sar.py:smoke",
    ),
    (
      ("--config", "configs/methods/sar.py:smoke"),
      "1 verifiable + 0.2*sar + 0*opera configs/methods/sar.py:smoke",
    ),
  ],
)
def test_shipped_configs_from_any_folder(tmp_path, arguments, said):
  done = _run(tmp_path, *arguments)
  assert done.stdout.strip() == said, done.stderr


def test_your_own_config_builds_on_a_shipped_one(tmp_path):
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "tiny.py").write_text(
    "from opera_jax.configs import tiny\n"
    "def get_config(arg):\n"
    "  config = tiny.get_config(arg).unlock()\n"
    "  config.rl.steps = 7\n"
    "  return config.lock()\n"
  )
  done = _run(tmp_path, "--config=configs/tiny.py:smoke")
  assert done.stdout.startswith("7 "), done.stderr


def test_a_file_that_is_nowhere_is_named_as_it_was_asked_for(tmp_path):
  done = _run(tmp_path, "--config=configs/none.py")
  assert done.returncode
  assert "'configs/none.py'" in done.stderr
