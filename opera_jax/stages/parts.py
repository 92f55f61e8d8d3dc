"""The parts of a long synthesis: files that appear whole, and are found again.

Part i holds the traces of items [i * size, (i + 1) * size), a JSONL file that
takes its name when all of it is on the disk. What a file lacks all the same,
cut short by whatever means, is missing, item by item.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Collection, Iterator, Sequence

from opera_jax.data import traces
from opera_jax.stages import claims

_POLL = 1.0  # seconds between two looks at what others work on


class Parts:
  """Which items are done, in a folder that several processes may share."""

  def __init__(self, folder: str | os.PathLike, ids: Sequence[str], size: int):
    """Opens the folder, making it if need be.

    Args:
      folder: of the parts.
      ids: of the items, distinct; the same at every start.
      size: items of a part, likewise.

    Raises:
      ValueError: an id twice, or no item a part.
    """
    if size < 1:
      raise ValueError(
        f"A part needs at least 1 item, got {size}. Raise "
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

  @property
  def done(self) -> int:
    """Items of the parts that were seen to be whole."""
    return sum(len(self._items(index)) for index in self._whole)

  def missing(self, index: int) -> list[int]:
    """The items of a part that have no trace yet."""
    if index in self._whole:
      return []
    found = self._found(index)
    left = [i for i in self._items(index) if self._ids[i] not in found]
    if not left:
      self._whole.add(index)
    return left

  def work(self, own: Collection[int]) -> Iterator[tuple[int, list[int]]]:
    """Claims parts that lack items, one at a time, until no part does.

    Where another process works on a part, it is waited for at the end; if
    that process dies, the part is claimed here.

    Args:
      own: the parts to claim; of the others the end is waited for.

    Yields:
      A part and the items that it lacks, which `put` is to add before the
      next is asked for.
    """
    left = [i for i in range(len(self)) if self.missing(i)]
    while left:
      for index in left:
        with self._claim(index, own) as held:
          items = self.missing(index)  # it may have been made meanwhile
          if held and items:
            yield index, items
      before, left = len(left), [i for i in left if self.missing(i)]
      if len(left) == before:
        time.sleep(_POLL)

  def put(self, index: int, made: Sequence[traces.Trace]) -> None:
    """Adds traces to a part, all or none of them; its claimant calls it.

    Args:
      index: of the part.
      made: traces of items that it lacks.

    Raises:
      OSError: the disk is full, or the like.
      ValueError: a trace of no item of the part.
    """
    found = self._found(index) | {trace.id: trace for trace in made}
    wanted = [self._ids[i] for i in self._items(index)]
    if strange := sorted(found.keys() - set(wanted)):
      raise ValueError(
        f"Part {index} holds items {wanted[0]!r} to {wanted[-1]!r}, and "
        f"{strange[0]!r} is none of them."
      )
    lines = [traces.to_line(found[name]) for name in wanted if name in found]
    path = self._path(index)
    partial = path.with_suffix(".partial")
    try:
      partial.write_text("".join(lines), encoding="utf-8", newline="\n")
      traces.sync(partial)
      partial.replace(path)
      traces.sync(self._folder)
    except OSError as error:
      raise OSError(
        f"{path} cannot be written ({error}). The parts before it are kept: "
        "make room, or give the rights, and give the same command again."
      ) from error
    if len(lines) == len(wanted):
      self._whole.add(index)

  def read(self) -> Iterator[traces.Trace]:
    """Every trace, in the order of the items, one part in memory at a time."""
    for index in range(len(self)):
      yield from self._found(index).values()

  def _items(self, index: int) -> range:
    start = index * self.size
    return range(start, min(start + self.size, len(self._ids)))

  def _path(self, index: int) -> pathlib.Path:
    return self._folder / f"{index * self.size:08d}.jsonl"

  def _claim(self, index: int, own: Collection[int]):
    if index not in own:
      return contextlib.nullcontext(False)
    return claims.claim(self._path(index).with_suffix(".lock"))

  def _found(self, index: int) -> dict[str, traces.Trace]:
    """The traces of a part's file by id; what is no whole line is not there."""
    path, out = self._path(index), {}
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
