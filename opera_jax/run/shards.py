"""The shards of a long synthesis: JSONL files that survive a kill.

Shard i is a JSONL file with the traces of items [i * size, (i + 1) * size). A
line is appended when an item finishes; once all have, the file is sorted by
item. After a crash or a kill only the missing items are computed again.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from opera_jax import atomic_file, file_lock
from opera_jax.data import traces

_POLL = 1.0  # seconds between two checks of other processes' locks


class Shards:
  """Tracks finished items in a folder that several processes may share."""

  def __init__(self, folder: str | os.PathLike, ids: Sequence[str], size: int):
    """Opens the folder, and creates it if it does not exist.

    Args:
      folder: of the shards.
      ids: distinct ids of the items; the same at every start.
      size: items per shard; the same at every start.

    Raises:
      ValueError: a duplicate id, or a size below 1.
    """
    if size < 1:
      raise ValueError(
        f"A shard needs at least 1 item, got {size}. Raise "
        "config.synthesis.batch."
      )
    if len(set(ids)) < len(ids):
      twice = next(one for one in ids if ids.count(one) > 1)
      raise ValueError(
        f"Item id {twice!r} occurs twice; ids must be distinct, since they "
        "mark finished items. Change the ids of the tasks."
      )
    self._folder, self._ids, self.size = pathlib.Path(folder), list(ids), size
    self._folder.mkdir(parents=True, exist_ok=True)
    self._finished: set[int] = set()

  def __len__(self) -> int:
    return -(-len(self._ids) // self.size)

  def num_missing(self) -> int:
    """Number of items without a trace, over all shards."""
    return sum(len(self.missing(index)) for index in range(len(self)))

  def missing(self, index: int) -> list[int]:
    """The items of a shard that have no trace yet."""
    if index in self._finished:
      return []
    found = self._found(index)
    left = [i for i in self._items(index) if self._ids[i] not in found]
    if not left:
      self._finished.add(index)
    return left

  def work(
    self, local: Collection[int], wait: Callable[[], None] = lambda: None
  ) -> Iterator[tuple[int, list[int]]]:
    """Claims shards that lack items, one at a time, until no shard does.

    Shards of other processes come last: this waits for them, and claims a shard
    if its process dies.

    Args:
      local: the shards to claim here; this waits until the others are finished.
      wait: called repeatedly while waiting; may raise to stop.

    Yields:
      A shard and its missing items; `add` them before taking the next shard.
    """
    left = [i for i in range(len(self)) if self.missing(i)]
    while left:
      for index in left:
        with self._claim(index, local) as claimed:
          items = self.missing(index)  # another process may have finished it
          if claimed and items:
            self._rewrite(index)
            yield index, items
            self._rewrite(index)
      before, left = len(left), [i for i in left if self.missing(i)]
      if len(left) == before:
        wait()
        time.sleep(_POLL)

  def add(self, index: int, trace: traces.Trace) -> None:
    """Appends a trace to a shard that this process has claimed.

    Raises:
      OSError: the file cannot be written.
      ValueError: the trace is not an item of the shard, or `traces.to_line`
        refuses it.
    """
    wanted = [self._ids[i] for i in self._items(index)]
    if trace.id not in wanted:
      raise ValueError(
        f"Shard {index} holds items {wanted[0]!r} to {wanted[-1]!r}, and "
        f"{trace.id!r} is not one of them."
      )
    line = traces.to_line(trace)
    with (
      _explain_errors(self._path(index)),
      open(self._path(index), "a", encoding="utf-8", newline="\n") as file,
    ):
      file.write(line)

  def _rewrite(self, index: int) -> None:
    """Rewrites a shard in item order and syncs it; drops truncated lines."""
    found, path = self._found(index), self._path(index)
    wanted = [self._ids[i] for i in self._items(index)]
    lines = [traces.to_line(found[name]) for name in wanted if name in found]
    with _explain_errors(path):
      atomic_file.write(path, "".join(lines), newline="\n")
      traces.sync(self._folder)

  def read(self) -> Iterator[traces.Trace]:
    """Yields every trace in item order, with one shard in memory at a time.

    Raises:
      ValueError: an item has no trace.
    """
    for index in range(len(self)):
      found = self._found(index)
      for item in self._items(index):
        if self._ids[item] not in found:
          raise ValueError(
            f"{self._path(index)} lacks item {self._ids[item]!r}. Run the "
            "same command again to compute it."
          )
        yield found[self._ids[item]]

  def _items(self, index: int) -> range:
    start = index * self.size
    return range(start, min(start + self.size, len(self._ids)))

  def _path(self, index: int) -> pathlib.Path:
    return self._folder / f"{index * self.size:08d}.jsonl"

  def _claim(
    self, index: int, local: Collection[int]
  ) -> contextlib.AbstractContextManager[bool]:
    if index not in local:
      return contextlib.nullcontext(False)
    return file_lock.claim(self._path(index).with_suffix(".lock"))

  def _found(self, index: int) -> dict[str, traces.Trace]:
    """Reads a shard's traces by id; truncated lines are ignored."""
    path = self._path(index)
    out: dict[str, traces.Trace] = {}
    wanted = {self._ids[i] for i in self._items(index)}
    if not path.exists():
      return out
    with open(path, "rb") as file:
      for line in file:
        try:
          trace = traces.from_line(str(path), line.decode())
        except ValueError:  # truncated; the item is computed again
          continue
        if trace.id in wanted:
          out[trace.id] = trace
    return out


@contextlib.contextmanager
def _explain_errors(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise OSError(
      f"{path} cannot be written ({error}). Finished traces are kept. Free "
      "disk space or fix the permissions, and run the same command again."
    ) from error
