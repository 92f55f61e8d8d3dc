"""What a workdir says of its run: its config, and every start.

    config.json   the config of its stages; `--config` reads it back
    run.json      of each start: command, code, versions, devices, data

Neither names an environment variable, since those hold keys; the user and
password of an address on the command line are left out.
"""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from opera_jax import atomic_file, config_file, file_lock
from opera_jax.run import setup
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import exchange

FILE = "run.json"
PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "transformers",
  "numpy",
)
_USER = re.compile(r"(?<=://)[^/\s@]+@")
_GIT_SECONDS = 10
# Sections of the config that say what one stage did, by stage.
_OF_STAGE = {
  "base": ("base",),
  "synthesize": ("synthesis",),
  "select": ("select",),
  "sft": ("sft",),
  "rl": ("rl", "rollout", "reward"),
  "evaluate": ("evaluate",),
}


def begin(
  workdir: str | os.PathLike,
  config: Any,
  stages: Collection[str],
  needs: Mapping[str, int] | None = None,
) -> setup.Run:
  """Sets up a run, and adds this start to its record.

  The config is written once a stage has recorded its settings: what a start
  that failed before was given says nothing of what the folder holds.

  Args:
    workdir: folder of the run.
    config: of this start, a ConfigDict; sizes that follow from its lengths are
      derived, and not recorded.
    stages: that this start runs.
    needs: the least tasks of the stages that will run, see `tasks.load`.

  Raises:
    ValueError: see `setup.setup`.
  """

  def recorded() -> None:
    end(workdir, config, stages)

  run = setup.from_config(workdir, config, recorded, needs)
  exchange.on_main_process(lambda: _add(run.workdir, _start(run.tasks.digests)))
  return run


def end(
  workdir: str | os.PathLike, config: Any, stages: Collection[str]
) -> None:
  """Writes the config of a run whose stages have accepted it."""
  path = pathlib.Path(workdir) / config_file.NAME
  atomic_file.write(path, config_file.text(of_run(workdir, config, stages)))


def of_run(
  workdir: str | os.PathLike, config: Any, stages: Collection[str]
) -> Any:
  """The config of all that lies in a workdir, after a start that ran a part.

  A stage that this start did not run keeps its sections as they were recorded,
  and `stages` names those of every start.

  Args:
    workdir: folder of the run.
    config: of this start, a ConfigDict.
    stages: that this start runs.
  """
  path = pathlib.Path(workdir) / config_file.NAME
  if not os.path.lexists(path):
    return config
  try:
    before = config_file.load(str(path))
  except (OSError, ValueError) as error:
    print(f"{error} It is written anew.", flush=True)
    return config
  whole = config.copy_and_resolve_references().unlock()
  for stage, sections in _OF_STAGE.items():
    if stage not in stages and workdir_lib.begun(workdir, stage):
      for section in sections:
        whole[section] = before[section]
  names = [*before.stages.split(","), *config.stages.split(",")]
  whole.stages = ",".join(dict.fromkeys(name.strip() for name in names))
  return whole.lock()


def _add(workdir: pathlib.Path, start: Mapping[str, Any]) -> None:
  path = workdir / FILE
  with file_lock.claim(workdir / "run.lock", wait=lambda: None):
    starts: Any = []
    if os.path.lexists(path):
      remedy = "delete it: the starts are listed anew"
      starts = workdir_lib.read(path, remedy).get("starts")
      if not isinstance(starts, list):
        raise ValueError(
          f"{path} is damaged: its starts are {starts!r:.80} and not a list. "
          f"Restore it from a copy, or {remedy}."
        )
    workdir_lib.write(path, {"starts": [*starts, start]})


def _start(data: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    "started": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    "command": command(sys.argv),
    "folder": os.getcwd(),
    "code": _commit(pathlib.Path(__file__).resolve().parents[2]),
    "versions": {"python": platform.python_version()}
    | {name: _version(name) for name in PACKAGES},
    "host": socket.gethostname(),
    "system": platform.platform(),
    "processes": jax.process_count(),
    "devices": f"{jax.device_count()} x {device.device_kind}",
    "data": {
      name: {"place": place, "sha256": digest}
      for name, (place, digest) in data.items()
    },
  }


def command(argv: Sequence[str]) -> list[str]:
  """A command line without the user and password of any address in it."""
  return [_USER.sub("...@", argument) for argument in argv]


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit(root: pathlib.Path) -> dict[str, Any]:
  """The commit of a checkout, and whether tracked files differ from it; the
  version of an installed copy."""
  if not (root / ".git").exists():
    return {"version": _version("opera-jax")}
  try:
    commit, changes = (
      subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_SECONDS,
      ).stdout.strip()
      for arguments in (
        ("rev-parse", "HEAD"),
        ("status", "--porcelain", "--untracked-files=no"),
      )
    )
  except (OSError, subprocess.SubprocessError) as error:
    return {"commit": None, "why": f"git: {error}"}
  return {"commit": commit, "dirty": bool(changes)}
