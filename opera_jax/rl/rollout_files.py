"""Keeps every rollout of a run in files that people and programs read.

`rl/rollouts/step_00000012.jsonl.gz` holds the completions of step 12, one JSON
object a line; `evaluate/samples/rl.jsonl.gz` those of an evaluated model:

    step, prompt_id, task, set, sample
                                    which completion of which prompt, "set"
                                    by its name in config.data.mix
    prompt, reference, completion   text
    prompt_tokens, completion_tokens
    finish_reason                   "stop", "length" or "loop"
    reward, terms                   the weighted sum, and every term
    advantage                       mean over the completion's tokens; null if
                                    the update did not use the completion
    steps                           of the thought: text, tokens, whether it is
                                    reflective, and delta, the change of
                                    log P(y_ref) in nats per token; null where
                                    it was not scored
    sampler_logprob, trainer_logprob
                                    sums over the completion's tokens, nats

`zcat` shows them, `pandas.read_json(path, lines=True)` reads them. A number
that is not finite is null.
"""

import gzip
import json
import math
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax import atomic_file
from opera_jax.rl import score as score_lib
from opera_jax.sharding import runtime

MEGABYTE = 1_000_000
_NAME = "step_{:08d}.jsonl.gz"
_STEP = re.compile(r"step_(\d{8,})\.jsonl\.gz")


def records(
  scored: score_lib.Scored,
  decode: Callable[[np.ndarray], str],
  *,
  step: int,
  advantages: Sequence[np.ndarray] | None = None,
) -> Iterator[dict[str, Any]]:
  """Builds one record per completion, prompt-major.

  Args:
    scored: R completions with their rewards.
    decode: turns tokens into text.
    step: number of the step, from 1; 0 for an evaluation.
    advantages: [R] of one value per token; None if no update uses them.

  Yields:
    JSON objects, see the head of this file.
  """
  rollouts, thoughts = scored.rollouts, scored.thoughts
  trainer = scored.of_completions(scored.logprobs)
  for r, sample in enumerate(rollouts.completions):
    b, n = divmod(r, rollouts.samples)
    prompt = rollouts.prompts[b]
    steps, begin = [], int(thoughts.start[r])
    for j in range(int(thoughts.count[r])):
      end = int(thoughts.step_end[r, j])
      steps.append(
        {
          "text": decode(sample.tokens[begin:end]).strip(),
          "tokens": end - begin,
          "delta": _number(scored.deltas_RJ[r, j]),
          "reflective": bool(thoughts.reflective[r, j]),
        }
      )
      begin = end
    yield {
      "step": step,
      "prompt_id": prompt.id,
      "task": prompt.task,
      "set": prompt.set,
      "sample": n,
      "prompt": prompt.prompt,
      "reference": prompt.reference,
      "completion": rollouts.texts[r],
      "prompt_tokens": len(rollouts.prompt_ids[b]),
      "completion_tokens": len(sample.tokens),
      "finish_reason": sample.reason
      or ("stop" if sample.finished else "length"),
      "reward": _number(scored.total_BN[b, n]),
      "terms": {name: _number(v[b, n]) for name, v in scored.terms.items()},
      "advantage": None
      if advantages is None
      else _number(np.mean(advantages[r])),
      "steps": steps,
      "sampler_logprob": _number(np.sum(sample.logprob, dtype=np.float64)),
      "trainer_logprob": _number(np.sum(trainer[r], dtype=np.float64)),
    }


def write(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
  """Writes a compressed file of records, atomically; equal records give equal
  bytes."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with (
    atomic_file.replacing(path, "wb") as raw,
    gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
  ):
    for line in lines:
      # ASCII, since a model may write half of a surrogate pair.
      packed.write(json.dumps(line, allow_nan=False).encode("ascii") + b"\n")


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the records of a file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: while it is read, it is cut short or no file of records.
  """
  number = 1
  try:
    with gzip.open(path, "rb") as file:
      for line in file:
        record = json.loads(line)
        wrong = _fault(record)
        if wrong:
          raise ValueError(wrong)
        yield record
        number += 1
  except FileNotFoundError:
    raise
  except (EOFError, OSError, RecursionError, ValueError, zlib.error) as error:
    raise ValueError(
      f"{path}:{number}: the file of rollouts is damaged ({error}). Delete "
      "it: nothing in the run depends on it."
    ) from error


def _fault(record: Any) -> str:
  """What a line lacks of a record; "" if nothing that is read from it."""
  if not isinstance(record, dict):
    return "it is not a JSON object"
  terms = record.get("terms")
  if not isinstance(terms, dict):
    return f"its terms are {terms!r:.80}"
  facts = record.get("facts", {})
  if not isinstance(facts, dict):
    return f"its facts are {facts!r:.80}"
  names = ("step", "reward", "advantage", "completion_tokens")
  numbers = {name: record.get(name, "") for name in names} | terms | facts
  for name, value in numbers.items():
    if not isinstance(value, int | float | None):
      return f"its {name} is {value!r:.80}"
  return ""


class RolloutLog:
  """The rollouts of an RL run, a file a step, within a limit of bytes."""

  def __init__(
    self, folder: pathlib.Path, *, megabytes: int, last_step: int | None
  ):
    """Drops what was written after the restored step, which runs again.

    Args:
      folder: of the files.
      megabytes: most that the files take together, in 10^6 bytes; the oldest
        steps are deleted beyond it. 0 keeps none.
      last_step: the step that was restored; None if the stage starts over.
    """
    self._folder, self._limit = folder, megabytes * MEGABYTE
    self._sizes: dict[int, int] = {}
    self._dropped = 0
    if not runtime.is_main_process():
      return
    for step, path in steps(folder).items():
      if step > (last_step or 0):
        path.unlink()
      else:
        self._sizes[step] = path.stat().st_size

  def write(self, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes the records of a step; process 0 only."""
    if not self._limit or not runtime.is_main_process():
      return
    path = self._folder / _NAME.format(step)
    write(path, lines)
    self._sizes[step] = path.stat().st_size
    while sum(self._sizes.values()) > self._limit and len(self._sizes) > 1:
      oldest = min(self._sizes)
      (self._folder / _NAME.format(oldest)).unlink(missing_ok=True)
      del self._sizes[oldest]
      self._dropped += 1

  def summary(self) -> str:
    """What is kept, as a line for the user; "" if nothing is."""
    if not self._sizes:
      return ""
    size = sum(self._sizes.values()) / MEGABYTE
    gone = (
      f"; {self._dropped} older ones went beyond config.rl.keep_rollouts"
      if self._dropped
      else ""
    )
    return (
      f"rollouts of {len(self._sizes)} steps are in {self._folder}, "
      f"{size:.1f} MB{gone}"
    )


def steps(folder: pathlib.Path) -> dict[int, pathlib.Path]:
  """The files of a folder by step, in order; {} if there is no folder."""
  if not folder.is_dir():
    return {}
  found = {
    int(match[1]): path
    for path in folder.iterdir()
    if (match := _STEP.fullmatch(path.name)) and not path.is_symlink()
  }
  return dict(sorted(found.items()))


def _number(value: Any) -> float | None:
  value = float(value)
  return value if math.isfinite(value) else None
