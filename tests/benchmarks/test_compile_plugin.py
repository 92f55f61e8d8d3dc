"""The plugin counts a file's programs, and no other's."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

COMPILES = """
import jax
import numpy as np

def test_{name}():
  jax.jit(lambda x: x * {factor} + 1)(np.ones(3, np.float32))
"""


@pytest.mark.slow
def test_programs_are_counted_by_file(tmp_path):
  (tmp_path / "test_one.py").write_text(COMPILES.format(name="one", factor=2))
  (tmp_path / "test_two.py").write_text(
    COMPILES.format(name="a", factor=3) + COMPILES.format(name="b", factor=4)
  )
  (tmp_path / "test_none.py").write_text("def test_none():\n  pass\n")
  report = tmp_path / "report"
  report.mkdir()
  done = subprocess.run(
    [
      *(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.compile_plugin",
      ),
      *("-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)),
    ],
    cwd=ROOT,
    env=os.environ | {"OPERA_COMPILE_REPORT": str(report)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  (file,) = report.glob("*.json")
  found = json.loads(file.read_text())
  assert {name: count for name, (_, count) in found.items()} == {
    "test_one.py": 1,
    "test_two.py": 2,
    "test_none.py": 0,
  }
  assert found["test_two.py"][0] > 0 and found["test_none.py"][0] == 0
