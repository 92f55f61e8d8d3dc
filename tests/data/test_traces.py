"""The synthesised set is whole on disk, and reads without TensorFlow."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from opera_jax.data import traces


def made(count=5):
  rng = np.random.default_rng(0)
  result = []
  for i in range(count):
    rounds = tuple(
      traces.Round(
        trigger="Wait",
        kept=int(rng.integers(3)),
        candidates=tuple(
          traces.Candidate(
            f"Wait, é{j}\u2028\n", float(rng.random()) + 1, 4 + j
          )
          for j in range(3)
        ),
      )
      for _ in range(i)
    )
    result.append(
      traces.Trace(
        id=f"t{i}",
        prompt="Tell 日本",
        reference="r",
        thought="a\n\nb </script>",
        answer="",
        completion=np.arange(i, dtype=np.int32),
        rounds=rounds,
        status="complete" if i else "answer too long",
      )
    )
  return result


def test_round_trip(tmp_path):
  folder = tmp_path / "a" / "set"
  traces.write(folder, made(), max_examples_per_shard=2)
  assert list(traces.read(folder)) == made()
  assert list(traces.read(folder))[2].completion.dtype == np.int32
  assert len((folder / "traces.jsonl").read_text().split("\n")) == 6


READ = """
import sys
import tensorflow_datasets as tfds
from opera_jax.data import traces

folder = sys.argv[1]
traces.write(folder + "/again", traces.read(folder + "/set"))
for name in ("set", "again"):
  builder = tfds.builder_from_directory(f"{folder}/{name}/tfds/traces/1.0.0")
  source = builder.as_data_source("train")
  assert len(source) == 5
row = source[4]
ppl = [float(p) for p in row["candidates"]["perplexity"]]
kept = [bool(k) for k in row["candidates"]["kept"]]
turn = [int(k) for k in row["candidates"]["round"]]
assert "tensorflow" not in sys.modules
import json
print(json.dumps([row["id"].decode(), ppl, kept, turn,
                  row["candidates"]["text"][1].decode(),
                  [int(k) for k in row["rounds"]["kept"]],
                  [int(t) for t in row["completion"]],
                  row["prompt"].decode(), row["answer"].decode()]))
"""


def test_tfds_reads_it_without_tensorflow(tmp_path):
  given = made()
  traces.write(tmp_path / "set", given, description="made up")
  done = subprocess.run(
    [sys.executable, "-c", READ, str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  trace = given[4]
  assert json.loads(done.stdout.splitlines()[-1]) == [
    "t4",
    [
      float(np.float32(one.perplexity))
      for r in trace.rounds
      for one in r.candidates
    ],
    [place == r.kept for r in trace.rounds for place in range(3)],
    [number for number in range(4) for _ in range(3)],
    trace.rounds[0].candidates[1].text,
    [r.kept for r in trace.rounds],
    [0, 1, 2, 3],
    "Tell 日本",
    "",
  ]


def test_an_older_set_is_replaced(tmp_path):
  traces.write(tmp_path / "set", made(5))
  traces.write(tmp_path / "set", made(2))
  assert len(list(traces.read(tmp_path / "set"))) == 2
  assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
  traces.write(tmp_path / "set", made(5))

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(traces._Shards, "add", fail)
  for name in ("set", "new"):
    with pytest.raises(OSError, match="disk full"):
      traces.write(tmp_path / name, made(2))
  assert [path.name for path in tmp_path.iterdir()] == ["set"]
  assert list(traces.read(tmp_path / "set")) == made(5)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
  (tmp_path / "set").mkdir()
  (tmp_path / "set" / "thesis.txt").write_text("years of work")
  with pytest.raises(FileExistsError, match="is not replaced"):
    traces.write(tmp_path / "set", made())


def test_bad_traces(tmp_path):
  one = made(2)[1]
  round_ = one.rounds[0]
  with pytest.raises(ValueError, match="at least one"):
    traces.write(tmp_path / "set", [])
  with pytest.raises(ValueError, match="'t1' is given twice"):
    traces.write(tmp_path / "set", [one, one])
  nan = dataclasses.replace(round_.candidates[0], perplexity=float("nan"))
  for bad in (
    dataclasses.replace(round_, kept=3),
    dataclasses.replace(round_, candidates=(nan,) * 3),
  ):
    with pytest.raises(ValueError, match="'t1', round 0: kept"):
      traces.write(tmp_path / "set", [dataclasses.replace(one, rounds=(bad,))])
  assert not list(tmp_path.iterdir())


def test_bad_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="no synthesised set"):
    traces.read(tmp_path)
  traces.write(tmp_path / "set", made(2))
  path = tmp_path / "set" / "traces.jsonl"
  first = path.read_text().split("\n")[0]
  for bad in ("{", "[]", "{}", first.replace('"rounds": []', '"rounds": [1]')):
    path.write_text(f"{first}\n{bad}\n")
    with pytest.raises(ValueError, match="traces.jsonl:2: .*is no trace"):
      list(traces.read(tmp_path / "set"))
