"""Reads the rows of a data set from any source, with their line numbers.

A source is a path or a name, and after "#" the split (default "train"):

    FILE.jsonl, FILE.jsonl.gz, FILE.jsonl.xz, FILE.parquet
    DIRECTORY          what `datasets.Dataset.save_to_disk` left (of it or of
                       a dictionary of splits), or a prepared TFDS data set of
                       ArrayRecords
    hf:NAME[@REVISION][:CONFIG]
                       a data set of the Hugging Face hub, or a directory that
                       `datasets.load_dataset` reads
    tfds:NAME          a TFDS data set of ArrayRecords, made where need be

Rows are streamed; no file is held in memory as a whole. The data is untrusted:
none of its code runs, a data set cannot read files outside its directory, a
line has at most 16 MiB, and a row may hold only text valid in UTF-8, finite
numbers of at most 64 bits, and at most 32 levels of lists and objects.
"""

import gzip
import io
import json
import lzma
import math
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from opera_jax import hub

Read = Callable[[pathlib.Path], bytes]
LINE_BYTES = 2**24  # of a line of JSONL, once unpacked
LEVELS = 32  # of lists and objects in a row
_NUMBERS = 2**64
_TFDS_NAME = re.compile(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?")
_TFDS_FEATURES = "tensorflow_datasets.core.features."
_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
  ".jsonl": lambda source: source,
  ".gz": gzip.open,
  ".xz": lzma.open,
}
_SAVED = {"state.json", "dataset_dict.json"}  # of save_to_disk
_KINDS = (
  "a .jsonl (.gz, .xz) or .parquet file, a directory saved by save_to_disk or"
  " by TFDS, hf:NAME or tfds:NAME"
)


class RowError(ValueError):
  """A row that cannot be used; the others of its source can be read on.

  Attributes:
    reason: the rule that it breaks, without its values.
  """

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


def read(
  source: str,
  read_file: Read | None = None,
  bad: Callable[[int, RowError], None] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line or row, counted from 1; its columns).

  Args:
    source: see above.
    read_file: returns a file's bytes, such as `sharding.exchange.read_file`;
      None streams the file. Other kinds of data sets do not use it.
    bad: called with the line of a row that cannot be used, and the error; the
      row is left out. None raises the first.

  Raises:
    FileNotFoundError: no such file or directory.
    RowError: a row that is not a record or that holds forbidden values.
    ValueError: an unknown kind, a damaged file, an unknown name or split.
  """
  for line, row in _rows(source, read_file):
    try:
      if isinstance(row, bytes):
        row = _json_row(f"{source}:{line}:", row)
      check(f"{source}:{line}:", row)
    except RowError as error:
      if bad is None:
        raise
      bad(line, error)
      continue
    yield line, row


def check(place: str, row: Mapping[str, Any]) -> None:
  """Refuses values that would cause errors later, far from their file.

  Args:
    place: file and line, for the error.
    row: columns of a record.

  Raises:
    RowError: text that UTF-8 cannot write, a number that is not finite or has
      more than 64 bits, or too many levels.
  """
  waiting: list[tuple[str, Any, int]] = [
    (short(name), value, 1) for name, value in row.items()
  ]
  waiting += [("a column's name", name, 1) for name in row]
  while waiting:
    name, value, level = waiting.pop()
    wrong = _wrong(value, level)
    if wrong:
      raise RowError(
        "a value that no record may hold",
        f"{place} {name} holds {short(value)}, {wrong}. Mend or drop the row.",
      )
    if isinstance(value, Mapping):
      waiting += [(name, key, level + 1) for key in value]
      value = list(value.values())
    if isinstance(value, list | tuple):
      waiting += [(name, one, level + 1) for one in value]


def _wrong(value: Any, level: int) -> str:
  if level > LEVELS:
    return f"more than {LEVELS} levels deep"
  if isinstance(value, str):
    try:
      value.encode()
    except UnicodeEncodeError as error:
      return f"which must be text that UTF-8 can write ({error.reason})"
  if isinstance(value, float) and not math.isfinite(value):
    return "and numbers must be finite; leave out what is not known"
  if isinstance(value, int) and abs(value) >= _NUMBERS:
    return "and whole numbers have at most 64 bits; write longer ones as text"
  return ""


def _rows(source: str, read_file: Read | None) -> Iterator[tuple[int, Any]]:
  """Yields (line or row, its columns, or the bytes of a line of JSON)."""
  name, _, split = source.partition("#")
  for prefix, rows_of in SOURCES.items():
    if name.startswith(prefix):
      return rows_of(source, name.removeprefix(prefix), split or "train")
  # A file may have "#" in its name.
  path = pathlib.Path(source if pathlib.Path(source).exists() else name)
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file. Give {_KINDS}.")
  if path.is_dir():
    return _directory(source, path, split or "train")
  if path.suffix == ".parquet":
    return _parquet(path, read_file)
  packed = path.suffix in (".gz", ".xz")
  inner = path.with_suffix("").suffix if packed else path.suffix
  if inner != ".jsonl":
    raise ValueError(
      f"{path}: unknown kind of file; it must end in .jsonl, .jsonl.gz,"
      " .jsonl.xz or .parquet. Convert or rename it."
    )
  return _jsonl(path, read_file)


def short(value: Any) -> str:
  """Formats a value for an error message."""
  try:
    shown = repr(value[:80] if isinstance(value, str | bytes) else value)
  except (ValueError, RecursionError):  # a huge number or a deeply nested list
    shown = f"a {type(value).__name__}"
  return shown if len(shown) <= 60 else shown[:57] + "..."


def open_file(path: pathlib.Path, read_file: Read | None) -> BinaryIO:
  """Opens a file; streams it if `read_file` is None."""
  return open(path, "rb") if read_file is None else io.BytesIO(read_file(path))


def _jsonl(
  path: pathlib.Path, read_file: Read | None
) -> Iterator[tuple[int, bytes]]:
  line = 0
  opened = open_file(path, read_file)
  with opened as source, _OPENERS[path.suffix](source) as file:
    while True:
      line += 1
      try:
        raw = file.readline(LINE_BYTES + 1)
      except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
          f"{path}:{line}: the compressed file breaks off ({error}). Fetch or"
          " write it again."
        ) from error
      if not raw:
        return
      if len(raw) > LINE_BYTES:
        raise ValueError(
          f"{path}:{line}: the line is longer than {LINE_BYTES:,} bytes; no"
          " task is. Shorten or drop it."
        )
      if raw.strip():
        yield line, raw


def _json_row(place: str, raw: bytes) -> dict[str, Any]:
  try:
    row = json.loads(raw.decode("utf-8-sig"))
  except RecursionError as error:
    raise RowError(
      "not a line of JSON",
      f"{place} {short(raw)} has more than {LEVELS} levels of lists and"
      " objects. Mend or drop the line.",
    ) from error
  except ValueError as error:  # no UTF-8, no JSON, or a number without end
    raise RowError(
      "not a line of JSON",
      f"{place} {short(raw)} is not a line of JSON in UTF-8 ({error}). Mend"
      " or drop the line.",
    ) from error
  if not isinstance(row, dict):
    raise RowError(
      "no JSON object",
      f"{place} {short(row)} is no JSON object; each line must read"
      ' {"prompt": ..., "reference": ...}.',
    )
  return row


def _parquet(
  path: pathlib.Path, read_file: Read | None
) -> Iterator[tuple[int, dict[str, Any]]]:
  import pyarrow
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(open_file(path, read_file))
  except (pyarrow.ArrowInvalid, OSError) as error:
    raise ValueError(
      f"{path}: cannot be read as Parquet ({error}). Fetch or write it again."
    ) from error
  line = 0
  for batch in file.iter_batches(batch_size=1024):
    for row in batch.to_pylist():
      line += 1
      yield line, row


def _directory(
  source: str, path: pathlib.Path, split: str
) -> Iterator[tuple[int, dict[str, Any]]]:
  names = {child.name for child in path.iterdir()}
  if names & _SAVED:
    import datasets

    try:
      saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
      raise ValueError(
        f"{source}: cannot be read as a saved data set ({error}). Save it"
        " again with save_to_disk."
      ) from error
    if isinstance(saved, datasets.DatasetDict):
      saved = saved[_split(source, split, list(saved))]
    return enumerate(saved, start=1)
  if "features.json" in names:
    import tensorflow_datasets as tfds

    _check_features(source, path / "features.json")
    try:
      builder = tfds.builder_from_directory(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{source}: cannot be read as a TFDS data set ({error}). Prepare it"
        " again."
      ) from error
    return _records(source, builder, split)
  raise ValueError(
    f"{source}: a directory without {', '.join(sorted(_SAVED))} or"
    f" features.json. Give {_KINDS}."
  )


def _check_features(source: str, file: pathlib.Path) -> None:
  """Refuses feature classes other than TFDS's own, since TFDS would import
  them."""
  try:
    waiting = [json.loads(file.read_text("utf-8"))]
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{source}: {file.name} is not JSON ({error}). Prepare the data set"
      " again."
    ) from error
  while waiting:
    value = waiting.pop()
    if isinstance(value, dict):
      waiting += value.values()
      names = [value.get(key) for key in ("pythonClassName", "type")]
      # `type` may also be the name of a feature in a dict.
      for name in (one for one in names if isinstance(one, str)):
        if not name.startswith(_TFDS_FEATURES):
          raise ValueError(
            f"{source}: {file.name} names the class {name!r}. Only features of"
            " tensorflow_datasets itself are read, for reading another one"
            " runs its code. Write the data set anew with those."
          )
    elif isinstance(value, list):
      waiting += value


def _check_card(source: str, folder: pathlib.Path) -> None:
  """Refuses a directory whose dataset card names files outside of it."""
  import yaml
  from huggingface_hub import repocard

  card = folder / "README.md"
  try:
    head: Any = (repocard.metadata_load(card) or {}) if card.exists() else {}
  except (ValueError, OSError, yaml.YAMLError) as error:
    raise ValueError(
      f"{source}: the head of {card} is no YAML ({error}). Mend it."
    ) from error
  files, seen = [], set()
  waiting = [(head, False)]
  while waiting:
    value, names = waiting.pop()
    if isinstance(value, str) and names:
      files.append(value)
    if id(value) in seen:  # YAML may be cyclic
      continue
    if isinstance(value, dict):
      seen.add(id(value))
      waiting += [
        (inner, names or key in ("data_files", "data_dir"))
        for key, inner in value.items()
      ]
    elif isinstance(value, list):
      seen.add(id(value))
      waiting += [(inner, names) for inner in value]
  for name in files:
    parts = pathlib.PurePosixPath(name.replace("\\", "/"))
    if (
      "://" in name
      or "::" in name
      or parts.is_absolute()
      or ".." in (parts.parts)
    ):
      raise ValueError(
        f"{source}: {card} names {name!r}, which lies outside of the directory."
        " A card names files of its own directory. Mend it, or give the file."
      )


def _hugging_face(
  source: str, name: str, split: str
) -> Iterator[tuple[int, dict[str, Any]]]:
  import datasets

  name, _, config = name.partition(":")
  name, revision = hub.split(name)
  if pathlib.Path(name).is_dir():
    _check_card(source, pathlib.Path(name))
  try:
    rows = datasets.load_dataset(
      name, config or None, split=split, revision=revision
    )
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{source}: the data set cannot be loaded ({error}). Check the name, the"
      " configuration (hf:NAME:CONFIG) and the split (#SPLIT), or save it where"
      " there is a network with save_to_disk and give the directory."
    ) from error
  return enumerate(rows, start=1)


def _tfds(
  source: str, name: str, split: str
) -> Iterator[tuple[int, dict[str, Any]]]:
  import tensorflow_datasets as tfds

  if not _TFDS_NAME.fullmatch(name):
    raise ValueError(
      f"{source}: {name!r} is not the name of a TFDS data set, such as 'gsm8k'"
      " or 'wiki40b/en:1.3.0'; community data sets run code and are not read."
    )
  try:
    builder = tfds.builder(name, file_format="array_record")
    builder.download_and_prepare()
  except (
    ImportError,
    OSError,
    ValueError,
    tfds.core.DatasetNotFoundError,
  ) as error:
    raise ValueError(
      f"{source}: the data set cannot be made ({error}). Check the name, or"
      " give the directory of a prepared one."
    ) from error
  return _records(source, builder, split)


def _records(
  source: str, builder: Any, split: str
) -> Iterator[tuple[int, dict[str, Any]]]:
  split = _split(source, split, list(builder.info.splits))
  if builder.info.file_format.value != "array_record":
    raise ValueError(
      f"{source}: its records are {builder.info.file_format.value}; only"
      " array_record is read without TensorFlow. Prepare it with"
      " file_format='array_record'."
    )
  for line, row in enumerate(builder.as_data_source(split=split), start=1):
    yield line, {name: _plain(value) for name, value in row.items()}


def _split(source: str, split: str, known: list[str]) -> str:
  if split not in known:
    raise ValueError(
      f"{source}: no split {split!r}; it has {known}. Put one after '#', as in"
      f" {source.partition('#')[0]}#{known[0] if known else 'SPLIT'}."
    )
  return split


def _plain(value: Any) -> Any:
  """Converts TFDS's bytes and numpy values to Python values."""
  if isinstance(value, bytes):
    return value.decode("utf-8", errors="surrogateescape")
  if isinstance(value, np.ndarray | np.generic):
    return _plain(value.tolist())
  if isinstance(value, dict):
    return {name: _plain(one) for name, one in value.items()}
  if isinstance(value, list):
    return [_plain(one) for one in value]
  return value


# Prefix of a source -> function of (source for errors, name, split) that yields
# (row number from 1, columns). CONTRIBUTING.md shows how to add one.
SOURCES: dict[
  str, Callable[[str, str, str], Iterator[tuple[int, dict[str, Any]]]]
] = {"hf:": _hugging_face, "tfds:": _tfds}
