"""The run's folder: which stages are finished, and what each was made from.

A stage is a folder of the workdir:

    SETTINGS.json   the settings that its outcome depends on, and digests of
                    what it was made from: data, tokenizer, the stages before
    DONE.json       what it reports; it is finished
    stage.lock      held by whoever writes in it, and says who that is
"""

import contextlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opera_jax import atomic_file, file_lock
from opera_jax.sharding import exchange, runtime
from opera_jax.train import checkpoint

# Each is made from those before it; redoing one drops those after it.
ORDER = (
  "tokenizer",
  "base",
  "synthesize",
  "select",
  "sft",
  "select_rl",
  "rl",
  "evaluate",
)
DROPPED = "dropped"
_FORMAT = 2  # of SETTINGS.json
_LOCK, _BEGUN, _DONE, _REDO = (
  "stage.lock",
  "SETTINGS.json",
  "DONE.json",
  "REDO.json",
)
_BEGINNING = "SETTINGS.lock"
_STAYS = (_LOCK, _BEGINNING)  # where a stage's outcome is dropped

Inputs = Mapping[str, tuple[str, str] | None]


def make(folder: str | os.PathLike) -> pathlib.Path:
  """Makes the run's folder, and makes sure that it can be written.

  Raises:
    OSError: it cannot.
  """
  folder = pathlib.Path(folder)
  probe = folder / f".probe-{secrets.token_hex(8)}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe.touch(exist_ok=False)
    probe.unlink()
  except OSError as error:
    raise OSError(
      f"--workdir={folder} cannot be written ({error}); everything that a run "
      "leaves goes there. Name another folder, or give the rights to this one."
    ) from error
  return folder


@contextlib.contextmanager
def hold_lock(
  lock: pathlib.Path,
  name: str,
  preemption: checkpoint.Preemption | None = None,
) -> Iterator[None]:
  """Holds a lock file against other runs; waits until it is free.

  Args:
    lock: file.
    name: of the stage, for what is said.
    preemption: ends the wait, and the run after the block, once it was told.
  """
  with contextlib.ExitStack() as stack:
    told: list[str] = []

    def wait() -> None:
      if not told:
        told.append(file_lock.holder(lock))
        print(
          f"{name}: {told[0]} is at it in {lock.parent}; waiting.", flush=True
        )
      if preemption is not None:
        preemption.exit_if_requested_here()

    def take() -> None:
      stack.enter_context(file_lock.claim(lock, wait=wait))

    exchange.on_main_process(take)
    yield
    if preemption is not None:
      preemption.exit_if_requested()


class Stage:
  """One stage's folder `<workdir>/<name>`, with a mark when it is finished.

  What the stage was begun with and made from is recorded. A finished stage is
  not repeated, and a changed setting or input is an error rather than a silent
  mixture.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    name: str,
    settings: Mapping[str, Any],
    inputs: Inputs | None = None,
    *,
    redo: Sequence[str] = (),
  ):
    """Opens the folder, making it if need be.

    Args:
      workdir: folder of the run.
      name: of the stage.
      settings: what the stage's outcome depends on; JSON values.
      inputs: what it is made from: by name the place and the SHA-256 of each;
        None where it is not there, which a finished stage does not need.
      redo: stages that may be dropped where they do not fit, see `redo`.

    Raises:
      ValueError: the stage was begun with other settings or from other
        inputs, or its record cannot be read.
      FileNotFoundError: an input of an unfinished stage is missing.
    """
    self.name = name
    self.path = pathlib.Path(workdir) / name
    self._settings = _flat(json.loads(json.dumps(settings)))
    self._inputs = inputs or {}
    exchange.on_main_process(lambda: self._open(name in redo))

  def finished(self) -> bool:
    """Whether `finish` was called, in this run or an earlier one.

    Raises:
      ValueError: the mark is damaged.
    """
    mark = self.path / _DONE
    if not os.path.lexists(mark):
      return False
    read(mark, _unmarked(self.name))
    return True

  @contextlib.contextmanager
  def locked(
    self, preemption: checkpoint.Preemption | None = None
  ) -> Iterator[None]:
    """Holds the stage's lock against other runs; waits until it is free.

    Ask `finished` inside: another run may have done the stage meanwhile. See
    `hold_lock` for the rest.
    """
    with hold_lock(self.path / _LOCK, self.name, preemption):
      yield

  def result(self) -> dict[str, Any]:
    """What it reported; {} if it has not finished."""
    return result(self.path.parent, self.name)

  def finish(self, result: Mapping[str, Any]) -> None:
    """Marks the stage finished; returns when every process is done with it."""
    if runtime.is_main_process():
      write(self.path / _DONE, dict(result))
    runtime.barrier(f"{self.name} finished")

  def _open(self, may_drop: bool) -> None:
    self.path.mkdir(parents=True, exist_ok=True)
    # Two runs that begin at once must not both find an empty folder.
    with file_lock.claim(self.path / _BEGINNING, wait=lambda: None):
      changed = self._changed()
      if changed and may_drop:
        print(f"redo: {self.name} {changed}.", flush=True)
        _drop(self.path.parent, self.name)
      elif changed:
        raise ValueError(
          f"Stage {self.name} in {self.path} {changed}. Go on with what it was "
          f"begun with, use a new --workdir, {remedy(self.name)}."
        )
      if not os.path.lexists(self.path / _BEGUN):
        self._begin()

  def _begin(self) -> None:
    missing = [name for name, one in self._inputs.items() if one is None]
    if missing:
      raise FileNotFoundError(
        f"Stage {self.name} in {self.path} is made from {', '.join(missing)}, "
        "and that has not been made yet. Run the stage that makes it first: "
        f"add {missing[0].partition('/')[0]} to config.stages."
      )
    inputs = {k: v for k, v in self._inputs.items() if v is not None}
    record = {
      "format": _FORMAT,
      "settings": self._settings,
      "made_from": {
        name: {"place": place, "sha256": digest}
        for name, (place, digest) in inputs.items()
      },
    }
    write(self.path / _BEGUN, record)

  def _changed(self) -> str:
    """The settings and inputs that changed since the stage began; "" if
    none."""
    if not os.path.lexists(self.path / _BEGUN):
      return ""
    record = _record(self.path / _BEGUN, self.name)
    before, now = record["settings"], self._settings
    settings_ = [
      f"{n}: {before.get(n, 'none')!r} then, {now.get(n, 'none')!r} now"
      for n in sorted(before.keys() | now.keys())
      if before.get(n) != now.get(n)
    ]
    then, inputs = record["made_from"], []
    for name in sorted(then.keys() | self._inputs.keys()):
      if self._inputs.get(name, ()) is None and self.finished():
        continue  # the input is gone, and a finished stage does not need it
      place, digest = self._inputs.get(name) or ("not there", "none")
      before_digest = then.get(name, {}).get("sha256", "none")
      if before_digest != digest:
        inputs.append(
          f"{name} ({place}): sha256 {before_digest[:12]} then, {digest[:12]} "
          "now"
        )
    return " and ".join(
      f"was {what}: {'; '.join(some)}"
      for what, some in (
        ("begun with other settings", settings_),
        ("made from something else", inputs),
      )
      if some
    )


def remedy(name: str) -> str:
  """How to do a stage again, to end the sentence of an error."""
  if name not in ORDER:
    return "or delete that folder"
  later = ORDER[ORDER.index(name) + 1 :]
  rest = f" and {', '.join(later)} after it" if later else ""
  return (
    f"or do it again with --config.redo={name}, which moves what {name}{rest} "
    f"left to {DROPPED}/ of the workdir"
  )


def redo(workdir: str | os.PathLike, asked: str) -> tuple[str, ...]:
  """Drops the outcome of stages, and of those after them, to be done again.

  What they left is moved to `dropped/`, each under its lock. A redo that was
  killed goes on when it is asked for again, until `redone` ends it.

  Args:
    workdir: folder of the run.
    asked: `config.redo`, a comma-separated choice of `ORDER`; "" for none.

  Returns:
    The stages that may be dropped.

  Raises:
    ValueError: an unknown stage.
    OSError: another process works at one of them.
  """
  workdir, names = pathlib.Path(workdir), redo_names(asked)
  if names:
    chosen = sorted(_names("config.redo", asked, ORDER))
    exchange.on_main_process(lambda: _redo(workdir, chosen, names))
  return names


def redo_names(asked: str) -> tuple[str, ...]:
  """The stages that `config.redo` drops: those it names and all after them.

  Raises:
    ValueError: an unknown stage.
  """
  if not asked.strip():
    return ()
  chosen = _names("config.redo", asked, ORDER)
  return ORDER[min(map(ORDER.index, chosen)) :]


def redone(workdir: str | os.PathLike) -> None:
  """Marks the `redo` as done."""
  if runtime.is_main_process():
    (pathlib.Path(workdir) / _REDO).unlink(missing_ok=True)


def _redo(
  workdir: pathlib.Path, chosen: list[str], names: Sequence[str]
) -> None:
  mark = workdir / _REDO
  if os.path.lexists(mark):
    record = read(mark, "delete it: the redo that it speaks of begins anew")
    if record.get("asked") == chosen:
      print(f"redo: goes on with that of {', '.join(chosen)}.", flush=True)
      return
  # The last stage first, so that no stage outlives one it was made from.
  for name in reversed(names):
    if (workdir / name).exists():
      _drop(workdir, name)
  write(mark, {"asked": chosen})


def _drop(workdir: pathlib.Path, name: str) -> None:
  """Moves what a stage left to `dropped/`, under its lock."""
  folder = workdir / name
  if folder.is_symlink():
    raise OSError(
      f"{folder} is a link to {folder.resolve()}, which other runs share. Redo "
      f"{name} there, or remove the link."
    )
  with file_lock.claim(folder / _LOCK) as own:
    if not own:
      raise OSError(
        f"{file_lock.holder(folder / _LOCK)} is at stage {name} in {folder}; "
        "it cannot be dropped meanwhile. Wait for it, or end it."
      )
    left = [one for one in folder.iterdir() if one.name not in _STAYS]
    if not left:
      return
    (workdir / DROPPED).mkdir(exist_ok=True)
    number = 1
    while (workdir / DROPPED / f"{name}-{number}").exists():
      number += 1
    aside = workdir / DROPPED / f"{name}-{number}"
    print(f"redo: drops {name}; what it left is now {aside}.", flush=True)
    aside.mkdir()
    # DONE.json first: a kill in between leaves no stage that seems finished.
    for one in sorted(left, key=lambda path: path.name != _DONE):
      one.rename(aside / one.name)


def result(workdir: str | os.PathLike, name: str) -> dict[str, Any]:
  """What a finished stage reported; {} if it has not finished.

  Raises:
    ValueError: the report is damaged.
  """
  mark = pathlib.Path(workdir) / name / _DONE
  return read(mark, _unmarked(name)) if os.path.lexists(mark) else {}


def _unmarked(name: str) -> str:
  return (
    "delete that file and give the same command again: the stage ends anew "
    f"with what it has kept; {remedy(name)}"
  )


def settings(workdir: str | os.PathLike, name: str) -> dict[str, Any]:
  """What a stage was begun with, by dotted name; {} if it was not."""
  begun = pathlib.Path(workdir) / name / _BEGUN
  if not os.path.lexists(begun):
    return {}
  return _record(begun, name)["settings"]


def model(workdir: str | os.PathLike, stage: str) -> tuple[str, str] | None:
  """A finished stage's model as an input of another; None if there is none."""
  digest = result(workdir, stage).get("model")
  place = pathlib.Path(workdir) / stage / "model"
  return None if digest is None else (str(place), str(digest))


def read(path: pathlib.Path, mend: str) -> dict[str, Any]:
  """A JSON object that a run has left.

  Args:
    path: file.
    mend: what to do if it is damaged, to end the sentence.

  Raises:
    ValueError: it is none.
    OSError: it cannot be read.
  """
  try:
    value = json.loads(path.read_bytes().decode())
    wrong = "" if isinstance(value, dict) else "it holds no JSON object"
  except (ValueError, RecursionError) as error:
    wrong = f"it is no JSON ({error})"
  except OSError as error:
    raise type(error)(
      f"{path} cannot be read ({error.strerror}). Give the rights, or {mend}."
    ) from error
  if wrong:
    raise ValueError(
      f"{path} is damaged: {wrong}. Bring it back from a copy, or {mend}."
    )
  return value


def write(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all, never by way of a link."""
  atomic_file.write(path, json.dumps(value, indent=1))


def parse_stages(text: str, known: tuple[str, ...]) -> set[str]:
  """The stages that a comma-separated list names.

  Raises:
    ValueError: an unknown stage, or none.
  """
  return _names("config.stages", text, known)


def _names(field: str, text: str, known: tuple[str, ...]) -> set[str]:
  chosen = {name.strip() for name in text.split(",") if name.strip()}
  unknown = sorted(chosen - set(known))
  if unknown or not chosen:
    raise ValueError(
      f"{field}={text!r} names {unknown or 'no stage'}; choose among "
      f"{','.join(known)}."
    )
  return chosen


def _record(path: pathlib.Path, name: str) -> dict[str, Any]:
  """A stage's SETTINGS.json, checked.

  Raises:
    ValueError: it is damaged, or an earlier version of the code wrote it.
  """
  mend = f"use a new --workdir, {remedy(name)}"
  record = read(path, mend)
  if record.get("format") != _FORMAT:
    raise ValueError(
      f"{path} does not say what stage {name} was made from; an earlier "
      f"version of this code wrote it. Go on with that version, {mend}."
    )
  parts = [record.get("settings"), record.get("made_from")]
  whole = all(isinstance(part, dict) for part in parts) and all(
    isinstance(one, dict) and isinstance(one.get("sha256"), str)
    for one in record["made_from"].values()
  )
  if not whole:
    raise ValueError(
      f"{path} is damaged: it lacks settings or digests. Bring it back from a "
      f"copy, {mend}."
    )
  return record


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {prefix: tree}
  out: dict[str, Any] = {}
  for name, value in tree.items():
    out |= _flat(value, f"{prefix}.{name}" if prefix else name)
  return out
