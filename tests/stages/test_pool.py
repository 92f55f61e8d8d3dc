"""The stage end to end with an embedding that is known; the driver's errors."""

import collections
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from opera_jax import structs
from opera_jax.configs import common
from opera_jax.data import prompts as prompts_lib
from opera_jax.stages import pool
from opera_jax.train import checkpoint

SUBJECTS = ("storm", "garden", "harbour")


def _tasks(count=60):
  """Prompts about three subjects: half, a third and a sixth of them."""
  out = []
  for i in range(count):
    subject = SUBJECTS[(0, 0, 0, 1, 1, 2)[i % 6]]
    text = f"Tell {i} about the {subject}, number {i * i}, in some {i} words."
    out.append(structs.Prompt(f"p{i}", "open_ended", text, "", {"n": i}))
  return out


def _embed(texts):
  rng = np.random.default_rng(len(texts))
  place = [[subject in text for subject in SUBJECTS] for text in texts]
  return (np.array(place) + 0.01 * rng.normal(size=(len(texts), 3))).astype(
    np.float32
  )


def _settings(**changes):
  given = common.get_config().pool.to_dict() | {
    "size": 24, "embedder": "known", "cluster_choices": (2, 3, 5), "minimum": 6,
    "batch": 16,
  }  # fmt: skip
  return pool.Settings(**(given | changes))


def _build(folder, prompts, embedder=lambda: _embed, **changes):
  with checkpoint.Preemption() as preemption:
    pool.build(
      folder,
      prompts,
      _settings(**changes),
      seed=0,
      embedder=embedder,
      preemption=preemption,
    )


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_pool(tmp_path):
  given = [*_tasks(), structs.Prompt("twin", "open_ended", "Hm.", "r")]
  calls = []

  def embedder():
    calls.append(1)
    return _embed

  _build(tmp_path, given, embedder=embedder)
  kept = _rows(tmp_path / "pool" / "prompts.jsonl")
  subjects = collections.Counter(
    next(s for s in SUBJECTS if s in row["prompt"]) for row in kept
  )
  # 30, 20 and 10 in the ratio to 24, and no less than 6 of any.
  assert subjects == {"storm": 11, "garden": 7, "harbour": 6}
  assert len({row["cluster"] for row in kept}) == 3
  rejected = _rows(tmp_path / "pool" / "rejected.jsonl")
  reasons = collections.Counter(row["reason"] for row in rejected)
  assert reasons == {"not sampled": 36, "prompt too short": 1}
  assert {r["id"] for r in kept + rejected} == {p.id for p in given}
  counts = json.loads((tmp_path / "pool" / "DONE.json").read_text())
  assert counts == {"read": 61, **reasons, "kept": 24, "clusters": 3}
  assert "24 of 61 prompts" in (tmp_path / "pool" / "clusters.html").read_text()
  # A run reads it, with the columns that came along.
  read = prompts_lib.load(
    tmp_path / "pool" / "prompts.jsonl", require_reference=False
  )
  assert [p.id for p in read] == [row["id"] for row in kept]
  assert read[0].columns["n"] == int(read[0].id[1:])

  # Finished, it is not made again; killed before the end, it embeds no more.
  (tmp_path / "pool" / "DONE.json").unlink()
  (tmp_path / "pool" / "embeddings" / "00000048.npy").unlink()
  before = (tmp_path / "pool" / "prompts.jsonl").read_bytes()
  _build(tmp_path, given, embedder=embedder)
  _build(tmp_path, given, embedder=embedder)
  assert len(calls) == 2
  assert (tmp_path / "pool" / "prompts.jsonl").read_bytes() == before
  with pytest.raises(ValueError, match="started with other settings: prompts"):
    _build(tmp_path, given[1:], embedder=embedder)


def test_fewer_prompts_than_asked_for(tmp_path):
  with pytest.raises(
    ValueError,
    match="asks for 61 prompts and 60 of 60 pass the filters.*Lower it",
  ):
    _build(tmp_path, _tasks(), size=61)
  assert not (tmp_path / "pool" / "embeddings").exists()


def _drive(tmp_path, rows, *flags):
  path = tmp_path / "a.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return subprocess.run(
    [
      *(sys.executable, "-m", "experiments.pool"),
      "--config=configs/open_ended.py:smoke",
      f"--config.data.path={path}",
      f"--workdir={tmp_path / 'run'}",
      "--config.data.default_task=open_ended",
      *flags,
    ],
    cwd=ROOT,
    env=dict(os.environ, XLA_FLAGS=""),
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )


GOOD = [
  {"id": str(i), "prompt": f"Say {i} things on {i} days.", "reference": "r"}
  for i in range(9)
]


@pytest.mark.parametrize(
  "rows, flags, rule",
  [
    ([GOOD[0], GOOD[0]], [], "a.jsonl:2: id '0' was given on line 1"),
    pytest.param(
      *([{"text": "a"}], [], "a.jsonl:1: no column 'prompt'"),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *(GOOD, ["--config.pool.size=10"], "asks for 10 prompts and 9 of 9 pass"),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *(GOOD, ["--config.pool.languages=('xx',)"], "names ['xx']"),
      marks=pytest.mark.slow,
    ),
    (GOOD, ["--config.data.path="], "--config.data.path=FILE"),
  ],
)
def test_bad_input_ends_the_driver_with_the_reason(tmp_path, rows, flags, rule):
  done = _drive(tmp_path, rows, *flags)
  assert done.returncode != 0
  assert rule in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_policy_embeds(tmp_path):
  rows = [
    {
      "id": p.id, "prompt": p.prompt, "task": "open_ended",
      "reference": f"The {p.prompt.split()[4]} was cold and quiet. " * 6,
    }
    for p in _tasks(60)
  ]  # fmt: skip
  done = _drive(
    tmp_path,
    rows,
    "--config.pool.embedder=policy",
    "--config.pool.size=24",
    "--config.pool.clusters=3",
    "--config.pool.minimum=1",
    "--config.data.documents=64",
    "--config.data.synthesis=500",  # of another run; there are 60
  )
  assert done.returncode == 0, done.stderr
  assert "'kept': 24, 'clusters': 3" in done.stdout
