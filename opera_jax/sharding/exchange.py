"""Splits host work over processes, and gathers or broadcasts results.

Host work (reading files, tokenising, asking a judge) is sharded over the
processes, and the results are gathered on all of them: each item is processed
once, and all processes continue with the same values. With one process nothing
is sent.

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


def shard_range(count: int, index: int, num_shards: int) -> range:
  """Shard `index` of range(count) in `num_shards` contiguous shards, whose
  lengths differ by at most one."""
  return range(count * index // num_shards, count * (index + 1) // num_shards)


def local_range(count: int) -> range:
  """The contiguous shard of range(count) that belongs to this process."""
  return shard_range(count, jax.process_index(), jax.process_count())


def gather(mine: bytes) -> list[bytes]:
  """Gathers the bytes of every process, in the order of the processes."""
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
  """Computes `work(items)`; each process works on its shard of the items.

  Args:
    items: the same on every process.
    work: maps items to a list of one JSON value per item; it is not called
      without items. Floats survive JSON exactly.

  Returns:
    One value for each item, in order, on every process.

  Raises:
    RuntimeError: `work` raised on some process; the process itself raises the
      original error.
  """
  mine = [items[i] for i in local_range(len(items))]
  if jax.process_count() == 1:
    return list(work(mine)) if mine else []
  # An error must reach all processes, or they would wait for ever.
  with futures.ThreadPoolExecutor(1) as pool:
    done = pool.submit(lambda: list(work(mine)) if mine else [])
  raised = done.exception()
  if raised is None:
    reply: dict[str, Any] = {"values": done.result()}
  else:
    reply = {"error": f"{type(raised).__name__}: {raised}"}
  replies = [json.loads(one) for one in gather(json.dumps(reply).encode())]
  if raised is not None:
    raise raised
  for index, one in enumerate(replies):
    if "error" in one:
      raise RuntimeError(f"Process {index} of the run: {one['error']}")
  return [value for one in replies for value in one["values"]]


def check_same(values: Mapping[str, np.ndarray], message: str) -> None:
  """Raises an error if values differ between processes, bit for bit.

  Args:
    values: arrays by name, with the same shapes on every process.
    message: of the error, without a final full stop.

  Raises:
    RuntimeError: on every process; names the first array that differs.
  """
  if jax.process_count() == 1:
    return
  mine = {
    name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    for name, value in values.items()
  }
  replies = [json.loads(one) for one in gather(json.dumps(mine).encode())]
  for name in sorted(set().union(*replies)):
    if len({one.get(name) for one in replies}) > 1:
      raise RuntimeError(f"{message}: {name!r} differs.")


def read_file(path: str | os.PathLike) -> bytes:
  """Reads a file: each process reads its shard of the bytes, and all gather
  them.

  Raises:
    OSError: it cannot be read.
  """
  path = pathlib.Path(path)
  mine = local_range(path.stat().st_size)
  with open(path, "rb") as file:
    file.seek(mine.start)
    return b"".join(gather(file.read(len(mine))))


def on_main_process(work: Callable[[], Any]) -> Any:
  """Runs `work` on process 0 and broadcasts its result; all processes must call
  this.

  Args:
    work: something that only one process may do, such as writing a file;
      returns a JSON value. The other processes wait.

  Raises:
    RuntimeError: `work` raised; process 0 raises the original error.
    SystemExit: `work` exited; all processes exit with its code.
  """
  if jax.process_count() == 1:
    return work()
  reply: dict[str, Any] = {}
  if jax.process_index() == 0:
    try:
      reply["value"] = work()
    except SystemExit as left:
      reply["code"] = left.code
      raise
    finally:
      error = sys.exception()
      if error is not None and "code" not in reply:
        reply["error"] = f"{type(error).__name__}: {error}"
      gather(json.dumps(reply).encode())
    return reply["value"]
  reply = json.loads(gather(b"")[0])
  if "code" in reply:
    raise SystemExit(reply["code"])
  if "error" in reply:
    raise RuntimeError(f"Process 0 of the run: {reply['error']}")
  return reply["value"]
