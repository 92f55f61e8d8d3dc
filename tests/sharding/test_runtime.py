"""Compiled programs lie in private, and only what is named listens."""

import os
import pathlib
import socket
import stat
import subprocess
import sys
import time
import warnings

import jax
import pytest
from conftest import ROOT

from opera_jax.sharding import runtime


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  return tmp_path / "home"


def _mode(path):
  return stat.S_IMODE(pathlib.Path(path).stat().st_mode)


def test_the_cache_of_programs_is_the_users_alone(home, tmp_path, monkeypatch):
  folder = runtime.cache_folder("auto")
  assert folder == str(home / ".cache" / "opera_jax" / "compiled")
  assert _mode(folder) == 0o700
  pathlib.Path(folder).chmod(0o755)  # readable only: closed, and used
  assert runtime.cache_folder("auto") == folder and _mode(folder) == 0o700
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  folder = runtime.cache_folder("auto")
  assert folder == str(tmp_path / "xdg" / "opera_jax" / "compiled")
  monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says: ignore
  assert runtime.cache_folder("auto").startswith(str(home))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
  assert runtime.cache_folder("auto") == str(tmp_path / "named")
  assert runtime.cache_folder("") == ""


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_one_that_others_can_write_is_refused(home, tmp_path, mode):
  folder = pathlib.Path(runtime.cache_folder("auto"))
  folder.chmod(mode)
  with pytest.raises(OSError, match="can be written by others.*chmod 700"):
    runtime.cache_folder("auto")
  # One that is named may be shared, by whoever trusts those who write there.
  shared = tmp_path / "shared"
  shared.mkdir()
  shared.chmod(mode)
  with pytest.warns(RuntimeWarning, match="whoever writes there is trusted"):
    assert runtime.cache_folder(str(shared)) == str(shared)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    runtime.cache_folder(str(tmp_path / "own"))


def test_one_of_another_user_is_refused(home, monkeypatch):
  folder = runtime.cache_folder("auto")
  monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
  with pytest.raises(OSError, match="belongs to another user"):
    runtime.cache_folder("auto")
  with pytest.warns(RuntimeWarning, match="belongs to another user"):
    runtime.cache_folder(folder)


def test_what_is_no_folder_is_named(home):
  (home / ".cache" / "opera_jax").mkdir(parents=True)
  (home / ".cache" / "opera_jax" / "compiled").write_text("")
  with pytest.raises(OSError, match="compiled cannot be created"):
    runtime.cache_folder("auto")


def test_the_default_is_not_in_the_working_directory():
  from opera_jax.configs import common

  assert common.get_config().runtime.compile_cache == "auto"


def test_an_address_is_bound_to_and_no_other(monkeypatch):
  given = {}
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **k: given.update(k)
  )
  start = {"heartbeat_seconds": 5, "compile_cache": ""}
  runtime.start(distributed="10.0.0.1:8476,2,0", **start)
  assert given["coordinator_bind_address"] == "10.0.0.1:8476"
  # Unless the machine knows itself by another name.
  given.clear()
  monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0:1")
  runtime.start(distributed="10.0.0.1:8476,2,0", **start)
  assert "coordinator_bind_address" not in given


LISTEN = """
import sys
from opera_jax.sharding import runtime
runtime.start(distributed=sys.argv[1] + ",2,0", heartbeat_seconds=10,
              compile_cache="")
"""


def _listening(port: int) -> set[str]:
  """Addresses, in the kernel's hexadecimal, where a port is listened at."""
  out = set()
  for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in pathlib.Path(table).read_text().splitlines()[1:]:
      address, state = line.split()[1], line.split()[3]
      if state == "0A" and int(address.rpartition(":")[2], 16) == port:
        out.add(address.rpartition(":")[0])
  return out


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs /proc")
def test_a_run_on_one_machine_is_not_heard_outside():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  process = subprocess.Popen(
    [sys.executable, "-c", LISTEN, f"127.0.0.1:{port}"],
    cwd=ROOT,
    stderr=subprocess.DEVNULL,
  )
  try:
    deadline = time.monotonic() + 60
    while not _listening(port):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.05)
    found = _listening(port)
  finally:
    process.kill()
    process.wait()
  # 127.0.0.1, as IPv4 or mapped into IPv6.
  assert all(address.endswith("0100007F") for address in found), found
