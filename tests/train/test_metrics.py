"""A killed and resumed run writes the lines of a straight one."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from opera_jax.train import metrics as run_metrics


def _write(metrics, steps):
  for i in steps:
    metrics.write(i, {"reward/mean": jnp.float32(0.1) * i, "loss": 1 / i})


def test_resumed_lines_equal_straight_ones(tmp_path):
  straight = run_metrics.Metrics(tmp_path / "a", "rl")
  _write(straight, range(1, 11))
  straight.close()

  killed = run_metrics.Metrics(tmp_path / "b", "rl")
  _write(killed, range(1, 8))
  killed.close()
  with killed.path.open("a") as file:
    file.write('{"step": 8, "rewar')
  resumed = run_metrics.Metrics(tmp_path / "b", "rl", last_step=5)
  _write(resumed, range(6, 11))
  resumed.close()

  assert resumed.path.read_bytes() == straight.path.read_bytes()
  steps = [line["step"] for line in run_metrics.read(resumed.path)]
  assert steps == list(range(1, 11))


def test_a_stage_that_starts_over_starts_an_empty_file(tmp_path):
  first = run_metrics.Metrics(tmp_path, "sft")
  _write(first, [1, 2])
  first.close()
  again = run_metrics.Metrics(tmp_path, "sft")
  again.close()
  assert run_metrics.read(again.path) == []
  assert run_metrics.read(tmp_path / "none.jsonl") == []


def test_every_line_is_strict_json(tmp_path):
  metrics = run_metrics.Metrics(tmp_path, "rl")
  metrics.write(3, {"a": float("nan"), "b": np.float32(2), "c": 4})
  metrics.close()
  text = metrics.path.read_text()
  assert json.loads(text, parse_constant=pytest.fail) == {
    "step": 3,
    "a": None,
    "b": 2.0,
    "c": 4.0,
  }


def test_tensorboard_gets_the_same_numbers(tmp_path):
  metrics = run_metrics.Metrics(tmp_path, "rl")
  _write(metrics, [1])
  metrics.close()
  files = list((tmp_path / "tensorboard" / "rl").iterdir())
  assert len(files) == 1
  assert b"reward/mean" in files[0].read_bytes()


def test_tensorboard_gets_histograms_and_texts_as_they_are(tmp_path):
  metrics = run_metrics.Metrics(tmp_path, "rl")
  metrics.write(
    2,
    {"loss": 1.0},
    histograms={"reward": np.asarray([[0.25, 0.5], [0.5, 4.0]])},
    texts=["<script>a</script>\n# b", *map(str, range(9))],
  )
  metrics.close()
  assert run_metrics.read(metrics.path) == [{"step": 2, "loss": 1.0}]
  (file,) = (tmp_path / "tensorboard" / "rl").iterdir()
  events = {
    value.tag: value for event in _events(file) for value in event.summary.value
  }
  histogram = events["reward"].histo
  assert (histogram.num, histogram.sum) == (4, 5.25)
  assert (histogram.min, histogram.max) == (0.25, 4.0)
  samples = sorted(tag for tag in events if tag.startswith("samples/"))
  assert samples == [f"samples/{i}/text_summary" for i in range(3)]
  (text,) = events[samples[0]].tensor.string_val
  assert text == b"    <script>a</script>\n    # b"


def _events(path):
  """The events of a file: length, checksum, event, checksum."""
  content = path.read_bytes()
  while content:
    (size,) = struct.unpack("<Q", content[:8])
    yield event_pb2.Event.FromString(content[12 : 12 + size])
    content = content[12 + size + 4 :]


def test_an_array_is_no_metric(tmp_path):
  metrics = run_metrics.Metrics(tmp_path, "rl")
  with pytest.raises(ValueError, match="'x' has shape"):
    metrics.write(1, {"x": np.zeros(2)})
