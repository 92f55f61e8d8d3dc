"""Rows of a data set, wherever it lies, with the place of each.

A source is a path or a name, and after "#" the split (default "train"):

    FILE.jsonl, FILE.jsonl.gz, FILE.jsonl.xz, FILE.parquet
    DIRECTORY          what `datasets.Dataset.save_to_disk` left (of it or of
                       a dictionary of splits), or a prepared TFDS data set of
                       ArrayRecords
    hf:NAME[:CONFIG]   a data set of the Hugging Face hub, or a directory that
                       `datasets.load_dataset` reads
    tfds:NAME          a TFDS data set of ArrayRecords, made where need be

Rows come one by one; nothing holds a whole file.
"""

import gzip
import io
import json
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

Read = Callable[[pathlib.Path], bytes]
_OPENERS = {
  ".jsonl": lambda source: source,
  ".gz": gzip.open,
  ".xz": lzma.open,
}
_SAVED = {"state.json", "dataset_dict.json"}  # of save_to_disk
_KINDS = (
  "a .jsonl (.gz, .xz) or .parquet file, a directory saved by save_to_disk or"
  " by TFDS, hf:NAME or tfds:NAME"
)


def read(
  source: str, read_file: Read | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line or row, counted from 1; its columns).

  Args:
    source: see above.
    read_file: gives a file's bytes, such as `sharding.exchange.read`; None
      streams the file. Data sets of the other kinds are read in place.

  Raises:
    FileNotFoundError: no such file or directory.
    ValueError: a kind that is not read, a broken file, a row that is no
      record, a name or a split that is not there.
  """
  name, _, split = source.partition("#")
  if name.startswith("hf:"):
    return _hugging_face(source, name.removeprefix("hf:"), split or "train")
  if name.startswith("tfds:"):
    return _tfds(source, name.removeprefix("tfds:"), split or "train")
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
  """A value as an error shows it."""
  shown = repr(value)
  return shown if len(shown) <= 60 else shown[:57] + "..."


def open_file(path: pathlib.Path, read_file: Read | None) -> BinaryIO:
  """The bytes of a file, streamed where `read_file` is None."""
  return open(path, "rb") if read_file is None else io.BytesIO(read_file(path))


def _jsonl(
  path: pathlib.Path, read_file: Read | None
) -> Iterator[tuple[int, dict[str, Any]]]:
  line = 0
  opened = open_file(path, read_file)
  with opened as source, _OPENERS[path.suffix](source) as file:
    while True:
      line += 1
      try:
        raw = file.readline()
      except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
          f"{path}:{line}: the compressed file breaks off ({error}). Fetch or"
          " write it again."
        ) from error
      if not raw:
        return
      if raw.strip():
        yield line, _json_row(f"{path}:{line}:", raw)


def _json_row(place: str, raw: bytes) -> dict[str, Any]:
  try:
    row = json.loads(raw.decode("utf-8-sig"))
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(
      f"{place} {short(raw)} is not a line of JSON in UTF-8 ({error}). Mend"
      " or drop the line."
    ) from error
  if not isinstance(row, dict):
    raise ValueError(
      f"{place} {short(row)} is no JSON object; each line must read"
      ' {"prompt": ..., "reference": ...}.'
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


def _directory(source: str, path: pathlib.Path, split: str):
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

    return _records(source, tfds.builder_from_directory(path), split)
  raise ValueError(
    f"{source}: a directory without {', '.join(sorted(_SAVED))} or"
    f" features.json. Give {_KINDS}."
  )


def _hugging_face(source: str, name: str, split: str):
  import datasets

  name, _, config = name.partition(":")
  try:
    rows = datasets.load_dataset(name, config or None, split=split)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{source}: the data set cannot be loaded ({error}). Check the name, the"
      " configuration (hf:NAME:CONFIG) and the split (#SPLIT), or save it where"
      " there is a network with save_to_disk and give the directory."
    ) from error
  return enumerate(rows, start=1)


def _tfds(source: str, name: str, split: str):
  import tensorflow_datasets as tfds

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


def _records(source: str, builder: Any, split: str):
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
  """TFDS's bytes and numpy scalars as Python has them."""
  if isinstance(value, bytes):
    return value.decode("utf-8", errors="surrogateescape")
  if isinstance(value, np.ndarray | np.generic):
    return _plain(value.tolist())
  if isinstance(value, dict):
    return {name: _plain(one) for name, one in value.items()}
  if isinstance(value, list):
    return [_plain(one) for one in value]
  return value
