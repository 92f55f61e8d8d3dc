"""Reads and writes synthesised traces, as JSONL and as a TFDS data set.

`write` creates in its folder

    traces.jsonl                   every trace, read back by `read`
    tfds/traces/1.0.0/             `tfds.builder_from_directory` reads it
    README.md                      the data set's card
    FILES.json                     bytes of each file, for `damage`

Reading and writing stream the traces, so a set may be larger than memory.
Neither needs TensorFlow. Without it TFDS has no ragged lists of text, so the
candidates of all rounds are in one list, each with its round. TFDS rounds
perplexities to float32; JSONL does not.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from opera_jax import atomic_file
from opera_jax.data import digest

JSONL = "traces.jsonl"
TFDS = pathlib.Path("tfds", "traces", "1.0.0")
CARD, FILES = "README.md", "FILES.json"
_VERSION = "1.0.0"
_BATCH = 64  # traces in memory at a time

Card = Callable[[Mapping[str, int]], str]  # counts by status -> README.md


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One candidate step of a round."""

  text: str  # starts with the trigger
  perplexity: float  # exp(-mean log p), which the search compared
  tokens: int  # tokens of the candidate, including the trigger


@dataclasses.dataclass(frozen=True)
class Round:
  """One round of the search: the stop word and its candidate continuations."""

  trigger: str  # the reflection word at which the thought was stopped
  kept: int  # index of the candidate that was kept
  candidates: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
  """A synthesised thought and answer of a prompt, with the search's rounds."""

  id: str
  prompt: str
  reference: str
  thought: str  # between the think tags
  answer: str
  completion: np.ndarray  # [T] int32, <think> to the end of the turn
  rounds: tuple[Round, ...]
  status: str  # "complete", or why the trace is not
  forced: bool = False  # the thought was closed by force, not by the model

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Trace) and _to_json(self) == _to_json(other)


def _to_json(trace: Trace) -> dict[str, Any]:
  row = {
    field.name: getattr(trace, field.name)
    for field in dataclasses.fields(trace)
  }
  if not trace.forced:
    del row["forced"]
  row["completion"] = [int(token) for token in trace.completion]
  row["rounds"] = [dataclasses.asdict(round_) for round_ in trace.rounds]
  return row


def to_line(trace: Trace) -> str:
  """Serialises a trace as a line of JSONL, with the newline.

  Raises:
    ValueError: a round's kept index is out of range, or a perplexity is not
      finite.
  """
  for number, round_ in enumerate(trace.rounds):
    logprobs = [one.perplexity for one in round_.candidates]
    if not 0 <= round_.kept < len(logprobs) or not np.isfinite(logprobs).all():
      raise ValueError(
        f"Trace {trace.id!r}, round {number}: kept {round_.kept} of the"
        f" perplexities {logprobs}; it must be an index of them, and each must"
        " be finite. Look for NaN in the log-probabilities."
      )
  row = json.dumps(_to_json(trace), ensure_ascii=False, allow_nan=False)
  return row + "\n"


def from_line(place: str, line: str) -> Trace:
  """Parses a line that `to_line` wrote.

  Args:
    place: file and line, for the error.
    line: one line.

  Raises:
    ValueError: the line is malformed or truncated.
  """
  try:
    if not line.endswith("\n"):
      raise ValueError("it does not end, so it was cut short")
    row = json.loads(line)
    rounds = tuple(
      Round(
        trigger=round_["trigger"],
        kept=round_["kept"],
        candidates=tuple(Candidate(**one) for one in round_["candidates"]),
      )
      for round_ in row.pop("rounds")
    )
    completion = np.asarray(row.pop("completion"), np.int32)
    return Trace(**row, completion=completion, rounds=rounds)
  except (
    *(KeyError, TypeError, AttributeError, ValueError),
    *(OverflowError, RecursionError),
  ) as error:
    raise ValueError(
      f"{place} {line[:60]!r} is no trace ({error!r}); a line is what"
      " traces.write writes. Synthesise the set again."
    ) from error


def write(
  directory: str | os.PathLike,
  traces: Iterable[Trace],
  *,
  description: str = "",
  card: Card | None = None,
  max_examples_per_shard: int = 1000,
) -> dict[str, int]:
  """Writes the set atomically; replaces an older one.

  Args:
    directory: folder to create; it appears once everything is written. Only one
      process at a time may write it.
    traces: at least one, with distinct ids; consumed in small batches.
    description: stored in the TFDS data set.
    card: builds README.md from the number of traces per status.
    max_examples_per_shard: traces per ArrayRecord file.

  Returns:
    The number of traces per status.

  Raises:
    ValueError: no trace, an id given twice, or a trace that `to_line` refuses.
    FileExistsError: the folder exists and holds something else.
  """
  directory = pathlib.Path(directory)
  if directory.exists() and not (directory / JSONL).exists():
    raise FileExistsError(
      f"{directory} exists and holds no {JSONL}; it is not replaced. Name"
      " another folder, or remove it."
    )
  counts: collections.Counter[str] = collections.Counter()
  seen: set[str] = set()
  with _created_atomically(directory) as folder:
    shards = _Shards(folder / TFDS, description, max_examples_per_shard)
    with open(folder / JSONL, "w", encoding="utf-8") as file:
      coming = iter(traces)
      while some := list(itertools.islice(coming, _BATCH)):
        for trace in some:
          if trace.id in seen:
            raise ValueError(
              f"Trace id {trace.id!r} is given twice; ids must be distinct."
            )
          seen.add(trace.id)
          counts[trace.status] += 1
          file.write(to_line(trace))
        shards.add(some)
    if not seen:
      raise ValueError(
        "No trace to write; a set holds at least one. See the counts of"
        " rejected traces, and loosen the filters or synthesise more."
      )
    shards.close()
    if card is not None:
      (folder / CARD).write_text(card(counts), encoding="utf-8")
    _seal(folder)
  return dict(sorted(counts.items()))


def read(directory: str | os.PathLike) -> Iterator[Trace]:
  """Yields the traces of a set from its JSONL.

  Raises:
    FileNotFoundError: no such set.
    ValueError: while it is read, a line that is no trace.
  """
  path = pathlib.Path(directory) / JSONL
  if not path.exists():
    raise FileNotFoundError(
      f"{path}: no synthesised set. Run the stage that synthesises first."
    )
  return _lines(path)


def _lines(path: pathlib.Path) -> Iterator[Trace]:
  with open(path, encoding="utf-8", newline="\n") as file:
    for number, line in enumerate(file, start=1):
      yield from_line(f"{path}:{number}:", line)


def digest_of(directory: str | os.PathLike) -> str | None:
  """SHA-256 of the JSONL file; None if there is no set."""
  path = pathlib.Path(directory) / JSONL
  return digest.file(path) if path.exists() else None


def damage(directory: str | os.PathLike) -> str:
  """Describes what is missing or truncated in a set; "" if it is intact."""
  directory = pathlib.Path(directory)
  listing = directory / FILES
  if not listing.exists():
    return f"{listing} is missing"
  try:
    sizes = json.loads(listing.read_bytes().decode())
  except (ValueError, OSError, RecursionError) as error:
    return f"{listing} cannot be read as JSON ({error})"
  if not isinstance(sizes, dict) or JSONL not in sizes:
    return f"{listing} is no list of files with their sizes"
  for name, size in sizes.items():
    path = directory / name
    found = path.stat().st_size if path.is_file() else 0
    if found != size:
      return f"{path} has {found} bytes of {size}"
  return ""


def sync(path: pathlib.Path) -> None:
  """Calls fsync on a file or a folder."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _seal(folder: pathlib.Path) -> None:
  """Writes the list of files with sizes, and syncs everything to disk."""
  files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  sizes = {str(p.relative_to(folder)): p.stat().st_size for p in files}
  atomic_file.write(folder / FILES, json.dumps(sizes, indent=1))
  for path in (*folder.rglob("*"), folder):
    sync(path)


@contextlib.contextmanager
def _created_atomically(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary folder that is renamed to `directory` on success.

  Leftovers of a killed writer are removed first.
  """
  directory.parent.mkdir(parents=True, exist_ok=True)
  folder = directory.with_name(f".{directory.name}.partial")
  old = directory.with_name(f".{directory.name}.old")
  for left in (folder, old):
    shutil.rmtree(left, ignore_errors=True)
  folder.mkdir()
  try:
    yield folder
    if directory.exists():
      # A non-empty folder cannot be replaced by a rename, so it is moved aside
      # first.
      directory.rename(old)
    folder.rename(directory)
    sync(directory.parent)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


class _Shards:
  """Writes the TFDS data set, one ArrayRecord after another."""

  def __init__(
    self, folder: pathlib.Path, description: str, max_examples_per_shard: int
  ):
    import tensorflow_datasets as tfds

    folder.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
      name="traces",
      version=tfds.core.Version(_VERSION),
      data_dir=str(folder),
      module_name=__name__,
    )
    info = tfds.core.DatasetInfo(
      builder=identity, features=_features(), description=description
    )
    self._writer = tfds.core.SequentialWriter(
      info,
      max_examples_per_shard=max_examples_per_shard,
      file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
    self._writer.initialize_splits(["train"])

  def add(self, traces: Iterable[Trace]) -> None:
    self._writer.add_examples({"train": [_to_example(t) for t in traces]})

  def close(self) -> None:
    self._writer.close_all()


def _features() -> Any:
  import tensorflow_datasets as tfds

  text = tfds.features.Text
  return tfds.features.FeaturesDict(
    {
      "id": text(),
      "prompt": text(),
      "reference": text(),
      "thought": text(),
      "answer": text(),
      "status": text(),
      "completion": tfds.features.Sequence(np.int32),
      "rounds": tfds.features.Sequence({"trigger": text(), "kept": np.int32}),
      "candidates": tfds.features.Sequence(
        {
          "round": np.int32,
          "kept": np.bool_,
          "text": text(),
          "perplexity": np.float32,
          "tokens": np.int32,
        }
      ),
    }
  )


def _to_example(trace: Trace) -> dict[str, Any]:
  names = ("id", "prompt", "reference", "thought", "answer", "status")
  return {name: getattr(trace, name) for name in names} | {
    "completion": np.asarray(trace.completion, np.int32),
    "rounds": [
      {"trigger": round_.trigger, "kept": round_.kept}
      for round_ in trace.rounds
    ],
    "candidates": [
      {
        "round": number,
        "kept": place == round_.kept,
        "text": one.text,
        "perplexity": one.perplexity,
        "tokens": one.tokens,
      }
      for number, round_ in enumerate(trace.rounds)
      for place, one in enumerate(round_.candidates)
    ],
  }
