"""What processes tell one another on the host: shares of work, then results.

Work on the host (reading files, tokenising, asking a judge) is split: each
process does its own share and all learn the whole, so that it is done once and
all go on with the same numbers. With one process nothing is sent.

Every process must call these functions in the same order.
"""

import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_Item = TypeVar("_Item")
_LENGTH_BYTES = 8


def shard_range(count: int, index: int, parts: int) -> range:
  """The `index`th of `parts` runs of 0 .. count - 1, alike to one in length."""
  return range(count * index // parts, count * (index + 1) // parts)


def local_range(count: int) -> range:
  """This process's share of `count` items, in order."""
  return shard_range(count, jax.process_index(), jax.process_count())


def gather(mine: bytes) -> list[bytes]:
  """What every process brings, in the order of the processes."""
  if jax.process_count() == 1:
    return [mine]
  sizes = multihost_utils.process_allgather(
    np.frombuffer(len(mine).to_bytes(_LENGTH_BYTES, "little"), np.uint8)
  )
  sizes = [int.from_bytes(row.tobytes(), "little") for row in np.asarray(sizes)]
  padded = np.zeros(max(1, *sizes), np.uint8)
  padded[: len(mine)] = np.frombuffer(mine, np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [row[:size].tobytes() for row, size in zip(rows, sizes)]


def map_across_processes(
  items: Sequence[_Item], work: Callable[[Sequence[_Item]], Sequence[Any]]
) -> list[Any]:
  """`work(items)`, each process working on its own share.

  Args:
    items: the same on every process.
    work: a list of one JSON value for each of the items it is given; it is
      not called without items. Python writes floats to JSON exactly.

  Returns:
    One value for each item, in order, on every process.

  Raises:
    RuntimeError: some process's work raised; with one process, its own error.
  """
  mine = [items[i] for i in local_range(len(items))]
  if jax.process_count() == 1:
    return list(work(mine)) if mine else []
  # What it raises is told to all, who else would wait for ever.
  with futures.ThreadPoolExecutor(1) as pool:
    done = pool.submit(lambda: list(work(mine)) if mine else [])
  raised = done.exception()
  if raised is None:
    told: dict[str, Any] = {"values": done.result()}
  else:
    told = {"error": f"{type(raised).__name__}: {raised}"}
  heard = [json.loads(one) for one in gather(json.dumps(told).encode())]
  if raised is not None:
    raise raised
  for index, one in enumerate(heard):
    if "error" in one:
      raise RuntimeError(f"Process {index} of the run: {one['error']}")
  return [value for one in heard for value in one["values"]]


def check_same(values: Mapping[str, np.ndarray], message: str) -> None:
  """Refuses values that differ between processes, bit for bit.

  Args:
    values: arrays by name, of equal shape on every process.
    message: of the error, without its full stop.

  Raises:
    RuntimeError: on every process alike; names the first array that differs.
  """
  if jax.process_count() == 1:
    return
  mine = {
    name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    for name, value in values.items()
  }
  heard = [json.loads(one) for one in gather(json.dumps(mine).encode())]
  for name in sorted(set().union(*heard)):
    if len({one.get(name) for one in heard}) > 1:
      raise RuntimeError(f"{message}: {name!r} differs.")


def read_file(path: str | os.PathLike) -> bytes:
  """A file's bytes; each process reads its own part of it, and no more.

  Raises:
    OSError: it cannot be read.
  """
  path = pathlib.Path(path)
  mine = local_range(path.stat().st_size)
  with open(path, "rb") as file:
    file.seek(mine.start)
    return b"".join(gather(file.read(len(mine))))


def on_main_process(work: Callable[[], Any]) -> Any:
  """What `work` returns on process 0, on every process; all must call it.

  Args:
    work: what one process alone may do, such as writing; gives a JSON value.
      The others only wait for it.

  Raises:
    RuntimeError: it raised; process 0 raises the error itself.
    SystemExit: it left, and so all leave, with its code.
  """
  if jax.process_count() == 1:
    return work()
  told: dict[str, Any] = {}
  if jax.process_index() == 0:
    try:
      told["value"] = work()
    except SystemExit as left:
      told["code"] = left.code
      raise
    finally:
      error = sys.exception()
      if error is not None and "code" not in told:
        told["error"] = f"{type(error).__name__}: {error}"
      gather(json.dumps(told).encode())
    return told["value"]
  told = json.loads(gather(b"")[0])
  if "code" in told:
    raise SystemExit(told["code"])
  if "error" in told:
    raise RuntimeError(f"Process 0 of the run: {told['error']}")
  return told["value"]
