"""A process that outlives another one says who that was, in one line."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from opera_jax.sharding import peer_failure

SILENT = """E1127 coordination_service.cc:1549] error to all tasks: \
UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
{}
The tasks have crashed. Check the task logs for an earlier error.
F1127 client.h:80] Terminating process because the JAX distributed service
*** Check failure stack trace: ***
    @     0x7fd775040634  absl::lts_20260107::log_internal::LogMessage
"""
SERVICE = """E1127 coordination_service_agent.cc:289] Polled an error from \
coordination service (this can be an error from this or another task).
F1127 client.h:80] UNAVAILABLE: failed to connect to all addresses
"""


class _Words(peer_failure.FailureReporter):
  """Without taking over the standard error of the tests."""

  def __init__(self, folder, index, text):
    self._folder, self._index, self._count = folder, index, 4
    self._path = folder / f"{index}.txt"
    self._path.write_text("host here, pid 1, since now\n" + text)


@pytest.mark.parametrize(
  "index,text,dead",
  [
    (0, SILENT.format("2"), (2,)),
    (1, SILENT.format("2\n3"), (2, 3)),
    (3, SILENT.format("1").replace("1\nThe", "1, 2\nThe"), (1, 2)),
    (1, "F1127 /job:jax_worker/replica:0/task:2 is gone", (2,)),
    (2, SERVICE, (0,)),
    (0, SERVICE, ()),
    (1, "malloc(): invalid size", ()),
    (1, "", ()),
    (1, SILENT.format("99999"), (0,)),
  ],
  ids=range(9),
)
def test_who_it_was(tmp_path, index, text, dead):
  for i in range(4):
    (tmp_path / f"{i}.txt").write_text(f"host h{i}, pid {i}0, since then\n")
  line = _Words(tmp_path, index, text).line()
  assert (
    line.startswith(f"Process {index} of the run ends") and "\n" not in line
  )
  for i in range(4):
    named = f"process {i} (host h{i}, pid {i}0, since then)"
    assert (named in line) == (i in dead), line
  assert str(tmp_path / f"{index}.txt") in line and "same command" in line
  assert ("aborted it" in line) == (not dead)


RUN = """
import sys, time
import numpy as np
from jax.experimental import multihost_utils
from opera_jax.sharding import runtime

folder, address, index, idle = sys.argv[1:]
runtime.start(distributed=f"{address},2,{index}", heartbeat_seconds=10,
              compile_cache="", folder=folder)
multihost_utils.process_allgather(np.ones(3))
print("up", file=sys.stderr, flush=True)
while True:
  if int(idle):
    time.sleep(0.1)
  else:
    multihost_utils.process_allgather(np.ones(3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("idle", [0, 1])
@pytest.mark.parametrize("victim", [0, 1])
def test_of_two_the_other_one_says_who_died(tmp_path, victim, idle):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  both = [
    subprocess.Popen(
      [sys.executable, "-c", RUN, str(tmp_path), address, str(i), str(idle)],
      cwd=ROOT,
      env=os.environ | {"XLA_FLAGS": ""},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for one in both:
    while "up" not in one.stderr.readline():
      assert one.poll() is None
  dead, other = both[victim], both[1 - victim]
  begin = time.monotonic()
  dead.send_signal(signal.SIGKILL)
  _, said = other.communicate(timeout=60)
  dead.communicate()
  assert time.monotonic() - begin < 30
  assert other.returncode == peer_failure.EXIT_CODE
  assert said.count("\n") == 1, said
  assert (
    f"process {victim} (host {socket.gethostname()}, pid {dead.pid}" in said
  )
  page = (tmp_path / "runtime" / f"{1 - victim}.txt").read_text()
  assert page.count("\n") > 5
