"""Finds settings with which a run fits on one device, by estimates.

A knob is one decision and the steps in which it gives way. They are turned in a
fixed order, from what costs time alone to what changes the run:

1. fewer prompts, samples and prefixes at once (time)
2. more micro-batches (time)
3. fewer completions in a packed row (time)
4. moments and caches in bfloat16 (a little precision)
5. full rematerialisation (time)
6. LoRA of rank 16, 8, 4 in place of all parameters (another method)
7. shorter completions (another task)

Then each knob is turned back as far as the run still fits, the last one first,
so that nothing is given up that a later knob has paid for.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from opera_jax.plan import estimate, hardware, programs
from opera_jax.run import sizes

Changes = dict[str, Any]  # value by dotted field
SHORTEST = 64  # tokens of a completion
# Model fields that a config sets and no checkpoint does.
_FREE = ("dtype", "remat", "attention", "rope_factors")


class Solver:
  """Estimates a config with changed values."""

  def __init__(
    self,
    card: hardware.Card,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    names: tuple[str, ...] = programs.NAMES,
  ):
    """Estimates nothing yet.

    Args:
      card: the device.
      config: nested values, before `sizes.derive`.
      model: fields of `decoder.Config`, of the checkpoint.
      names: of the programs that must fit.
    """
    self._card, self._config, self._names = card, config, names
    self._model = model

  def overflow(self, changes: Changes) -> int:
    """Bytes that the programs of a changed config lack, in all; 0 if it
    fits."""
    config = sizes.derive(self.changed(changes))
    free = {name: config["model"][name] for name in _FREE}
    sections = {
      name: config[name] for name in ("engine", "rollout", "scoring", "sft")
    }
    sections |= {"rl": config["rl"], "model": {**self._model, **free}}
    found = estimate.costs(self._card, config["mesh"], sections, self._names)
    return sum(
      max(0, cost.total_bytes - self._card.memory_bytes) for cost in found
    )

  def changed(self, changes: Changes) -> dict[str, Any]:
    """A copy of the config with these values."""
    out: Any = copy.deepcopy(dict(self._config))
    for field, value in changes.items():
      *sections, name = field.split(".")
      section = out
      for part in sections:
        section = section[part]
      section[name] = value
    return out

  def fit(self) -> Changes | None:
    """The changes with which the run fits, none of which can be left out.

    None if it does not fit with all knobs turned down.
    """
    turned: list[list[Changes]] = []  # of each knob, its steps so far
    lacking = self.overflow({})
    for knob in KNOBS:
      steps: list[Changes] = []
      turned.append(steps)
      while lacking:
        step = knob(self.changed(_merged(turned)))
        if step is None:
          break
        steps.append(step)
        now = self.overflow(_merged(turned))
        if now >= lacking:
          steps.pop()
          break
        lacking = now
    if lacking:
      return None
    for steps in reversed(turned):
      while steps:
        step = steps.pop()
        if self.overflow(_merged(turned)):
          steps.append(step)
          break
    return _merged(turned)

  def grow(self, changes: Changes) -> Changes:
    """The same, with as much at once as fits: less time, nothing else."""
    turned = dict(changes)
    for field, most in (
      ("engine.slots", self._config["rl"]["samples"]),
      ("engine.prompt_slots", self._config["rl"]["prompts"]),
      ("scoring.batch_size", self._config["rl"]["prompts"]),
    ):
      while (
        value := 2 * _value(sizes.derive(self.changed(turned)), field)
      ) <= most:
        if self.overflow(turned | {field: value}):
          break
        turned[field] = value
    for stage in ("rl", "sft"):
      field = f"{stage}.micro_batches"
      while (value := _value(self.changed(turned), field)) > 1:
        if value % 2 or self.overflow(turned | {field: value // 2}):
          break
        turned[field] = value // 2
    return {
      field: value
      for field, value in turned.items()
      if value != _value(self._config, field)
    }


def flags(changes: Changes) -> str:
  """The changes as flags of a driver, ready to paste."""
  shown = []
  for field, value in changes.items():
    text = str(value).replace(" ", "")
    shown.append(
      f"'--config.{field}={text}'"
      if "(" in text
      else f"--config.{field}={text}"
    )
  return " ".join(shown)


def _merged(turned: list[list[Changes]]) -> Changes:
  return {
    field: value
    for steps in turned
    for step in steps
    for field, value in step.items()
  }


def _value(config: Mapping[str, Any], field: str) -> Any:
  value: Any = config
  for part in field.split("."):
    value = value[part]
  return value


Knob = Callable[[Mapping[str, Any]], Changes | None]


def _halved(field: str, least: int = 1) -> Knob:
  def knob(config: Mapping[str, Any]) -> Changes | None:
    value = _value(sizes.derive(config), field)
    return {field: value // 2} if value // 2 >= least else None

  return knob


def _micro_batches(stage: str) -> Knob:
  def knob(config: Mapping[str, Any]) -> Changes | None:
    section = config[stage]
    rows = section.get("batch_size") or (
      section["mini_batch"]
      * section["samples"]
      // section["completions_per_row"]
    )
    parts = 2 * section["micro_batches"]
    return {f"{stage}.micro_batches": parts} if rows % parts == 0 else None

  return knob


def _completions_per_row(config: Mapping[str, Any]) -> Changes | None:
  value = config["rl"]["completions_per_row"]
  if value == 1:
    return None
  fewer = next(n for n in range(value - 1, 0, -1) if value % n == 0)
  # Rows of one completion hold its prompt, too.
  rows: Changes = {"rl.row_buckets": ()} if config["rl"]["row_buckets"] else {}
  return {"rl.completions_per_row": fewer, **(rows if fewer == 1 else {})}


def _set(**values: Any) -> Knob:
  """Sets fields, written with two underscores for the dot."""
  wanted = {name.replace("__", "."): value for name, value in values.items()}

  def knob(config: Mapping[str, Any]) -> Changes | None:
    new = {f: v for f, v in wanted.items() if _value(config, f) != v}
    return new or None

  return knob


def _lora(config: Mapping[str, Any]) -> Changes | None:
  ranks = [config[stage]["lora"]["rank"] for stage in ("rl", "sft")]
  if not all(ranks):
    rank = 16
  elif max(ranks) > 4:
    rank = max(ranks) // 2
  else:
    return None
  return {"rl.lora.rank": rank, "sft.lora.rank": rank}


def _shorter(config: Mapping[str, Any]) -> Changes | None:
  shorter = config["rollout"]["max_new_tokens"] // 2
  if shorter < SHORTEST:
    return None
  # Sizes that are set would stay as long as they are.
  empty: Changes = {
    "engine.cache_buckets": (),
    "scoring.prefix_buckets": (),
    "rl.row_buckets": (),
    "sft.row_tokens": 0,
  }
  return {
    "rollout.max_new_tokens": shorter,
    **{field: value for field, value in empty.items() if _value(config, field)},
  }


KNOBS: tuple[Knob, ...] = (
  _halved("engine.prompt_slots"),
  _halved("engine.slots"),
  _halved("scoring.batch_size"),
  _micro_batches("rl"),
  _micro_batches("sft"),
  _completions_per_row,
  _set(rl__moment_dtype="bfloat16"),
  _set(sft__moment_dtype="bfloat16"),
  _set(engine__cache_dtype="bfloat16"),
  _set(model__remat="full"),
  _lora,
  _shorter,
)
