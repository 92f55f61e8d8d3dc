"""Checkpoints that survive being killed at any instant.

A checkpoint holds a tree of arrays (parameters, optimizer, step, key) and a
JSON record of the host's own state (data position, reward state). Orbax writes
it; a list of its files with sizes and checksums is written last, by an atomic
rename. A checkpoint that does not match its list is set aside with a warning
and the one before it is used.
"""

import json
import os
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

from opera_jax.sharding import runtime

_FILES = "FILES.json"
_DAMAGED = "damaged"
_TEMPORARY = ".orbax-checkpoint-tmp"
# Enough to meet every small file whole; sizes tell about the rest.
_CHECKED_BYTES = 64 * 2**20


class MismatchError(ValueError):
  """A checkpoint holds other arrays than this run's config makes."""


class Checkpoints:
  """The checkpoints of one stage, in one directory.

  Saving waits until the checkpoint is whole on disk: an update donates the
  buffers of the state it was given, so the next one may not run meanwhile.
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
    """Opens a directory, making it if need be, and checks what is in it.

    What a kill left half written is removed, and the newest checkpoints that
    do not match their lists are set aside, each with a RuntimeWarning.

    Args:
      directory: local path or gs:// address; of this stage alone.
      keep: how many checkpoints to hold; at least 2, for one may be damaged.

    Raises:
      ValueError: `keep` below 2.
    """
    if keep < 2:
      raise ValueError(
        f"Keep at least 2 checkpoints, got {keep}: the newest may be half "
        "written when a run is killed."
      )
    self._directory = epath.Path(directory).resolve()
    self._directory.mkdir(parents=True, exist_ok=True)
    if runtime.lead():
      self._clean()
    runtime.barrier("checkpoints clean")
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "host": ocp.JsonCheckpointHandler(),
      },
    )

  def save(self, step: int, state: Any, host: dict[str, Any]) -> bool:
    """Writes a checkpoint and returns when it is whole.

    Args:
      step: its number, above that of every checkpoint so far.
      state: tree of arrays.
      host: what JSON can hold; floats come back bit for bit.

    Returns:
      False if that step was the newest already.
    """
    if self.latest() == step:
      return False
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
      ),
      force=True,
    )
    self._manager.wait_until_finished()
    if runtime.lead():
      folder = self._directory / str(step)
      partial = self._directory / f"{_FILES}{_TEMPORARY}"
      partial.write_text(json.dumps(_listing(folder), indent=1))
      partial.replace(folder / _FILES)
    runtime.barrier(f"saved {step}")
    return True

  def latest(self) -> int | None:
    """The newest checkpoint's step, or None."""
    return self._manager.latest_step()

  def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """Reads the newest intact checkpoint.

    Args:
      like: tree of arrays or `jax.ShapeDtypeStruct`s with shardings; what is
        read takes their shapes, dtypes and shardings, whatever devices wrote
        it.

    Returns:
      Its step, the tree and the host record; None if there is none.

    Raises:
      MismatchError: the checkpoint holds other arrays than `like`.
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

  def close(self) -> None:
    """Lets go of the directory."""
    self._manager.close()

  def _clean(self) -> None:
    """Removes what was half written, sets aside what is damaged."""
    names = [child.name for child in self._directory.iterdir()]
    for name in names:
      if _TEMPORARY in name:
        _warn(f"Ignoring half-written checkpoint {name}; removing it.")
        half = self._directory / name
        half.rmtree() if half.is_dir() else half.unlink()
    steps = [int(name) for name in names if name.isdigit()]
    for step in sorted(steps, reverse=True):
      fault = _fault(self._directory / str(step))
      if fault is None:
        break
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
  """Turns SIGTERM into a flag, for a loop to save and leave.

      with Preemption() as preemption:
        for ...:
          ...
          if preemption.requested():
            checkpoints.save(...)
            sys.exit(preemption.EXIT_CODE)

  Enter it from the main thread. A second SIGTERM acts as it did before.
  """

  EXIT_CODE = 128 + signal.SIGTERM  # 143, as a shell reports a SIGTERM

  def __init__(self):
    self._flag = False
    self._before = signal.SIG_DFL

  def __enter__(self) -> "Preemption":
    self._before = signal.signal(signal.SIGTERM, self._on_signal)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    signal.signal(signal.SIGTERM, self._before)

  def told(self) -> bool:
    """Whether this process was told to stop, whatever the others were."""
    return self._flag

  def requested(self) -> bool:
    """Whether any process was told to stop; all must ask together.

    With several processes this is one small collective.
    """
    if jax.process_count() == 1:
      return self._flag
    return bool(np.any(multihost_utils.process_allgather(self._flag)))

  def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
    self._flag = True
    signal.signal(signal.SIGTERM, self._before)


def _warn(message: str) -> None:
  warnings.warn(message, RuntimeWarning, stacklevel=4)


def _listing(folder: epath.Path) -> dict[str, list[int]]:
  """Size and checksum of every file of a checkpoint but the list itself."""
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
  """What is wrong with a checkpoint's files, or None."""
  listing = folder / _FILES
  if not listing.exists():
    return f"it was not finished ({_FILES} is missing)"
  try:
    expected = json.loads(listing.read_text())
  except ValueError as error:
    return f"{_FILES} is not JSON ({error})"
  for name, (size, checksum) in expected.items():
    path = folder / name
    if not path.exists():
      return f"{name} is missing"
    if path.stat().length != size:
      return f"{name} has {path.stat().length} bytes of {size}"
    if _checksum(path) != checksum:
      return f"{name} has changed since it was written"
  return None


def _without_keys(tree: Any) -> Any:
  """Typed random keys as the integers they are saved as."""
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
