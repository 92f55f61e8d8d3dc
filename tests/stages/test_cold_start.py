"""Synthesis goes on where it was, mends what broke, and stays small."""

import json
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT

from opera_jax.configs import tiny
from opera_jax.data import traces
from opera_jax.rewards import function
from opera_jax.run import setup, workdir
from opera_jax.stages import cold_start
from opera_jax.stages import dataset_card as dataset_card_lib
from opera_jax.synthesis import filters
from opera_jax.train import checkpoint, metrics

ABOUT = dataset_card_lib.Card(name="Made up", license="cc0-1.0")


class _Searcher:
  """Stands in for the search: a trace of given size, and a note of its id."""

  def __init__(self, note, words=20):
    self._note, self._words = note, words

  def run(self, sample_params, score_params, prompts, key, advance, ended):
    self._note += [p.id for p in prompts]
    advance(5 * len(prompts))
    for p in reversed(prompts):  # in whatever order
      ended(self._trace(p))

  def _trace(self, p):
    return traces.Trace(
      id=p.id,
      prompt=p.prompt,
      reference=p.reference,
      thought="One.\n\nWait, "
      + " ".join(f"{p.id}-{i}" for i in range(self._words)),
      answer="" if p.id.endswith(("3", "7")) else "Fine.",
      completion=np.arange(5, dtype=np.int32),
      rounds=(traces.Round("Wait", 0, (traces.Candidate("Wait", 1.5, 4),)),),
      status="complete",
      forced=p.id.endswith(("1", "4")),
    )


@pytest.fixture
def make(tmp_path, monkeypatch):
  """`make(items, words)`: a run, its searched ids, and its two stages."""

  def made(items=24, words=20, folder="run"):
    config = tiny.get_config("smoke")
    config.unlock()
    config.data.synthesis = items
    config.data.documents = 60
    run = setup.setup(
      tmp_path / folder,
      temperature=1.0,
      **{name: config[name] for name in setup.SECTIONS},
    )
    searched = []
    monkeypatch.setattr(
      cold_start, "_searcher", lambda *_: _Searcher(searched, words)
    )
    monkeypatch.setattr(setup.Run, "load", lambda run, _: run.initial())
    workdir.Stage(run.workdir, "base", {}).finish({"model": "made up"})

    def synthesize():
      del searched[:]
      with checkpoint.Preemption() as preemption:
        cold_start.synthesize(
          run, cold_start.Search(**config.synthesis), ABOUT, preemption
        )

    rules = config.select.to_dict()
    rules.pop("rl")

    def select():
      with checkpoint.Preemption() as preemption:
        cold_start.select(
          run, filters.Rules(**rules), config.reward.keywords, ABOUT, preemption
        )

    return run.workdir, searched, synthesize, select

  return made


def test_sets_and_their_cards(make):
  workdir, searched, synthesize, select = make()
  synthesize()
  select()
  assert len(searched) == 24
  every = list(traces.read(workdir / "synthesize" / "traces"))
  kept = list(traces.read(workdir / "select" / "traces"))
  rejected = list(traces.read(workdir / "select" / "rejected"))
  assert [t.id for t in every] == searched
  assert {t.id for t in kept} | {t.id for t in rejected} == set(searched)
  assert [t for t in every if t.answer] == kept
  assert {t.status for t in rejected} == {"answer missing"}
  text = (workdir / "select" / "traces" / "README.md").read_text()
  assert text.startswith("---\nlicense: cc0-1.0\n")
  for row in (
    "| complete | 19 |",
    "| answer missing | 5 |",
    "| min_reflections | 0 |",
    "| candidates | 4 |",
    "| hidden_size | 128 |",
    "| seed | 0 |",
    "| data.kind | storyworld |",
  ):
    assert row in text, row
  (line,) = metrics.read(workdir / "synthesize" / "metrics.jsonl")
  forced = sum(trace.forced for trace in every)
  assert 0 < forced < 24
  assert line == {
    "step": 24,
    "synthesis/complete": 1.0,
    "synthesis/forced_close": forced / 24,
  }


@pytest.mark.parametrize("name", ["traces.jsonl", "*array_record*"])
def test_a_set_cut_short_is_written_anew_without_a_search(make, name):
  workdir, searched, synthesize, select = make()
  synthesize()
  select()
  for stage in ("synthesize", "select"):
    (path,) = (workdir / stage / "traces").rglob(name)
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    assert str(path) in traces.damage(workdir / stage / "traces")
    synthesize()
    select()
    assert not searched
    assert not traces.damage(workdir / stage / "traces")
    source = tfds.builder_from_directory(
      workdir / stage / "traces" / traces.TFDS
    ).as_data_source("train")
    ids = [row["id"].decode() for row in source]
    assert ids == [t.id for t in traces.read(workdir / stage / "traces")]


def test_a_part_cut_short_is_searched_again_for_what_it_lost(make):
  workdir, searched, synthesize, _ = make()
  synthesize()
  want = list(traces.read(workdir / "synthesize" / "traces"))
  (workdir / "synthesize" / "DONE.json").unlink()
  shard = workdir / "synthesize" / "shards" / "00000012.jsonl"
  shard.write_bytes(shard.read_bytes()[:-10])
  synthesize()
  assert searched == [want[-1].id]
  assert list(traces.read(workdir / "synthesize" / "traces")) == want


def test_progress_counts_what_was_there_and_what_others_make(make, capsys):
  workdir, searched, synthesize, _ = make()
  synthesize()
  assert "synthesize: 24/24 traces" in capsys.readouterr().err
  (workdir / "synthesize" / "DONE.json").unlink()
  shard = workdir / "synthesize" / "shards" / "00000012.jsonl"
  shard.write_bytes(shard.read_bytes()[:-10])
  synthesize()
  assert len(searched) == 1
  shown = capsys.readouterr().err
  assert "synthesize: 24/24 traces, " in shown


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_done(make):
  peaks = []
  for items in (60, 600):
    # 20 kB of text a trace: 600 of them are 12 MB, and copies of them more.
    workdir, _, synthesize, select = make(items, 2000, str(items))
    tracemalloc.start()
    synthesize()
    select()
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    size = (workdir / "synthesize" / "traces" / traces.JSONL).stat().st_size
    assert size > items * 20_000
  assert peaks[1] - peaks[0] < 2e6, peaks


def _start(workdir, *flags):
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "experiments.synthesize"),
      "--config=configs/tiny.py:smoke",
      f"--workdir={workdir}",
      "--config.data.documents=160",
      "--config.synthesis.batch=4",
      "--config.select.max_repeat=1.0",
      *flags,
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _finish(process):
  output, _ = process.communicate(timeout=1500)
  assert process.returncode == 0, output
  return output


def _outcome(workdir):
  folder = pathlib.Path(workdir) / "synthesize"
  done = json.loads((folder / "DONE.json").read_text())
  return done, (folder / "traces" / traces.JSONL).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_and_two_at_once_equal_one_straight_run(tmp_path):
  output = _finish(_start(tmp_path / "straight"))
  assert "traces/s" in output
  want = _outcome(tmp_path / "straight")
  assert sum(want[0].values()) == 24

  # Two processes begin with nothing, tokenizer and base model included.
  both = [_start(tmp_path / "two") for _ in range(2)]
  shards = tmp_path / "two" / "synthesize" / "shards"
  deadline = time.monotonic() + 900
  while sum(b"\n" in p.read_bytes() for p in shards.glob("*.jsonl")) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  both[0].send_signal(signal.SIGKILL)
  both[0].communicate()
  there = b"".join(p.read_bytes() for p in shards.glob("*.jsonl"))
  ended = {line for line in there.split(b"\n") if line.endswith(b"}")}
  _finish(both[1])
  assert ended and ended <= set(want[1].split(b"\n"))
  assert _outcome(tmp_path / "two") == want

  # Nothing is done again.
  assert "synthesize:" not in _finish(_start(tmp_path / "two"))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  process = _start(tmp_path / "file" / "run")
  output, _ = process.communicate(timeout=120)
  assert process.returncode != 0
  assert f"--workdir={tmp_path / 'file' / 'run'} is not writable" in output
  assert "Name another folder" in output


def test_a_judge_is_named_by_path(monkeypatch):
  """`config.synthesis.choose` reaches the search as a function."""
  config = tiny.get_config("smoke")
  given = {}
  monkeypatch.setattr(
    cold_start.search, "Searcher", lambda *_, **given_: given.update(given_)
  )
  values = dict(config.synthesis)
  run = types.SimpleNamespace(
    engine=None,
    logprob_scorer=None,
    tokenizer=None,
    reward={"timeout": 7.0, "environment": ("MY_KEY",)},
  )
  cold_start._searcher(run, cold_start.Search(**values))
  assert given["choose"] is None
  values["choose"] = "operator:countOf"
  cold_start._searcher(run, cold_start.Search(**values))
  want = function.Choice("operator:countOf", 7.0, ("MY_KEY",))
  assert given["choose"] == want
  values["choose"] = "operator:nowhere"
  with pytest.raises(ValueError, match="cannot be imported"):
    cold_start._searcher(run, cold_start.Search(**values))
