"""Prompt templates: text files with placeholders.

A filled template is one user turn of the policy's chat template
(`Tokenizer.chat_prompt`). Tags in it are plain text,
as in a prompt.
"""

import re
from collections.abc import Mapping, Sequence

from opera_jax import shipped

SUFFIX = ".txt"


def load(value: str, names: Sequence[str], setting: str) -> str:
  """Loads and checks a template.

  Args:
    value: the text itself, or the path of a file that ends in .txt.
    names: placeholders that the text must contain exactly once, such as
      "prompt" for "{prompt}".
    setting: the config field of the template, for error messages.

  Returns:
    The text of the template.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a placeholder is missing or repeated.
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
  """Replaces placeholders; placeholders within values are not replaced."""
  marks = "|".join(re.escape(f"{{{name}}}") for name in values)
  return re.sub(marks, lambda hit: values[hit.group()[1:-1]], template)
