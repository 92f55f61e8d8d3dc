"""A shipped file is found from any folder, and never hides one of yours."""

import pathlib

import pytest
from conftest import ROOT

from opera_jax import shipped


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize(
  "name",
  [
    "configs/tiny.py",
    "configs/methods/sar.py",
    "configs/templates/rewrite.txt",
  ],
)
def test_shipped_files_are_found(elsewhere, name):
  assert shipped.path(name).samefile(ROOT / name)


def test_a_file_of_the_working_directory_comes_first(elsewhere):
  (elsewhere / "configs").mkdir()
  (elsewhere / "configs" / "tiny.py").write_text("")
  assert shipped.path("configs/tiny.py") == pathlib.Path("configs/tiny.py")
  assert shipped.path("configs/common.py").samefile(ROOT / "configs/common.py")


@pytest.mark.parametrize(
  "name",
  [
    "configs/none.py",  # nothing of the name ships
    "tiny.py",  # of no folder
    "configs",  # no file
    "configs/methods",
    "other/configs/tiny.py",
    "/configs/tiny.py",
    "../configs/tiny.py",
    "structs.py",
    "",
  ],
)
def test_other_names_stay_as_they_are(elsewhere, name):
  assert shipped.path(name) == pathlib.Path(name)
