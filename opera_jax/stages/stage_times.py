"""How long each stage of a run took: compiling, waiting, in all.

The run prints the table when it ends, and leaves it with every program's name
in `timing.json` of its folder.
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
SETUP = "set-up"  # imports, tasks, tokenizer: all before the first stage


@dataclasses.dataclass(frozen=True)
class StageTime:
  """What one stage of one run took; seconds of the wall."""

  name: str
  seconds: float  # in all
  compiling: float  # of which some thread traced, lowered or compiled
  waiting: float  # of which the main thread waited, see `sharding.clock`
  programs: int  # compiled, or read from the persistent cache
  # (name, times compiled, seconds of all its phases), the dearest first.
  dearest: tuple[tuple[str, int, float], ...]


class StageTimes:
  """Takes the time of one stage after the other."""

  def __init__(self, began: float):
    """The first stage is set-up, which began at that `time.time()`."""
    self._spans = compile_log.spans()
    self._name, self._start, self._waited = SETUP, began, 0.0
    self._done: list[StageTime] = []

  def enter(self, name: str) -> None:
    """The stage before ends here, and this one begins."""
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
    """Ends the last stage; writes the file and prints the table."""
    self.enter("")
    if runtime.is_main_process():
      lines = [dataclasses.asdict(stage) for stage in self._done]
      text = json.dumps({"stages": lines}, indent=1)
      atomic_file.write(pathlib.Path(folder) / FILE, text)
      print(table(self._done), flush=True)
    return self._done


def read(folder: str | os.PathLike) -> list[StageTime]:
  """What `StageTimes.finish` has left in a run's folder.

  Raises:
    FileNotFoundError: no run has ended there.
  """
  text = (pathlib.Path(folder) / FILE).read_text()
  return [_stage(line) for line in json.loads(text)["stages"]]


def _stage(line: dict[str, Any]) -> StageTime:
  dearest = tuple((n, count, s) for n, count, s in line["dearest"])
  return StageTime(**line | {"dearest": dearest})


def table(stages: list[StageTime]) -> str:
  """The table as text, with a line of sums."""
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
