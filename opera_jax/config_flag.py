"""The flag `--config` of every driver: a file of values, see `config_file`.

Without the flag, a workdir that holds a config says what it is. A relative path
means the working directory; the configs that ship with the package are found
from any other folder too, see `shipped.path`.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from opera_jax import config_fields, config_file, user_errors

# `--help` lists the flag as the driver's own.
flags.disclaim_key_flags()


class _Parser(flags.ArgumentParser):
  """Reads config files in place of the parser of ml_collections."""

  def __init__(self, parser: flags.ArgumentParser) -> None:
    self._parser = parser
    self.syntactic_help = parser.syntactic_help

  def parse(self, argument: str) -> Any:
    """The config of "PATH" or "PATH:ARG"."""
    config = config_file.load(argument).lock()
    known = set(_paths(config))
    faults = [
      config_fields.fault(path, known)
      for path in _overridden(sys.argv)
      if path not in known
    ]
    if faults:
      # The default is parsed where the flag is defined: no traceback there.
      sys.exit(f"{'; '.join(faults)}. Nothing has been started.")
    return config

  def flag_type(self) -> str:
    """What `--help` calls it."""
    return self._parser.flag_type()


def _overridden(argv: list[str]) -> Iterator[str]:
  """Fields that the command line sets: "rl.steps" of --config.rl.steps=3."""
  for argument in argv[1:]:
    if argument == "--":
      return
    found = re.match(r"--?(?:no)?config\.([^=\[]+)", argument)
    if found:
      yield found[1]


def _paths(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
  """Every field and section of a config."""
  for name, value in config.items():
    yield prefix + name
    if isinstance(value, Mapping) or hasattr(value, "items"):
      yield from _paths(value, f"{prefix}{name}.")


def define(default: str) -> flags.FlagHolder:
  """Defines `--config`, whose fields are flags too: `--config.NAME=VALUE`.

  Args:
    default: the config where the command line names none and its workdir has
      none, such as "configs/tiny.py".
  """
  holder = config_flags.DEFINE_config_file(
    "config", None, "PATH or PATH:ARG of a config."
  )
  flag = flags.FLAGS["config"]
  flag.parser = _Parser(flag.parser)
  try:
    # This parses the default, before there is anybody to catch an error.
    flags.set_default(holder, config_file.of_workdir(sys.argv) or default)
  except (flags.Error, ValueError, OSError) as error:
    message = isinstance(error, flags.Error) or user_errors.is_message(error)
    if "--debug" in sys.argv or not message:
      raise
    sys.exit(str(error))
  return holder
