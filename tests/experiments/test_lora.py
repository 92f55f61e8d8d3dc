"""The whole method with LoRA: killed, it goes on; peft reads its adapters."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from opera_jax.clock_metrics import depends_on_clock
from opera_jax.train import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = "--config=configs/tiny.py:smoke"
FLAGS = (
  CONFIG,
  "--config.data.documents=320",
  "--config.model.hidden_size=64",
  "--config.model.num_hidden_layers=2",
  "--config.sft.lora.rank=4",
  "--config.sft.lora.targets=('q','v','down')",
  "--config.rl.lora.rank=4",
  "--config.rl.learning_rate=1e-3",
)
# Runs the driver; while it samples, counts the arrays of the embedding's shape
# and of the feed-forward weights'.
COUNTING = """
import collections, json, sys
import jax
from opera_jax.rl import rollouts
from opera_jax.experiments import opera_rl

collect, counts = rollouts.collect, []

def counted(*args, **named):
  live = [x for x in jax.live_arrays() if x.shape in ((2, 64, 384), (640, 64))]
  names = [f"{x.shape} {x.dtype}" for x in live]
  counts.append(collections.Counter(names))
  return collect(*args, **named)

rollouts.collect = counted
from absl import app
try:
  app.run(opera_rl.main, [sys.argv[0], *sys.argv[2:]])
finally:
  with open(sys.argv[1], "w") as file:
    json.dump(counts, file)
"""


def _start(*command) -> subprocess.Popen:
  env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(ROOT / ".jax_cache"))
  env["XLA_FLAGS"] = ""
  return subprocess.Popen(
    [sys.executable, "-W", "ignore", *command],
    cwd=ROOT,
    env=env,
    stderr=subprocess.STDOUT,
    stdout=subprocess.PIPE,
    text=True,
  )


def _finish(process) -> str:
  output, _ = process.communicate(timeout=800)
  assert process.returncode == 0, output
  return output


def _driver(workdir) -> subprocess.Popen:
  return _start("-m", "experiments.opera_rl", *FLAGS, f"--workdir={workdir}")


def _lines(path) -> list[dict]:
  return [
    {k: v for k, v in line.items() if not depends_on_clock(k)}
    for line in metrics.read(path)
  ]


def _done(workdir, stage) -> dict:
  return json.loads((workdir / stage / "DONE.json").read_text())


def _bytes(folder: pathlib.Path) -> int:
  return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run from end to end, and what it held while it sampled for RL."""
  folder = tmp_path_factory.mktemp("lora")
  counts = folder / "counts.json"
  _finish(
    _start("-c", COUNTING, str(counts), *FLAGS, f"--workdir={folder / 'run'}")
  )
  return folder / "run", json.loads(counts.read_text())


def test_the_chain_runs_and_the_policy_is_what_sampled(straight):
  workdir, _ = straight
  for stage in ("sft", "rl", "evaluate"):
    assert _done(workdir, stage)
  models = [_done(workdir, stage)["model"] for stage in ("base", "sft", "rl")]
  assert len(set(models)) == 3
  lines = _lines(workdir / "rl" / "metrics.jsonl")
  assert len(lines) == 3
  for line in lines:
    assert line["sampler_trainer/max_logprob_diff"] < 1e-4
  # KL to the SFT model grows from the first update on.
  assert 0 <= lines[0]["kl"] < lines[-1]["kl"]


def test_the_base_is_held_once_and_the_reference_not_at_all(straight):
  _, counts = straight
  assert len(counts) == 3
  for held in counts:
    # Frozen in bfloat16, and merged in float32 for sampling.
    assert held == {
      f"{shape} {dtype}": number
      for shape, number in (("(2, 64, 384)", 2), ("(640, 64)", 1))
      for dtype in ("bfloat16", "float32")
    }


def test_checkpoints_hold_the_adapter_and_not_the_base(straight):
  workdir, _ = straight
  model = _bytes(workdir / "rl" / "model")
  for stage in ("sft", "rl"):
    [*_, newest] = sorted((workdir / stage / "checkpoints").glob("[0-9]*"))
    assert _bytes(newest) < model / 2


def test_killed_during_rl_it_ends_as_the_straight_run(straight, tmp_path):
  workdir, _ = straight
  for stage, ready in (
    ("sft", lambda: (tmp_path / "sft" / "metrics.jsonl").exists()),
    ("rl", lambda: (tmp_path / "rl/checkpoints/1/FILES.json").exists()),
    ("rl", lambda: (tmp_path / "rl/checkpoints/2/FILES.json").exists()),
  ):
    process = _driver(tmp_path)
    deadline = time.monotonic() + 600
    while not ready():
      assert process.poll() is None, (stage, process.communicate()[0])
      assert time.monotonic() < deadline
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
  assert not (tmp_path / "rl" / "DONE.json").exists()
  _finish(_driver(tmp_path))
  for stage in ("sft", "rl"):
    want = _lines(workdir / stage / "metrics.jsonl")
    assert _lines(tmp_path / stage / "metrics.jsonl") == want, stage
    assert _done(tmp_path, stage) == _done(workdir, stage)


def test_the_exported_adapter_makes_the_exported_rl_model(straight, tmp_path):
  """On the SFT model as the run froze it, in bfloat16."""
  import peft
  import torch
  import transformers

  workdir, _ = straight

  def export(name, *flags):
    _finish(
      _start(
        *("-m", "experiments.export", *FLAGS, f"--workdir={workdir}"),
        *(f"--output={tmp_path / name}", *flags),
      )
    )
    return tmp_path / name

  base = export("sft", "--stage=sft", "--dtype=bfloat16")
  adapter = export("adapter", "--stage=rl", "--adapter", f"--base_model={base}")
  whole = export("rl", "--stage=rl")
  tokens = torch.arange(3, 40)[None] * 7 % 600

  def logits(model):
    with torch.no_grad():
      return model.eval()(tokens).logits.numpy()

  def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32
    )

  plain = logits(load(base))
  want = logits(load(whole))
  got = logits(peft.PeftModel.from_pretrained(load(base), adapter))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  assert np.abs(plain - want).max() > 1e-2


def test_a_stage_without_an_adapter_says_so(straight, tmp_path):
  workdir, _ = straight
  process = _start(
    *("-m", "experiments.export", CONFIG, f"--workdir={workdir}"),
    *(f"--output={tmp_path}", "--stage=base", "--adapter"),
    *FLAGS[1:4],
  )
  output, _ = process.communicate(timeout=300)
  assert process.returncode != 0
  assert "Stage base trains no LoRA adapter with this config" in output
