"""Configs as files: Python that returns one, or the JSON that a run left.

A run writes its whole config to `config.json` of its workdir. `--config` takes
that file wherever it takes a Python file, so a run is repeated, changed and
looked at without the command that began it.
"""

import json
import os
import pathlib
import re
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from opera_jax import config_fields, shipped, user_errors

NAME = "config.json"  # of the config in a run's workdir
_MOST_BYTES = 1_000_000  # of a JSON config; a run writes 10 kB
_MOST_FAULTS = 20  # that a message lists
_MOST_CHARACTERS = 200  # of a value that a message shows
# Fields that are tables with keys of the user's own: a file replaces them.
TABLES = (
  "data.fields",
  "data.task_map",
  "data.math_fields",
  "reward.by_task",
  "reward.options",
  "rl.advantage_options",
)


def load(name: str) -> ml_collections.ConfigDict:
  """Reads a config file.

  Args:
    name: "PATH" or "PATH:ARG" of a Python file with `get_config`, which is
      called with ARG; or the path of a JSON file. See `shipped.path`.

  Raises:
    FileNotFoundError: no such file; the message names the nearest.
    ValueError: the JSON file holds fields or values that no config has, or
      `get_config` refuses its argument.
    ConfigFileError: any other error of a Python file.
  """
  if name.endswith(".json"):
    return _read_json(pathlib.Path(name))
  path, colon, arg = name.partition(":")
  file = shipped.path(path)
  if not file.is_file():
    raise FileNotFoundError(
      f"There is no config file {path!r}{_nearest_file(path)}; name a file of "
      "the working directory, or one of the shipped configs/."
    )
  try:
    config = runpy.run_path(str(file))["get_config"](*([arg] if colon else []))
  except Exception as error:
    if user_errors.is_message(error):
      raise
    raise user_errors.ConfigFileError(f"{file} does not run.") from error
  return config


def text(config: ml_collections.ConfigDict) -> str:
  """A config as JSON that `load` reads back.

  `redo` is left out: it is an order, and the workdir has followed it.
  """
  return json.dumps({**config.to_dict(), "redo": ""}, indent=1) + "\n"


def of_workdir(argv: Sequence[str]) -> str:
  """The config of the workdir that a command line names; "" if it has none."""
  for place, argument in enumerate(argv):
    if argument == "--":
      break
    found = re.fullmatch(r"--?workdir(?:=(.*))?", argument, re.DOTALL)
    if found:
      after = argv[place + 1 : place + 2]
      folder = found[1] if found[1] is not None else "".join(after)
      path = os.path.join(folder, NAME)
      return path if os.path.isfile(path) else ""
  return ""


def _read_json(path: pathlib.Path) -> ml_collections.ConfigDict:
  values: Any = None
  try:
    with open(path, "rb") as file:
      read = file.read(_MOST_BYTES + 1)
    if len(read) > _MOST_BYTES:
      wrong = f"it has more than {_MOST_BYTES:,} bytes, which no config has"
    else:
      values = json.loads(read.decode())
      wrong = "" if isinstance(values, dict) else "it is not a JSON object"
  except (ValueError, RecursionError) as error:
    wrong = f"it is not JSON ({error})"
  except OSError as error:
    raise FileNotFoundError(
      f"The config file {path} cannot be read ({error.strerror})"
      f"{_nearest_file(str(path))}; a run writes {NAME} to its workdir."
    ) from error
  if not wrong:
    config = load(str(shipped.CONFIGS / "common.py"))
    faults = _fill(config, values, "")
    if not faults:
      return config.lock()
    wrong = "; ".join(faults[:_MOST_FAULTS])
    if len(faults) > _MOST_FAULTS:
      wrong += f"; and {len(faults) - _MOST_FAULTS:,} faults more"
  raise ValueError(
    f"The config file {path} cannot be used: {wrong}. Correct it, or give the "
    "Python file that the run began with as --config."
  )


def _fill(
  config: ml_collections.ConfigDict, values: Mapping[str, Any], prefix: str
) -> list[str]:
  """Sets the fields of a config; returns what is wrong with the values."""
  faults = []
  for name, value in values.items():
    path = prefix + name
    if name not in config:
      known = [prefix + field for field in config]
      faults.append(config_fields.fault(path, known))
      continue
    section = isinstance(config[name], ml_collections.ConfigDict)
    if section != isinstance(value, dict):
      faults.append(f"config.{path} is {_shown(value)}")
    elif section and path not in TABLES:
      faults += _fill(config[name], value, f"{path}.")
    else:
      try:
        config[name] = _tuples(value)
      # AttributeError: a key of a table that ConfigDict needs for itself.
      except (AttributeError, RecursionError, TypeError, ValueError) as error:
        faults.append(f"config.{path} is {_shown(value)} ({_cut(str(error))})")
  return faults


def _shown(value: Any) -> str:
  try:
    return _cut(repr(value))
  except RecursionError:
    return "nested too deeply"


def _cut(text: str) -> str:
  beyond = len(text) > _MOST_CHARACTERS
  return f"{text[:_MOST_CHARACTERS]}..." if beyond else text


def _tuples(value: Any) -> Any:
  """Configs hold tuples where JSON has lists."""
  if isinstance(value, list):
    return tuple(map(_tuples, value))
  if isinstance(value, dict):
    return {name: _tuples(inner) for name, inner in value.items()}
  return value


def _nearest_file(path: str) -> str:
  here = pathlib.Path(path).parent
  names = [str(file) for file in here.glob("*") if file.suffix == ".py"]
  names += [str(file) for file in here.glob("*.json")]
  root = shipped.CONFIGS
  names += [
    str(pathlib.Path(root.name) / file.relative_to(root))
    for file in root.glob("**/*.py")
    if not file.name.startswith("_")
  ]
  return user_errors.nearest(path, names)
