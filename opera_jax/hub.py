"""Names on the Hugging Face hub, with the revision that is wanted.

    Qwen/Qwen3-0.6B               whatever is newest there
    Qwen/Qwen3-0.6B@REVISION      a commit, a tag or a branch

What is fetched by a name alone may be another thing tomorrow; a commit is not.
The name is a setting of the run, so its revision is recorded with it.
"""

import pathlib


def split(name: str) -> tuple[str, str | None]:
  """A name and its revision; None where it has none.

  Args:
    name: of a model or a data set. What is a directory here has no revision,
      whatever its name holds.

  Raises:
    ValueError: nothing before or after the sign.
  """
  if "@" not in name or pathlib.Path(name).exists():
    return name, None
  hub_id, _, revision = name.rpartition("@")
  if not hub_id or not revision:
    raise ValueError(
      f"{name!r} is no name with a revision. Write NAME@REVISION, as in "
      "'Qwen/Qwen3-0.6B@main'; a commit is best."
    )
  return hub_id, revision
