"""What docs/architecture.md says of the code is true of it."""

import ast
import re

import pytest
from conftest import ROOT

from scripts.docs import arrows, pictures

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
NAMES = sorted(set(re.findall(r"`([\w/]+\.py)::([\w.]+)`", PAGE)))


def _defined(path) -> set[str]:
  """Functions and classes of a file, and `Class.method`."""
  out = set()
  for node in ast.parse(path.read_text("utf-8")).body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      out.add(node.name)
    if isinstance(node, ast.ClassDef):
      out |= {
        f"{node.name}.{inner.name}"
        for inner in node.body
        if isinstance(inner, ast.FunctionDef)
      }
  return out


def test_the_walk_names_enough():
  assert len(NAMES) > 35


@pytest.mark.parametrize("file, name", NAMES)
def test_every_name_of_the_walk_exists(file, name):
  path = ROOT / file
  assert path.is_file(), (
    f"docs/architecture.md names {file}, which is not there"
  )
  assert name in _defined(path), f"{file} defines no {name}"


def test_the_rooms_are_the_packages():
  named = set(re.findall(r"^\| `opera_jax/(\w+)/` \|", PAGE, re.MULTILINE))
  # Links to folders at the root, where an installed copy has them, are no
  # rooms of their own.
  there = {
    path.parent.name
    for path in (ROOT / "opera_jax").glob("*/__init__.py")
    if not path.parent.is_symlink()
  }
  assert named == there


def test_the_arrows_are_those_that_are_enforced():
  rules = arrows.allowed((ROOT / "tests" / "test_arrows.py").read_text("utf-8"))
  assert len(rules) > 15
  assert arrows.written(PAGE) == arrows.table(rules), (
    "docs/architecture.md has another table than tests/test_arrows.py; run "
    "python -m scripts.docs.arrows"
  )


def test_the_reader_of_rules_knows_constants_and_empty_sets():
  source = 'API = "k.api"\nALLOWED = {"a": set(), "b": {"a", API}}\n'
  assert arrows.allowed(source) == {"a": set(), "b": {"a", "k.api"}}
  assert arrows.table(arrows.allowed(source)).splitlines()[2:] == [
    "| `a` | nothing |",
    "| `b` | `a`, `k.api` |",
  ]


def test_no_package_imports_from_a_layer_above_its_own():
  rules = arrows.allowed((ROOT / "tests" / "test_arrows.py").read_text("utf-8"))
  level = {
    package: -depth
    for depth, (_, packages) in enumerate(pictures.LAYERS)
    for package in packages
  }
  files = {path.stem for path in (ROOT / "opera_jax").glob("*.py")}
  assert set(rules) - files - {"structs"} == set(level) - {"structs"}
  for package in level:
    for other in rules.get(package, ()):
      if other in level:
        assert level[other] <= level[package], (
          f"{package} may import {other}, which the picture draws above it"
        )


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_what_the_script_draws(name):
  drawn = pictures.PICTURES[name]()
  there = (pictures.FOLDER / name).read_text("utf-8")
  assert there == drawn, "run python -m scripts.docs.pictures"
