"""The synthesised traces, as JSONL and as a TFDS data set of ArrayRecords.

`write` leaves in its folder

    traces.jsonl                   every trace, read back by `read`
    tfds/traces/1.0.0/             `tfds.builder_from_directory` reads it

TensorFlow is needed for neither. Without it TFDS holds no ragged lists of
text, so the candidates of all rounds stand in one list, each with its round.
TFDS rounds perplexities to float32; the JSONL does not.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

JSONL = "traces.jsonl"
TFDS = pathlib.Path("tfds", "traces", "1.0.0")
_VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One candidate step of a round."""

  text: str  # opens with the trigger
  perplexity: float  # exp(-mean log p), what the search compared
  tokens: int  # tokens of the candidate, trigger included


@dataclasses.dataclass(frozen=True)
class Round:
  """One brake of the search: the trigger and what could follow it."""

  trigger: str  # the reflection word at which the thought was stopped
  kept: int  # index of the candidate that was kept
  candidates: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
  """A thought and an answer made for a prompt, and how the search went."""

  id: str
  prompt: str
  reference: str
  thought: str  # between the think tags
  answer: str
  completion: np.ndarray  # [T] int32, <think> to <|im_end|>
  rounds: tuple[Round, ...]
  status: str  # "complete", or why the trace is not

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Trace) and _to_json(self) == _to_json(other)


def _to_json(trace: Trace) -> dict[str, Any]:
  row = {
    field.name: getattr(trace, field.name)
    for field in dataclasses.fields(trace)
  }
  row["completion"] = [int(token) for token in trace.completion]
  row["rounds"] = [dataclasses.asdict(round_) for round_ in trace.rounds]
  return row


def _from_json(place: str, line: str) -> Trace:
  try:
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
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise ValueError(
      f"{place} {line[:60]!r} is no trace ({error!r}); a line is what"
      " traces.write writes. Synthesise the set again."
    ) from error


def write(
  directory: str | os.PathLike,
  traces: Sequence[Trace],
  *,
  description: str = "",
  max_examples_per_shard: int = 1000,
) -> None:
  """Writes the set, whole or not at all; an older one is replaced.

  Args:
    directory: folder to make; it appears once all is written.
    traces: at least one, with distinct ids.
    description: goes into the TFDS data set.
    max_examples_per_shard: traces of an ArrayRecord file.

  Raises:
    ValueError: no trace, an id given twice, a round that keeps a candidate it
      does not have, or a perplexity that is no finite number.
    FileExistsError: the folder exists and holds something else.
  """
  _check(traces)
  directory = pathlib.Path(directory)
  if directory.exists() and not (directory / JSONL).exists():
    raise FileExistsError(
      f"{directory} exists and holds no {JSONL}; it is not replaced. Name"
      " another folder, or remove it."
    )
  with _appearing(directory) as folder:
    with open(folder / JSONL, "w", encoding="utf-8") as file:
      for trace in traces:
        row = json.dumps(_to_json(trace), ensure_ascii=False, allow_nan=False)
        file.write(row + "\n")
    _write_tfds(folder / TFDS, traces, description, max_examples_per_shard)


def read(directory: str | os.PathLike) -> list[Trace]:
  """Reads what `write` wrote, from the JSONL.

  Raises:
    FileNotFoundError: no such set.
    ValueError: a line is no trace.
  """
  path = pathlib.Path(directory) / JSONL
  if not path.exists():
    raise FileNotFoundError(
      f"{path}: no synthesised set. Run the stage that synthesises first."
    )
  with open(path, encoding="utf-8", newline="\n") as file:
    return [
      _from_json(f"{path}:{number}:", line)
      for number, line in enumerate(file, start=1)
    ]


def _check(traces: Sequence[Trace]) -> None:
  if not traces:
    raise ValueError(
      "No trace to write; a set holds at least one. See the counts of rejected"
      " traces, and loosen the filters or synthesise more."
    )
  seen = set()
  for trace in traces:
    if trace.id in seen:
      raise ValueError(
        f"Trace id {trace.id!r} is given twice; ids must be distinct."
      )
    seen.add(trace.id)
    for number, round_ in enumerate(trace.rounds):
      prices = [one.perplexity for one in round_.candidates]
      if not 0 <= round_.kept < len(prices) or not np.isfinite(prices).all():
        raise ValueError(
          f"Trace {trace.id!r}, round {number}: kept {round_.kept} of the"
          f" perplexities {prices}; it must be an index of them, and each must"
          " be finite. Look for NaN in the prices."
        )


@contextlib.contextmanager
def _appearing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder beside `directory` that takes its name if all goes well."""
  directory.parent.mkdir(parents=True, exist_ok=True)
  hidden = tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent)
  folder = pathlib.Path(hidden)
  old = folder.with_name(folder.name + "-old")
  try:
    yield folder
    folder.chmod(0o755)
    if directory.exists():
      # A folder that is not empty cannot be renamed over: it steps aside.
      directory.rename(old)
    folder.rename(directory)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _write_tfds(
  folder: pathlib.Path,
  traces: Sequence[Trace],
  description: str,
  max_examples_per_shard: int,
) -> None:
  import tensorflow_datasets as tfds

  text = tfds.features.Text
  features = tfds.features.FeaturesDict(
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
  folder.mkdir(parents=True)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name="traces",
    version=tfds.core.Version(_VERSION),
    data_dir=str(folder),
    module_name=__name__,
  )
  info = tfds.core.DatasetInfo(
    builder=identity, features=features, description=description
  )
  writer = tfds.core.SequentialWriter(
    info,
    max_examples_per_shard=max_examples_per_shard,
    file_format=tfds.core.FileFormat.ARRAY_RECORD,
  )
  writer.initialize_splits(["train"])
  writer.add_examples({"train": [_to_example(trace) for trace in traces]})
  writer.close_all()


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
