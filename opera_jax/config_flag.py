"""The flag `--config` of every driver: a file of values, `PATH` or `PATH:ARG`.

A relative path means the working directory; the configs that ship with the
package are found from any other folder too, see `shipped.path`.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from opera_jax import shipped

# `--help` lists the flag as the driver's own.
flags.disclaim_key_flags()


class _Parser(flags.ArgumentParser):
  """The parser of ml_collections, given the file that is meant."""

  def __init__(self, parser: flags.ArgumentParser) -> None:
    self._parser = parser
    self.syntactic_help = parser.syntactic_help

  def parse(self, argument: str) -> Any:
    """The config of "PATH" or "PATH:ARG"."""
    name, colon, arg = argument.partition(":")
    return self._parser.parse(f"{shipped.path(name)}{colon}{arg}")

  def flag_type(self) -> str:
    """What `--help` calls it."""
    return self._parser.flag_type()


def define(default: str) -> flags.FlagHolder:
  """Defines `--config`, whose fields are flags too: `--config.NAME=VALUE`.

  Args:
    default: the config where none is named, such as "configs/tiny.py".
  """
  holder = config_flags.DEFINE_config_file(
    "config", None, "PATH or PATH:ARG of a config."
  )
  flag = flags.FLAGS["config"]
  flag.parser = _Parser(flag.parser)
  flags.set_default(holder, default)
  return holder
