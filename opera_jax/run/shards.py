"""The shards of a long synthesis: JSONL files that survive a kill.

Shard i holds the traces of items [i * size, (i + 1) * size), a JSONL file to
which a line is added as each item ends; when all have, it is put in order. What
a file lacks, after a crash or a kill, is made again, item by item.
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
  """Which items are done, in a folder that several processes may share."""

  def __init__(self, folder: str | os.PathLike, ids: Sequence[str], size: int):
    """Opens the folder, making it if need be.

    Args:
      folder: of the shards.
      ids: of the items, distinct; the same at every start.
      size: items of a shard, likewise.

    Raises:
      ValueError: an id twice, or no item a shard.
    """
    if size < 1:
      raise ValueError(
        f"A shard needs at least 1 item, got {size}. Raise "
        "config.synthesis.batch."
      )
    if len(set(ids)) < len(ids):
      twice = next(one for one in ids if ids.count(one) > 1)
      raise ValueError(
        f"Item id {twice!r} is given twice; ids must be distinct, for they say "
        "what is done. Change the ids of the tasks."
      )
    self._folder, self._ids, self.size = pathlib.Path(folder), list(ids), size
    self._folder.mkdir(parents=True, exist_ok=True)
    self._whole: set[int] = set()

  def __len__(self) -> int:
    return -(-len(self._ids) // self.size)

  def lacking(self) -> int:
    """How many items have no trace yet, in all."""
    return sum(len(self.missing(index)) for index in range(len(self)))

  def missing(self, index: int) -> list[int]:
    """The items of a shard that have no trace yet."""
    if index in self._whole:
      return []
    found = self._found(index)
    left = [i for i in self._items(index) if self._ids[i] not in found]
    if not left:
      self._whole.add(index)
    return left

  def work(
    self, own: Collection[int], wait: Callable[[], None] = lambda: None
  ) -> Iterator[tuple[int, list[int]]]:
    """Claims shards that lack items, one at a time, until no shard does.

    Where another process works on a shard, it is waited for at the end; if
    that process dies, the shard is claimed here.

    Args:
      own: the shards to claim; of the others the end is waited for.
      wait: called again and again meanwhile; what it raises ends the wait.

    Yields:
      A shard and the items that it lacks, which `add` is to add before the
      next is asked for.
    """
    left = [i for i in range(len(self)) if self.missing(i)]
    while left:
      for index in left:
        with self._claim(index, own) as held:
          items = self.missing(index)  # it may have been made meanwhile
          if held and items:
            self._mend(index)
            yield index, items
            self._mend(index)
      before, left = len(left), [i for i in left if self.missing(i)]
      if len(left) == before:
        wait()
        time.sleep(_POLL)

  def add(self, index: int, trace: traces.Trace) -> None:
    """Adds a trace to a shard; its claimant calls it.

    Raises:
      OSError: the disk is full, or the like.
      ValueError: a trace of no item of the shard, or one that
        `traces.to_line` refuses.
    """
    wanted = [self._ids[i] for i in self._items(index)]
    if trace.id not in wanted:
      raise ValueError(
        f"Shard {index} holds items {wanted[0]!r} to {wanted[-1]!r}, and "
        f"{trace.id!r} is none of them."
      )
    line = traces.to_line(trace)
    with (
      _explained(self._path(index)),
      open(self._path(index), "a", encoding="utf-8", newline="\n") as file,
    ):
      file.write(line)

  def _mend(self, index: int) -> None:
    """Puts a shard's whole lines in order, on the disk; drops what is none."""
    found, path = self._found(index), self._path(index)
    wanted = [self._ids[i] for i in self._items(index)]
    lines = [traces.to_line(found[name]) for name in wanted if name in found]
    with _explained(path):
      atomic_file.write(path, "".join(lines), newline="\n")
      traces.sync(self._folder)

  def read(self) -> Iterator[traces.Trace]:
    """Every trace, in the order of the items, one shard in memory at a time.

    Raises:
      ValueError: an item has none.
    """
    for index in range(len(self)):
      found = self._found(index)
      for item in self._items(index):
        if self._ids[item] not in found:
          raise ValueError(
            f"{self._path(index)} lacks item {self._ids[item]!r}; give the "
            "same command again, and it is made."
          )
        yield found[self._ids[item]]

  def _items(self, index: int) -> range:
    start = index * self.size
    return range(start, min(start + self.size, len(self._ids)))

  def _path(self, index: int) -> pathlib.Path:
    return self._folder / f"{index * self.size:08d}.jsonl"

  def _claim(self, index: int, own: Collection[int]):
    if index not in own:
      return contextlib.nullcontext(False)
    return file_lock.claim(self._path(index).with_suffix(".lock"))

  def _found(self, index: int) -> dict[str, traces.Trace]:
    """The traces of a shard's file by id; what is no whole line is not
    there."""
    path = self._path(index)
    out: dict[str, traces.Trace] = {}
    wanted = {self._ids[i] for i in self._items(index)}
    if not path.exists():
      return out
    with open(path, "rb") as file:
      for line in file:
        try:
          trace = traces.from_line(str(path), line.decode())
        except ValueError:  # cut short: made again
          continue
        if trace.id in wanted:
          out[trace.id] = trace
    return out


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise OSError(
      f"{path} cannot be written ({error}). What is done is kept: make room, "
      "or give the rights, and give the same command again."
    ) from error
