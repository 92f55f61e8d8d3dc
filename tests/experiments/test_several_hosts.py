"""Two processes do what one does, and a run outlives one that dies.

Every process here is a host of its own with a few fake devices; they meet at
localhost as hosts of a pod meet over the network.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from opera_jax.clock_metrics import depends_on_clock
from opera_jax.data import storyworld, traces
from opera_jax.sharding import exchange, peer_failure, runtime
from opera_jax.train import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HEARTBEAT = 10  # seconds
STEPS = 2
HERE = pathlib.Path(__file__).parent
FLAGS = (
  "--config=configs/tiny.py:smoke",
  "--config.data.kind=jsonl",
  "--config.reward.terms=opera + 0.1*logged_reward:short",
  "--config.mesh.tensor=2",
  "--config.model.hidden_size=64",
  "--config.model.num_hidden_layers=2",
  "--config.sft.batch_size=4",
  "--config.sft.packed=False",
  "--config.sft.epochs=1",
  "--config.sft.row_tokens=160",
  "--config.synthesis.max_thought_tokens=96",
  "--config.rollout.max_new_tokens=64",
  f"--config.rl.steps={STEPS}",
)


def _run(
  workdir, stages: str, *flags: str, processes: int, devices: int
) -> list:
  """Starts the driver on so many hosts of so many devices each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  env = dict(os.environ)
  env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
  env["PYTHONPATH"] = str(HERE)  # of logged_reward
  data = workdir.parent / "tasks.jsonl"
  if not data.exists():
    data.write_text("".join(map(_line, storyworld.prompts(160, 7))))
  return [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "experiments.opera_rl", *FLAGS, *flags),
        f"--workdir={workdir}",
        f"--config.data.path={data}",
        f"--config.stages={stages}",
        f"--config.runtime.heartbeat_seconds={HEARTBEAT}",
        *(
          [f"--config.runtime.distributed=localhost:{port},{processes},{i}"]
          if processes > 1
          else []
        ),
      ],
      cwd=ROOT,
      env=env | {"REWARD_LOG": str(workdir / f"asked-{processes}-{i}")},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(processes)
  ]


def _line(prompt) -> str:
  row = {n: getattr(prompt, n) for n in ("id", "task", "prompt", "reference")}
  return json.dumps(row) + "\n"


def _asked(workdir, processes: int) -> list[list[str]]:
  """By process, the prompts whose reward it computed in the last step."""
  logs = [workdir / f"asked-{processes}-{i}" for i in range(processes)]
  return [json.loads(log.read_text().splitlines()[-1]) for log in logs]


def _finish(hosts: list) -> list[str]:
  outputs = [host.communicate(timeout=1100)[0] for host in hosts]
  for host, output in zip(hosts, outputs):
    assert host.returncode == 0, output
  return outputs


def _lines(workdir, stage: str) -> list[dict]:
  return [
    {k: v for k, v in line.items() if not depends_on_clock(k)}
    for line in metrics.read(workdir / stage / "metrics.jsonl")
  ]


def _assert_same(ours, theirs) -> None:
  for stage in ("sft", "rl"):
    got, want = _lines(ours, stage), _lines(theirs, stage)
    assert want
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for a, b in zip(got, want, strict=True):
      assert a == pytest.approx(b, rel=1e-4, abs=1e-5), stage


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
  """A run that stands before SFT, made by one device."""
  workdir = tmp_path_factory.mktemp("selected")
  _finish(_run(workdir, "synthesize,select", processes=1, devices=2))
  return workdir


def _copy(workdir, name: str):
  return shutil.copytree(workdir, workdir.parent / f"{workdir.name}-{name}")


@pytest.fixture(scope="module")
def alone(selected):
  """SFT and RL by one process with eight devices."""
  workdir = _copy(selected, "alone")
  _finish(_run(workdir, "sft,rl", processes=1, devices=8))
  return workdir


def test_two_processes_do_what_one_does_and_outlive_a_kill(selected, alone):
  workdir = _copy(selected, "two")
  first, second = _run(workdir, "sft,rl", processes=2, devices=4)
  saved = workdir / "rl" / "checkpoints" / "1" / "FILES.json"
  deadline = time.monotonic() + 900
  while not saved.exists():
    assert first.poll() is None, first.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.02)
  second.send_signal(signal.SIGKILL)
  killed = time.monotonic()
  output, _ = first.communicate(timeout=120)
  seconds = time.monotonic() - killed
  print(f"the other process ended after {seconds:.1f} s")
  assert first.returncode == peer_failure.EXIT_CODE, output
  assert seconds < 3 * HEARTBEAT, output
  # One line says who; the runtime's page is in a file.
  (said,) = [line for line in output.splitlines() if "of the run ends" in line]
  assert f"process 1 (host {socket.gethostname()}, pid {second.pid}, " in said
  for word in ("***", "absl::", "Traceback", "coordination_service"):
    assert word not in output, output
  page = (workdir / "runtime" / "0.txt").read_text()
  assert "heartbeats" in page and str(workdir / "runtime" / "0.txt") in said
  second.communicate()
  # One writer: one line a step, one board.
  board = workdir / "sft" / "tensorboard" / "metrics"
  assert len(list(board.glob("events*"))) == 1

  for name, processes, devices in (
    ("one", 1, 8),
    ("small", 2, 2),
    ("same", 2, 4),
  ):
    again = _copy(workdir, name)
    _finish(_run(again, "sft,rl", processes=processes, devices=devices))
    _assert_same(again, alone)
    assert json.loads((again / "rl" / "DONE.json").read_text())
    asked = _asked(again, processes)
    assert len({len(mine) for mine in asked}) == 1  # shares of one size
    assert sorted(sum(asked, [])) == _asked(alone, 1)[0]


@pytest.mark.parametrize("apart", [True, False])
def test_two_hosts_divide_the_synthesis_or_do_it_together(selected, apart):
  """Apart where each holds a whole model; the traces are those of one host."""
  workdir = selected.parent / f"synthesis-{apart}"
  for stage in ("tokenizer", "base"):
    shutil.copytree(selected / stage, workdir / stage)
  outputs = _finish(
    _run(
      workdir,
      "synthesize,select",
      f"--config.mesh.data={2 if apart else 1}",
      processes=2,
      devices=2,
    )
  )
  for output in outputs:
    assert ("this host makes 1 of 2 shards" in output) == apart
  for stage in ("synthesize", "select"):
    got, want = (
      list(traces.read(folder / stage / "traces"))
      for folder in (workdir, selected)
    )
    assert [t.id for t in got] == [t.id for t in want]
    assert [t.completion.tolist() for t in got] == [
      t.completion.tolist() for t in want
    ]


SHARE = """
import io
import os

import jax
import numpy as np
from opera_jax.sharding import exchange, layout, mesh, runtime

runtime.start(distributed="auto", heartbeat_seconds=10, compile_cache="")
devices = mesh.create()
mine = layout.local_rows(devices, 8)
whole = np.arange(16.0).reshape(8, 2)
placed = layout.from_local_rows(whole[mine], devices, 8)
np.testing.assert_array_equal(layout.to_host(placed * 2), whole * 2)
copied = layout.to_devices(whole, layout.batch_sharding(devices))
np.testing.assert_array_equal(layout.to_host(copied + placed), whole * 2)
key = layout.to_devices(jax.random.key(1), layout.replicated(devices))
bits = layout.to_host(jax.random.bits(key))
assert bits == jax.random.bits(jax.random.key(1))
# Each does its own share of host work, all learn the whole.
index = jax.process_index()
done = exchange.map_across_processes(
  range(5), lambda share: [[i, index] for i in share]
)
assert done == [[0, 0], [1, 0], [2, 1], [3, 1], [4, 1]], done
third = exchange.map_across_processes([3.3e-7], lambda xs: [x / 3 for x in xs])
assert third == [1.1e-7]
assert exchange.gather(b"ab" * index) == [b"", b"ab"]
# What one alone may do, all learn, with what it raised.
alone = []
told = exchange.on_main_process(lambda: alone.append(1) or {"a": [1]})
assert told == {"a": [1]}
assert len(alone) == 1 - index
for work, kind, words in (
  (lambda: 1 // 0, (ZeroDivisionError, RuntimeError), "integer division"),
  (lambda: exit(143), SystemExit, "143"),
):
  try:
    exchange.on_main_process(work)
  except kind as error:
    assert words in str(error), error
  else:
    raise AssertionError(kind)
path = os.environ["SHARED_FILE"]
taken = []


class Counted(io.FileIO):
  def read(self, size=-1):
    taken.append(size)
    return super().read(size)


exchange.open = Counted
assert exchange.read_file(path).decode() == "0123456789\u00e9"
assert taken == [6], taken
try:
  exchange.map_across_processes(
    range(2), lambda share: [1 // (1 - i) for i in share]
  )
except (ZeroDivisionError, RuntimeError) as error:
  print(type(error).__name__, error)
print("share", jax.process_index(), runtime.is_main_process(), mine.tolist())
"""


def test_hosts_of_a_slurm_job_find_each_other_and_share_the_work(tmp_path):
  shared = tmp_path / "shared"
  shared.write_text("0123456789\u00e9", encoding="utf-8")
  job = str(os.getpid())  # names the port where they meet
  hosts = [
    subprocess.Popen(
      [sys.executable, "-c", SHARE],
      cwd=ROOT,
      env=os.environ
      | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "SHARED_FILE": str(shared),
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
        "SLURM_STEP_NUM_NODES": "1",
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  outputs = [host.communicate(timeout=200)[0] for host in hosts]
  assert "share 0 True [0, 1, 2, 3]" in outputs[0], outputs[0]
  assert "share 1 False [4, 5, 6, 7]" in outputs[1], outputs[1]
  # What one process's work raised ends all of them, with its words.
  said = "ZeroDivisionError: integer division or modulo by zero"
  assert f"RuntimeError Process 1 of the run: {said}" in outputs[0]
  assert "ZeroDivisionError integer division" in outputs[1]


def test_shares_are_disjoint_and_cover_all():
  for count, parts in ((0, 3), (2, 3), (10, 4), (12, 4)):
    shares = [exchange.shard_range(count, i, parts) for i in range(parts)]
    assert [i for share in shares for i in share] == list(range(count))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("value", ["here", "host:1,2", "host:1,2,2"])
def test_an_address_that_is_none_is_refused(value):
  with pytest.raises(ValueError, match="HOST:PORT,COUNT,INDEX"):
    runtime.start(distributed=value, heartbeat_seconds=1, compile_cache="")
