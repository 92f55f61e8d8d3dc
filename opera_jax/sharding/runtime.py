"""Process setup that a driver runs before anything else uses JAX.

On several hosts, each runs the same command, joins the others, and holds the
shards of its own devices. All share the run's folder. Only process 0 writes to
it, except for checkpoints, which all write together.
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
  """Joins the other processes, and opens the compilation cache.

  Args:
    distributed: "" for one process; "auto" if the environment describes the
      cluster (a TPU pod, SLURM); or "HOST:PORT,COUNT,INDEX", the address of
      process 0, the number of processes, and which one this is.
    heartbeat_seconds: heartbeat timeout; after a process dies, the others end
      with an error within about this time.
    compile_cache: see `cache_folder`.
    folder: of the run; with several processes it receives the JAX runtime's
      output, see `peer_failure`. "" leaves that output on the terminal.

  Raises:
    ValueError: `distributed` has another form.
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
    # By default JAX would listen on every address of the machine.
    if "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
      given["coordinator_bind_address"] = match["address"]
  reporter = peer_failure.FailureReporter(folder) if folder else None
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    **given,
    heartbeat_timeout_seconds=heartbeat_seconds,
    shutdown_timeout_seconds=heartbeat_seconds,
  )
  if reporter is not None:
    reporter.ready(
      index=jax.process_index(),
      count=jax.process_count(),
      seconds=heartbeat_seconds,
    )


def cache_folder(setting: str) -> str:
  """Returns the directory of the compilation cache, and creates it; "" for
  none.

  Whoever can write there controls the programs that we run. So it must belong
  to this user alone; if the user names a shared one, there is a warning.

  Args:
    setting: "" for none; "auto" for JAX_COMPILATION_CACHE_DIR, or if unset
      opera_jax/compiled in the user's cache directory (XDG_CACHE_HOME, or
      ~/.cache); or a local directory that outlives the run.

  Raises:
    OSError: it cannot be created, or others can write to the one of "auto".
  """
  if not setting:
    return ""
  named = setting if setting != "auto" else ""
  named = named or os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
  home = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(home):  # the XDG standard ignores relative paths
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
      f"{folder} cannot be created ({error}), and it is the compilation cache. "
      "Set another --config.runtime.compile_cache, or '' for none."
    ) from error
  fault = ""
  if found.st_uid != os.geteuid():
    fault = f"belongs to another user ({found.st_uid})"
  elif found.st_mode & 0o022:
    fault = f"can be written by others (mode {found.st_mode & 0o777:03o})"
  if fault and not named:
    raise OSError(
      f"{folder} {fault}, and the compiled programs in it are executed. chmod "
      "700 it, remove it, or set another --config.runtime.compile_cache ('' "
      "for none)."
    )
  if fault:
    warnings.warn(
      f"{folder} {fault}, and the compiled programs in it are executed: "
      "whoever writes there is trusted. chmod 700 it, or set "
      "--config.runtime.compile_cache=auto for a private one.",
      RuntimeWarning,
      stacklevel=3,
    )
  if not named:
    os.chmod(folder, 0o700)
  return folder


def is_main_process() -> bool:
  """Whether this is process 0, which writes the files."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits for all processes, so that all see what one wrote."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def from_main_process(values: np.ndarray) -> np.ndarray:
  """Broadcasts the values of process 0; all processes must call this
  together."""
  if jax.process_count() == 1:
    return values
  return np.asarray(multihost_utils.broadcast_one_to_all(values))


def compiled() -> int:
  """Number of programs compiled or read from the cache since
  `count_compiled`."""
  return compile_log.programs(compile_log.spans())


def count_compiled() -> None:
  """Starts counting; further calls have no effect."""
  compile_log.spans()
