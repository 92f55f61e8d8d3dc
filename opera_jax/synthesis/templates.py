"""Guiding words around a prompt: a file that anyone can read and change.

The text is one user turn in the policy's chat layout (`Tokenizer.chat_prompt`,
which is Qwen3's to the token); tags in it are plain text, as in a prompt.
"""

import re
from collections.abc import Mapping, Sequence

from opera_jax import shipped

SUFFIX = ".txt"


def load(value: str, names: Sequence[str], setting: str) -> str:
  """A template's text, checked.

  Args:
    value: the text itself, or the path of a file that ends in .txt.
    names: placeholders that it must hold exactly once each, such as "prompt"
      for "{prompt}".
    setting: the config field that it comes from, for errors.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a placeholder is missing or given twice.
  """
  text, shown = value, repr(value[:60])
  if value.endswith(SUFFIX) and "\n" not in value and "{" not in value:
    path, shown = shipped.path(value), value
    if not path.is_file():
      raise FileNotFoundError(
        f"{setting}={value}: no such file. Name one such as "
        "configs/templates/monologue.txt, or give the text itself."
      )
    text = path.read_text(encoding="utf-8").strip()
  for name in names:
    if text.count(f"{{{name}}}") != 1:
      raise ValueError(
        f"The template {shown} holds {{{name}}} {text.count(f'{{{name}}}')} "
        f"times; it must hold it exactly once, where the {name} goes. Correct "
        f"{setting}."
      )
  return text


def fill(template: str, values: Mapping[str, str]) -> str:
  """The template with its placeholders replaced; values are not searched."""
  marks = "|".join(re.escape(f"{{{name}}}") for name in values)
  return re.sub(marks, lambda hit: values[hit.group()[1:-1]], template)
