"""Writes the README.md (dataset card) of a synthesised data set."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from opera_jax.models import decoder
from opera_jax.run import setup as setup_lib
from opera_jax.run import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Card:
  """The name and licence of a data set, set by its owner."""

  name: str
  license: str  # identifier of the Hugging Face hub, "unknown" if undecided


FIELDS = {
  "id": "of the task",
  "prompt": "the task",
  "reference": "a reference answer; the search does not see it",
  "thought": "between the think tags",
  "answer": "after the thought",
  "completion": "token ids from <think> to the end of the turn",
  "rounds": "one per round of the search: the reflection word, the candidate "
  "steps with their perplexities and tokens, and which one was kept",
  "status": '"complete", or why the trace is incomplete or was rejected',
}
SIZES = (("1K", 10_000, "10K"), ("10K", 100_000, "100K"), ("100K", 10**6, "1M"))


def write(
  run: setup_lib.Run,
  card: Card,
  counts: Mapping[str, int],
  tables: Mapping[str, Mapping[str, Any]],
) -> str:
  """Returns the text of the card.

  Args:
    run: the run that made the set.
    card: its name and licence.
    counts: traces by status.
    tables: further tables by title, such as the filters: names and values.
  """
  total = sum(counts.values())
  base = workdir_lib.settings(run.workdir, "base")
  every = {
    "Traces by status": {**counts, "all": total},
    **tables,
    "Model that wrote them": {
      "weights": base.get("base.path", "pretrained on the tasks' documents"),
      "parameters": f"{_parameters(run):,}",
      **dataclasses.asdict(run.model),
    },
    "Tasks": _flat(
      {
        "seed": run.seed,
        "max_prompt_tokens": run.settings["max_prompt_tokens"],
        "max_reference_tokens": run.settings["max_reference_tokens"],
        "tokenizer": run.settings["tokenizer"],
        "data": run.settings["data"],
        "by length": {
          name.removeprefix("synthesis/"): count
          for name, count in run.dropped.items()
          if name.startswith("synthesis/")
        },
      }
    ),
    "Fields": FIELDS,
    "Software": {
      name: importlib.metadata.version(name) for name in ("jax", "flax")
    },
  }
  head = (
    "---\n"
    f"license: {card.license}\n"
    f"pretty_name: {card.name}\n"
    f"size_categories:\n- {_size(total)}\n"
    "task_categories:\n- text-generation\n"
    "tags:\n- synthetic\n- reasoning\n"
    "configs:\n- config_name: default\n  data_files: traces.jsonl\n"
    "---\n\n"
    f"# {card.name}\n\n"
    f"{total:,} traces, a thought and an answer to a prompt each, written by a "
    "language model under perplexity-guided search (arXiv 2606.25757): the "
    "thought is stopped at reflection words, several next steps are sampled, "
    "and the one is kept that leaves the whole the least perplexing. They are "
    "machine-written and nobody has read them all.\n\n"
    f"Licence: {card.license}"
    + (
      "; whoever publishes the set decides it, by config.card.license.\n\n"
      if card.license == "unknown"
      else ".\n\n"
    )
    + "`traces.jsonl` holds a trace a line; `tfds/traces/1.0.0` the same for\n"
    '`tfds.builder_from_directory(...).as_data_source("train")`, in '
    "ArrayRecords.\n"
  )
  return head + "".join(
    f"\n## {title}\n\n{_table(values)}" for title, values in every.items()
  )


def _parameters(run: setup_lib.Run) -> int:
  return decoder.parameter_count(decoder.abstract(run.model)[1])


def _size(total: int) -> str:
  """The Hugging Face hub's category of a size."""
  if total < 1_000:
    return "n<1K"
  for low, bound, name in SIZES:
    if total < bound:
      return f"{low}<n<{name}"
  return "n>1M"


def _table(values: Mapping[str, Any]) -> str:
  rows = "".join(
    f"| {name} | {_cell(value)} |\n" for name, value in values.items()
  )
  return "| | |\n| --- | --- |\n" + rows


def _cell(value: Any) -> str:
  text = str(value)
  if isinstance(value, list | tuple):
    text = ", ".join(map(str, value))
  return text.replace("|", "\\|").replace("\n", "\\n")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  out: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      out |= _flat(value, f"{prefix}{name}.")
    else:
      out[prefix + name] = value
  return out
