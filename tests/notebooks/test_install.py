"""The cell that installs leaves what is new enough, and asks for a restart."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import types

import pytest
from conftest import ROOT

from scripts.docs import notebooks


def _execute(monkeypatch, tmp_path, code, versions):
  """Runs the cell as in a session without the package, in no checkout."""
  commands = []

  def run(command, **kwargs):
    commands.append(command)
    return types.SimpleNamespace(returncode=code)

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(subprocess, "run", run)
  monkeypatch.setattr(
    importlib.metadata,
    "version",
    lambda name: versions[bool(commands)] if name == "numpy" else "1",
  )
  exec(compile(notebooks.install(), "cell", "exec"), {})
  return commands


def test_a_session_whose_packages_stay_goes_on(monkeypatch, tmp_path):
  (command,) = _execute(monkeypatch, tmp_path, 0, ("2.5", "2.5"))
  assert command[0] == sys.executable
  assert command[-1] == f"git+{notebooks.REPOSITORY}"


def test_a_session_that_imported_an_older_package_is_to_restart(
  monkeypatch, tmp_path
):
  with pytest.raises(RuntimeError, match=r"'numpy': '2\.6'.*Restart"):
    _execute(monkeypatch, tmp_path, 0, ("2.5", "2.6"))


def test_an_installation_that_fails_says_so(monkeypatch, tmp_path):
  with pytest.raises(RuntimeError, match="pip could not install git"):
    _execute(monkeypatch, tmp_path, 1, ("2.5", "2.5"))


def test_a_checkout_needs_nothing(monkeypatch, tmp_path, capsys):
  monkeypatch.chdir(ROOT / "notebooks")
  monkeypatch.setattr(sys, "path", [*sys.path])
  exec(compile(notebooks.install(), "cell", "exec"), {})
  assert str(ROOT) in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_newer_jax_and_numpy_stay_as_they_are(tmp_path):
  """As on Colab: Python 3.12 with the newest of both."""
  python = shutil.which("python3.12")
  if python is None or subprocess.run(
    [python, "-c", ""], check=False, capture_output=True
  ).returncode:
    pytest.skip("no python3.12 on this machine")
  subprocess.run([python, "-m", "venv", tmp_path / "env"], check=True)
  pip = [tmp_path / "env" / "bin" / "python", "-m", "pip"]
  subprocess.run([*pip, "install", "-q", "jax", "numpy"], check=True)
  done = subprocess.run(
    [*pip, "install", "-q", "--dry-run", "--report", "-", ROOT],
    check=True,
    capture_output=True,
    text=True,
  )
  report = json.loads(done.stdout[done.stdout.index("{") :])
  names = {one["metadata"]["name"].lower() for one in report["install"]}
  assert "opera-jax" in names and "flax" in names
  assert not names & {"jax", "jaxlib", "numpy"}
