"""A lock keeps others out, says who holds it, and is nobody else's file."""

import os
import re
import socket
import stat
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from opera_jax import file_lock

HOLD = """
import sys, time
from opera_jax import file_lock
with file_lock.claim(sys.argv[1]) as held:
  print(held, flush=True)
  time.sleep(600)
"""


def _holding(lock):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(lock)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "True\n"
  return process


def test_a_claim_keeps_others_out_until_it_ends(tmp_path):
  lock = tmp_path / "lock"
  with file_lock.claim(lock) as first, file_lock.claim(lock) as second:
    assert first and not second
  with file_lock.claim(lock) as held:
    assert held
  with (
    pytest.raises(FileNotFoundError, match="no/lock"),
    file_lock.claim(tmp_path / "no" / "lock"),
  ):
    pass


def test_it_says_who_holds_it_and_ends_with_that_process(tmp_path):
  lock = tmp_path / "lock"
  other = _holding(lock)
  said = file_lock.holder(lock)
  host = re.escape(socket.gethostname())
  pattern = rf"process {other.pid} on '{host}' since \d{{4}}-\d\d-\d\d \d\d:"
  assert re.match(pattern, said)
  waited = []

  def wait():
    waited.append(file_lock.holder(lock))
    other.kill()
    other.wait()

  with file_lock.claim(lock, wait=wait) as held:
    assert held and waited == [said]
    assert f"process {os.getpid()} " in file_lock.holder(lock)
  assert file_lock.holder(lock) == "another process"
  assert lock.read_text() == ""


def test_what_a_wait_raises_ends_it(tmp_path):
  lock = tmp_path / "lock"

  def leave():
    raise SystemExit(143)

  with file_lock.claim(lock):
    begin = time.monotonic()
    with pytest.raises(SystemExit), file_lock.claim(lock, wait=leave):
      pass
    assert time.monotonic() - begin < 1


FORK = """
import os, sys, time
from opera_jax import file_lock
with file_lock.claim(sys.argv[1]) as held:
  child = os.fork()
  if child == 0:
    os.close(1)
    time.sleep(600)
    os._exit(0)
print(child, held, flush=True)
"""


def test_a_fork_does_not_keep_its_parents_lock(tmp_path):
  lock = tmp_path / "lock"
  parent = subprocess.run(
    [sys.executable, "-c", FORK, str(lock)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  child, held = parent.stdout.split()
  assert held == "True"
  os.kill(int(child), 0)  # it lives
  deadline = time.monotonic() + 10

  def wait():
    assert time.monotonic() < deadline, "the fork holds the lock"

  try:
    with file_lock.claim(lock, wait=wait) as held:
      assert held
  finally:
    os.kill(int(child), 9)


def test_a_lock_is_its_owners_alone(tmp_path):
  lock = tmp_path / "lock"
  with file_lock.claim(lock):
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
  lock.chmod(0o644)  # of an earlier version
  with file_lock.claim(lock):
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "dangling", "twin"])
def test_what_lies_in_its_place_is_an_error(tmp_path, kind):
  lock, other = tmp_path / "lock", tmp_path / "other"
  if kind == "pipe":
    os.mkfifo(lock)
  elif kind == "folder":
    lock.mkdir()
  elif kind == "twin":
    other.write_text("precious")
    lock.hardlink_to(other)
  else:
    if kind == "link":
      other.write_text("precious")
    lock.symlink_to(other)
  begin = time.monotonic()
  with (
    pytest.raises(OSError, match="must be a plain file.*remove it"),
    file_lock.claim(lock),
  ):
    pass
  assert time.monotonic() - begin < 1
  if kind in ("link", "twin"):
    assert other.read_text() == "precious"
  else:
    assert not other.exists()
