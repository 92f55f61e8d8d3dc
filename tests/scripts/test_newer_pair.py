"""The script of the newer pair: what it asks for, and what it refuses."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

from conftest import ROOT
from packaging import requirements

SCRIPT = ROOT / "scripts" / "newer_pair.sh"


def test_the_pair_lies_within_the_ranges_and_above_the_pins():
  text = SCRIPT.read_text()
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  pins = (ROOT / "requirements.txt").read_text()
  for name in ("jax", "flax"):
    newer = re.search(rf"^{name}=(\S+)$", text, re.MULTILINE)[1]
    (wanted,) = (
      requirements.Requirement(line)
      for line in project["dependencies"]
      if requirements.Requirement(line).name == name
    )
    assert wanted.specifier.contains(newer), (name, newer)
    pinned = re.search(rf"^{name}==(\S+)$", pins, re.MULTILINE)[1]
    above = requirements.Requirement(f"{name}>{pinned}")
    assert above.specifier.contains(newer), (name, newer)


def test_another_python_is_refused_before_anything_is_made(tmp_path):
  python = tmp_path / "python"
  python.write_text("#!/bin/sh\nexit 1\n")
  python.chmod(0o755)
  made = tmp_path / "environment"
  done = subprocess.run(
    [str(SCRIPT)],
    env=os.environ | {"PYTHON": str(python), "VENV": str(made)},
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  assert done.returncode == 2
  assert "needs Python 3.12; name one: PYTHON=" in done.stderr
  assert not made.exists()


def test_shellcheck_finds_nothing():
  program = shutil.which(
    "shellcheck", path=str(pathlib.Path(sys.executable).parent)
  )
  assert program, "pip install -r requirements-dev.txt"
  done = subprocess.run(
    [program, str(SCRIPT)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout
