"""Logs metrics to JSONL, TensorBoard and experiment trackers.

Metric names look like "reward/mean"; docs/metrics.md lists all of them with
their names in TRL and verl. `opera_jax.clock_metrics` lists those that depend
on the clock and so differ between identical runs.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax import atomic_file
from opera_jax.sharding import runtime
from opera_jax.train import trackers

# Texts that a step shows in TensorBoard, and the characters of each.
_TEXTS, _CHARACTERS = 3, 4_000


class Metrics:
  """One stage's metrics: `<workdir>/<name>.jsonl`, one object per step."""

  def __init__(
    self,
    workdir: str | os.PathLike,
    name: str,
    *,
    last_step: int | None = None,
    log: Sequence[str] = ("jsonl", "tensorboard"),
  ):
    """Opens the files for appending, on process 0 only.

    Args:
      workdir: folder of the run; TensorBoard's files go to
        `<workdir>/tensorboard/<name>`.
      name: the stage.
      last_step: the step that was restored. Later lines and a truncated last
        line are dropped, since those steps run again. None drops all lines: the
        stage starts over.
      log: where metrics go, see `trackers.parse`.
    """
    workdir = pathlib.Path(workdir)
    self.path = workdir / f"{name}.jsonl"
    self._file: Any = None  # process 0 only
    self._board: Any = None
    self._trackers: trackers.Trackers | None = None
    if not runtime.is_main_process():
      return
    workdir.mkdir(parents=True, exist_ok=True)
    _truncate(self.path, last_step)
    self._file = self.path.open("a", encoding="utf-8")
    self._trackers = trackers.Trackers(
      log, workdir, workdir.name, resumed=last_step is not None
    )
    if "tensorboard" not in log:
      return
    import tensorboardX  # imports torch where that is installed

    self._board = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard" / name),
      purge_step=0 if last_step is None else last_step + 1,
    )

  def write(
    self,
    step: int,
    values: Mapping[str, Any],
    *,
    histograms: Mapping[str, np.ndarray] | None = None,
    texts: Sequence[str] = (),
  ) -> None:
    """Appends one line; blocks until arrays of one element are ready.

    Args:
      step: number of finished steps.
      values: scalars by name; one that is not finite is written as null.
      histograms: values by name, for TensorBoard.
      texts: untrusted plain texts, of which TensorBoard gets the first few.

    Raises:
      ValueError: a value is not a scalar.
    """
    scalars = {name: _scalar(name, value) for name, value in values.items()}
    line = {"step": int(step)} | {
      name: value if math.isfinite(value) else None
      for name, value in scalars.items()
    }
    if self._file is None:
      return
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    assert self._trackers is not None
    self._trackers.log(
      int(step), {n: v for n, v in scalars.items() if math.isfinite(v)}
    )
    if self._board is None:
      return
    for name, value in scalars.items():
      self._board.add_scalar(name, value, int(step))
    for name, array in (histograms or {}).items():
      self._board.add_histogram(name, np.asarray(array).reshape(-1), int(step))
    for at, text in enumerate(texts[:_TEXTS]):
      # Indented, so that its Markdown shows the text as it is.
      shown = "\n".join(
        f"    {line}" for line in text[:_CHARACTERS].split("\n")
      )
      self._board.add_text(f"samples/{at}", shown, int(step))

  def close(self) -> None:
    """Flushes and closes the files, and ends the trackers' runs."""
    if self._file is None:
      return
    assert self._trackers is not None
    self._file.close()
    self._trackers.close()
    if self._board is not None:
      self._board.close()


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads the lines of a metrics file, oldest first; [] if there is no file.

  A truncated last line is ignored.

  Raises:
    ValueError: a line is not a line of metrics.
    OSError: the file cannot be read.
  """
  return [line for _, line in _lines(pathlib.Path(path))]


def _scalar(name: str, value: Any) -> float:
  if getattr(value, "size", 1) != 1:
    raise ValueError(
      f"Metric {name!r} has shape {value.shape}; a metric is one number. Take "
      "its mean first."
    )
  return float(value)


def _truncate(path: pathlib.Path, last_step: int | None) -> None:
  """Keeps complete lines up to `last_step`; replaces the file atomically."""
  if not os.path.lexists(path):
    return
  kept = []
  if last_step is not None:
    for text, line in _lines(path):
      if line["step"] > last_step:
        break
      kept.append(text)
  atomic_file.write(path, "".join(kept))


def _lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields each line of a metrics file, as text and parsed."""
  if not os.path.lexists(path):
    return
  try:
    content = path.read_bytes()
  except OSError as error:
    raise OSError(
      f"{path} cannot be read ({error}). Fix its permissions, or move it away: "
      "the run continues without its numbers."
    ) from error
  for number, raw in enumerate(content.splitlines(keepends=True), start=1):
    if not raw.endswith(b"\n"):
      return  # truncated by a kill
    try:
      text = raw.decode()
      line = json.loads(text)
      step = line["step"]
      if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f"its step is {step!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise ValueError(
        f"{path}:{number}: {raw[:60]!r} is not a line of metrics ({error}). "
        "Fix or drop the line and run the same command again."
      ) from error
    yield text, line
