"""Runs that are told to stop, started twice, or find their inputs changed."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from opera_jax.clock_metrics import depends_on_clock
from opera_jax.data import storyworld, sums
from opera_jax.train import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = (
  f"--config={ROOT}/configs/tiny.py:smoke",
  "--config.data.kind=jsonl",
  "--config.data.documents=320",
  "--config.model.hidden_size=64",
  "--config.model.num_hidden_layers=2",
  "--config.base.checkpoint_every=4",
  "--config.synthesis.max_thought_tokens=96",
  "--config.rollout.max_new_tokens=64",
  "--config.select.rl.samples=2",
  "--config.select.rl.right=(0,1,2)",
)
STAGES = ("tokenizer", "base", "synthesize", "select", "sft", "select_rl")


def _tasks(path, seed=1):
  made = storyworld.prompts(120, seed) + sums.prompts(120, seed)
  names = ("id", "task", "prompt", "reference")
  rows = [{name: getattr(p, name) for name in names} for p in made]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _start(workdir, *flags, driver="opera_rl", config=SMALL, cwd=None):
  """Starts a driver; beside the workdir, so that paths may be relative."""
  env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(ROOT / ".jax_cache"))
  env["XLA_FLAGS"], env["PYTHONPATH"] = "", str(ROOT)
  return subprocess.Popen(
    [
      *(sys.executable, "-m", f"experiments.{driver}", *config),
      f"--workdir={workdir}",
      *flags,
    ],
    cwd=cwd or workdir.parent,
    env=env,
    stderr=subprocess.STDOUT,
    stdout=subprocess.PIPE,
    text=True,
  )


def _end(process, code=0) -> str:
  output, _ = process.communicate(timeout=600)
  assert process.returncode == code, output
  return output


def _signal_when(process, ready, sign) -> tuple[int, str, float]:
  """Sends a signal as soon as `ready()`; exit code, output, seconds to end."""
  deadline = time.monotonic() + 600
  while not ready():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.005)
  process.send_signal(sign)
  begin = time.monotonic()
  output, _ = process.communicate(timeout=300)
  return process.returncode, output, time.monotonic() - begin


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run from end to end, and its tasks."""
  folder = tmp_path_factory.mktemp("straight")
  _tasks(folder / "tasks.jsonl")
  _end(_start(folder / "run", "--config.data.path=tasks.jsonl"))
  return folder


@pytest.fixture
def start(straight, tmp_path):
  """`start(stages)`: a folder with a copy of some stages, and its driver."""
  shutil.copy(straight / "tasks.jsonl", tmp_path / "tasks.jsonl")
  for name in STAGES:
    shutil.copytree(straight / "run" / name, tmp_path / "run" / name)

  def started(stages, *flags, without=(), **more):
    for name in without:
      shutil.rmtree(tmp_path / "run" / name)
    return _start(
      tmp_path / "run",
      "--config.data.path=tasks.jsonl",
      f"--config.stages={stages}",
      *flags,
      **more,
    )

  return started


def _lines(path) -> list[dict]:
  return [
    {k: v for k, v in line.items() if not depends_on_clock(k)}
    for line in metrics.read(path)
  ]


def _done(folder, stage) -> dict:
  return json.loads((folder / "run" / stage / "DONE.json").read_text())


def _traces(folder) -> int:
  parts = (folder / "run" / "synthesize" / "shards").glob("*.jsonl")
  return sum(part.read_bytes().count(b"\n") for part in parts)


def _refused(output, *words) -> None:
  last = output.strip().splitlines()[-1]
  for word in (*words, "then, ", " now", "a new --workdir", "--config.redo="):
    assert word in last, output


def test_new_content_in_the_middle_of_a_synthesis_is_refused(start, tmp_path):
  code, _, _ = _signal_when(
    start("synthesize", without=("synthesize", "select", "sft", "select_rl")),
    lambda: _traces(tmp_path) >= 4,
    signal.SIGKILL,
  )
  assert code == -signal.SIGKILL and 4 <= _traces(tmp_path) < 24
  _tasks(tmp_path / "tasks.jsonl", seed=2)
  _refused(_end(start("synthesize"), 1), "data.path (tasks.jsonl): sha256")
  # Asked to, it does all of it again with what is there now.
  _end(start("synthesize", "--config.redo=tokenizer"))
  assert _traces(tmp_path) == 24
  assert (tmp_path / "run" / "dropped" / "synthesize-1" / "shards").exists()


def test_other_prompts_after_a_checkpoint_of_rl_are_refused(
  start, straight, tmp_path
):
  saved = tmp_path / "run" / "rl" / "checkpoints" / "1" / "FILES.json"
  code, _, _ = _signal_when(start("rl"), saved.exists, signal.SIGKILL)
  assert code == -signal.SIGKILL
  path = tmp_path / "tasks.jsonl"
  before = path.read_text()
  _tasks(path, seed=2)
  _refused(_end(start("rl"), 1), "data.path (tasks.jsonl): sha256")
  path.write_text(before)
  _end(start("rl"))
  assert _done(tmp_path, "rl") == _done(straight, "rl")


def test_keywords_changed_after_select_are_refused(start):
  changed = "--config.reward.keywords=('But',)"
  _refused(_end(start("select", changed), 1), "Stage select", "reward.keyword")
  # Stages before it do not care.
  _end(start("synthesize", changed))


def test_a_base_model_made_anew_under_sft_is_refused(start, tmp_path):
  (tmp_path / "run" / "base").rename(tmp_path / "before")
  faster = "--config.base.learning_rate=0.002"
  _refused(_end(start("sft", faster), 1), "Stage sft", "base/model")
  _refused(_end(start("synthesize", faster), 1), "Stage synthesize", "base/mo")
  output = _end(start("synthesize,select,sft", faster, "--config.redo=base"))
  assert "redo: drops sft" in output


def test_two_starts_of_rl_do_it_once(start, straight, tmp_path):
  both = [start("rl"), start("rl")]
  outputs = [_end(one) for one in both]
  waited = [f"rl: waiting for process {one.pid} on " in other for one, other in
            zip(both, reversed(outputs))]  # fmt: skip
  assert sum(waited) == 1, outputs
  assert sum("rl: 3/3 steps" in one for one in outputs) == 1
  assert _lines(tmp_path / "run" / "rl" / "metrics.jsonl") == _lines(
    straight / "run" / "rl" / "metrics.jsonl"
  )
  assert _done(tmp_path, "rl") == _done(straight, "rl")


TOLD = {
  "base": lambda run: (run / "base" / "metrics.jsonl").exists(),
  "synthesize": lambda run: _traces(run.parent) >= 2,
  "sft": lambda run: (run / "sft" / "metrics.jsonl").exists(),
  "select_rl": lambda run: (run / "select_rl" / "pieces").exists(),
  "rl": lambda run: len(metrics.read(run / "rl" / "metrics.jsonl")) >= 1,
  "evaluate": lambda run: len(list((run / "evaluate").glob("pieces/*"))) >= 1,
}


@pytest.mark.parametrize("stage", TOLD)
def test_told_to_stop_it_saves_leaves_and_goes_on(
  start, straight, tmp_path, stage
):
  run = tmp_path / "run"
  later = STAGES[STAGES.index(stage) :] if stage in STAGES else ()
  if stage == "evaluate":
    shutil.copytree(straight / "run" / "rl", run / "rl")
  stages = {"base": "synthesize", "select_rl": "rl"}.get(stage, stage)
  code, output, seconds = _signal_when(
    start(stages, without=later), lambda: TOLD[stage](run), signal.SIGTERM
  )
  assert code == 128 + signal.SIGTERM, output
  assert not (run / stage / "DONE.json").exists()
  assert seconds < 30, output
  kept = {p: p.stat().st_mtime_ns for p in run.rglob("pieces/*.json")}
  if stage == "evaluate":
    assert kept
  again = start(
    stages if stage != "base" else "synthesize,select,sft,rl",
  )
  _end(again)
  assert _done(tmp_path, stage) == _done(straight, stage)
  for path, when in kept.items():
    assert path.stat().st_mtime_ns == when


def test_told_while_it_is_set_up_it_leaves_at_once(start, tmp_path):
  process = start("rl")
  while "tasks:" not in process.stdout.readline():
    assert process.poll() is None
  code, _, seconds = _signal_when(process, lambda: True, signal.SIGTERM)
  assert code == 128 + signal.SIGTERM and seconds < 10
  assert not (tmp_path / "run" / "rl").exists()


def test_a_pool_told_to_stop_keeps_its_embeddings(tmp_path):
  _tasks(tmp_path / "tasks.jsonl")
  flags = (
    f"--config.data.path={tmp_path / 'tasks.jsonl'}",
    "--config.pool.size=0",
    "--config.pool.embedder=policy",
    "--config.pool.batch=8",
    "--config.pool.clusters=2",
    "--config.pool.minimum=0",
    "--config.pool.languages=()",
  )
  run = tmp_path / "run"
  parts = run / "pool" / "embeddings"
  code, output, _ = _signal_when(
    _start(run, *flags, driver="pool"),
    lambda: len(list(parts.glob("0*.npy"))) >= 1,
    signal.SIGTERM,
  )
  assert code == 128 + signal.SIGTERM, output
  kept = {p: p.stat().st_mtime_ns for p in parts.glob("0*.npy")}
  assert kept and not (run / "pool" / "DONE.json").exists()
  _end(_start(run, *flags, driver="pool"))
  assert all(p.stat().st_mtime_ns == when for p, when in kept.items())


def test_a_grid_told_to_stop_ends_the_run_it_has_begun(tmp_path):
  grid = ("--config=configs/ablations.py:smoke",)
  log = tmp_path / "run" / "start" / "base" / "metrics.jsonl"
  code, output, _ = _signal_when(
    _start(tmp_path / "run", driver="ablate", config=grid, cwd=ROOT),
    log.exists,
    signal.SIGTERM,
  )
  assert code == 128 + signal.SIGTERM, output
  saved = tmp_path / "run" / "start" / "base" / "checkpoints"
  assert list(saved.glob("*/FILES.json"))
  before = log.read_text()
  time.sleep(2)
  assert log.read_text() == before  # nobody goes on
  assert pathlib.Path(tmp_path / "run" / "ablate.lock").exists()
