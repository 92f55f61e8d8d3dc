"""The driver end to end: killed anywhere it goes on, and it learns."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT

from opera_jax import config_file
from opera_jax.clock_metrics import depends_on_clock
from opera_jax.configs import tiny
from opera_jax.data import prompts, storyworld, sums
from opera_jax.experiments import opera_rl
from opera_jax.rl import rollout_files
from opera_jax.stages import stage_times
from opera_jax.train import metrics

pytestmark = pytest.mark.slow


def _start(
  workdir,
  *flags,
  config="configs/tiny.py:smoke",
  program=("-m", "experiments.opera_rl"),
):
  env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(ROOT / ".jax_cache"))
  env["XLA_FLAGS"] = ""  # one device, as on a laptop
  return subprocess.Popen(
    [
      *(sys.executable, *program),
      f"--config={config}",
      f"--workdir={workdir}",
      *flags,
    ],
    cwd=ROOT,
    env=env,
    stderr=subprocess.STDOUT,
    stdout=subprocess.PIPE,
    text=True,
  )


def _finish(process) -> str:
  output, _ = process.communicate(timeout=1200)
  assert process.returncode == 0, output
  return output


def _kill_when(process, ready, sign) -> int:
  """Sends a signal as soon as `ready()`; returns the exit code."""
  deadline = time.monotonic() + 1200
  while not ready():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(sign)
  process.communicate(timeout=120)
  return process.returncode


def _lines(path) -> list[dict]:
  return [
    {k: v for k, v in line.items() if not depends_on_clock(k)}
    for line in metrics.read(path)
  ]


def _checkpoints(folder: pathlib.Path) -> list[str]:
  return [p.name for p in folder.glob("*") if (p / "FILES.json").exists()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight")
  output = _finish(_start(workdir))
  return workdir, output


def test_every_stage_leaves_what_it_should(straight):
  workdir, output = straight
  for stage in ("base", "synthesize", "select", "sft", "rl", "evaluate"):
    assert (workdir / stage / "DONE.json").exists(), stage
  page = (workdir / "report.html").read_text()
  assert "<script" not in page
  assert "A model of family qwen3, " in page
  assert "facts kept" in page
  assert len(_lines(workdir / "rl" / "metrics.jsonl")) == 3
  assert list((workdir / "rl" / "tensorboard").rglob("events*"))
  # On a fast machine no stage lasts long enough to say how much is left.
  for word in ("tokens/s", "facts kept"):
    assert word in output
  for whose in ("synthesize: first sample of the base", "rl: first sample"):
    assert output.count(whose) == 1
  times = {s.name: s for s in stage_times.read(workdir)}
  assert list(times) == [stage_times.SETUP, *opera_rl.STAGES]
  for stage in ("base", "synthesize", "sft", "rl", "evaluate"):
    assert times[stage].programs > 0
    assert 0 < times[stage].compiling < times[stage].seconds
  assert "\nin all " in output
  for number, stage in enumerate(opera_rl.STAGES, 1):
    assert output.count(f"\nstage {number} of 7: {stage}\n") == 1
  assert output.count("float32; the page will be") == 1
  assert "not in this run" not in output
  source = tfds.builder_from_directory(
    workdir / "synthesize" / "traces" / "tfds" / "traces" / "1.0.0"
  ).as_data_source("train")
  assert len(source) == 24
  line = _lines(workdir / "rl" / "metrics.jsonl")[0]
  assert line["sampler_trainer/max_logprob_diff"] < 1e-4
  for part in ("mean", "r_ppl", "r_self", "count", "score"):
    assert f"reward/{part}" in line


def test_a_finished_run_repeats_nothing(straight):
  workdir, _ = straight
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("DONE.json")}
  output = _finish(_start(workdir))
  assert "base:" not in output
  for number, stage in enumerate(opera_rl.STAGES[:-1], 1):
    assert f"\nstage {number} of 7: {stage}, done before\n" in output
  assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("DONE.json")}


def _command(name, *flags):
  return subprocess.run(
    [sys.executable, "-m", f"experiments.{name}", *flags],
    cwd=ROOT,
    env=dict(os.environ, XLA_FLAGS=""),
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def test_the_workdir_alone_is_enough(straight, tmp_path):
  workdir, _ = straight
  config = config_file.load(str(workdir / config_file.NAME))
  assert config.to_dict() == tiny.get_config("smoke").to_dict()
  first, *_ = json.loads((workdir / "run.json").read_text())["starts"]
  assert f"--workdir={workdir}" in first["command"]
  done = _command("evaluate", f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  made = tmp_path / "export"
  done = _command("export", f"--workdir={workdir}", f"--output={made}")
  assert done.returncode == 0 and (made / "config.json").exists()
  # A mistyped one is named with the nearest, and is not created.
  wrong = workdir.with_name(workdir.name + "x")
  for name, *flags in (
    ("chat", "--prompt=Hi"),
    ("export", f"--output={tmp_path / 'none'}"),
    ("evaluate",),
  ):
    done = _command(name, f"--workdir={wrong}", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"did you mean '{workdir.name}'" in done.stderr
  assert not wrong.exists() and not (tmp_path / "none").exists()


def test_rl_from_another_runs_model_is_the_rl_of_that_run(straight, tmp_path):
  """Bit for bit, without a base model, and without copying a folder."""
  workdir, _ = straight
  flags = (
    "--config.stages=rl,evaluate,report",
    f"--config.rl.init={workdir}/sft",
  )
  output = _finish(_start(tmp_path, *flags))
  assert "not in this run: base, synthesize, select, sft\n" in output
  assert "\nstage 1 of 3: rl\n" in output and "report:" in output
  want = _lines(workdir / "rl" / "metrics.jsonl")
  assert _lines(tmp_path / "rl" / "metrics.jsonl") == want
  assert not (tmp_path / "base").exists() and not (tmp_path / "sft").exists()
  ours, theirs = (
    json.loads((folder / "evaluate" / "DONE.json").read_text())["values"]
    for folder in (tmp_path, workdir)
  )
  assert list(ours) == ["init", "rl"]
  for name, there in (("init", "sft"), ("rl", "rl")):
    # Ranks depend on the models that are compared.
    for values in (ours[name], theirs[there]):
      del values["r_ppl"]
    assert ours[name] == theirs[there]
  # Another model is refused by its digest.
  process = _start(tmp_path, flags[0], f"--config.rl.init={workdir}/base")
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 1 and "Traceback" not in output
  assert "given other inputs: init/model" in output


def test_ctrl_c_saves_first_and_the_run_goes_on(straight, tmp_path):
  workdir, _ = straight
  flags = (
    "--config.rl.checkpoint_every=99",
    "--config.stages=rl",
    f"--config.rl.init={workdir}/sft",
  )
  log = tmp_path / "rl" / "metrics.jsonl"
  # As in a shell's foreground, wherever the tests are run.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = _start(tmp_path, *flags)
  signal.signal(signal.SIGINT, before)
  deadline = time.monotonic() + 600
  while not metrics.read(log):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 130, output
  assert output.count("Ctrl-C") == 1 and "Traceback" not in output
  assert _checkpoints(tmp_path / "rl" / "checkpoints") in (["1"], ["2"])
  _finish(_start(tmp_path, *flags))
  assert _lines(log) == _lines(workdir / "rl" / "metrics.jsonl")


def _chat(workdir, *flags, typed="") -> str:
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.chat"),
      "--config=configs/tiny.py:smoke",
      f"--workdir={workdir}",
      *flags,
    ],
    cwd=ROOT,
    input=typed,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_a_model_answers_by_hand(straight):
  workdir, _ = straight
  typed = _chat(workdir, typed="Tell me of a fox.\n\n")
  streamed = typed.removeprefix("prompt> ")
  text, _, rest = streamed.partition("\n[")
  assert text and " tokens, ended by " in rest
  # The same draw, not streamed, beside another one.
  both = _chat(workdir, "--prompt=Tell me of a fox.", "--samples=2")
  assert text in both and both.count(" tokens, ended by ") == 2
  # The string that ends an answer is not shown.
  end = text[len(text) // 2 :][:4]
  cut = _chat(workdir, "--prompt=Tell me of a fox.", f"--stop={end}")
  assert cut.partition("\n[")[0] == text[: text.index(end)]


def test_a_changed_setting_is_refused(straight):
  workdir, _ = straight
  process = _start(workdir, "--config.sft.learning_rate=0.5")
  output, _ = process.communicate(timeout=300)
  assert process.returncode != 0
  assert "sft.learning_rate: 0.0005 then, 0.5 now" in output


def test_killed_in_every_stage_equals_straight_bit_for_bit(straight, tmp_path):
  workdir, _ = straight
  killed = [
    ("base", lambda: _checkpoints(tmp_path / "base" / "checkpoints")),
    ("synthesize", lambda: (tmp_path / "synthesize" / "shards").exists()),
    ("sft", lambda: (tmp_path / "sft" / "metrics.jsonl").exists()),
    ("rl", lambda: _checkpoints(tmp_path / "rl" / "checkpoints")),
    ("rl", lambda: "2" in _checkpoints(tmp_path / "rl" / "checkpoints")),
    ("evaluate", lambda: (tmp_path / "evaluate" / "SETTINGS.json").exists()),
  ]
  for stage, ready in killed:
    code = _kill_when(_start(tmp_path), ready, signal.SIGKILL)
    assert code == -signal.SIGKILL, stage
  _finish(_start(tmp_path))
  for stage in ("base", "sft", "rl"):
    want = _lines(workdir / stage / "metrics.jsonl")
    assert _lines(tmp_path / stage / "metrics.jsonl") == want, stage
  results = [
    json.loads((w / "evaluate" / "DONE.json").read_text())["values"]
    for w in (workdir, tmp_path)
  ]
  assert results[0] == results[1]


def test_sigterm_saves_first_and_the_run_goes_on(straight, tmp_path):
  workdir, _ = straight
  for stage in ("tokenizer", "base", "synthesize", "select", "sft"):
    shutil.copytree(workdir / stage, tmp_path / stage)
  # No checkpoint by count: what is there was written because of the signal.
  flags = ("--config.rl.checkpoint_every=99", "--config.stages=rl")
  log = tmp_path / "rl" / "metrics.jsonl"
  code = _kill_when(
    _start(tmp_path, *flags),
    lambda: len(metrics.read(log)) == 1,
    signal.SIGTERM,
  )
  assert code == 128 + signal.SIGTERM
  assert _checkpoints(tmp_path / "rl" / "checkpoints") in (["1"], ["2"])
  _finish(_start(tmp_path, *flags))
  assert _lines(log) == _lines(workdir / "rl" / "metrics.jsonl")


def test_mean_reward_rises_over_rl(tmp_path):
  _finish(
    _start(
      tmp_path,
      "--config.stages=synthesize,select,sft,rl",
      "--config.rl.steps=10",
      config="configs/tiny.py",
    )
  )
  reward = [
    line["reward/mean"] for line in _lines(tmp_path / "rl" / "metrics.jsonl")
  ]
  # A permutation test of the slope over steps, one-sided.
  steps = np.arange(len(reward)) - (len(reward) - 1) / 2
  slope = steps @ np.asarray(reward)
  rng = np.random.default_rng(0)
  by_chance = [steps @ rng.permutation(reward) for _ in range(10_000)]
  assert np.mean(np.asarray(by_chance) >= slope) < 0.005


# Two data sets with a reward of their own each, drawn by pass rate.
_MIXED = """
from opera_jax.configs import tiny
def get_config():
  config = tiny.get_config("smoke").copy_and_resolve_references().unlock()
  config.stages = "rl"
  config.rl.init = {init!r}
  config.rl.steps = 4
  config.rl.sampling = "pass_rate"
  config.rl.max_resamples = 1
  config.data.kind = "jsonl"
  config.data.documents = config.data.synthesis = 0
  config.data.mix = (({tales!r}, 1.0), ({sums!r}, 3.0))
  config.reward.terms = "opera"
  config.reward.by_task = {{"sums": "0.5*entropy + 2*verifiable"}}
  return config.lock()
"""


def test_a_killed_run_of_several_sets_by_pass_rate_is_a_straight_one(
  straight, tmp_path
):
  places = {name: str(tmp_path / f"{name}.jsonl") for name in ("tales", "sums")}
  for name, made in (
    ("tales", storyworld.prompts(60, 5)),
    ("sums", sums.prompts(30, 5)),
  ):
    prompts.write(places[name], [prompts.row(p) for p in made])
  config = tmp_path / "mixed.py"
  config.write_text(_MIXED.format(init=f"{straight[0]}/sft", **places))
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  _finish(_start(whole, config=config))
  log = killed / "rl" / "metrics.jsonl"
  _kill_when(
    _start(killed, config=config),
    lambda: len(_checkpoints(killed / "rl" / "checkpoints")) > 1,
    signal.SIGKILL,
  )
  assert len(metrics.read(log)) < 4
  assert "resuming after step" in _finish(_start(killed, config=config))
  want = _lines(whole / "rl" / "metrics.jsonl")
  assert _lines(log) == want and len(want) == 4
  assert all("reward_by_set/sums" in line for line in want)
  results = [
    json.loads((folder / "rl" / "DONE.json").read_text())["model"]
    for folder in (whole, killed)
  ]
  assert results[0] == results[1]
  # One tale and three sums in every sampled batch; each paid by its own sum.
  for path in rollout_files.steps(whole / "rl" / "rollouts").values():
    records = list(rollout_files.read(path))
    sets = [r["set"] for r in records if r["sample"] == 0]
    assert sets.count("sums") == 3 * sets.count("tales") > 0
    for record in records:
      assert record["prompt_id"].startswith(record["set"] + "/")
      terms = record["terms"]
      paid = {
        "tales": terms["opera"],
        "sums": 0.5 * terms["entropy"] + 2 * terms["verifiable"],
      }
      np.testing.assert_allclose(
        record["reward"], paid[record["set"]], rtol=1e-5, atol=1e-6
      )


# A run that dies between a new best model and the checkpoint that names it.
_DIES = """
import os
from absl import app
from opera_jax.experiments import opera_rl
from opera_jax.rl import validation
real = validation.save_best
def save_best(folder, step, params):
  real(folder, step, params)
  if step == int(os.environ["DIES_AT"]):
    os._exit(9)
validation.save_best = save_best
app.run(opera_rl.main)
"""


def test_the_best_model_of_a_killed_run_is_that_of_a_straight_one(
  straight, tmp_path, monkeypatch
):
  flags = [
    "--config.stages=rl",
    "--config.rl.validation.every=1",
    "--config.rl.validation.prompts=4",
    "--config.rl.epochs_per_batch=2",
    "--config.rl.optimizer=muon",
    "--config.rl.advantage=gdpo",
  ]
  folders = [tmp_path / name for name in ("whole", "killed", "early")]
  for folder in folders:
    for stage in ("base", "synthesize", "select", "sft"):
      shutil.copytree(straight[0] / stage, folder / stage)
  whole, killed, early = folders
  score = "--config.rl.validation.metric=score"
  _finish(_start(whole, *flags, score))
  best = json.loads((whole / "rl" / "DONE.json").read_text())["validation"]
  monkeypatch.setenv("DIES_AT", str(best["best_step"]))
  died = _start(killed, *flags, score, program=("-c", _DIES))
  died.communicate(timeout=1200)
  assert died.returncode == 9
  assert (killed / "rl" / "best" / str(best["best_step"])).exists()
  checkpoints = _checkpoints(killed / "rl" / "checkpoints")
  assert str(best["best_step"]) not in checkpoints
  _finish(_start(killed, *flags, score))
  results = [
    json.loads((folder / "rl" / "DONE.json").read_text())
    for folder in (whole, killed)
  ]
  assert results[0]["model"] == results[1]["model"]
  assert results[0]["validation"] == results[1]["validation"]
  lines = [_lines(f / "rl" / "metrics.jsonl") for f in (whole, killed)]
  assert lines[0] == lines[1]
  assert [line["step"] for line in lines[0]] == [1, 2, 3]
  # Ranks within a group have one mean: no validation beats the first.
  _finish(_start(early, *flags, "--config.rl.validation.patience=1"))
  result = json.loads((early / "rl" / "DONE.json").read_text())
  assert result["steps"] == 2 and result["validation"]["best_step"] == 1
  assert result["model"] != results[0]["model"]
