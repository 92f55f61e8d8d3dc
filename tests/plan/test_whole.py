"""A plan's sums, its table, and what the command does with it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from opera_jax.configs import qwen3_0_6b
from opera_jax.models import presets
from opera_jax.plan import render, whole
from opera_jax.run import sizes

CONFIG = (
  *("--config=configs/tiny.py:smoke", "--config.model.vocab_size=640"),
  *("--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
  *(
    "--config.scoring.prefix_buckets=(128,)",
    "--config.scoring.slot_buckets=(1,)",
  ),
)


def _run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.plan", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
    env=os.environ | {"XLA_FLAGS": ""},
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """The command's output, and the folder with its file."""
  folder = tmp_path_factory.mktemp("plans")
  done = _run(
    *CONFIG,
    "--topology=v5e:2x2",
    "--programs=reference",
    f"--json={folder / 'tiny.json'}",
  )
  assert done.returncode == 0, done.stderr
  return done.stdout, folder


def test_the_command_prints_the_table_and_saves_the_plan(saved):
  output, folder = saved
  plan = json.loads((folder / "tiny.json").read_text())
  assert output.endswith(render.text(plan) + "\n")
  assert plan["devices"] == plan["chips"] == 4
  [reference] = plan["programs"]
  assert plan["step_seconds"] == reference["work"] * reference["seconds"]
  assert plan["serial_seconds"] > plan["step_seconds"]
  # No overlap: what it computes, moves and sends, one after the other.
  assert reference["serial_seconds"] == pytest.approx(
    sum(reference[f"{x}_seconds"] for x in ("flops", "moved", "collective"))
  )
  assert reference["seconds"] >= reference["flops_seconds"] > 0
  # 2 x 2 layers' keys and values, 64 wide, float32, 224 tokens a sample.
  assert plan["slot_bytes"] == 2 * 3 * 2 * 32 * 4 * 224
  [head] = [x for x in output.splitlines() if x.startswith("program ")]
  [row] = [x for x in output.splitlines() if x.startswith("reference ")]
  assert len(head) == len(row)


def test_the_page_holds_every_saved_plan(saved):
  _, folder = saved
  assert _run(f"--page={folder}").returncode == 0
  page = (folder / "README.md").read_text()
  plan = json.loads((folder / "tiny.json").read_text())
  assert page == render.markdown([plan])
  assert "## `configs/tiny.py:smoke` on v5e:2x2" in page
  assert "| reference | " in page


def test_programs_that_are_not_named_are_kept(saved):
  _, folder = saved
  plan = json.loads((folder / "tiny.json").read_text())
  kept = whole.kept(plan, plan["config"], plan["topology"])
  assert kept == {"reference": plan["programs"][0]}
  assert whole.kept(plan, plan["config"], "v6e:2x2") == {}
  assert whole.kept(None, plan["config"], plan["topology"]) == {}
  # Nor are those of a plan that had other columns.
  del plan["programs"][0]["moved_bytes"]
  assert whole.kept(plan, plan["config"], plan["topology"]) == {}


def test_what_does_not_fit_is_said_and_has_no_number_it_lacks(saved):
  _, folder = saved
  plan = json.loads((folder / "tiny.json").read_text())
  plan["programs"][0] |= {
    "fits": False,
    "argument_bytes": None,
    "collective_bytes": None,
    "collective_seconds": None,
  }
  text = render.text(plan)
  assert "reference does not fit" in text
  assert "config.scoring.batch_size (16; a multiple of 2)" in text
  assert text.count("not available") == 3


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("--topology=v5e:3x3",), "must be one of"),
    (("--topology=v5e:2x2", "--programs=sing"), "sing"),
    ((), "--topology=v5p:4x4x4"),
  ],
)
def test_wrong_flags_end_with_their_remedy(arguments, message):
  done = _run(*CONFIG, *arguments)
  assert done.returncode == 1
  assert message in done.stdout + done.stderr


def test_what_does_not_fit_ends_the_command_with_an_error(tmp_path):
  done = _run(
    *CONFIG,
    *("--topology=v5e:2x2", "--programs=decode"),
    *(
      "--config.engine.prompt_slots=4096",
      "--config.rollout.max_new_tokens=16384",
    ),
  )
  assert done.returncode == 1
  assert "decode does not fit" in done.stdout


@pytest.mark.slow
def test_a_gpu_is_estimated_and_what_does_not_fit_gets_values_that_do():
  done = _run(
    "--config=configs/qwen3_0_6b.py",
    *("--config.mesh.fsdp=1", "--config.mesh.tensor=1", "--topology=l4"),
    *("--programs=decode,update", "--solve"),
  )
  assert done.returncode == 1, done.stderr
  assert "estimated from shapes, nothing compiled" in done.stdout
  assert "decode does not fit" in done.stdout
  assert "It fits with --config.engine.prompt_slots=1" in done.stdout
  largest = done.stdout.partition("The largest setting that fits: ")[2].split()
  again = _run(
    "--config=configs/qwen3_0_6b.py",
    *("--config.mesh.fsdp=1", "--config.mesh.tensor=1", "--topology=l4"),
    *("--programs=decode,update", *largest),
  )
  assert again.returncode == 0, again.stdout


def test_a_plan_is_saved_after_every_program(saved):
  _, folder = saved
  plan = json.loads((folder / "tiny.json").read_text())
  written = []
  sections = {
    "model": vars(presets.PRESETS["Qwen/Qwen3-0.6B"]),
    **{n: sizes.derive(qwen3_0_6b.get_config())[n] for n in whole.SECTIONS[1:]},
  }
  whole.make(
    *("h100", {"fsdp": 1}, sections),
    name="x",
    names=("decode", "update"),
    save=lambda plan: written.append(json.loads(json.dumps(plan))),
  )
  assert [p["missing"] for p in written[:-1]] == [["update"], []]
  assert "This plan is partial: it lacks update." in render.text(written[0])
  assert "missing" not in written[-1] and "missing" not in plan
  assert "partial" not in render.text(written[-1])


@pytest.mark.slow
def test_what_is_killed_leaves_a_plan_that_says_it_is_partial(tmp_path):
  path = tmp_path / "plan.json"
  command = [
    *(sys.executable, "-m", "experiments.plan", *CONFIG),
    *("--topology=v5e:2x2", "--programs=decode,reference,update"),
    f"--json={path}",
  ]
  with subprocess.Popen(
    command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}
  ) as running:
    while running.poll() is None and not path.exists():
      time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
  plan = json.loads(path.read_text())
  assert running.returncode == -signal.SIGTERM
  assert plan["missing"] and [p["name"] for p in plan["programs"]] == ["decode"]
