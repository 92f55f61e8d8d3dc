"""What a driver does before anything else touches JAX.

Several hosts run one program: each starts the same command, finds the others,
and holds the shards of its own devices. They share the folder of the run; only
process 0 writes to it, but for checkpoints, which all write together.
"""

import os
import re
import warnings
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from opera_jax.sharding import compile_log, peer_failure

_ADDRESS = re.compile(r"(?P<address>.+:\d+),(?P<count>\d+),(?P<index>\d+)")


def start(
  *,
  distributed: str,
  heartbeat_seconds: int,
  compile_cache: str,
  folder: str | os.PathLike = "",
) -> None:
  """Joins the other processes, and opens the cache of compiled programs.

  Args:
    distributed: "" for one process; "auto" where the machines say who they
      are (a TPU pod, SLURM); or "HOST:PORT,COUNT,INDEX", the address of process
      0, the number of processes, and which one this is.
    heartbeat_seconds: when a process has died, the others end within about
      this time, with an error.
    compile_cache: see `cache_folder`.
    folder: of the run; takes what the runtime of several processes writes of
      its own, see `peer_failure`. "" leaves it on the screen.

  Raises:
    ValueError: `distributed` is none of these.
  """
  count_compiled()
  cache = cache_folder(compile_cache)
  if cache:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  if not distributed:
    return
  given: dict[str, Any] = {}
  if distributed != "auto":
    match = _ADDRESS.fullmatch(distributed)
    if match is None or int(match["index"]) >= int(match["count"]):
      raise ValueError(
        f"config.runtime.distributed={distributed!r} is neither '', 'auto' nor "
        "'HOST:PORT,COUNT,INDEX' with INDEX from 0 to COUNT - 1, e.g. "
        "'10.0.0.1:8476,2,0'."
      )
    given = {
      "coordinator_address": match["address"],
      "num_processes": int(match["count"]),
      "process_id": int(match["index"]),
    }
    # JAX itself would listen on every address of the machine.
    if "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
      given["coordinator_bind_address"] = match["address"]
  words = peer_failure.FailureReporter(folder) if folder else None
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    **given,
    heartbeat_timeout_seconds=heartbeat_seconds,
    shutdown_timeout_seconds=heartbeat_seconds,
  )
  if words is not None:
    words.ready(
      index=jax.process_index(),
      count=jax.process_count(),
      seconds=heartbeat_seconds,
    )


def cache_folder(asked: str) -> str:
  """The directory of compiled programs, made if need be; "" for none.

  Whoever can write there decides what our programs do. So it belongs to this
  user alone; one that is named and shared is taken with a warning.

  Args:
    asked: "" for none; "auto" for the one of JAX_COMPILATION_CACHE_DIR, or
      else opera_jax/compiled in the user's cache directory (XDG_CACHE_HOME, or
      ~/.cache); or a local directory that outlives the run.

  Raises:
    OSError: it cannot be made, or the one of "auto" is open to others.
  """
  if not asked:
    return ""
  named = asked if asked != "auto" else ""
  named = named or os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
  home = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(home):  # the standard ignores others
    home = os.path.expanduser("~/.cache")
  folder = named or os.path.join(home, "opera_jax", "compiled")
  if "://" in folder:
    return folder
  try:
    if not os.path.isdir(folder):
      os.makedirs(os.path.dirname(os.path.abspath(folder)), exist_ok=True)
      os.mkdir(folder, 0o700)
    found = os.stat(folder)
  except OSError as error:
    raise OSError(
      f"{folder} cannot be made ({error}); compiled programs are kept there. "
      "Name another --config.runtime.compile_cache, or '' for none."
    ) from error
  fault = ""
  if found.st_uid != os.geteuid():
    fault = f"belongs to another user ({found.st_uid})"
  elif found.st_mode & 0o022:
    fault = f"can be written by others (mode {found.st_mode & 0o777:03o})"
  if fault and not named:
    raise OSError(
      f"{folder} {fault}, and what lies there is run. chmod 700 it or remove "
      "it, or name another --config.runtime.compile_cache ('' for none)."
    )
  if fault:
    warnings.warn(
      f"{folder} {fault}, and the compiled programs that lie there are run: "
      "whoever writes there is trusted. chmod 700 it, or set "
      "--config.runtime.compile_cache=auto for a private one.",
      RuntimeWarning,
      stacklevel=3,
    )
  if not named:
    os.chmod(folder, 0o700)
  return folder


def is_main_process() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process is here, so that all see what one wrote."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def from_main_process(values: np.ndarray) -> np.ndarray:
  """What process 0 has, on every process; all must call it together."""
  if jax.process_count() == 1:
    return values
  return np.asarray(multihost_utils.broadcast_one_to_all(values))


def compiled() -> int:
  """Programs compiled, or read from the cache, since `count_compiled`."""
  return compile_log.programs(compile_log.spans())


def count_compiled() -> None:
  """Starts to count; calls after the first change nothing."""
  compile_log.spans()
