"""Intermediate results of a stage, one file a piece, so that it can resume.

A piece is a JSON value that is made once; a stage that is ended goes on with
the next. Pieces are the same whenever the stage is begun, so that what comes
out does not depend on where it was ended.
"""

import json
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from opera_jax import structs
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import exchange, runtime

TOGETHER = 64  # prompts of a piece


def blocks(count: int) -> Iterator[range]:
  """The pieces of `count` prompts, by index."""
  for start in range(0, count, TOGETHER):
    yield range(start, min(start + TOGETHER, count))


def block(items: Sequence[Any], indices: range) -> list[Any]:
  """The items of a piece."""
  return [items[i] for i in indices]


class Pieces:
  """The pieces of one stage."""

  def __init__(self, folder: pathlib.Path):
    """Opens the folder, making it if need be."""
    self._folder = folder
    if runtime.is_main_process():
      folder.mkdir(parents=True, exist_ok=True)

  def get(self, name: str, make: Callable[[], Any]) -> Any:
    """A piece, made by all processes together where it is not there.

    Args:
      name: of the piece, which is its file's.
      make: gives a JSON value, the same on every process. Floats come back
        bit for bit.
    """
    path = self._folder / f"{name}.json"
    found = exchange.by_lead(lambda: _read(path))
    if found is not None:
      return found["piece"]
    made = make()
    if runtime.is_main_process():
      workdir_lib.write(path, {"piece": made})
    return made


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """A piece; None where there is none, or a damaged one."""
  if not path.exists() and not path.is_symlink():
    return None
  try:
    if path.is_symlink() or not path.is_file():
      raise ValueError("it is no plain file")
    value = json.loads(path.read_bytes().decode())
    if not isinstance(value, dict) or "piece" not in value:
      raise ValueError("it holds no piece")
    return value
  except (ValueError, OSError, RecursionError) as error:
    warnings.warn(
      f"Ignoring {path} ({error}); what it held is made again.",
      RuntimeWarning,
      stacklevel=4,
    )
    return None


def samples_out(groups: Sequence[Sequence[structs.Sample]]) -> list[list[Any]]:
  """Samples as a JSON value."""
  return [
    [
      [
        s.tokens.tolist(),
        [float(x) for x in s.logprob],
        bool(s.finished),
        s.reason,
        None
        if s.truncated_logprob is None
        else [float(x) for x in s.truncated_logprob],
      ]
      for s in group
    ]
    for group in groups
  ]


def samples_in(value: list[list[Any]]) -> list[list[structs.Sample]]:
  """What `samples_out` made, bit for bit."""
  return [
    [
      structs.Sample(
        tokens=np.asarray(tokens, np.int32),
        logprob=np.asarray(logprob, np.float32),
        finished=finished,
        reason=reason,
        truncated_logprob=None
        if truncated is None
        else np.asarray(truncated, np.float32),
      )
      for tokens, logprob, finished, reason, truncated in group
    ]
    for group in value
  ]
