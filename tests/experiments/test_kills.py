"""Killed 25 times, at random instants and at writes of checkpoints, a run ends
bit for bit as one that was not."""

import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from opera_jax.clock_metrics import depends_on_clock
from opera_jax.data import traces
from opera_jax.train import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KILLS = 25
SEED = 20261127
STAGES = ("base", "synthesize", "select", "sft", "select_rl", "rl", "evaluate")
FLAGS = (
  "--config=configs/tiny.py:smoke",
  "--config.data.math_share=0.5",
  "--config.data.documents=320",
  "--config.data.rl=32",
  "--config.model.hidden_size=64",
  "--config.model.num_hidden_layers=2",
  "--config.base.checkpoint_every=2",
  "--config.synthesis.batch=4",
  "--config.synthesis.max_thought_tokens=64",
  "--config.sft.checkpoint_every=2",
  "--config.rollout.max_new_tokens=48",
  "--config.select.rl.samples=2",
  "--config.select.rl.right=(0,1,2)",
)


def _start(workdir):
  env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(ROOT / ".jax_cache"))
  env["XLA_FLAGS"] = ""
  return subprocess.Popen(
    [
      *(sys.executable, "-W", "ignore", "-m", "experiments.opera_rl"),
      *(*FLAGS, f"--workdir={workdir}"),
    ],
    cwd=ROOT,
    env=env,
    stderr=subprocess.STDOUT,
    stdout=subprocess.PIPE,
    text=True,
  )


def _finish(process) -> float:
  begin = time.monotonic()
  output, _ = process.communicate(timeout=600)
  assert process.returncode == 0, output
  return time.monotonic() - begin


def _writing(run: pathlib.Path) -> set[str]:
  """Checkpoints that are being written, or have not got their list yet."""
  out = set()
  for folder in run.glob("*/*/"):
    if folder.name in ("checkpoints", "model"):
      for one in folder.iterdir():
        half = "orbax-checkpoint-tmp" in one.name
        if half or (one.name.isdigit() and not (one / "FILES.json").exists()):
          out.add(str(one))
  return out


def _kill(process, run: pathlib.Path, seconds: float, at_write: bool) -> str:
  """Kills after so long, or then at the next write of a checkpoint.

  Returns:
    What was going on; "ended" where the run was faster.
  """
  begin, known = time.monotonic(), _writing(run)
  while process.poll() is None:
    late = time.monotonic() - begin > seconds
    if late and not at_write:
      break
    new = _writing(run) - known if at_write else set()
    if new:
      process.kill()
      process.communicate()
      return "write of " + str(pathlib.Path(min(new)).relative_to(run))
    if time.monotonic() - begin > seconds + 8:
      break  # nothing is being written here
    time.sleep(0.0005 if at_write else 0.01)
  if process.poll() is not None:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return "ended"
  process.send_signal(signal.SIGKILL)
  process.communicate()
  begun = [name for name in STAGES if (run / name).exists()]
  return f"in {begun[-1] if begun else 'set-up'}"


def _stage(where: str) -> str:
  """Of what `_kill` says."""
  return where.split(" ")[-1].split("/")[0]


def _outcome(run: pathlib.Path) -> dict:
  """All that a run leaves, but for what depends on the clock."""
  out = {}
  for stage in STAGES:
    out[stage] = json.loads((run / stage / "DONE.json").read_text())
    log = run / stage / "metrics.jsonl"
    out[f"{stage}/metrics"] = [
      {k: v for k, v in line.items() if not depends_on_clock(k)}
      for line in metrics.read(log)
    ]
  for stage in ("synthesize", "select"):
    path = run / stage / "traces" / traces.JSONL
    out[f"{stage}/traces"] = path.read_bytes()
  out["prompts"] = (run / "select_rl" / "prompts.jsonl").read_bytes()
  return out


@pytest.fixture(scope="module")
def want(tmp_path_factory):
  """What a run leaves that is let alone; it compiles, too."""
  straight = tmp_path_factory.mktemp("straight") / "run"
  _finish(_start(straight))
  return _outcome(straight)


def _kill_at_new_write(process, run: pathlib.Path, before: set[str]) -> str:
  """Kills at the first write that is not among `before`.

  Returns:
    Its name, STAGE/FOLDER/STEP; "" where the run ended first.
  """
  while process.poll() is None:
    for path in map(pathlib.Path, _writing(run)):
      step = path.name.partition(".")[0]
      name = str(path.parent.relative_to(run) / step)
      if name not in before:
        process.kill()
        process.communicate()
        return name
    time.sleep(0.0005)
  output, _ = process.communicate()
  assert process.returncode == 0, output
  return ""


def test_a_run_that_is_killed_at_each_write_ends_as_the_straight_one(
  want, tmp_path
):
  """Each checkpoint of each stage, and each final model, once."""
  run, killed = tmp_path / "run", []
  while name := _kill_at_new_write(_start(run), run, set(killed)):
    killed.append(name)
    print(f"killed at the write of {name}", flush=True)
  got = _outcome(run)
  for name in want:
    assert got[name] == want[name], (name, killed)
  assert {one.rpartition("/")[0] for one in killed} == {
    f"{stage}/{folder}"
    for stage in ("base", "sft", "rl")
    for folder in ("checkpoints", "model")
  }
  assert {f"rl/checkpoints/{step}" for step in (1, 2, 3)} <= set(killed)


def test_a_run_that_is_killed_25_times_ends_as_the_straight_one(want, tmp_path):
  assert all(len(want[stage]["model"]) == 64 for stage in ("base", "sft", "rl"))
  rng = random.Random(SEED)
  where = []
  for number in itertools.count(1):
    run = tmp_path / f"killed-{number}"
    while len(where) < KILLS:
      # Setting up takes 2 s; longer where it was killed before, to get on.
      stage = [_stage(one) for one in where[-4:]]
      again = len(
        list(itertools.takewhile(stage[-1:].__contains__, stage[::-1]))
      )
      seconds = rng.uniform(2.0, 6.0) + 2.0 * again
      at_write = rng.random() < 0.5
      where.append(_kill(_start(run), run, seconds, at_write))
      print(f"kill {len(where)}: {where[-1]}", flush=True)
      if where[-1] == "ended":
        where.pop()
        break
    else:
      _finish(_start(run))
    got = _outcome(run)
    for name in want:
      assert got[name] == want[name], (number, name, where)
    if len(where) == KILLS:
      break
  # It was killed all over, and in the midst of writes.
  assert sum("write" in one for one in where) >= 3, where
  assert len(set(map(_stage, where))) >= 4, where
