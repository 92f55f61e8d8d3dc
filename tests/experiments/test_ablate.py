"""The grid is well formed, resumes cell by cell, and writes its tables."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from opera_jax.configs import ablations, cold_start
from opera_jax.experiments import ablate
from opera_jax.stages import held_out


@pytest.mark.parametrize("arg", ["", "smoke"])
@pytest.mark.parametrize("grid", [ablations, cold_start])
def test_the_grid_names_real_configs_rows_and_measures(grid, arg):
  config = grid.get_config(arg)
  names = {name for name, _, _ in config.rows} | {config.first}
  task = ablate.load(config.task, [])
  for name, path, changes in config.rows:
    made = ablate.load(
      ablate.config_of(path, config),
      [*ablate.split(config.each.format(seed=3)), *ablate.split(changes)],
    )
    for section in ("seed", "tokenizer", "model", "data", "base"):
      assert made[section] == task[section], (name, section)
  assert config.baseline in names
  assert set(config.measures) <= set(held_out.MEASURES)
  for _, row, other, name in config.questions:
    assert {row, other} <= names and name in held_out.MEASURES
  slugs = [ablate.slug(name) for name in sorted(names)]
  assert len(set(slugs)) == len(names)
  with pytest.raises(ValueError, match="'tall'"):
    grid.get_config("tall")


def test_changes_of_a_row_are_applied():
  changes = {name: text for name, _, text in ablations.ROWS}
  path = f"{ablations.OPERA}:ablation"
  config = ablate.load(path, ablate.split(changes["opera, bridge"]))
  assert config.reward.bridge == "\n</think>\n\n"
  config = ablate.load(
    f"{ablations.OPPO}:ablation", ablate.split(changes["oppo, no anchoring"])
  )
  assert config.rl.advantage_options.oppo.anchor is False
  config = ablate.load(
    f"{ablations.SAR}:ablation", ablate.split(changes["R_SA only"])
  )
  assert config.reward.terms == "sar + 0*opera + 0*verifiable"


def _run(workdir, grid="ablations"):
  env = dict(os.environ, XLA_FLAGS="")
  env["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".jax_cache")
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.ablate"),
      f"--config=configs/{grid}.py:smoke",
      f"--workdir={workdir}",
    ],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    check=False,
    timeout=1500,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_small_grid_runs_and_repeats_nothing(tmp_path):
  output = _run(tmp_path)
  text = (tmp_path / "ablation.md").read_text()
  for word in ("opera", "R_VR + 0.2 R_SA", "reference_echoed", "scored"):
    assert word in text and word in output
  kept = json.loads((tmp_path / "ablation.json").read_text())
  assert set(kept["values"]["opera"]["0"]) == set(held_out.MEASURES)
  assert (tmp_path / "curves.png").stat().st_size > 10_000
  # A cell that was lost is made again; the others are left alone.
  cells = sorted((tmp_path / "cells").iterdir())
  before = (cells[0] / "rl" / "DONE.json").stat().st_mtime_ns
  (cells[1] / "measured.json").unlink()
  assert "rl: 1/1" not in _run(tmp_path)
  assert (cells[0] / "rl" / "DONE.json").stat().st_mtime_ns == before
  assert (tmp_path / "ablation.md").read_text() == text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_small_grid_of_cold_starts(tmp_path):
  _run(tmp_path, "cold_start")
  text = (tmp_path / "ablation.md").read_text()
  for word in ("| plain sampling | 1 |", "| base | 1 |", "traces kept"):
    assert word in text
  # Both rows have the base model's draws; only one of them searched.
  kept = json.loads((tmp_path / "ablation.json").read_text())
  search, plain = (
    kept["cost"][row]["0"] for row in ("lowest perplexity", "plain sampling")
  )
  assert search["sampled_tokens"] > plain["sampled_tokens"] > 0
  assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_rows_that_differ_have_folders_that_do():
  names = ["A + B", "A - B", "A_B", "a/b", "..", "", "é", "è", "x" * 300]
  slugs = [ablate.slug(name) for name in names]
  assert len(set(slugs)) == len(names)
  assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", one) for one in slugs if one)


def test_a_row_that_is_named_twice_is_refused():
  config = ablations.get_config("smoke").copy_and_resolve_references()
  config.unlock()
  config.rows = (*config.rows, config.rows[0])
  with pytest.raises(ValueError, match=r"names \['opera'\] twice"):
    ablate.check(config, [])
  config.rows = (("bad", ablations.OPERA, "--config.rl.loss=clip"),)
  with pytest.raises(
    ValueError, match="(?s)Row 'bad': .*config.rl.loss is 'clip'"
  ):
    ablate.check(config, [])


def test_tables_are_written_while_the_grid_runs(tmp_path):
  """Every row of a table has the same seeds, those that all rows have."""
  config = ablations.get_config("smoke").copy_and_resolve_references()
  config.unlock()
  config.rows = (("a", "", ""), ("b", "", ""), ("c", "", ""))
  config.baseline, config.questions = "a", ()
  config.measures, config.seeds = ("facts",), (0, 1, 2)
  numbers = {"facts": [1.0, 2.0]}
  for name in "abc":
    for seed in config.seeds:
      folder = tmp_path / "cells" / f"{name}-{seed}" / "rl"
      folder.mkdir(parents=True)
      (folder / "metrics.jsonl").write_text("")
  values, cost = {"sft": {0: numbers}}, {}
  shown = []
  for seed in config.seeds:
    for name in "abc":
      values.setdefault(name, {})[seed] = numbers
      cost.setdefault(name, {})[seed] = {"steps": 1, "sampled_tokens": 9}
      text = ablate.write(tmp_path, config, values, cost, {})
      assert (tmp_path / "ablation.md").read_text() == text + "\n"
      table = text.split("\n\n")[0].splitlines()[2:]
      shown.append([tuple(row.split(" | ")[:2]) for row in table])
  assert shown[0] == [("| sft", "1"), ("| a", "1")]
  assert shown[3] == [("| sft", "1"), ("| a", "1"), ("| b", "1"), ("| c", "1")]
  assert shown[4] == shown[3]
  assert shown[5][1:] == [("| a", "2"), ("| b", "2"), ("| c", "2")]
  assert shown[-1][1:] == [("| a", "3"), ("| b", "3"), ("| c", "3")]
  kept = json.loads((tmp_path / "ablation.json").read_text())
  assert kept["values"]["a"]["2"] == numbers
