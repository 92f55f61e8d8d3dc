"""Partial results of a stage, one JSON file each, so that the stage can resume.
Each result is computed once; a killed stage continues with the next one. The
split into results is fixed, so the outcome of a stage does not depend on where
it was interrupted.
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

PROMPTS_PER_BLOCK = 64


def blocks(count: int) -> Iterator[range]:
  """Splits `count` prompts into ranges of at most PROMPTS_PER_BLOCK indices."""
  for start in range(0, count, PROMPTS_PER_BLOCK):
    yield range(start, min(start + PROMPTS_PER_BLOCK, count))


def take(items: Sequence[Any], indices: range) -> list[Any]:
  """The items at the indices of a block."""
  return [items[i] for i in indices]


class PartialResults:
  """The partial results of one stage."""

  def __init__(
    self, folder: pathlib.Path, begin: Callable[[], None] = lambda: None
  ):
    """Opens the folder, and creates it if it does not exist.

    Args:
      folder: of the results.
      begin: called by all processes before a result is written, such as
        `workdir.Stage.begin`.
    """
    self._folder, self._begin = folder, begin
    if runtime.is_main_process():
      folder.mkdir(parents=True, exist_ok=True)

  def get(self, name: str, compute: Callable[[], Any]) -> Any:
    """Reads a result, or computes it on all processes if its file is missing.

    Args:
      name: of the result and of its file.
      compute: returns a JSON value, the same on every process. Floats are
        restored bit for bit.
    """
    path = self._folder / f"{name}.json"
    found = exchange.on_main_process(lambda: _read(path))
    if found is not None:
      return found["piece"]
    value = compute()
    self._begin()
    if runtime.is_main_process():
      workdir_lib.write(path, {"piece": value})
    return value


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads a result; None if the file is missing or damaged."""
  if not path.exists() and not path.is_symlink():
    return None
  try:
    if path.is_symlink() or not path.is_file():
      raise ValueError("it is not a regular file")
    value = json.loads(path.read_bytes().decode())
    if not isinstance(value, dict) or "piece" not in value:
      raise ValueError("it has no field 'piece'")
    return value
  except (ValueError, OSError, RecursionError) as error:
    warnings.warn(
      f"Ignoring {path} ({error}); its result is computed again.",
      RuntimeWarning,
      stacklevel=4,
    )
    return None


def samples_to_json(
  groups: Sequence[Sequence[structs.Sample]],
) -> list[list[Any]]:
  """Converts samples to a JSON value."""
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


def samples_from_json(value: list[list[Any]]) -> list[list[structs.Sample]]:
  """Restores what `samples_to_json` wrote, bit for bit."""
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
