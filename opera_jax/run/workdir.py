"""The run's folder: which stages are finished, and what their inputs were.

A stage is a folder of the workdir:

    SETTINGS.json   the settings that its result depends on, and digests of its
                    inputs: data, tokenizer, earlier stages
    DONE.json       its result; marks the stage as finished
    stage.lock      held by the process that writes here; names that process

The settings are recorded just before the first result is written. A start that
fails earlier leaves nothing that a corrected one would contradict.
"""

import contextlib
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from opera_jax import atomic_file, config_file, file_lock, user_errors
from opera_jax.sharding import exchange, runtime
from opera_jax.train import checkpoint

# Each stage depends on earlier ones; redoing one drops all later ones.
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
_FORMAT = 5  # of SETTINGS.json
_LOCK, _BEGUN, _DONE, _REDO = (
  "stage.lock",
  "SETTINGS.json",
  "DONE.json",
  "REDO.json",
)
_BEGINNING = "SETTINGS.lock"
_SHOWN = 8  # changed settings that a message lists
_STAYS = (_LOCK, _BEGINNING)  # stays when a stage's result is dropped
# Files that only a stage with recorded settings leaves.
_RESULTS = (
  _DONE,
  "checkpoints/*/FILES.json",
  "model/*/FILES.json",
  "shards/*.jsonl",
  "pieces/*.json",
  "embeddings/*",
)

Inputs = Mapping[str, tuple[str, str] | None]


def make(folder: str | os.PathLike) -> pathlib.Path:
  """Creates the run's folder, and checks that it is writable.

  Raises:
    OSError: it is not writable.
  """
  folder = pathlib.Path(folder)
  probe = folder / f".probe-{secrets.token_hex(8)}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe.touch(exist_ok=False)
    probe.unlink()
  except OSError as error:
    raise OSError(
      f"--workdir={folder} is not writable ({error}), and a run saves all its "
      "files there. Name another folder, or fix the permissions of this one."
    ) from error
  return folder


def existing(folder: str | os.PathLike) -> pathlib.Path:
  """The folder of a run that has begun; for commands that read one.

  Raises:
    FileNotFoundError: there is no such folder, or no run in it. The message
      names the nearest, and nothing is created.
  """
  folder = pathlib.Path(folder)
  if _is_run(folder):
    return folder
  around = folder if folder.is_dir() else folder.parent
  runs = [f.name for f in sorted(around.glob("*")) if _is_run(f)]
  near = user_errors.nearest(folder.name, runs)
  if around == folder:
    what = "holds no run"
    near = near or (f"; it has the runs {', '.join(runs[:8])}." * bool(runs))
  else:
    what = "does not exist"
  raise FileNotFoundError(
    f"--workdir={folder} {what}{near or '.'} Name the folder of a run that has "
    "begun. Nothing was created."
  )


def _is_run(folder: pathlib.Path) -> bool:
  """Whether a stage has begun; a tokenizer alone is of a start that failed."""
  return (folder / config_file.NAME).is_file() or any(
    (folder / name / _BEGUN).is_file() for name in ORDER if name != "tokenizer"
  )


def begun(workdir: str | os.PathLike, name: str) -> bool:
  """Whether a stage has recorded its settings, and so has results."""
  return os.path.lexists(pathlib.Path(workdir) / name / _BEGUN)


@contextlib.contextmanager
def hold_lock(
  lock: pathlib.Path,
  name: str,
  preemption: checkpoint.Preemption | None = None,
) -> Iterator[None]:
  """Takes a lock file that excludes other runs; waits until it is free.

  Args:
    lock: the lock file.
    name: of the stage, for the message while waiting.
    preemption: SIGTERM ends the wait; after the block it ends the run.
  """
  with contextlib.ExitStack() as stack:
    holders: list[str] = []

    def wait() -> None:
      if not holders:
        holders.append(file_lock.holder(lock))
        print(
          f"{name}: waiting for {holders[0]}, which works in {lock.parent}.",
          flush=True,
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
  """One stage's folder `<workdir>/<name>`, with a marker once it is finished.

  The settings and inputs of the stage are recorded. A finished stage does not
  run again, and a changed setting or input is an error instead of a silent
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
    recorded: Callable[[], None] = lambda: None,
  ):
    """Opens the folder, and creates it if it does not exist.

    Records nothing yet, see `begin`.

    Args:
      workdir: folder of the run.
      name: of the stage.
      settings: JSON values that the stage's result depends on.
      inputs: (place, SHA-256) of each input by name; None for a missing one,
        which is allowed if the stage has finished.
      redo: stages that may be dropped if they do not match, see `redo`.
      recorded: called when `begin` has recorded the settings.

    Raises:
      ValueError: the stage was started with other settings or inputs, or its
        record cannot be read.
      FileNotFoundError: an input of an unfinished stage is missing.
    """
    self.name = name
    self.path = pathlib.Path(workdir) / name
    self._settings = _flat(json.loads(json.dumps(settings)))
    self._inputs, self._recorded = inputs or {}, recorded
    exchange.on_main_process(lambda: self._open(name in redo))

  def begin(self) -> None:
    """Records the settings; call it before the stage writes its first result.

    All processes must call this together. Further calls have no effect.

    Raises:
      ValueError: another run has recorded other settings meanwhile.
    """
    exchange.on_main_process(self.begin_here)

  def begin_here(self) -> None:
    """`begin` for work that processes do independently of one another."""
    # Two runs that start together must not both find an empty folder.
    with file_lock.claim(self.path / _BEGINNING, wait=lambda: None):
      self._refuse_changes()
      if not os.path.lexists(self.path / _BEGUN):
        self._record()
        self._recorded()

  def finished(self) -> bool:
    """Whether `finish` was called, in this run or an earlier one.

    Raises:
      ValueError: the marker file is damaged, or another run with other settings
        has finished the stage meanwhile.
    """
    if not self._marked():
      return False
    self._refuse_changes()
    return True

  @contextlib.contextmanager
  def locked(
    self, preemption: checkpoint.Preemption | None = None
  ) -> Iterator[None]:
    """Takes the stage's lock, which excludes other runs; waits until it is
    free.

    Check `finished` inside the block: another run may have finished the stage
    meanwhile. See `hold_lock`.
    """
    with hold_lock(self.path / _LOCK, self.name, preemption):
      # The run that held the lock may have been given other settings.
      exchange.on_main_process(self._refuse_changes)
      yield

  def result(self) -> dict[str, Any]:
    """The stage's result; {} if it has not finished."""
    return result(self.path.parent, self.name)

  def finish(self, result: Mapping[str, Any]) -> None:
    """Saves the result, which marks the stage finished; waits for all
    processes."""
    self.begin()
    if runtime.is_main_process():
      write(self.path / _DONE, dict(result))
    runtime.barrier(f"{self.name} finished")

  def _open(self, may_drop: bool) -> None:
    self.path.mkdir(parents=True, exist_ok=True)
    with file_lock.claim(self.path / _BEGINNING, wait=lambda: None):
      changed = self._changed() or self._unrecorded()
      if changed and may_drop:
        print(f"redo: {self.name} {changed}.", flush=True)
        _drop(self.path.parent, self.name)
      elif changed:
        raise self._refusal(changed)
    missing = [name for name, one in self._inputs.items() if one is None]
    if missing and not os.path.lexists(self.path / _BEGUN):
      raise FileNotFoundError(
        f"Stage {self.name} in {self.path} needs {', '.join(missing)}, which "
        "does not exist yet. Run the stage that creates it first: "
        f"add {missing[0].partition('/')[0]} to config.stages."
      )

  def _marked(self) -> bool:
    mark = self.path / _DONE
    if not os.path.lexists(mark):
      return False
    read(mark, _unmarked(self.name))
    return True

  def _refuse_changes(self) -> None:
    changed = self._changed()
    if changed:
      raise self._refusal(changed)

  def _refusal(self, changed: str) -> ValueError:
    return ValueError(
      f"Stage {self.name} in {self.path} {changed}. Use its old settings and "
      f"inputs, use a new --workdir, {remedy(self.name)}."
    )

  def _record(self) -> None:
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

  def _unrecorded(self) -> str:
    """Describes a result of which no record says what it was made from."""
    if os.path.lexists(self.path / _BEGUN):
      return ""
    for pattern in _RESULTS:
      for file in self.path.glob(pattern):
        if file.stat().st_size:  # a claimed shard is empty at first
          return (
            f"holds {file.relative_to(self.path)} without {_BEGUN}, which says "
            "what it was made from"
          )
    return ""

  def _changed(self) -> str:
    """Describes settings and inputs that changed since the stage began; "" if
    none did."""
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
      if self._inputs.get(name, ()) is None and self._marked():
        continue  # a finished stage does not need its inputs
      place, digest = self._inputs.get(name) or ("not there", "none")
      before_digest = then.get(name, {}).get("sha256", "none")
      if before_digest != digest:
        inputs.append(
          f"{name} ({place}): sha256 {before_digest[:12]} then, {digest[:12]} "
          "now"
        )
    return " and ".join(
      f"was {what}: {'; '.join(some[:_SHOWN])}"
      + (f"; and {len(some) - _SHOWN} more" if len(some) > _SHOWN else "")
      for what, some in (
        ("started with other settings", settings_),
        ("given other inputs", inputs),
      )
      if some
    )


def remedy(name: str) -> str:
  """How to redo a stage; ends the sentence of an error message."""
  if name not in ORDER:
    return "or delete that folder"
  later = ORDER[ORDER.index(name) + 1 :]
  rest = f" and of {', '.join(later)} after it" if later else ""
  return (
    f"or redo it with --config.redo={name}, which moves the files of "
    f"{name}{rest} to {DROPPED}/ in the workdir"
  )


def redo(workdir: str | os.PathLike, stages: str) -> tuple[str, ...]:
  """Drops the results of stages and of all later ones, so that they run again.

  Their files move to `dropped/`, each stage under its lock. The same redo after
  a kill continues the first one, until `redone` ends it.

  Args:
    workdir: folder of the run.
    stages: `config.redo`, comma-separated names of `ORDER`; "" for none.

  Returns:
    The stages that may be dropped.

  Raises:
    ValueError: an unknown stage.
    OSError: another process works on one of them.
  """
  workdir, names = pathlib.Path(workdir), redo_names(stages)
  if names:
    chosen = sorted(_names("config.redo", stages, ORDER))
    exchange.on_main_process(lambda: _redo(workdir, chosen, names))
  return names


def redo_names(stages: str) -> tuple[str, ...]:
  """The stages that `config.redo` drops: those it names and all later ones.

  Raises:
    ValueError: an unknown stage.
  """
  if not stages.strip():
    return ()
  chosen = _names("config.redo", stages, ORDER)
  return ORDER[min(map(ORDER.index, chosen)) :]


def redone(workdir: str | os.PathLike) -> None:
  """Marks the `redo` as finished."""
  if runtime.is_main_process():
    (pathlib.Path(workdir) / _REDO).unlink(missing_ok=True)


def _redo(
  workdir: pathlib.Path, chosen: list[str], names: Sequence[str]
) -> None:
  mark = workdir / _REDO
  if os.path.lexists(mark):
    record = read(mark, "delete it: the redo that it records starts over")
    if record.get("asked") == chosen:
      print(f"redo: continues that of {', '.join(chosen)}.", flush=True)
      return
  # The last stage first, so that no stage outlives its inputs.
  for name in reversed(names):
    if (workdir / name).exists():
      _drop(workdir, name)
  write(mark, {"asked": chosen})


def _drop(workdir: pathlib.Path, name: str) -> None:
  """Moves a stage's files to `dropped/`, under its lock."""
  folder = workdir / name
  if folder.is_symlink():
    raise OSError(
      f"{folder} is a link to {folder.resolve()}, which other runs share. Redo "
      f"{name} there, or remove the link."
    )
  with file_lock.claim(folder / _LOCK) as own:
    if not own:
      raise OSError(
        f"{file_lock.holder(folder / _LOCK)} works on stage {name} in "
        f"{folder}, so the stage cannot be dropped. Wait for it, or end it."
      )
    left = [one for one in folder.iterdir() if one.name not in _STAYS]
    if not left:
      return
    (workdir / DROPPED).mkdir(exist_ok=True)
    number = 1
    while (workdir / DROPPED / f"{name}-{number}").exists():
      number += 1
    aside = workdir / DROPPED / f"{name}-{number}"
    print(f"redo: drops {name}; its files are now in {aside}.", flush=True)
    aside.mkdir()
    # DONE.json first, so that after a kill the stage does not look finished.
    for one in sorted(left, key=lambda path: path.name != _DONE):
      one.rename(aside / one.name)


def result(workdir: str | os.PathLike, name: str) -> dict[str, Any]:
  """Reads a finished stage's result; {} if it has not finished.

  Raises:
    ValueError: the file is damaged.
  """
  mark = pathlib.Path(workdir) / name / _DONE
  return read(mark, _unmarked(name)) if os.path.lexists(mark) else {}


def _unmarked(name: str) -> str:
  return (
    "delete that file and run the same command again: the stage finishes "
    f"again from its saved work; {remedy(name)}"
  )


def settings(workdir: str | os.PathLike, name: str) -> dict[str, Any]:
  """Reads a stage's recorded settings, by dotted name; {} if it has not
  started."""
  begun = pathlib.Path(workdir) / name / _BEGUN
  if not os.path.lexists(begun):
    return {}
  return _record(begun, name)["settings"]


def made_from(workdir: str | os.PathLike, name: str) -> dict[str, str]:
  """Reads the recorded digests of a stage's inputs; {} if it has not
  started."""
  begun = pathlib.Path(workdir) / name / _BEGUN
  if not os.path.lexists(begun):
    return {}
  record = _record(begun, name)["made_from"]
  return {place: one["sha256"] for place, one in record.items()}


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Turns recorded settings, by dotted name, into nested values."""
  out: dict[str, Any] = {}
  for path, value in settings.items():
    *sections, name = path.split(".")
    place = out
    for section in sections:
      place = place.setdefault(section, {})
    place[name] = value
  return out


def model(workdir: str | os.PathLike, stage: str) -> tuple[str, str] | None:
  """(place, digest) of a finished stage's model; None if there is none."""
  digest = result(workdir, stage).get("model")
  place = pathlib.Path(workdir) / stage / "model"
  return None if digest is None else (str(place), str(digest))


def read(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """Reads a JSON object that a run has written.

  Args:
    path: file.
    remedy: what to do if it is damaged; ends the error message.

  Raises:
    ValueError: it is not a JSON object.
    OSError: it cannot be read.
  """
  try:
    value = json.loads(path.read_bytes().decode())
    wrong = "" if isinstance(value, dict) else "it is not a JSON object"
  except (ValueError, RecursionError) as error:
    wrong = f"it is not JSON ({error})"
  except OSError as error:
    raise type(error)(
      f"{path} cannot be read ({error.strerror}). Fix its permissions, or "
      f"{remedy}."
    ) from error
  if wrong:
    raise ValueError(
      f"{path} is damaged: {wrong}. Restore it from a copy, or {remedy}."
    )
  return value


def write(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file atomically; never follows a link."""
  atomic_file.write(path, json.dumps(value, indent=1))


def parse_stages(text: str, known: tuple[str, ...]) -> set[str]:
  """The stages that a comma-separated list names.

  Raises:
    ValueError: an unknown stage, or no stage.
  """
  return _names("config.stages", text, known)


def _names(field: str, text: str, known: tuple[str, ...]) -> set[str]:
  chosen = {name.strip() for name in text.split(",") if name.strip()}
  unknown = sorted(chosen - set(known))
  if unknown or not chosen:
    near = user_errors.nearest(unknown[0], known) if unknown else ""
    raise ValueError(
      f"{field}={text!r} names {unknown or 'no stage'}{near}; use stages of "
      f"{','.join(known)}."
    )
  return chosen


def _record(path: pathlib.Path, name: str) -> dict[str, Any]:
  """Reads and checks a stage's SETTINGS.json.

  Raises:
    ValueError: it is damaged, or an earlier version of the code wrote it.
  """
  advice = f"use a new --workdir, {remedy(name)}"
  record = read(path, advice)
  if record.get("format") != _FORMAT:
    raise ValueError(
      f"{path} is of format {record.get('format')!r} and this code reads "
      f"format {_FORMAT}: an earlier version, with other names of fields, "
      f"wrote it. Continue with that version, {advice}."
    )
  parts = [record.get("settings"), record.get("made_from")]
  whole = all(isinstance(part, dict) for part in parts) and all(
    isinstance(one, dict) and isinstance(one.get("sha256"), str)
    for one in record["made_from"].values()
  )
  if not whole:
    raise ValueError(
      f"{path} is damaged: it lacks settings or digests. Restore it from a "
      f"copy, {advice}."
    )
  return record


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {prefix: tree}
  out: dict[str, Any] = {}
  for name, value in tree.items():
    out |= _flat(value, f"{prefix}.{name}" if prefix else name)
  return out
