"""Several data sets with weights: their names, and the order of RL's prompts.

`config.data.mix` holds (source, weight) or (source, weight, name) for each set.
Of the first T prompts that RL draws, every set has its share of T to within
one, whatever the sizes of the sets: a small set is repeated more often. So a
batch has the exact shares wherever they are whole numbers, and no set waits
longer than its share asks. The rule is Tijdeman's for the chairman assignment
problem (Discrete Mathematics 32, 1980). Weights in place of sizes are T5's
mixing (arXiv 1910.10683, section 3.5.2), drawn in order rather than at random.

Shape key: N prompts, B prompts of a batch, S sets.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax.data import batching, prompts

_SUFFIXES = re.compile(r"(\.(jsonl|gz|xz|parquet))+$")
_NAME = re.compile(r"[A-Za-z_][\w-]*")


@dataclasses.dataclass(frozen=True)
class Set:
  """One data set of the mix."""

  name: str  # prefix of its ids, and its name in metrics
  source: str  # see `data.rows`
  weight: float  # relative to the other sets'


def parse(mix: Sequence[Any]) -> list[Set]:
  """Reads `config.data.mix`.

  Args:
    mix: entries (source, weight) or (source, weight, name). A set without a
      name is called after its file or data set.

  Raises:
    ValueError: an entry of another form, a weight that is not above 0, a name
      that two sets have or that no metric can have, or a source given twice.
  """
  sets = [_entry(entry) for entry in mix]
  for place, one in enumerate(sets):
    for other in sets[:place]:
      if one.source == other.source:
        raise ValueError(
          f"{one.source!r} is given twice; name each source once, with the sum "
          "of the weights"
        )
      if one.name == other.name:
        raise ValueError(
          f"{other.source!r} and {one.source!r} are both called {one.name!r}; "
          f'give one another name: ("{one.source}", {one.weight:g}, "NAME")'
        )
  return sets


def _entry(entry: Any) -> Set:
  form = (
    "an entry is (source, weight) or (source, weight, name), such as "
    '("tasks.jsonl", 2.0); one entry alone needs a comma behind it'
  )
  if isinstance(entry, str) or not isinstance(entry, Sequence):
    raise ValueError(f"{entry!r} is no entry; {form}")
  if len(entry) not in (2, 3) or not isinstance(entry[0], str) or not entry[0]:
    raise ValueError(f"{tuple(entry)!r} is no entry; {form}")
  source, weight = entry[:2]
  fine = isinstance(weight, int | float) and not isinstance(weight, bool)
  if not (fine and 0 < weight < math.inf):
    raise ValueError(
      f"the weight of {source!r} is {weight!r}; it must be a finite number "
      "above 0. Leave a set out to draw nothing from it"
    )
  name = entry[2] if len(entry) == 3 else _called(source)
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise ValueError(
      f"the name of {source!r} is {name!r}; it must be a letter, then letters, "
      f'digits, _ or -: ("{source}", {weight:g}, "NAME")'
    )
  if name in prompts.TASKS:
    raise ValueError(
      f"{source!r} is called {name!r}, which is a kind of task; give it "
      f'another name: ("{source}", {weight:g}, "NAME")'
    )
  return Set(name, source, float(weight))


def _called(source: str) -> str:
  """hf:openai/gsm8k:main -> gsm8k; data/my tasks.jsonl.gz -> my_tasks."""
  kind, _, rest = source.partition(":")
  place = rest if kind in ("hf", "tfds") else source
  last = place.partition("#")[0].rstrip("/").rpartition("/")[2]
  if place is rest:
    last = re.split("[@:]", last)[0]
  return re.sub(r"[^\w-]", "_", _SUFFIXES.sub("", last))


def quotas(
  sizes: Mapping[str, int], weights: Mapping[str, float], count: int
) -> dict[str, int]:
  """Divides `count` prompts among sets by weight; a small set gives all it has.

  Args:
    sizes: prompts of each set.
    weights: of each set.
    count: prompts to take in all; fewer are taken if there are fewer.
  """
  taken = dict.fromkeys(sizes, 0)
  for _ in range(min(count, sum(sizes.values()))):
    # D'Hondt's rule: the set that is then least over its weight.
    left = [name for name in sizes if taken[name] < sizes[name]]
    taken[min(left, key=lambda name: (taken[name] + 1) / weights[name])] += 1
  return taken


def set_sequence(weights: Sequence[float], count: int) -> np.ndarray:
  """The set of each of the first `count` prompts, int64 [count].

  Of any first T of them, set s has its share `T w_s / sum of w` to within one.

  Args:
    weights: of the sets, above 0.
    count: prompts.
  """
  share_S = np.asarray(weights, np.float64) / np.sum(weights)
  bound = 1 / max(2 * len(weights) - 2, 1)
  chosen = np.zeros(count, np.int64)
  given_S = np.zeros(len(weights))
  for t in range(count if len(weights) > 1 else 0):
    owed_S = (t + 1) * share_S - given_S
    # Of the sets that may be next, the one that would be late first. The slack
    # is for rounding alone.
    late_S = (1 - bound - owed_S) / share_S
    chosen[t] = np.argmin(np.where(owed_S >= bound - 1e-9, late_S, np.inf))
    given_S[chosen[t]] += 1
  return chosen


def batch_sets(
  set_of_prompt: Sequence[str],
  weights: Mapping[str, float],
  batch_size: int,
  batches: int,
) -> np.ndarray:
  """The set of each prompt of each batch, int64 [batches, B].

  Args:
    set_of_prompt: the set of each of the N prompts.
    weights: by set; the result counts sets in this order.
    batch_size: B.
    batches: number of batches.

  Raises:
    ValueError: a set has fewer prompts than a batch takes of it.
  """
  names = list(weights)
  size_S = np.asarray([list(set_of_prompt).count(name) for name in names])
  chosen = set_sequence(list(weights.values()), batches * batch_size)
  chosen = chosen.reshape(batches, batch_size)
  most_S = [int((chosen == s).sum(axis=1).max()) for s in range(len(names))]
  for name, size, most in zip(names, size_S, most_S):
    if size < most:
      raise ValueError(
        f"Set {name!r} of config.data.mix has {size} prompts for RL, and a "
        f"batch of {batch_size} takes up to {most} of it. Lower its weight or "
        "config.rl.prompts, raise config.data.rl, add prompts, loosen "
        "config.select.rl or config.rl.tasks, or leave the set out."
      )
  return chosen


def mixed_order(
  set_of_prompt: Sequence[str],
  weights: Mapping[str, float],
  batch_size: int,
  batches: int,
  seed: int,
) -> list[np.ndarray]:
  """The prompts of each batch, a pure function of its arguments.

  Every set is passed through in shuffled epochs of its own, as in
  `batching.batch_order`; no batch contains a prompt twice.

  Args:
    set_of_prompt: the set of each of the N prompts.
    weights: by set.
    batch_size: B.
    batches: number of batches.
    seed: any int.

  Returns:
    For each batch the indices of its prompts, int64 [B].

  Raises:
    ValueError: a set has fewer prompts than a batch takes of it.
  """
  set_of_slot = batch_sets(set_of_prompt, weights, batch_size, batches)
  out = np.zeros_like(set_of_slot)
  for s, name in enumerate(weights):
    items = np.flatnonzero(np.asarray(set_of_prompt) == name)
    counts = (set_of_slot == s).sum(axis=1).tolist()
    order = batching.ragged_order(len(items), counts, seed)
    out[set_of_slot == s] = items[order]
  return list(out)
