"""Records how long each stage took: in total, compiling, and waiting.

At its end the run prints a table, and writes it with the names of all programs
to `timing.json` in its folder.
"""

import dataclasses
import json
import os
import pathlib
import time
from typing import Any

from opera_jax import atomic_file
from opera_jax.sharding import clock, compile_log, runtime

FILE = "timing.json"
SETUP = "set-up"  # everything before the first stage: imports, tasks, tokenizer


@dataclasses.dataclass(frozen=True)
class StageTime:
  """The time of one stage of one run, in wall-clock seconds."""

  name: str
  seconds: float  # in total
  compiling: float  # during which some thread traced, lowered or compiled
  waiting: float  # during which the main thread waited, see `sharding.clock`
  programs: int  # compiled, or read from the persistent cache
  # (name, times compiled, seconds of all its phases), the slowest first.
  dearest: tuple[tuple[str, int, float], ...]


class StageTimes:
  """Times one stage after the other."""

  def __init__(self, began: float):
    """Starts with the set-up, which began at `time.time() == began`."""
    self._spans = compile_log.spans()
    self._name, self._start, self._waited = SETUP, began, 0.0
    self._done: list[StageTime] = []

  def enter(self, name: str) -> None:
    """Ends the current stage, and starts the next one."""
    now, waited = time.time(), clock.waited()
    mine = compile_log.between(self._spans, self._start, now)
    self._done.append(
      StageTime(
        name=self._name,
        seconds=now - self._start,
        compiling=compile_log.wall_seconds(mine),
        waiting=waited - self._waited,
        programs=compile_log.programs(mine),
        dearest=tuple(compile_log.by_program(mine)),
      )
    )
    self._name, self._start, self._waited = name, now, waited

  def finish(self, folder: str | os.PathLike) -> list[StageTime]:
    """Ends the last stage, writes the file, and prints the table."""
    self.enter("")
    if runtime.is_main_process():
      lines = [dataclasses.asdict(stage) for stage in self._done]
      text = json.dumps({"stages": lines}, indent=1)
      atomic_file.write(pathlib.Path(folder) / FILE, text)
      print(table(self._done), flush=True)
    return self._done


def read(folder: str | os.PathLike) -> list[StageTime]:
  """Reads what `StageTimes.finish` wrote in a run's folder.

  Raises:
    FileNotFoundError: no run has finished there.
  """
  text = (pathlib.Path(folder) / FILE).read_text()
  return [_stage(line) for line in json.loads(text)["stages"]]


def _stage(line: dict[str, Any]) -> StageTime:
  dearest = tuple((n, count, s) for n, count, s in line["dearest"])
  return StageTime(**line | {"dearest": dearest})


def table(stages: list[StageTime]) -> str:
  """Formats the table as text, with a line of totals."""
  header = ("stage", "seconds", "compiling", "waiting", "programs")
  rows = [
    (s.name, s.seconds, s.compiling, s.waiting, s.programs) for s in stages
  ]
  columns = list(zip(*(row[1:] for row in rows), strict=True))
  rows.append(("in all", *(sum(column) for column in columns)))
  width = max(len(row[0]) for row in (header, *rows))
  lines = [f"{header[0]:<{width}}" + "".join(f"{h:>11}" for h in header[1:])]
  lines += [
    f"{name:<{width}}{total:>11.1f}{compiling:>11.1f}{waiting:>11.1f}{count:>11}"
    for name, total, compiling, waiting, count in rows
  ]
  return "\n".join(lines)
