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


@pytest.mark.parametrize(
  "argument, said",
  [
    ("--config.rl.credit=grpo", "config.rl.credit is now config.rl.advantage"),
    ("--config.price.rows=4", "is now config.scoring.batch_size"),
    ("--config.rl.draws=4", "config.rl.max_resamples (the number of draws"),
    (
      "--config.rl.stepz=4",
      "config.rl.stepz is no field; did you mean config.rl.steps?",
    ),
    ("--config.qwerty=4", "config.qwerty is no field"),
  ],
)
def test_a_field_that_is_none_is_named_with_the_one_that_is(
  tmp_path, argument, said
):
  done = _run(tmp_path, argument)
  assert done.returncode != 0 and not done.stdout
  assert said in done.stderr and "Traceback" not in done.stderr


def test_every_old_name_leads_to_a_field():
  from opera_jax import config_fields
  from opera_jax.configs import common

  config = common.get_config().to_dict()

  def there(path):
    value = config
    for part in path.split("."):
      if not isinstance(value, dict) or part not in value:
        return False
      value = value[part]
    return True

  for old, new in config_fields.RENAMED.items():
    assert there(new.partition(" ")[0]) and not there(old), old
