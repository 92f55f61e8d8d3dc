"""Experiment trackers that metrics go to beside the JSONL file.

`config.log` names them. The libraries of "wandb" and "trackio" are optional and
imported only when named. A tracker gets each step once: the identity of its run
and the last step that it was given lie beside the metrics, so that a resumed
run goes on with the same run there and repeats nothing. Nothing but numbers
goes there, no settings and no texts.
"""

import importlib
import importlib.util
import json
import os
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from opera_jax import atomic_file

NAMES = ("jsonl", "tensorboard", "wandb", "trackio")
_LIBRARIES = ("wandb", "trackio")
_PROJECT = "opera_jax"


def parse(log: str) -> tuple[str, ...]:
  """The names in `config.log`, as in "jsonl,tensorboard".

  Raises:
    ValueError: an unknown name, one twice, no "jsonl", or a library that is not
      installed.
  """
  names = tuple(name.strip() for name in log.split(","))
  wrong = sorted(set(names) - set(NAMES))
  if wrong or len(set(names)) < len(names) or "jsonl" not in names:
    raise ValueError(
      f"config.log is {log!r}; it names some of {', '.join(NAMES)}, each once, "
      "separated by commas, and jsonl always, which the report and resumed "
      "runs read"
    )
  for name in (n for n in names if n in _LIBRARIES):
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f"config.log is {log!r}; {name} is not installed: run `pip install "
        f"{name}`, or leave it out"
      )
  return names


class Trackers:
  """The runs of one stage in the named libraries; on one process only."""

  def __init__(
    self,
    names: Sequence[str],
    folder: pathlib.Path,
    stage: str,
    *,
    resumed: bool,
  ):
    """Starts a run in every library, or goes on with the one that there is.

    Args:
      names: of `config.log`; only libraries count here.
      folder: of the stage; keeps which runs these are.
      stage: the stage.
      resumed: False starts new runs.
    """
    self._mark = folder / "trackers.json"
    marks = json.loads(self._mark.read_bytes()) if self._known(resumed) else {}
    self._marks: dict[str, dict[str, Any]] = {}
    self._runs: dict[str, Any] = {}
    for name in names:
      if name not in _LIBRARIES:
        continue
      known = name in marks
      mark = marks.get(name, {"id": f"{stage}-{secrets.token_hex(4)}"})
      self._marks[name] = {"step": -1} | mark
      library = importlib.import_module(name)
      self._runs[name] = _start(name, library, mark["id"], folder, resume=known)
    self._keep()

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Sends a step's numbers to the trackers that do not have the step."""
    due = [n for n, mark in self._marks.items() if mark["step"] < step]
    for name in due:
      self._marks[name]["step"] = step
    # Noted first: a kill in between loses a step there, and repeats none.
    if due:
      self._keep()
    for name in due:
      self._runs[name].log(dict(values), step=step)

  def close(self) -> None:
    """Ends the runs."""
    for run in self._runs.values():
      run.finish()

  def _known(self, resumed: bool) -> bool:
    return resumed and self._mark.exists()

  def _keep(self) -> None:
    if self._marks:
      atomic_file.write(self._mark, json.dumps(self._marks))


def _start(
  name: str, library: Any, run: str, folder: pathlib.Path, *, resume: bool
) -> Any:
  """Starts a run, or resumes it; an object with `log` and `finish`."""
  if name == "wandb":
    return library.init(
      project=os.environ.get("WANDB_PROJECT", _PROJECT),
      id=run,
      name=f"{folder.resolve().parent.name}/{run}",
      dir=str(folder),
      resume="allow",
    )
  library.init(
    project=_PROJECT,
    name=f"{folder.resolve().parent.name}/{run}",
    resume="must" if resume else "never",
  )
  return library
