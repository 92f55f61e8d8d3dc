"""Loads prompts and their references, and checks each row."""

import collections
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import regex

from opera_jax import atomic_file, structs
from opera_jax.data import rows
from opera_jax.text import math_answer, words
from opera_jax.text import tokenizer as tokenizer_lib

TASKS = ("open_ended", "math")
FIELDS = {
  "prompt": "prompt",
  "reference": "reference",
  "task": "task",
  "id": "id",
}
# The final number of a GSM8K answer: the line behind the last "####". The
# pattern runs in time linear in the text.
GSM8K_ANSWER = r"(?s)\A.*####\s*+(\S[^\n]*+)"
# Seconds that a pattern may search one reference.
_SEARCH = 1.0
_SLOW = "a reference that takes too long to search"


def load(
  path: str | os.PathLike,
  fields: Mapping[str, str | None] = FIELDS,
  task_map: Mapping[str, str] | None = None,
  default_task: str | None = None,
  limit: int | None = None,
  answer_pattern: str | None = None,
  read: rows.Read | None = None,
  require_reference: bool = True,
  seen: Callable[[Mapping[str, Any]], None] | None = None,
) -> list[structs.Prompt]:
  r"""Reads a data set; one error names all invalid rows by reason and place.

  Args:
    path: a file or another source, see `rows`.
    fields: maps our field ("prompt", "reference", "task", "id") to the file's
      column. A task or id may be None, "" or left out; the id is then "line-N".
      Columns that are not named are stored in `Prompt.columns`.
    task_map: maps the file's task to ours; "*" matches every other one. None
      means that the file already uses "open_ended" and "math".
    default_task: task of rows that have none, or one that `task_map` does not
      lead to ours. None means "open_ended" for a data set without that column;
      beside rows that have one, a row without is invalid.
    limit: maximum number of rows to read; None reads all.
    answer_pattern: regular expression whose first group, found in the
      reference, is the true answer of a maths task, such as `GSM8K_ANSWER`; the
      whole reference is then stored in `Prompt.columns["solution"]`. The search
      in one reference times out after a second.
    read: returns a file's bytes, such as `sharding.exchange.read_file`; None
      streams the file.
    require_reference: False allows open-ended tasks without a reference; it is
      then "". The column may be None, "" or left out of `fields`.
    seen: called with every row, such as `digest.Source.row`.

  Returns:
    The prompts, in the file's order.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a malformed row, a missing or empty field, a maths reference
      without an answer (see `math_answer.of_reference`) or one that takes too
      long to search, an unknown task, an id given twice, no row at all, an
      unknown suffix or field name, an answer pattern that is no regular
      expression with a group.
  """
  path = os.fspath(path)
  needed = ("prompt", "reference") if require_reference else ("prompt",)
  if set(fields) - set(FIELDS) or not all(map(fields.get, needed)):
    raise ValueError(
      f"fields is {dict(fields)}; its keys must be among {list(FIELDS)}, with"
      f" {' and '.join(needed)} each naming a column."
    )
  columns = {name: column or None for name, column in fields.items()}
  pattern = None if answer_pattern is None else _compiled(answer_pattern)
  prompts: list[structs.Prompt] = []
  line_of_id: dict[str, int] = {}
  faults = _Faults()
  taskless: list[int] = []  # lines without the task's column
  task_column, has_tasks = columns.get("task"), False
  for line, row in rows.read(path, read, faults.add):
    if limit is not None and len(prompts) >= limit:
      break
    if seen is not None:
      seen(row)
    place = f"{path}:{line}:"
    has_tasks = has_tasks or task_column in row
    try:
      prompt = _prompt(
        place,
        line,
        row,
        columns,
        task_map,
        default_task,
        pattern,
        require_reference,
      )
      if prompt.id in line_of_id:
        raise rows.RowError(
          "an id that another row has",
          f"{place} id {prompt.id!r} was given on line {line_of_id[prompt.id]}"
          " already; ids must be distinct. Rename one, or set the id field to"
          " None to number the lines.",
        )
    except rows.RowError as error:
      faults.add(line, error)
      if error.reason == _SLOW:
        break  # every further row may take as long
      continue
    line_of_id[prompt.id] = line
    prompts.append(prompt)
    if default_task is None and task_column not in row:
      taskless.append(line)
  if has_tasks:
    for line in taskless:
      faults.add(line, _unknown_task(f"{path}:{line}:", None, task_map))
  faults.check(path)
  if not prompts:
    raise ValueError(
      f"{path}:1: no rows read (limit is {limit}); a data set needs at least"
      " one. Check the path and the limit."
    )
  return prompts


class _Faults:
  """Counts invalid rows by reason, and keeps the first lines of each."""

  _SHOWN = 3  # lines of each reason

  def __init__(self) -> None:
    self._count: collections.Counter[str] = collections.Counter()
    self._first: dict[str, ValueError] = {}
    self._lines: dict[str, list[int]] = {}

  def add(self, line: int, error: rows.RowError) -> None:
    """Counts one invalid row."""
    self._count[error.reason] += 1
    self._first.setdefault(error.reason, error)
    lines = self._lines.setdefault(error.reason, [])
    if len(lines) < self._SHOWN:
      lines.append(line)

  def check(self, path: str) -> None:
    """Raises one error that names all reasons, if there are invalid rows."""
    total = self._count.total()
    if not total:
      return
    if total == 1:
      raise next(iter(self._first.values()))
    listed = []
    for reason, count in self._count.most_common():
      listed.append(f"  {count:,} x {reason}: {self._first[reason]}")
      places = [f"{path}:{line}" for line in self._lines[reason][1:]]
      more = count - 1 - len(places)
      if places:
        listed.append(
          f"    also {', '.join(places)}" + f" and {more:,} more" * (more > 0)
        )
    raise ValueError(
      f"{path}: {total:,} rows cannot be used:\n" + "\n".join(listed)
    )


def _prompt(
  place: str,
  line: int,
  row: Mapping[str, Any],
  fields: Mapping[str, str | None],
  task_map: Mapping[str, str] | None,
  default_task: str | None,
  answer_pattern: regex.Pattern | None,
  require_reference: bool,
) -> structs.Prompt:
  prompt = _text(place, row, "prompt", fields["prompt"])
  task = _task(place, row, fields.get("task"), task_map, default_task)
  column, reference = fields.get("reference"), ""
  needed = require_reference or task == "math"
  if needed or not _blank(row, column):
    reference = _text(place, row, "reference", column)
  solution = {}
  if task == "math" and answer_pattern is not None:
    try:
      hit = answer_pattern.search(reference, timeout=_SEARCH)
    except TimeoutError as error:
      raise rows.RowError(
        _SLOW,
        f"{place} reference {rows.short(reference)} of {len(reference):,} "
        f"characters takes longer than {_SEARCH:g} s to search for "
        f"{answer_pattern.pattern!r}. Mend the row, or write answer_pattern "
        "so that it does not backtrack, as GSM8K_ANSWER does.",
      ) from error
    if hit is None or not (hit.group(1) or "").strip():
      raise rows.RowError(
        "no answer in the reference",
        f"{place} reference {rows.short(reference)} holds no answer that"
        f" matches {answer_pattern.pattern!r}. Mend the row or change"
        " answer_pattern.",
      )
    solution = {"solution": reference}
    reference = hit.group(1).strip()
  if task == "math":
    try:
      math_answer.of_reference(reference)
    except ValueError as error:
      raise rows.RowError(
        "no answer in the reference", f"{place} {error}"
      ) from error
  column = fields.get("id")
  identity = row.get(column) if column is not None else None
  if isinstance(identity, bool) or not isinstance(
    identity, str | int | type(None)
  ):
    raise rows.RowError(
      "an id of another type",
      f"{place} id is {rows.short(identity)}; an id is text or a whole number."
      " Mend the row, or set the id field to None to number the lines.",
    )
  used = {name for name in fields.values() if name is not None}
  return structs.Prompt(
    id=f"line-{line}" if identity in (None, "") else str(identity),
    task=task,
    prompt=prompt,
    reference=reference,
    columns={name: value for name, value in row.items() if name not in used}
    | solution,
  )


def _compiled(pattern: str) -> regex.Pattern:
  try:
    compiled = regex.compile(pattern)
  except regex.error as error:
    raise ValueError(
      f"answer_pattern {pattern!r} is no regular expression ({error}). Correct "
      "config.data.math_answer."
    ) from error
  if not compiled.groups:
    raise ValueError(
      f"answer_pattern {pattern!r} has no group, whose text would be the "
      "answer. Put round brackets around that part of config.data.math_answer."
    )
  return compiled


def _blank(row: Mapping[str, Any], column: str | None) -> bool:
  """Whether the column is None, missing or empty."""
  if column is None:
    return True
  value = row.get(column, column)
  return value is None or (isinstance(value, str) and not value.strip())


def _text(
  place: str, row: Mapping[str, Any], field: str, column: str | None
) -> str:
  if column is None or column not in row:
    raise rows.RowError(
      f"no column for the {field}",
      f"{place} no column {column!r} for the {field}; the row has"
      f" {rows.short(sorted(row))}. Add it, or name the right column in"
      " fields.",
    )
  value = row[column]
  if not isinstance(value, str):
    raise rows.RowError(
      f"the {field} is not text",
      f"{place} {column!r} is {rows.short(value)}; the {field} must be text."
      " Quote it, or name another column in fields.",
    )
  if not value.strip():
    raise rows.RowError(
      f"the {field} is empty",
      f"{place} {column!r} is empty; the {field} must hold text. Fill it in or"
      " drop the row.",
    )
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise rows.RowError(
      f"the {field} is not text",
      f"{place} {column!r} is {rows.short(value)}; the {field} must be text"
      f" that UTF-8 can write ({error.reason}). Mend or drop the row.",
    ) from error
  return value


def _task(
  place: str,
  row: Mapping[str, Any],
  column: str | None,
  task_map: Mapping[str, str] | None,
  default_task: str | None,
) -> str:
  given = row.get(column) if column is not None else None
  if given is None:
    # A data set without this column is open-ended, see `load`.
    task = "open_ended" if column not in row else None
    task = default_task or task
  elif task_map is None:
    task = given
  else:
    task = task_map.get(str(given), task_map.get("*", given))
  if task not in TASKS and default_task is not None:
    task = default_task
  if task not in TASKS:
    raise _unknown_task(place, given, task_map)
  return task


def _unknown_task(
  place: str,
  given: Any,
  task_map: Mapping[str, str] | None,
) -> rows.RowError:
  reason = "no task, which other rows have" if given is None else "unknown task"
  return rows.RowError(
    reason,
    f"{place} task is {rows.short(given)}; it must become one of"
    f" {', '.join(TASKS)}. Map it in config.data.task_map (now"
    f" {dict(task_map or {})}), or take all such rows as one task:"
    " --config.data.default_task=open_ended.",
  )


def row(prompt: structs.Prompt, **more: Any) -> dict[str, Any]:
  """Converts a prompt to a row that `load` can read; `more` overrides
  fields."""
  fields = {name: getattr(prompt, name) for name in ("id", *FIELDS)}
  return fields | prompt.columns | fields | more


def write(path: str | os.PathLike, lines: Iterable[Mapping[str, Any]]) -> None:
  """Writes rows as JSONL, atomically."""
  # A lone surrogate is written as its JSON escape.
  with atomic_file.replacing(path, errors="backslashreplace") as file:
    for line in lines:
      file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def token_lengths(
  prompts: Sequence[structs.Prompt], tokenizer: tokenizer_lib.Tokenizer
) -> list[tuple[int, int]]:
  """Returns the number of tokens of each chat prompt and of its reference."""
  references = tokenizer.encode_many([prompt.reference for prompt in prompts])
  return [
    (len(tokenizer.chat_prompt(prompt.prompt)), len(reference))
    for prompt, reference in zip(prompts, references)
  ]


def filter_by_length(
  prompts: Sequence[structs.Prompt],
  lengths: Sequence[tuple[int, int]],
  max_prompt_tokens: int,
  max_reference_tokens: int,
  *,
  require_reference: bool = True,
) -> tuple[list[structs.Prompt], dict[str, int]]:
  """Drops prompts that do not fit, and counts them.

  Args:
    prompts: the prompts.
    lengths: their `token_lengths`.
    max_prompt_tokens: maximum tokens of the chat prompt.
    max_reference_tokens: maximum tokens of the reference.
    require_reference: whether a prompt without a reference is an error.

  Returns:
    (kept prompts, counts: "kept", "prompt_too_long", "reference_too_long"). A
    prompt that exceeds both limits counts as "prompt_too_long".

  Raises:
    ValueError: a reference has zero tokens, or no prompt fits.
  """
  kept = []
  counts = {"kept": 0, "prompt_too_long": 0, "reference_too_long": 0}
  for prompt, (length, reference) in zip(prompts, lengths, strict=True):
    if not reference and (require_reference or prompt.reference):
      raise ValueError(
        f"Prompt {prompt.id!r}: its reference {rows.short(prompt.reference)}"
        " has zero tokens, so it has no probability. Fill it in or drop the"
        " row."
      )
    if length > max_prompt_tokens:
      counts["prompt_too_long"] += 1
    elif reference > max_reference_tokens:
      counts["reference_too_long"] += 1
    else:
      counts["kept"] += 1
      kept.append(prompt)
  if prompts and not kept:
    most = np.quantile(np.asarray(lengths), 0.9, axis=0).astype(int)
    raise ValueError(
      f"None of {len(prompts)} prompts fits: {counts['prompt_too_long']} are"
      f" longer than config.max_prompt_tokens = {max_prompt_tokens}, and of the"
      f" others the references than config.max_reference_tokens ="
      f" {max_reference_tokens}. Nine of ten prompts have up to {most[0]}"
      f" tokens, nine of ten references up to {most[1]}. Raise the limits, or"
      " shorten references to so many words with config.data.excerpt_words."
    )
  return kept, counts


def split(
  prompts: Sequence[structs.Prompt],
  held_out: int,
  seed: int,
  *,
  groups: Sequence[str] | None = None,
  exact: bool = True,
) -> tuple[list[structs.Prompt], list[structs.Prompt]]:
  """Splits off held-out prompts by a hash of their text.

  A prompt's rank depends on its text and the seed alone, so the order of the
  file does not matter. Prompts that differ only in case, width or spacing are
  the same question, and go to the same side.

  Args:
    prompts: the prompts.
    held_out: number of prompts to hold out.
    seed: any int.
    groups: a group name for each prompt, such as its cluster of
      near-duplicates; a group is never split. None groups by text, see
      `words.normal`.
    exact: False holds out fewer prompts where whole groups do not add up.

  Returns:
    (training prompts, `held_out` prompts), each in the given order.

  Raises:
    ValueError: held_out is negative or leaves nothing to train on, or no set of
      whole groups has exactly that many prompts.
  """
  if not 0 <= held_out < len(prompts):
    raise ValueError(
      f"held_out is {held_out} of {len(prompts)} prompts; it must be at least"
      " 0 and leave one to train on. Lower it."
    )
  if groups is None:
    groups = [words.normal(prompt.prompt) for prompt in prompts]
  count = collections.Counter(groups)

  def rank(name: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{name}".encode()).digest()

  aside, left = set(), held_out
  for name in sorted(count, key=rank):
    if count[name] <= left:
      aside.add(name)
      left -= count[name]
  if left and exact:
    raise ValueError(
      f"{held_out} prompts cannot be held out whole: prompts that say the same"
      f" stay together and {left} places remain. Choose another number."
    )
  pairs = list(zip(prompts, groups, strict=True))
  train = [prompt for prompt, name in pairs if name not in aside]
  test = [prompt for prompt, name in pairs if name in aside]
  return train, test
