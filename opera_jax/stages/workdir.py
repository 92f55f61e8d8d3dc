"""The run's folder: which stages are finished, and with which settings."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from opera_jax.sharding import runtime
from opera_jax.stages import claims


def make(folder: str | os.PathLike) -> pathlib.Path:
  """Makes the run's folder, and makes sure that it can be written.

  Raises:
    OSError: it cannot.
  """
  folder = pathlib.Path(folder)
  probe = folder / f".probe-{os.getpid()}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise OSError(
      f"--workdir={folder} cannot be written ({error}); everything that a run "
      "leaves goes there. Name another folder, or give the rights to this one."
    ) from error
  return folder


class Stage:
  """One stage's folder `<workdir>/<name>`, with a mark when it is finished.

  The mark holds the settings that the stage ran with. A finished stage is not
  repeated, and a changed setting is an error rather than a silent mixture.
  """

  def __init__(
    self, workdir: str | os.PathLike, name: str, settings: Mapping[str, Any]
  ):
    """Opens the folder, making it if need be.

    Args:
      workdir: folder of the run.
      name: of the stage.
      settings: what the stage's outcome depends on; JSON values.

    Raises:
      ValueError: the stage was begun with other settings.
    """
    self.name = name
    self.path = pathlib.Path(workdir) / name
    self.path.mkdir(parents=True, exist_ok=True)
    self._settings = _flat(json.loads(json.dumps(settings)))
    begun = self.path / "SETTINGS.json"
    if begun.exists():
      before = json.loads(begun.read_text())
      names = sorted(before.keys() | self._settings.keys())
      changed = [
        f"{n}: {before.get(n, 'none')!r} then, "
        f"{self._settings.get(n, 'none')!r} now"
        for n in names
        if before.get(n) != self._settings.get(n)
      ]
      if changed:
        raise ValueError(
          f"Stage {name} in {self.path} was begun with other settings: "
          f"{'; '.join(changed)}. Use a new --workdir, or delete that "
          "folder and those of the stages after it."
        )
    else:
      self._write("SETTINGS.json", self._settings)

  def finished(self) -> bool:
    """Whether `finish` was called, in this run or an earlier one."""
    return (self.path / "DONE.json").exists()

  @contextlib.contextmanager
  def alone(self) -> Iterator[None]:
    """Keeps other runs on the same folder out of the stage; waits for them.

    Ask `finished` inside: another run may have done the stage meanwhile.
    """
    with contextlib.ExitStack() as stack:
      if runtime.lead():
        lock = self.path / "stage.lock"
        if not stack.enter_context(claims.claim(lock)):
          print(
            f"{self.name}: another process is at it in {self.path}; waiting.",
            flush=True,
          )
          stack.enter_context(claims.claim(lock, wait=True))
      runtime.barrier(f"{self.name} held")
      yield

  def finish(self, result: Mapping[str, Any]) -> None:
    """Marks the stage finished; returns when every process is done with it."""
    self._write("DONE.json", dict(result))
    runtime.barrier(f"{self.name} finished")

  def _write(self, name: str, value: Any) -> None:
    if runtime.lead():
      partial = self.path / f"{name}.{os.getpid()}.tmp"
      partial.write_text(json.dumps(value, indent=1))
      partial.replace(self.path / name)


def result(workdir: str | os.PathLike, name: str) -> dict[str, Any]:
  """What a finished stage reported; {} if it has not finished."""
  mark = pathlib.Path(workdir) / name / "DONE.json"
  return json.loads(mark.read_text()) if mark.exists() else {}


def settings(workdir: str | os.PathLike, name: str) -> dict[str, Any]:
  """What a stage was begun with, by dotted name; {} if it was not."""
  begun = pathlib.Path(workdir) / name / "SETTINGS.json"
  return json.loads(begun.read_text()) if begun.exists() else {}


def parse_stages(text: str, known: tuple[str, ...]) -> set[str]:
  """The stages that a comma-separated list names.

  Raises:
    ValueError: an unknown stage, or none.
  """
  chosen = {name.strip() for name in text.split(",") if name.strip()}
  unknown = sorted(chosen - set(known))
  if unknown or not chosen:
    raise ValueError(
      f"config.stages={text!r} names {unknown or 'no stage'}; choose among "
      f"{','.join(known)}."
    )
  return chosen


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {prefix: tree}
  out = {}
  for name, value in tree.items():
    out |= _flat(value, f"{prefix}.{name}" if prefix else name)
  return out
