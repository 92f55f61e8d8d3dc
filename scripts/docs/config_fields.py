"""MkDocs hook: the fields of configs/common.py, from the comments beside them.

Nothing is imported or run: the file is parsed, so that the docs need none of
the packages of a run. A field is an assignment `config.name = value`, or an
entry of a dictionary that is written one entry a line. A placeholder of
ml_collections is a field without a value, of a type that is known. The
description is the comment behind a field or the comment lines right above it.
`[P]` in a comment says that the default is the paper's, `[C]` that it is the
released code's.
"""

import ast
import dataclasses
import io
import json
import pathlib
import re
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any

SOURCE = pathlib.Path(__file__).resolve().parents[2] / "configs" / "common.py"
MARK = "<!-- the fields of configs/common.py -->"
PAPER, RELEASE, OURS = "paper", "released code", "ours"
_TAGS = {"P": PAPER, "C": RELEASE}
# A tag before a number speaks of that number and not of the default.
_TAG = re.compile(r"\[([PC])\](?! \d)[;,.]?\s*")
_TAG_OF_NUMBER = re.compile(r"\[([PC])\] (?=\d)")
# Characters of a comment that Markdown would take for something else.
_LITERAL = str.maketrans({"|": "\\|", "<": "&lt;", "*": "\\*"})
_PLACEHOLDER = "config_dict.placeholder"
_TYPES = {
  bool: "true or false",
  int: "integer",
  float: "number",
  str: "text",
  tuple: "list",
  dict: "mapping",
}
_KIND_OF_NAME = {of.__name__: kind for of, kind in _TYPES.items()}


class UndocumentedError(ValueError):
  """Fields of a config file have no comment, or no form that can be read."""


@dataclasses.dataclass(frozen=True)
class Field:
  """One value of a config.

  Attributes:
    name: dotted, without "config.".
    default: its value; None for a placeholder.
    kind: its type in words.
    text: what the comment says, without tags; "" where there is none.
    source: PAPER, RELEASE or OURS.
  """

  name: str
  default: Any
  kind: str
  text: str
  source: str


@dataclasses.dataclass(frozen=True)
class Section:
  """Fields that share a prefix; the first section has none."""

  name: str
  text: str
  fields: tuple[Field, ...]


def on_page_markdown(text: str, **_: Any) -> str:
  """Replaces the mark of a page by the tables; MkDocs calls this.

  Raises:
    UndocumentedError: a field has no comment.
  """
  if MARK not in text:
    return text
  return text.replace(MARK, markdown(read(SOURCE.read_text("utf-8"))))


def read(source: str) -> list[Section]:
  """The sections of a config file, in the order of the file.

  Args:
    source: the text of a file with a function `get_config`.

  Raises:
    UndocumentedError: a statement of `get_config` that is no field.
  """
  return _Reader(source).sections()


def undocumented(sections: list[Section]) -> list[str]:
  """The dotted names of fields whose comment says nothing."""
  return [f.name for s in sections for f in s.fields if not f.text]


def markdown(sections: list[Section]) -> str:
  """One table a section.

  Raises:
    UndocumentedError: names every field without a description.
  """
  missing = undocumented(sections)
  if missing:
    raise UndocumentedError(
      f"{len(missing)} fields of configs/common.py have no comment: "
      f"{', '.join(missing)}. Write one behind the field or right above it; "
      "the config page is made from these comments."
    )
  lines = []
  for section in sections:
    lines += [f"## {section.name or 'The run'}", ""]
    if section.text:
      lines += [section.text.translate(_LITERAL), ""]
    lines += [
      "| Field | Default | Type | From | What it does |",
      "|---|---|---|---|---|",
    ]
    for field in section.fields:
      name = f"`{field.name}`{{ #{field.name} }}"
      default = f"`{shown(field.default)}`"  # code may hold a bar as it is
      text = field.text.translate(_LITERAL)
      row = [name, default, field.kind, field.source, text]
      lines.append("| " + " | ".join(row) + " |")
    lines.append("")
  return "\n".join(lines)


def shown(value: Any) -> str:
  """A default as it is written in a config, strings in double quotes."""
  if isinstance(value, str):
    return json.dumps(value, ensure_ascii=False)
  if isinstance(value, tuple):
    items = [shown(item) for item in value]
    return f"({', '.join(items)}{',' * (len(items) == 1)})"
  if isinstance(value, dict):
    pairs = [f"{shown(k)}: {shown(v)}" for k, v in value.items()]
    return "{" + ", ".join(pairs) + "}"
  return repr(value)


class _Reader:
  """Walks the statements of `get_config`."""

  def __init__(self, source: str):
    self._tree = ast.parse(source)
    self._lines = source.splitlines()
    self._comments: dict[int, str] = {}
    self._alone: set[int] = set()  # lines that hold a comment and no code
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
      if token.type == tokenize.COMMENT:
        line = token.start[0]
        self._comments[line] = token.string.lstrip("#").strip()
        if not self._lines[line - 1][: token.start[1]].strip():
          self._alone.add(line)
    self._functions = {
      node.name: node
      for node in self._tree.body
      if isinstance(node, ast.FunctionDef)
    }
    # Names for the placeholder, such as `unset` after `unset = ...`.
    self._placeholders = {_PLACEHOLDER} | {
      ast.unparse(node.targets[0])
      for node in ast.walk(self._tree)
      if isinstance(node, ast.Assign)
      and ast.unparse(node.value) == _PLACEHOLDER
    }
    self._constants = {
      node.targets[0].id: ast.literal_eval(node.value)
      for node in self._tree.body
      if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }

  def sections(self) -> list[Section]:
    """All sections; a field that is assigned again keeps its place."""
    texts: dict[str, str] = {"": ""}
    fields: dict[str, dict[str, Field]] = {"": {}}
    for node in self._functions["get_config"].body:
      for section, text, found in self._statement(node):
        texts[section] = texts.get(section) or text
        mine = fields.setdefault(section, {})
        for field in found:
          before = mine.get(field.name)
          if before is not None and not field.text:
            field = dataclasses.replace(field, text=before.text)
          mine[field.name] = field
    return [
      Section(name, texts[name], tuple(mine.values()))
      for name, mine in fields.items()
      if mine
    ]

  def _statement(
    self, node: ast.stmt
  ) -> Iterator[tuple[str, str, list[Field]]]:
    """The sections that a statement opens or adds to."""
    if isinstance(node, (ast.Expr, ast.Return)):
      return
    if isinstance(node, ast.Assign) and ast.unparse(node.value) == _PLACEHOLDER:
      return  # a short name for it
    name = _target(node) if isinstance(node, ast.Assign) else None
    if name is None:
      raise UndocumentedError(
        f"Line {node.lineno} of the config file is no field: "
        f"{self._lines[node.lineno - 1].strip()!r}. A field is assigned as "
        "config.name = value."
      )
    if name == "":  # config = ml_collections.ConfigDict()
      return
    value = node.value
    if isinstance(value, ast.Call) and not self._is_placeholder(value):
      made = self._functions[value.func.id]
      text = self._text(node.lineno, node.lineno)
      returned = made.body[-1].value
      yield from self._dictionary(name, text, returned)
    elif _is_section(value):
      text = self._text(node.lineno, node.lineno)
      yield from self._dictionary(name, text, value)
    else:
      section = name.rpartition(".")[0]
      comment = self._text(node.lineno, node.end_lineno, tags=True)
      yield section, "", [self._field(name, value, comment)]

  def _dictionary(
    self, name: str, text: str, node: ast.Dict
  ) -> Iterator[tuple[str, str, list[Field]]]:
    """A dictionary's own fields, then those of the sections inside it."""
    fields, inside = [], []
    for key, value in zip(node.keys, node.values):
      inner = f"{name}.{ast.literal_eval(key)}"
      if _is_section(value):
        comment = self._text(key.lineno, key.lineno)
        inside += self._dictionary(inner, comment, value)
      else:
        comment = self._text(key.lineno, value.end_lineno, tags=True)
        fields.append(self._field(inner, value, comment))
    yield name, text, fields
    yield from inside

  def _is_placeholder(self, node: ast.expr) -> bool:
    """A call such as `unset(int)`."""
    return (
      isinstance(node, ast.Call)
      and ast.unparse(node.func) in self._placeholders
    )

  def _field(self, name: str, node: ast.expr, comment: str) -> Field:
    """A field, from the expression of its value."""
    default: Any = None
    if isinstance(node, ast.Call) and self._is_placeholder(node):
      kind = _KIND_OF_NAME[ast.unparse(node.args[0])]
    else:
      default = (
        self._constants[node.id]
        if isinstance(node, ast.Name)
        else ast.literal_eval(node)
      )
      kind = _TYPES[type(default)]
    tags = _TAG.findall(comment)
    source = _TAGS[tags[0]] if tags else OURS
    text = _TAG_OF_NUMBER.sub(
      lambda found: f"the {_TAGS[found[1]]} has ", _TAG.sub("", comment)
    )
    return Field(name, default, kind, _sentence(text), source)

  def _text(self, first: int, last: int, *, tags: bool = False) -> str:
    """The comment lines above line `first`, then the comment on line `last`."""
    above, line = [], first - 1
    while line in self._alone:
      above.insert(0, self._comments[line])
      line -= 1
    parts = [*above, self._comments.get(last, "")]
    text = " ".join(filter(None, parts))
    return text if tags else _sentence(_TAG.sub("", text))


def _target(node: ast.Assign) -> str | None:
  """The dotted name that is assigned, "" for `config`; None for another."""
  names, target = [], node.targets[0]
  while isinstance(target, ast.Attribute):
    names.insert(0, target.attr)
    target = target.value
  if isinstance(target, ast.Name) and target.id == "config":
    return ".".join(names)
  return None


def _is_section(node: ast.expr) -> bool:
  """A dictionary written one entry a line; on one line it is a value."""
  return (
    isinstance(node, ast.Dict)
    and bool(node.keys)
    and node.keys[0].lineno > node.lineno
  )


def _sentence(text: str) -> str:
  """Text with a capital and a full stop."""
  text = text.strip(" ;,")
  if not text:
    return ""
  return text[0].upper() + text[1:] + "." * (text[-1] not in ".!?")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested mappings as dotted names, for comparison with the fields."""
  out: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      out |= flat(value, f"{prefix}{name}.")
    else:
      out[prefix + name] = value
  return out
