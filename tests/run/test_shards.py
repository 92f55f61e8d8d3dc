"""No item is made twice, none is skipped, whatever dies and whenever."""

import collections
import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from opera_jax.data import traces
from opera_jax.run import shards

IDS = [f"item-{i}" for i in range(10)]


def _trace(name, words="日本 a\n\nb"):
  return traces.Trace(
    id=name,
    prompt="p",
    reference="r",
    thought=words,
    answer="a",
    completion=np.arange(3, dtype=np.int32),
    rounds=(),
    status="complete",
  )


def _fill(made, stop=None):
  """Does the work; returns the items in the order they were asked for."""
  asked = []
  for index, items in made.work(range(len(made))):
    for item in items:
      asked.append(item)
      made.add(index, _trace(IDS[item]))
      if len(asked) == stop:
        return asked
  return asked


def test_everything_once_and_in_order(tmp_path):
  made = shards.Shards(tmp_path, IDS, 4)
  assert len(made) == 3 and made.num_missing() == 10
  assert _fill(made) == list(range(10))
  assert made.num_missing() == 0
  assert [t.id for t in made.read()] == IDS
  again = shards.Shards(tmp_path, IDS, 4)
  assert _fill(again) == [] and again.num_missing() == 0


def test_a_second_start_goes_on(tmp_path):
  """Item by item: one that has ended is there, whatever its shard lacks."""
  assert _fill(shards.Shards(tmp_path, IDS, 4), stop=5) == [0, 1, 2, 3, 4]
  with pytest.raises(ValueError, match="lacks item 'item-5'"):
    list(shards.Shards(tmp_path, IDS, 4).read())
  assert _fill(shards.Shards(tmp_path, IDS, 4)) == [5, 6, 7, 8, 9]


def test_the_order_in_which_items_end_is_forgotten(tmp_path):
  made = shards.Shards(tmp_path, IDS, 10)
  for index, items in made.work([0]):
    for item in reversed(items):
      made.add(index, _trace(IDS[item]))
  assert [t.id for t in made.read()] == IDS
  text = (tmp_path / "00000000.jsonl").read_text()
  assert text == "".join(traces.to_line(_trace(name)) for name in IDS)


@pytest.mark.parametrize("lost", [1, 7, 120, 170, 10_000])
def test_what_was_cut_off_is_made_again_and_nothing_else(tmp_path, lost):
  _fill(shards.Shards(tmp_path, IDS, 4))
  path = tmp_path / "00000004.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole[: max(0, len(whole) - lost)])
  left = path.read_bytes().count(b"\n")
  asked = _fill(shards.Shards(tmp_path, IDS, 4))
  assert asked == list(range(4 + left, 8)) and asked
  assert path.read_bytes() == whole


def test_a_cut_inside_a_letter_or_a_line_of_something_else(tmp_path):
  _fill(shards.Shards(tmp_path, IDS, 4))
  path = tmp_path / "00000000.jsonl"
  lines = path.read_bytes().split(b"\n")
  letter = lines[3].index("日".encode()) + 1
  path.write_bytes(b"\n".join([lines[0], b"\0" * 9, lines[2], b""]))
  assert shards.Shards(tmp_path, IDS, 4).missing(0) == [1, 3]
  path.write_bytes(b"\n".join([*lines[:3], lines[3][:letter]]))
  assert shards.Shards(tmp_path, IDS, 4).missing(0) == [3]


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
  made = shards.Shards(tmp_path, IDS, 4)
  assert _fill(made, stop=1) == [0]

  def full(path):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(traces, "sync", full)
  with pytest.raises(OSError, match="No space left.*same command again"):
    _fill(made)
  assert shards.Shards(tmp_path, IDS, 4).missing(0) == [1, 2, 3]
  with pytest.raises(ValueError, match="'item-9' is not one of them"):
    made.add(0, _trace(IDS[9]))
  bad = dataclasses.replace(
    _trace(IDS[1]),
    rounds=(traces.Round("Wait", 1, (traces.Candidate("Wait", 1.0, 1),)),),
  )
  with pytest.raises(ValueError, match="kept 1 of the perplexities"):
    made.add(0, bad)
  assert shards.Shards(tmp_path, IDS, 4).missing(0) == [1, 2, 3]


def test_bad_items(tmp_path):
  with pytest.raises(ValueError, match="'item-3' occurs twice"):
    shards.Shards(tmp_path, [*IDS, "item-3"], 4)
  with pytest.raises(ValueError, match="config.synthesis.batch"):
    shards.Shards(tmp_path, IDS, 0)


def test_the_parts_of_others_are_waited_for(tmp_path, monkeypatch):
  """A static split: each process claims its own, and ends with the last."""
  naps = []
  made = shards.Shards(tmp_path, IDS, 4)

  def other(seconds):
    naps.append(seconds)
    for name in IDS[4:8]:
      made.add(1, _trace(name))

  monkeypatch.setattr(time, "sleep", other)
  mine = shards.Shards(tmp_path, IDS, 4)
  asked = []
  for index, items in mine.work([0, 2]):
    asked += items
    for item in items:
      mine.add(index, _trace(IDS[item]))
  assert asked == [0, 1, 2, 3, 8, 9]
  assert mine.num_missing() == 0 and naps


def test_a_wait_for_the_parts_of_others_can_be_ended(tmp_path):
  asked = []

  def leave():
    asked.append(1)
    raise SystemExit(143)

  with pytest.raises(SystemExit):
    for index, items in shards.Shards(tmp_path, IDS, 4).work([0], leave):
      for item in items:
        shards.Shards(tmp_path, IDS, 4).add(index, _trace(IDS[item]))
  assert asked == [1]
  assert shards.Shards(tmp_path, IDS, 4).num_missing() == len(IDS) - 4


# A worker notes each item it makes before it adds its trace. It begins when the
# one that it is told to wait for is there, too.
WORKER = """
import os, sys, time
sys.path.insert(0, "tests/run")
import test_shards
from opera_jax.run import shards

folder, name, hang, other = sys.argv[1:]
ids = [f"item-{i}" for i in range(200)]
made = shards.Shards(folder, ids, 4)
log = open(os.path.join(folder, name + ".log"), "a", buffering=1)
while not os.path.exists(os.path.join(folder, other + ".log")):
  time.sleep(0.001)
for index, items in made.work(range(len(made))):
  for item in items:
    log.write(f"{item}\\n")
    time.sleep(0.002)
    if item == int(hang):
      log.write("hangs\\n")
      time.sleep(600)
    made.add(index, test_shards._trace(ids[item]))
"""


def _worker(folder, name, other, hang=-1):
  return subprocess.Popen(
    [sys.executable, "-c", WORKER, str(folder), name, str(hang), other],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
  )


def _log(folder, name):
  path = folder / f"{name}.log"
  return path.read_text().split() if path.exists() else []


def test_processes_at_once_and_one_of_them_killed(tmp_path):
  """Only the item in flight of the killed process is made a second time."""
  hanging = _worker(tmp_path, "a", "a", hang=34)
  deadline = time.monotonic() + 60
  while "hangs" not in _log(tmp_path, "a"):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  others = [_worker(tmp_path, *names) for names in ("bc", "cb")]
  while not (_log(tmp_path, "b") and _log(tmp_path, "c")):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  time.sleep(1)  # all that is left is the shard of the one that hangs
  made_by_others = {int(i) for i in _log(tmp_path, "b") + _log(tmp_path, "c")}
  assert not made_by_others & set(range(32, 36))
  hanging.send_signal(signal.SIGKILL)
  for process in (hanging, *others):
    process.wait(timeout=60)
  assert [p.returncode for p in others] == [0, 0]
  every = [int(i) for n in "abc" for i in _log(tmp_path, n) if i != "hangs"]
  times = collections.Counter(every)
  assert set(times) == set(range(200))
  assert {item for item, count in times.items() if count > 1} == {34}
  assert max(times.values()) == 2
  assert len(_log(tmp_path, "b")) and len(_log(tmp_path, "c"))
  final = shards.Shards(tmp_path, [f"item-{i}" for i in range(200)], 4)
  assert [t.id for t in final.read()] == [f"item-{i}" for i in range(200)]
