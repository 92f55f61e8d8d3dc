"""The workflow and the hooks run what the Makefile and the pins say."""

import re

import yaml
from conftest import ROOT


def _jobs():
  text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
  return yaml.safe_load(text)["jobs"]


def _steps():
  return [step for job in _jobs().values() for step in job["steps"]]


def test_jobs_run_targets_of_the_makefile():
  makefile = (ROOT / "Makefile").read_text()
  ran = {
    target
    for step in _steps()
    for target in re.findall(r"^make ([\w-]+)", step.get("run", ""), re.M)
  }
  assert ran == {"lint", "test", "docs", "build"}
  for target in ran:
    assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_fast_tests_run_on_both_pythons():
  assert _jobs()["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]


def test_actions_are_named_by_tag():
  used = [step["uses"] for step in _steps() if "uses" in step]
  assert used
  for action in used:
    assert re.fullmatch(r"actions/[\w-]+@v\d+", action), action


def test_the_hooks_use_the_pinned_ruff():
  hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
  revisions = {r["repo"].split("/")[-1]: r.get("rev") for r in hooks["repos"]}
  pins = (ROOT / "requirements-dev.txt").read_text()
  pinned = re.search(r"^ruff==(\S+)$", pins, re.M)[1]
  assert revisions["ruff-pre-commit"] == f"v{pinned}"


def test_types_are_part_of_lint():
  makefile = (ROOT / "Makefile").read_text()
  assert re.search(r"^lint:.*\btypes\b", makefile, re.M)
