"""The configs and templates that come with the package, from any folder."""

import pathlib

# The folder `configs/` of the repository; in an installed copy, the package's.
CONFIGS = pathlib.Path(__file__).parent / "configs"


def path(name: str) -> pathlib.Path:
  """The file that a config value or a flag names.

  Args:
    name: a path. A relative one means the working directory, as always; one
      such as "configs/tiny.py" that is not there means the shipped file.

  Returns:
    The path as it was named where that file exists, or where nothing of the
    name ships either, so that errors name what was asked for.
  """
  named = pathlib.Path(name)
  if named.parts[:1] == (CONFIGS.name,) and not named.exists():
    ours = CONFIGS.joinpath(*named.parts[1:])
    if ours.is_file():
      return ours
  return named
