"""Every rollout is kept with what was computed of it, within a limit."""

import gzip
import json

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.rl import rollout_files, score

WORDS = [" a", " b", "\n\n", " Wait", "</think>", " yes", "\ud800"]


def _scored(prompts=2, samples=2):
  """Thoughts of two steps: tokens 1 and 2 to 3."""
  rows = prompts * samples
  completions = [
    structs.Sample(
      tokens=np.asarray([0, 2, 3, 4, 5, 6], np.int32),
      logprob=np.full(6, -0.1 * (r + 1), np.float32),
      finished=r != 1,
      reason="length" if r == 1 else "stop",
    )
    for r in range(rows)
  ]
  thoughts = structs.Thoughts(
    closed=np.ones(rows, bool),
    start=np.zeros(rows, np.int32),
    end=np.full(rows, 3, np.int32),
    count=np.full(rows, 2, np.int32),
    step_end=np.tile(np.asarray([2, 3, 0], np.int32), (rows, 1)),
    reflective=np.tile([False, True, False], (rows, 1)),
  )
  total = np.arange(rows, dtype=np.float32).reshape(prompts, samples)
  return score.Scored(
    total_BN=total,
    terms={"count": total * 2, "r": np.full_like(total, np.nan)},
    prefixes=[np.zeros(9, np.int32)] * rows,
    logprobs=structs.Logprobs(
      [np.full(9, -0.2, np.float32)] * rows, [], [], [], 0, 0
    ),
    thoughts=thoughts,
    deltas_RJ=np.tile(
      np.asarray([np.nan, 0.25, np.nan], np.float32), (rows, 1)
    ),
    open_ended_B=np.ones(prompts, bool),
    separate_tokens=0,
    rollouts=structs.Rollouts(
      prompts=[
        structs.Prompt(f"p{b}", "open_ended", f"ask {b}", "yes")
        for b in range(prompts)
      ],
      samples=samples,
      prompt_ids=[np.zeros(3, np.int32)] * prompts,
      completions=completions,
      texts=["".join(WORDS[t] for t in c.tokens) for c in completions],
      thoughts=thoughts,
      encode=None,
      chat_prompt=None,
    ),
  )


def _records(step=3, **more):
  return list(
    rollout_files.records(
      _scored(), lambda ids: "".join(WORDS[i] for i in ids), step=step, **more
    )
  )


def test_a_record_holds_what_was_computed():
  advantages = [np.full(6, 0.5 * r) for r in range(4)]
  records = _records(advantages=advantages)
  assert [(r["prompt_id"], r["sample"]) for r in records] == [
    ("p0", 0),
    ("p0", 1),
    ("p1", 0),
    ("p1", 1),
  ]
  one = records[1]
  assert one["finish_reason"] == "length" and one["reward"] == 1.0
  assert one["terms"] == {"count": 2.0, "r": None}
  assert one["advantage"] == 0.5 and one["step"] == 3
  assert one["prompt_tokens"] == 3 and one["completion_tokens"] == 6
  assert one["steps"] == [
    {"text": "a", "tokens": 2, "delta": None, "reflective": False},
    {"text": "Wait", "tokens": 1, "delta": 0.25, "reflective": True},
  ]
  assert one["sampler_logprob"] == pytest.approx(-0.2 * 6)
  assert one["trainer_logprob"] == pytest.approx(-0.2 * 6)
  assert _records()[0]["advantage"] is None


def test_files_are_read_back_and_repeat_bit_for_bit(tmp_path):
  first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
  rollout_files.write(first, _records())
  rollout_files.write(second, _records())
  assert first.read_bytes() == second.read_bytes()
  assert list(rollout_files.read(first)) == _records()
  lines = gzip.decompress(first.read_bytes()).decode().splitlines()
  assert [json.loads(line) for line in lines] == _records()


@pytest.mark.parametrize(
  "damaged", [b"", b"{}\n", b"\x1f\x8b\x08", None], ids=str
)
def test_a_damaged_file_is_named(tmp_path, damaged):
  path = tmp_path / "step.jsonl.gz"
  rollout_files.write(path, _records())
  if damaged is None:
    path.write_bytes(path.read_bytes()[:-20])
  elif damaged:
    path.write_bytes(damaged)
  else:
    path.write_bytes(gzip.compress(b"[1]\n"))
  with pytest.raises(ValueError, match=r"step\.jsonl\.gz:\d+: .* is damaged"):
    list(rollout_files.read(path))


def test_steps_after_the_restored_one_are_dropped(tmp_path):
  log = rollout_files.RolloutLog(tmp_path / "r", megabytes=1, last_step=None)
  for step in (1, 2, 3):
    log.write(step, _records(step))
  assert "3 steps" in log.summary()
  log = rollout_files.RolloutLog(tmp_path / "r", megabytes=1, last_step=2)
  assert list(rollout_files.steps(tmp_path / "r")) == [1, 2]
  log.write(3, _records(3))
  files = rollout_files.steps(tmp_path / "r")
  assert [next(rollout_files.read(f))["step"] for f in files.values()] == [
    1,
    2,
    3,
  ]
  rollout_files.RolloutLog(tmp_path / "r", megabytes=1, last_step=None)
  assert not rollout_files.steps(tmp_path / "r")


def test_the_oldest_steps_go_beyond_the_limit(tmp_path, monkeypatch):
  rollout_files.write(tmp_path / "one", _records())
  size = (tmp_path / "one").stat().st_size
  monkeypatch.setattr(rollout_files, "MEGABYTE", int(size * 2.5))
  log = rollout_files.RolloutLog(tmp_path / "r", megabytes=1, last_step=None)
  for step in range(1, 6):
    log.write(step, _records(step))
  assert list(rollout_files.steps(tmp_path / "r")) == [4, 5]
  assert "3 older ones" in log.summary()


def test_none_are_kept_where_none_are_wanted(tmp_path):
  log = rollout_files.RolloutLog(tmp_path / "r", megabytes=0, last_step=None)
  log.write(1, _records())
  assert not (tmp_path / "r").exists() and not log.summary()
