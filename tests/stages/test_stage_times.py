"""The table says of each stage what it took and no other did."""

import time

import jax
import numpy as np

from opera_jax.sharding import clock
from opera_jax.stages import first_sample, stage_times


def test_each_stage_takes_its_own_time(tmp_path, capsys):
  times = stage_times.StageTimes(time.time() - 1)
  times.enter("one")

  @jax.jit
  def of_stage_one(x):
    return x * 1.5 + 3.25

  of_stage_one(np.ones(17, np.float32))
  times.enter("two")
  with clock.waiting():
    time.sleep(0.05)
  of_stage_one(np.ones(17, np.float32))
  done = times.finish(tmp_path)
  assert [s.name for s in done] == [stage_times.SETUP, "one", "two"]
  before, one, two = done
  assert before.seconds >= 1
  assert one.programs == 1 and 0 < one.compiling <= one.seconds
  assert [(name, count) for name, count, _ in one.dearest] == [
    ("of_stage_one", 1)
  ]
  assert two.programs == two.compiling == 0
  assert 0.05 <= two.waiting <= two.seconds and one.waiting == 0
  assert stage_times.read(tmp_path) == done
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == [
    *("stage", "set-up", "one", "two", "in")
  ]
  assert len({len(line) for line in lines}) == 1
  total = float(lines[-1].split()[2])
  assert abs(total - sum(s.seconds for s in done)) < 0.1


def test_a_first_sample_is_a_few_harmless_lines(capsys):
  first_sample.show(
    "rl",
    "the policy",
    "Tell me \x1b[31mof a fox.",
    "<think>\nOne step.\n\nWait, another."
    + " more" * 200
    + "\n</think>\n\nA fox.",
  )
  first, *rest = capsys.readouterr().out.splitlines()
  assert first.startswith("rl: first sample of the policy, ")
  assert " s after the start:" in first
  text = "\n".join(rest)
  assert "prompt:  Tell me \u241b[31mof a fox." in text
  assert "thought: One step. Wait, another. more" in text
  assert "answer:  A fox." in text
  assert "think>" not in text and "\x1b" not in text
  assert len(rest) == 5 and max(map(len, rest)) <= 80


def test_a_thought_that_does_not_end_has_no_answer(capsys):
  first_sample.show("rl", "the policy", "x", "<think>\nOn and on")
  lines = capsys.readouterr().out.splitlines()
  assert lines[2:] == [
    "  thought: On and on",
    "  answer:  (the thought does not end)",
  ]
