"""Checkpoints that survive a kill at any time.

A checkpoint holds a tree of arrays (parameters, optimizer, step, key) and a
JSON record of the host state (data position, reward state). Orbax writes it; a
list of its files with sizes and checksums is written last, by an atomic rename.
A checkpoint that does not match its list is moved aside with a warning, and the
previous one is used.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import signal
import types
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from opera_jax import file_lock
from opera_jax.sharding import exchange, runtime

_FILES = "FILES.json"
_DAMAGED = "damaged"
_TEMPORARY = ".orbax-checkpoint-tmp"
_LOCK = "writer.lock"
# Only the head of a large file is checksummed; its size covers the rest.
_CHECKED_BYTES = 64 * 2**20


class MismatchError(ValueError):
  """The arrays of a checkpoint do not match this run's config."""


class Checkpoints:
  """The checkpoints of one stage, in one directory.

  Saving blocks until the checkpoint is complete on disk: an update donates the
  buffers of its input state, so the next update must not run before. Only one
  run writes to a directory at a time; it holds the lock until `close`, and
  other processes can only read.
  """

  def __init__(
    self, directory: str | os.PathLike, *, keep: int = 2, write: bool = True
  ):
    """Opens a directory and checks what is in it.

    If it may write and no other run does, it creates the directory, removes
    half-written checkpoints, and moves the newest checkpoints that do not match
    their lists aside, each with a RuntimeWarning. Otherwise it skips them and
    changes nothing.

    Args:
      directory: local path or gs:// address; used by this stage only. A gs://
        address has no lock of its own; the stage's lock excludes other runs.
      keep: number of checkpoints to keep; at least 2, since one may be damaged.
      write: whether checkpoints will be written.

    Raises:
      ValueError: `keep` below 2.
      OSError: the lock file is not a regular file.
    """
    if keep < 2:
      raise ValueError(
        f"Keep at least 2 checkpoints, got {keep}: the newest may be half "
        "written when a run is killed."
      )
    self._directory = epath.Path(directory).resolve()
    self._lock = contextlib.ExitStack()
    # Process 0 inspects the files and broadcasts the result.
    self._writes, self._latest = exchange.on_main_process(
      lambda: self._begin(write)
    )
    self._manager: Any = None  # None without a folder
    if self._writes or self._directory.exists():
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=keep if self._writes else None,
          enable_async_checkpointing=False,
          create=self._writes,
        ),
        item_handlers={
          "state": ocp.StandardCheckpointHandler(),
          "host": ocp.JsonCheckpointHandler(),
        },
      )

  def save(self, step: int, state: Any, host: dict[str, Any]) -> bool:
    """Writes a checkpoint and returns once it is complete on disk.

    Args:
      step: number of the checkpoint, larger than all earlier ones.
      state: tree of arrays.
      host: JSON values; floats are restored bit for bit.

    Returns:
      False if that step is already the newest checkpoint.

    Raises:
      RuntimeError: another run writes here, or `write` was False.
      OSError: the disk has no room for it; earlier checkpoints are whole.
    """
    if not self._writes:
      raise RuntimeError(
        f"{self._directory} was opened read-only, because write is False or "
        "another run writes checkpoints there. Wait until that run ends."
      )
    if self.latest() == step:
      return False
    self._check_room(step, state)
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
        ),
        force=True,
      )
      self._manager.wait_until_finished()
    except ValueError as error:  # tensorstore's, for any failed write
      if os.strerror(errno.ENOSPC) in str(error):
        raise self._no_room(step, "no space is left") from error
      raise
    if runtime.is_main_process():
      folder = self._directory / str(step)
      partial = self._directory / f"{_FILES}.{secrets.token_hex(8)}{_TEMPORARY}"
      partial.write_text(json.dumps(_listing(folder), indent=1))
      partial.replace(folder / _FILES)
    runtime.barrier(f"saved {step}")
    self._latest = step
    return True

  def _check_room(self, step: int, state: Any) -> None:
    """Refuses to begin what the disk cannot hold: orbax's threads would each
    report the failure in their own words."""
    if "://" in str(self._directory):
      return
    needed = sum(
      shard.data.nbytes
      for leaf in jax.tree.leaves(_without_keys(state))
      for shard in getattr(leaf, "addressable_shards", ())
      if shard.replica_id == 0
    )
    free = shutil.disk_usage(self._directory).free
    if free < needed:
      raise self._no_room(
        step, f"it has {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
      )

  def _no_room(self, step: int, why: str) -> OSError:
    return OSError(
      f"Checkpoint {step} does not fit on the disk of {self._directory}: "
      f"{why}. What was saved before is whole: make room, and run the same "
      "command again."
    )

  def latest(self) -> int | None:
    """The newest intact checkpoint's step, or None."""
    return self._latest

  def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """Reads the newest intact checkpoint.

    Args:
      like: tree of arrays or `jax.ShapeDtypeStruct`s with shardings; the
        restored arrays have their shapes, dtypes and shardings, whatever
        devices wrote them.

    Returns:
      Its step, the tree and the host record; None if there is none.

    Raises:
      MismatchError: the arrays of the checkpoint do not match `like`.
    """
    step = self.latest()
    if step is None:
      return None
    self._check_same_arrays(step, like)
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding
      ),
      like,
    )
    read = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()
      ),
    )
    return step, read.state, read.host

  def faults(self) -> list[str]:
    """Describes what is wrong with each damaged checkpoint in the directory."""
    if not self._directory.exists():
      return []
    found = {
      step: _fault(self._directory / str(step)) for step in self._steps()
    }
    return [f"{step}: {fault}" for step, fault in found.items() if fault]

  def close(self) -> None:
    """Closes the manager and releases the lock."""
    if self._manager is not None:
      self._manager.close()
    self._lock.close()
    self._writes = False

  def _begin(self, write: bool) -> tuple[bool, int | None]:
    """Takes the lock, cleans up, and returns (whether this run may write,
    newest intact step)."""
    local = "://" not in str(self._directory)
    if write:
      self._directory.mkdir(parents=True, exist_ok=True)
      if local:
        lock = file_lock.claim(self._directory / _LOCK)
        write = self._lock.enter_context(lock)
    if write:
      self._clean()
    if not self._directory.exists():
      return write, None
    for step in self._steps():
      fault = _fault(self._directory / str(step))
      if fault is None:
        return write, step
      if write:
        self._set_aside(step, fault)
    return write, None

  def _steps(self) -> list[int]:
    """Steps of all checkpoints, intact or not; newest first."""
    names = [child.name for child in self._directory.iterdir()]
    return sorted((int(n) for n in names if n.isdigit()), reverse=True)

  def _clean(self) -> None:
    """Removes half-written checkpoints."""
    for half in list(self._directory.iterdir()):
      if _TEMPORARY in half.name:
        _warn(f"Ignoring half-written checkpoint {half.name}; removing it.")
        half.rmtree() if half.is_dir() else half.unlink()

  def _set_aside(self, step: int, fault: str) -> None:
    aside = self._directory / _DAMAGED
    aside.mkdir(exist_ok=True)
    target = aside / f"{step}-{len(list(aside.iterdir()))}"
    (self._directory / str(step)).rename(target)
    _warn(
      f"Ignoring damaged checkpoint {step} in {self._directory}: {fault}. "
      f"It is now {target}; the intact one before it is used."
    )

  def _check_same_arrays(self, step: int, like: Any) -> None:
    saved = _shapes(self._manager.item_metadata(step).state.tree)
    wanted = _shapes(jax.eval_shape(_without_keys, like))
    names = sorted(saved.keys() | wanted.keys())
    wrong = [
      f"{name}: checkpoint {saved.get(name, 'none')}, config "
      f"{wanted.get(name, 'none')}"
      for name in names
      if saved.get(name) != wanted.get(name)
    ]
    if wrong:
      more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
      raise MismatchError(
        f"Checkpoint {step} in {self._directory} does not fit the config: "
        f"{'; '.join(wrong[:8])}{more}. Give the config it was written with, "
        "or a new workdir."
      )


class Preemption:
  """Turns SIGTERM and Ctrl-C into a flag, so that a loop can save and exit.

      with Preemption() as preemption:
        for ...:
          ...
          if preemption.requested():
            checkpoints.save(...)
            sys.exit(preemption.exit_code())

  Where all results are already saved, call `exit_if_requested` between two
  steps. Put host-only work in `exit_at_once`. Enter the context from the main
  thread. A second SIGTERM has its original effect; a second Ctrl-C ends the
  process at once, which no save minds.
  """

  EXIT_CODE = 128 + signal.SIGTERM  # 143, as a shell reports a SIGTERM
  INTERRUPTED = 128 + signal.SIGINT  # 130, as a shell reports a Ctrl-C

  def __init__(self) -> None:
    self._signal, self._now = 0, False  # the first signal, 0 for none
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Preemption":
    for number in (signal.SIGTERM, signal.SIGINT):
      # A shell that starts a job in the background tells it to ignore Ctrl-C.
      if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def exit_code(self) -> int:
    """The exit status of a run that ends because of the signal.

    130 after Ctrl-C; 143 after SIGTERM, also where another process got it.
    """
    interrupted = self._signal == signal.SIGINT
    return self.INTERRUPTED if interrupted else self.EXIT_CODE

  def requested_here(self) -> bool:
    """Whether this process received the signal, without asking the other
    processes."""
    return bool(self._signal)

  def requested(self) -> bool:
    """Whether any process received the signal; all processes must call this.

    With several processes this is one small collective.
    """
    mine = self.requested_here()
    if jax.process_count() == 1:
      return mine
    return bool(np.any(multihost_utils.process_allgather(mine)))

  def exit_if_requested(self) -> None:
    """Exits on all processes if any received the signal; all must call this.

    Raises:
      SystemExit: with `exit_code`.
    """
    if self.requested():
      raise SystemExit(self.exit_code())

  def exit_if_requested_here(self) -> None:
    """Exits if this process received the signal, without asking the others.

    Raises:
      SystemExit: with `exit_code`.
    """
    if self.requested_here():
      raise SystemExit(self.exit_code())

  @contextlib.contextmanager
  def exit_at_once(self) -> Iterator[None]:
    """A block that the signal interrupts at once; skipped if it already came.

    For host-only work that writes files atomically. It must contain no
    collectives, since the other processes would wait in them.

    Raises:
      SystemExit: with `exit_code`.
    """
    self._now = True
    try:
      self.exit_if_requested_here()
      yield
    finally:
      self._now = False

  def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
    self._signal = self._signal or number
    interrupted = number == signal.SIGINT
    # Python's own handler would only raise once the computation is over.
    again = signal.SIG_DFL if interrupted else self._before[number]
    signal.signal(number, again)
    if interrupted:
      ends = (
        "ended; what is finished is saved"
        if self._now
        else "what is finished is saved when the call in progress ends (again "
        "ends at once)"
      )
      # The interrupted code may itself be writing to sys.stderr.
      os.write(
        2,
        f"\nCtrl-C: {ends}, and the same command goes on from "
        "there.\n".encode(),
      )
    if self._now:
      raise SystemExit(self.exit_code())


def _warn(message: str) -> None:
  warnings.warn(message, RuntimeWarning, stacklevel=6)


def _listing(folder: epath.Path) -> dict[str, list[int]]:
  """Size and checksum of every file of a checkpoint except the list itself."""
  return {
    str(path.relative_to(folder)): [path.stat().length, _checksum(path)]
    for path in _walk(folder)
    if path.name != _FILES
  }


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
  for child in sorted(folder.iterdir()):
    if child.is_dir():
      yield from _walk(child)
    else:
      yield child


def _checksum(path: epath.Path) -> int:
  with path.open("rb") as file:
    return zlib.crc32(file.read(_CHECKED_BYTES))


def _fault(folder: epath.Path) -> str | None:
  """Describes what is wrong with a checkpoint's files; None if nothing is."""
  listing = folder / _FILES
  if not listing.exists():
    return f"it was not finished ({_FILES} is missing)"
  try:
    expected = json.loads(listing.read_bytes().decode())
  except (ValueError, OSError, RecursionError) as error:
    return f"{_FILES} cannot be read as JSON ({error})"
  if not _is_listing(expected):
    return f"{_FILES} is not a list of files with their sizes and checksums"
  for name, (size, checksum) in expected.items():
    path = folder / name
    try:
      if not path.exists():
        return f"{name} is missing"
      if path.stat().length != size:
        return f"{name} has {path.stat().length} bytes of {size}"
      if _checksum(path) != checksum:
        return f"{name} has changed since it was written"
    except OSError as error:
      return f"{name} cannot be read ({error})"
  return None


def _is_listing(value: Any) -> bool:
  """Whether a value maps relative file names to [size, checksum]."""
  return (
    isinstance(value, dict)
    and bool(value)
    and all(
      isinstance(pair, list)
      and len(pair) == 2
      and all(isinstance(x, int) and not isinstance(x, bool) for x in pair)
      and not name.startswith("/")
      and ".." not in name.split("/")
      for name, pair in value.items()
    )
  )


def _without_keys(tree: Any) -> Any:
  """Replaces typed random keys by the integers they are saved as."""
  return jax.tree.map(
    lambda leaf: (
      jax.random.key_data(leaf)
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      else leaf
    ),
    tree,
  )


def _shapes(tree: Any) -> dict[str, str]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    )
    for path, leaf in leaves
  }
