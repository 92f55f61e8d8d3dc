"""A stage goes on only with what it was begun with, and one at a time."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from opera_jax import file_lock
from opera_jax.run import workdir
from opera_jax.train import checkpoint

ONE, TWO = "1" * 64, "2" * 64


def _stage(folder, name="select", settings=None, digest=ONE, **more):
  return workdir.Stage(
    folder,
    name,
    settings or {"select": {"ngram": 8}},
    {"data.path": digest and ("tasks.jsonl", digest)},
    **more,
  )


def test_the_same_again_goes_on(tmp_path):
  assert not _stage(tmp_path).finished()
  stage = _stage(tmp_path)
  stage.finish({"kept": 3})
  assert _stage(tmp_path).finished()
  assert workdir.result(tmp_path, "select") == {"kept": 3}
  assert workdir.settings(tmp_path, "select") == {"select.ngram": 8}


def test_a_start_that_fails_leaves_nothing_to_contradict(tmp_path):
  """Settings are recorded with the first result, not before."""
  _stage(tmp_path, digest=ONE)
  corrected = _stage(tmp_path, settings={"select": {"ngram": 9}}, digest=TWO)
  assert not workdir.begun(tmp_path, "select")
  corrected.begin()
  assert workdir.settings(tmp_path, "select") == {"select.ngram": 9}
  with pytest.raises(ValueError, match=r"select\.ngram: 9 then, 8 now"):
    _stage(tmp_path)


@pytest.mark.parametrize(
  "result",
  ["checkpoints/3/FILES.json", "shards/00000000.jsonl", "pieces/a.json"],
)
def test_a_result_that_nothing_records_is_not_gone_on_with(tmp_path, result):
  path = tmp_path / "select" / result
  path.parent.mkdir(parents=True)
  path.write_text("")  # claimed, and nothing in it
  _stage(tmp_path)
  path.write_text("{}")
  with pytest.raises(ValueError, match=f"holds {result} without SETTINGS"):
    _stage(tmp_path)
  assert not _stage(tmp_path, redo=("select",)).finished()
  assert not path.exists()


def test_a_run_that_waited_does_not_take_a_result_of_other_settings(tmp_path):
  """Both found an empty folder; the second finds the first one's record."""
  first, second = _stage(tmp_path), _stage(tmp_path, digest=TWO)
  with first.locked():
    first.finish({"kept": 3})
  with pytest.raises(ValueError, match="given other inputs"):
    second.finished()
  with (
    pytest.raises(ValueError, match="given other inputs"),
    second.locked(),
  ):
    raise AssertionError("the lock was given")


def test_a_changed_setting_or_input_is_named_with_the_ways_on(tmp_path):
  _stage(tmp_path).begin()
  with pytest.raises(ValueError) as caught:
    _stage(tmp_path, settings={"select": {"ngram": 9, "new": 1}}, digest=TWO)
  said = str(caught.value)
  for words in (
    "select.ngram: 8 then, 9 now",
    "select.new: 'none' then, 1 now",
    "data.path (tasks.jsonl): sha256 111111111111 then, 222222222222 now",
    "a new --workdir",
    "--config.redo=select",
    "sft, select_rl, rl, evaluate after it",
  ):
    assert words in said, said
  # Nothing was changed by asking.
  _stage(tmp_path)


def test_the_place_of_an_input_does_not_matter(tmp_path):
  workdir.Stage(tmp_path, "rl", {}, {"data.path": ("a", ONE)}).begin()
  workdir.Stage(tmp_path, "rl", {}, {"data.path": ("b", ONE)})
  with pytest.raises(ValueError, match=r"data.path \(not there\): sha256 1"):
    workdir.Stage(tmp_path, "rl", {}, {})
  with pytest.raises(ValueError, match=r"sft/model .*none then, 2222"):
    workdir.Stage(
      tmp_path, "rl", {}, {"data.path": ("b", ONE), "sft/model": ("m", TWO)}
    )


def test_an_input_that_is_gone_is_needed_until_the_stage_has_finished(tmp_path):
  with pytest.raises(FileNotFoundError, match="needs sft/model.*add sft"):
    workdir.Stage(tmp_path, "rl", {}, {"sft/model": None})
  assert not (tmp_path / "rl" / "SETTINGS.json").exists()
  stage = _stage(tmp_path)
  stage.begin()
  with pytest.raises(ValueError, match="not there"):
    _stage(tmp_path, digest=None)
  stage.finish({})
  assert _stage(tmp_path, digest=None).finished()


def test_a_stage_of_an_earlier_version_says_so(tmp_path):
  (tmp_path / "select").mkdir()
  (tmp_path / "select" / "SETTINGS.json").write_text('{"select.ngram": 8}')
  with pytest.raises(
    ValueError, match="an earlier version.*a new --workdir.*redo=select"
  ):
    _stage(tmp_path)


def _finished(folder):
  for name in workdir.ORDER:
    (folder / name).mkdir(parents=True)
    workdir.Stage(folder, name, {}).finish({"of": name})
    (folder / name / "outcome").write_text(name)


def test_a_redo_drops_a_stage_and_those_after_it(tmp_path, capsys):
  _finished(tmp_path)
  dropped = workdir.redo(tmp_path, "sft")
  assert dropped == ("sft", "select_rl", "rl", "evaluate")
  said = capsys.readouterr().out
  for name in workdir.ORDER:
    gone = name in dropped
    aside = tmp_path / "dropped" / f"{name}-1"
    assert bool(workdir.result(tmp_path, name)) != gone
    assert aside.exists() == gone
    assert (f"drops {name}; its files are now in {aside}" in said) == gone
    if gone:
      assert (aside / "outcome").read_text() == name
      left = {path.name for path in (tmp_path / name).iterdir()}
      assert left == {"stage.lock", "SETTINGS.lock"}


def test_a_redo_that_was_killed_goes_on(tmp_path, capsys):
  _finished(tmp_path)
  workdir.redo(tmp_path, "sft")
  workdir.Stage(tmp_path, "sft", {"lr": 1}).finish({"again": True})
  # The same command again: what it has done is kept.
  allowed = workdir.redo(tmp_path, "sft")
  assert workdir.result(tmp_path, "sft") == {"again": True}
  assert "continues" in capsys.readouterr().out
  # Unless it does not fit what is asked for now.
  with pytest.raises(ValueError, match="lr: 1 then, 2 now"):
    workdir.Stage(tmp_path, "sft", {"lr": 2})
  assert not workdir.Stage(tmp_path, "sft", {"lr": 2}, redo=allowed).finished()
  assert (tmp_path / "dropped" / "sft-2" / "DONE.json").exists()
  # Once all is done, the next redo drops anew.
  workdir.Stage(tmp_path, "sft", {"lr": 2}).finish({})
  workdir.redone(tmp_path)
  workdir.redo(tmp_path, "sft")
  assert not workdir.result(tmp_path, "sft")
  assert workdir.result(tmp_path, "select")


def test_no_redo_drops_nothing(tmp_path):
  _finished(tmp_path)
  assert workdir.redo(tmp_path, "") == ()
  assert workdir.result(tmp_path, "tokenizer")
  with pytest.raises(ValueError, match="config.redo='foo' names.*tokenizer,"):
    workdir.redo(tmp_path, "foo")


def test_a_stage_that_others_share_or_work_at_is_not_dropped(tmp_path):
  _finished(tmp_path)
  with (
    file_lock.claim(tmp_path / "rl" / "stage.lock"),
    pytest.raises(OSError, match=f"process {os.getpid()} .*works on stage rl"),
  ):
    workdir.redo(tmp_path, "rl")
  assert workdir.result(tmp_path, "rl")
  other = tmp_path / "other"
  other.mkdir()
  (other / "base").symlink_to(tmp_path / "base")
  with pytest.raises(OSError, match="a link to .*which other runs share"):
    workdir.redo(other, "base")
  assert workdir.result(tmp_path, "base")


WAIT = """
import sys
from opera_jax.run import workdir
from opera_jax.train import checkpoint
stage = workdir.Stage(sys.argv[1], "rl", {})
with checkpoint.Preemption() as preemption, stage.locked(preemption):
  print("finished" if stage.finished() else "mine", flush=True)
"""


def _waiting(folder):
  process = subprocess.Popen(
    [sys.executable, "-c", WAIT, str(folder)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  return process, process.stdout.readline()


def test_the_second_start_says_who_has_the_stage_and_waits(tmp_path):
  stage = workdir.Stage(tmp_path, "rl", {})
  with stage.locked():
    second, said = _waiting(tmp_path)
    assert f"rl: waiting for process {os.getpid()} on " in said
    stage.finish({})
  assert second.communicate(timeout=60)[0] == "finished\n"
  assert second.returncode == 0


def test_a_wait_ends_when_it_is_told_to(tmp_path):
  with workdir.Stage(tmp_path, "rl", {}).locked():
    second, said = _waiting(tmp_path)
    assert "waiting" in said
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=30) == 143


def test_a_stage_ends_the_run_that_was_told_to_stop(tmp_path):
  with checkpoint.Preemption() as preemption:
    stage = workdir.Stage(tmp_path, "rl", {})
    with pytest.raises(SystemExit) as left, stage.locked(preemption):
      os.kill(os.getpid(), signal.SIGTERM)
      (tmp_path / "done").write_text("")
    assert left.value.code == 143
  assert (tmp_path / "done").exists()


def test_of_two_that_begin_at_once_one_is_refused(tmp_path):
  """Each finds what the other has begun, or nothing; never a mixture."""
  for round_ in range(8):
    gate, raised = threading.Barrier(2), []

    def begin(rate, folder=tmp_path / str(round_), gate=gate, raised=raised):
      gate.wait()
      try:
        workdir.Stage(folder, "sft", {"lr": rate}).begin()
      except ValueError as error:
        raised.append(str(error))

    pair = [threading.Thread(target=begin, args=(rate,)) for rate in (1, 2)]
    for one in pair:
      one.start()
    for one in pair:
      one.join()
    assert len(raised) == 1 and "lr: " in raised[0]


def test_a_json_file_is_written_whole_and_through_no_link(tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  path = tmp_path / "DONE.json"
  path.symlink_to(victim)
  workdir.write(path, {"a": 1})
  assert victim.read_text() == "precious"
  assert json.loads(path.read_text()) == {"a": 1} and not path.is_symlink()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["DONE.json", "victim"]


def test_a_message_lists_eight_changes_and_counts_the_rest(tmp_path):
  workdir.Stage(tmp_path, "sft", {f"s{i}": 0 for i in range(20)}).begin()
  with pytest.raises(ValueError, match=r"s13: 0 then.*; and 12 more\. Use"):
    workdir.Stage(tmp_path, "sft", {f"s{i}": 1 for i in range(20)})
