"""Checks the whole config before any stage starts.

A run takes hours, and its stages read their values one after the other. This
module finds all mistakes at once, before the first stage. It checks names (and
suggests the nearest one), ranges, lengths against buckets, settings of rewards
and advantage estimators, missing inputs of stages, and changed values that
nothing in this run reads.

Values are plain nested mappings. Checks that need devices (rows against data
shards) or data (the number of tasks) are elsewhere.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from opera_jax import config_fields, user_errors
from opera_jax.advantages import oppo
from opera_jax.data import mixture, prompts, rows
from opera_jax.losses import kl, policy, reduce
from opera_jax.models import decoder, lora, presets, rope
from opera_jax.models.families import table as families
from opera_jax.rewards import compose, opera_requests, opera_reward, verifiable
from opera_jax.rl import advantages, learner, prompt_sampling, score
from opera_jax.rollout import sampling
from opera_jax.run import initial_model, model_config, sizes
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import rules as sharding_rules
from opera_jax.stages import cold_start
from opera_jax.synthesis import filters, rl_filter, search
from opera_jax.train import optimizer, trackers

# Returns what a value must be, or "" where it is valid.
Rule = Callable[[Any], str]

DTYPES = ("float32", "bfloat16")
# The stages whose results a stage reads, besides the model it starts from.
NEEDS = {"select": ("synthesize",), "sft": ("select",)}
# Our advantage estimators that need no model besides the policy.
ALONE = ("grpo", "dr_grpo", "gdpo", "rloo", "reinforce", "gae", "pairs")
OURS = (*ALONE, "oppo", "sdpo", "distillation")


class ConfigError(ValueError):
  """A config that cannot be run; the message names every mistake."""


def check(
  config: Mapping[str, Any],
  stages: Collection[str],
  workdir: str | os.PathLike | None = None,
) -> None:
  """Raises one error that lists all faults of a config.

  Args:
    config: nested values, as in configs/common.py.
    stages: that will run, of `experiments.opera_rl`; the base model is always
      made.
    workdir: folder of the run, with results of earlier runs; None means empty.

  Raises:
    ConfigError: names each value, its rule and the remedy, one fault per line.
  """
  faults = list(_faults(config, set(stages), workdir))
  if faults:
    raise ConfigError(
      f"The config has {len(faults)} fault{'s' * (len(faults) > 1)}, and "
      "nothing has been started:\n  " + "\n  ".join(dict.fromkeys(faults))
    )


def _faults(
  config: Mapping[str, Any],
  stages: set[str],
  workdir: str | os.PathLike | None,
) -> Iterator[str]:
  strange = list(_no_fields(config))
  if strange:
    yield from strange
    return
  wrong: set[str] = set()  # sections with an invalid value
  for section, fault in _by_rules(config, stages):
    wrong.add(section)
    yield fault
  yield from _built(config, stages, wrong)
  yield from _terms(config, stages, wrong)
  if not wrong:  # these checks need valid numbers
    config = sizes.derive(config)
    yield from _stages(config, stages, workdir)
    yield from _data(config, stages)
    yield from _lengths(config, stages)
    yield from _optimizers(config, stages)
    if "rl" in stages:
      yield from _update(config)
    yield from _unread(config, stages)


def one_of(*names: str) -> Rule:
  """Is one of the names; the message suggests the nearest."""

  def rule(value: Any) -> str:
    if value in names:
      return ""
    near = user_errors.nearest(value, names)
    return f"use one of {', '.join(map(repr, names))}{near}"

  return rule


def number(
  low: float = -math.inf,
  high: float = math.inf,
  *,
  above: float = -math.inf,
  below: float = math.inf,
  whole: bool = False,
) -> Rule:
  """Is finite, with low <= it <= high and above < it < below."""
  bounds = [
    *([f"at least {low:g}"] if low > -math.inf else []),
    *([f"above {above:g}"] if above > -math.inf else []),
    *([f"at most {high:g}"] if high < math.inf else []),
    *([f"below {below:g}"] if below < math.inf else []),
  ]
  kind = "a whole number" if whole else "a finite number"
  problem = " ".join([kind, " and ".join(bounds)]).strip()

  def rule(value: Any) -> str:
    types = int if whole else (int, float)
    fine = isinstance(value, types) and not isinstance(value, bool)
    fine = fine and abs(value) < 2**63 if isinstance(value, int) else fine
    fine = fine and math.isfinite(value)
    if fine and low <= value <= high and above < value < below:
      return ""
    return f"it must be {problem}"

  return rule


def count(low: int = 1) -> Rule:
  """Is a whole number of at least `low`."""
  return number(low, whole=True)


def text(*, empty: bool = True) -> Rule:
  """Is text."""

  def rule(value: Any) -> str:
    if isinstance(value, str) and (value or empty):
      return ""
    return "it must be text" + ("" if empty else " that is not empty")

  return rule


def flag(value: Any) -> str:
  """Is True or False."""
  return "" if isinstance(value, bool) else "it must be True or False"


def unset_or(rule: Rule) -> Rule:
  """Is None, or follows the rule."""
  return lambda value: "" if value is None else rule(value)


def pair(value: Any) -> str:
  """Is empty, or two strings that differ."""
  fine = not isinstance(value, str) and isinstance(value, Sequence)
  fine = fine and all(isinstance(one, str) and one for one in value)
  if fine and len(set(value)) == len(value) and len(value) in (0, 2):
    return ""
  return (
    'it must be two different strings, such as ("<think>", "</think>"), or ()'
  )


def ascending(value: Any) -> str:
  """Is a tuple of lengths."""
  whole = count()
  some = isinstance(value, Sequence) and not isinstance(value, str) and value
  fine = some and not any(map(whole, value))
  if fine and all(a < b for a, b in zip(value, value[1:])):
    return ""
  return "it must be whole numbers from 1 on, ascending, at least one"


def derived_or(rule: Rule) -> Rule:
  """Is 0 or (), which `run.sizes` fills in, or follows the rule."""

  def whole(value: Any) -> str:
    if value in (0, (), []) and value is not False:
      return ""
    problem = rule(value)
    return problem and f"{problem}, or empty to follow the lengths"

  return whole


def three_shares(value: Any) -> str:
  """Is empty, or three fractions that leave something to train on."""
  fraction = number(0, 1)
  fine = isinstance(value, Sequence) and not isinstance(value, str)
  fine = fine and len(value) in (0, 3) and not any(map(fraction, value))
  if fine and sum(value) <= 1 + 1e-9 and (not value or value[2] < 1):
    return ""
  return (
    "it must be (), or three fractions (cold start, RL, held out) with a sum "
    "of at most 1, such as (0.4, 0.5, 0.1)"
  )


def axis_size(value: Any) -> str:
  """Is a size of a mesh axis."""
  if value == -1 or not count()(value):
    return ""
  return "it must be a whole number from 1 on, or -1 for what is left"


def table(rule: Rule) -> Rule:
  """Is a mapping of names to values that all follow the rule."""

  def whole(value: Any) -> str:
    if not isinstance(value, Mapping) or any(map(text(empty=False), value)):
      return "it must be a mapping of names"
    return next(filter(None, map(rule, value.values())), "")

  return whole


def anything(value: Any) -> str:
  """Accepts any value; the record that takes it checks it."""
  return ""


def log(value: Any) -> str:
  """Names trackers whose libraries are installed."""
  if not isinstance(value, str):
    return "it must be text"
  try:
    trackers.parse(value)
  except ValueError as error:
    return str(error).partition("; ")[2]
  return ""


def data_mix(value: Any) -> str:
  """Is empty, or data sets with weights, see `mixture.parse`."""
  if isinstance(value, str) or not isinstance(value, Sequence):
    return 'it must be a tuple, such as (("a.jsonl", 2.0), ("b.jsonl", 1.0))'
  try:
    mixture.parse(value)
  except ValueError as error:
    return str(error)
  return ""


def each(rule: Rule, *, least: int = 1) -> Rule:
  """Is a tuple of values that all follow the rule."""

  def whole(value: Any) -> str:
    if isinstance(value, str) or not isinstance(value, Sequence):
      return 'it must be a tuple, such as ("a", "b")'
    if len(value) < least:
      return f"it must hold at least {least}"
    return next(filter(None, map(rule, value)), "")

  return whole


_ANY_SEED = number(whole=True)
_SUPERVISED: dict[str, Rule] = {
  "epochs": count(),
  "batch_size": count(),
  "row_tokens": derived_or(count(2)),
  "packed": flag,
  "learning_rate": number(above=0),
  "warmup": number(0, 1),
  "decay": one_of(*optimizer.DECAYS),
  "optimizer": one_of(*optimizer.NAMES),
  "b2": number(above=0, below=1),
  "weight_decay": number(0),
  "max_grad_norm": number(above=0),
  "moment_dtype": one_of(*optimizer.MOMENT_DTYPES),
  # "constant" needs a divisor, which these stages lack.
  "reduction": one_of("token_mean", "sequence_mean"),
  "micro_batches": count(),
  "validation_share": number(0, below=1),
  "validation_every": count(),
  "checkpoint_every": count(),
  "seed": _ANY_SEED,
}
# `_built` checks ranks above 0, and names of targets.
_LORA: dict[str, Rule] = {
  "rank": number(whole=True),
  "alpha": number(),
  "targets": each(text(empty=False), least=0),
  "base_dtype": text(),
}
_BASE, _SYNTHESIZE, _SELECT = ("base",), ("synthesize",), ("select",)
_RL, _EVALUATE = ("rl",), ("evaluate",)
# Section -> (stages that read it, () for all; a rule per field). `_built`
# checks sections whose records check themselves.
RULES: dict[str, tuple[tuple[str, ...], dict[str, Rule]]] = {
  "": ((), {
    "seed": _ANY_SEED,
    "max_prompt_tokens": count(),
    "max_reference_tokens": count(),
    "checkpoint": text(),
    "redo": text(),
    "log": log,
  }),
  "mesh": ((), {
    axis: axis_size for axis in sharding_rules.MESH_AXES
  }),
  "runtime": ((), {
    "heartbeat_seconds": count(),
    **{name: text() for name in ("distributed", "compile_cache")},
  }),
  "tokenizer": ((), {
    "path": text(),
    "bpe_size": count(),
    "think": pair,
    "chat_template": text(),
    "enable_thinking": one_of("", "on", "off"),
  }),
  "model": ((), {
    "vocab_size": count(0),
    **{name: unset_or(count()) for name in (
      "hidden_size", "num_hidden_layers", "num_attention_heads",
      "num_key_value_heads", "head_dim", "intermediate_size",
      "max_position_embeddings",
    )},
    **{name: unset_or(count(0)) for name in (
      "sliding_window", "sliding_window_pattern",
    )},
    **{name: unset_or(number(above=0)) for name in (
      "rope_theta", "rms_norm_eps",
    )},
    **{name: unset_or(number(0)) for name in (
      "rope_local_theta", "query_scale",
    )},
    **{name: unset_or(flag) for name in (
      "tie_word_embeddings", "qk_norm", "qkv_bias", "norm_offset",
      "output_norms", "embedding_scale",
    )},
    "family": unset_or(one_of(*families.FAMILIES)),
    "hidden_act": unset_or(one_of(*decoder.ACTIVATIONS)),
    "rope_factors": one_of(*rope.SETS),
    "dtype": one_of(*DTYPES),
    **{name: text() for name in ("remat", "attention")},
  }),
  "data": ((), {
    "kind": one_of("storyworld", "jsonl"),
    **{name: count(0) for name in (
      "synthesis", "rl", "held_out", "documents", "prompt_words",
      "excerpt_words", "math_limit",
    )},
    "math_share": number(0, 1),
    "shares": three_shares,
    "mix": data_mix,
    "near_duplicate": number(0, 1),
    "default_task": one_of("", *prompts.TASKS),
    **{name: text() for name in (
      "path", "math_path", "responses_path", "math_answer",
    )},
    **{name: table(text()) for name in ("fields", "task_map", "math_fields")},
  }),
  "base": (_BASE, _SUPERVISED),
  "engine": ((), {
    "prompt_slots": count(),
    "slots": derived_or(count()),
    "prompt_buckets": derived_or(ascending),
    "cache_buckets": derived_or(ascending),
    "steps": count(),
    "cache_dtype": one_of(*DTYPES),
  }),
  "scoring": ((), {
    "batch_size": count(),
    "prefix_buckets": derived_or(ascending),
    "slot_buckets": derived_or(ascending),
    "continuation_buckets": derived_or(ascending),
  }),
  "reward": ((), {
    "timeout": number(above=0),
    "alpha": number(0, 1),
    "tau": number(above=0),
    "mode": one_of(*opera_reward.MODES),
    "match": one_of("word", "substring", "any"),
    "compare": one_of(*opera_requests.COMPARE),
    "keywords": each(text(empty=False)),
    "separator": text(empty=False),
    "bridge": text(),
    "max_steps": count(),
    "math_check": one_of(*verifiable.METHODS),
    "terms": text(empty=False),
    "by_task": table(text(empty=False)),
    "options": table(table(anything)),
    "environment": each(text(empty=False), least=0),
  }),
  "synthesis": (_SYNTHESIZE, {
    "batch": count(),
    "candidates": count(),
    "budget": count(0),
    "score": one_of(*search.SCORES),
    "temperature": number(above=0),
    "top_k": count(0),
    "top_p": number(high=1, above=0),
    "max_step_tokens": derived_or(count()),
    "max_thought_tokens": derived_or(count()),
    "max_answer_tokens": derived_or(count()),
    "close_thought": flag,
    "stop_words": each(text(empty=False)),
    "method": one_of(*cold_start.METHODS),
    "rounds": count(),
    "seed": _ANY_SEED,
    **{name: text() for name in ("choose", "template", "guide")},
  }),
  "select": (_SELECT, {
    "min_reflections": count(0),
    "ngram": count(),
    "think_tags": flag,
    "stop_words": each(text(empty=False), least=0),
    "max_stop_words": count(0),
    "min_thought_words": count(0),
    "max_thought_words": count(0),
    "min_answer_words": count(0),
    "max_answer_words": count(0),
    "max_deviation": number(0),
    **{name: number(0, 1) for name in (
      "max_repeat", "max_ngram_repeat", "max_copied", "max_foreign",
    )},
    "keep_share": number(high=1, above=0),
  }),
  "select.rl": (_RL, {
    "samples": count(0),
    "right": each(count(0)),
    "judge": text(),
    "band": each(number(), least=2),
  }),
  "sft": (("sft",), _SUPERVISED | {"init": text()}),
  "sft.lora": (("sft",), _LORA),
  "rl.lora": (_RL, _LORA),
  "rollout": ((), {
    "max_new_tokens": count(),
    "temperature": number(above=0),
    "top_k": count(0),
    "top_p": number(high=1, above=0),
    "min_p": number(0, 1),
    "min_new_tokens": count(0),
    "banned_ids": each(count(0), least=0),
    "logit_bias": each(each(number(), least=2), least=0),
    "loop_period": count(0),
    "loop_tokens": count(0),
  }),
  "rl": (_RL, {
    "init": text(),
    "steps": count(),
    "prompts": count(),
    "samples": count(2),
    "sampling": one_of(*prompt_sampling.METHODS),
    "sampling_floor": number(above=0),
    "mini_batch": count(),
    "epochs_per_batch": count(),
    "balance_tokens": flag,
    "micro_batches": count(),
    "completions_per_row": count(),
    "row_buckets": derived_or(ascending),
    "learning_rate": number(above=0),
    "warmup": number(0, 1),
    "decay": one_of(*optimizer.DECAYS),
    "optimizer": one_of(*optimizer.NAMES),
    "weight_decay": number(0),
    "max_grad_norm": number(above=0),
    "moment_dtype": one_of(*optimizer.MOMENT_DTYPES),
    "clip_low": number(high=1, above=0),
    "clip_high": number(above=0),
    "dual_clip": number(0),
    "kl_coef": number(0),
    "kl_estimator": one_of(*kl.NAMES),
    "reduction": one_of(*reduce.NAMES),
    "constant": number(0),
    "kl_in": one_of("loss", "reward"),
    "loss": one_of(*learner.LOSSES),
    "beta": number(above=0),
    "entropy_coef": number(),
    "importance_cap": number(0),
    "importance_level": one_of(*policy.IMPORTANCE_LEVELS),
    "importance_mode": one_of(*policy.IMPORTANCE_MODES),
    "importance_floor": number(0),
    "mask_truncated": flag,
    "max_logprob_diff": number(0),
    "max_logprob_diff_steps": count(),
    "max_resamples": count(0),
    "value_coef": number(0),
    "value_clip": number(above=0),
    "ema": number(0, below=1),
    "divergence_coef": number(0),
    "teacher_top_k": count(),
    "tasks": each(one_of(*prompts.TASKS)),
    "advantage": text(empty=False),
    "advantage_options": table(table(anything)),
    **{name: text() for name in ("teacher", "filter_reward")},
    "seed": _ANY_SEED,
    "token_budget": count(0),
    "checkpoint_every": count(),
    "keep_rollouts": count(0),
  }),
  "rl.validation": (_RL, {
    "every": count(0),
    "prompts": count(),
    "samples": count(2),
    "metric": text(empty=False),
    "patience": count(0),
    "keep_best": flag,
  }),
  "evaluate": (_EVALUATE, {
    "samples": count(2),
    "temperature": number(0),
    "top_p": number(high=1, above=0),
    "thoughts": count(0),
    "resamples": count(),
    "reward": flag,
  }),
}  # fmt: skip


# The driver checks `stages`; records check the other two.
_CHECKED_ELSEWHERE = {"stages", "card", "pool"}


def _no_fields(config: Mapping[str, Any]) -> Iterator[str]:
  """Fields that a config file sets but that do not exist."""
  known = {
    f"{section}.{name}" if section else name
    for section, (_, rules) in RULES.items()
    for name in rules
  }
  sections = {section for section in RULES if section}
  for section in ("", *sections):
    value: Any = config
    for part in filter(None, section.split(".")):
      value = value[part]
    for name in value:
      path = f"{section}.{name}" if section else name
      if path not in known | sections | _CHECKED_ELSEWHERE:
        yield config_fields.fault(path, known)


def _by_rules(
  config: Mapping[str, Any], stages: set[str]
) -> Iterator[tuple[str, str]]:
  """Checks each value that a stage of this run reads by its rule.

  Yields:
    The section and the fault.
  """
  running = stages | ({"base"} if _pretrains(config, stages) else set())
  for section, (readers, rules) in RULES.items():
    if readers and not running & set(readers):
      continue
    for name, rule in rules.items():
      value: Any = config
      for part in filter(None, [*section.split("."), name]):
        value = value[part]
      problem = rule(value)
      if problem:
        place = f"{section}.{name}" if section else name
        yield section, f"config.{place} is {rows.short(value)}; {problem}"
  if list(config["mesh"].values()).count(-1) > 1:
    yield (
      "mesh",
      f"config.mesh is {dict(config['mesh'])}; one axis at most may be -1",
    )


def _pretrains(config: Mapping[str, Any], stages: set[str]) -> bool:
  """Whether a base model is trained from nothing."""
  if config["checkpoint"]:
    return False
  return initial_model.reads_base(config, stages)


def _built(
  config: Mapping[str, Any], stages: set[str], wrong: set[str]
) -> Iterator[str]:
  """Builds the records that check their own arguments."""
  checkpoint = config["checkpoint"]

  def model() -> None:
    if not isinstance(checkpoint, str):
      return  # its rule has said so
    # What another id on the hub says is read when the run is set up.
    known = presets.find(checkpoint) is not None
    if not checkpoint or os.path.exists(checkpoint) or known:
      model_config.resolve(config["model"], checkpoint, offline=True)

  rollout = dict(config["rollout"])
  select = dict(config["select"])
  rl_rules = select.pop("rl")
  makers = [
    ("model", model),
    ("rollout", lambda: sampling.Sampling(**rollout)),
    ("synthesis", lambda: cold_start.Search(**config["synthesis"])),
    ("select", lambda: filters.Rules(**select)),
    ("select.rl", lambda: rl_filter.Rules(**rl_rules)),
    ("sft.lora", lambda: lora.settings(**config["sft"]["lora"])),
    ("rl.lora", lambda: lora.settings(**config["rl"]["lora"])),
  ]
  readers = {
    "synthesis": "synthesize",
    "select": "select",
    "select.rl": "rl",
    "sft.lora": "sft",
    "rl.lora": "rl",
  }
  for section, make in makers:
    if readers.get(section, next(iter(stages))) not in stages:
      continue
    if section in wrong or section.partition(".")[0] in wrong:
      continue
    try:
      make()
    except (ValueError, TypeError, OSError) as error:
      yield f"config.{section}: {error}"


def _terms(
  config: Mapping[str, Any], stages: set[str], wrong: set[str]
) -> Iterator[str]:
  """Checks reward terms and advantage estimators with their settings."""
  if "reward" in wrong or "rl" in wrong:
    return
  reward = dict(config["reward"])
  names: list[str] = []
  place = f"config.reward.terms = {reward['terms']!r}"
  if reward["by_task"]:
    place += f" with config.reward.by_task = {dict(reward['by_task'])}"
  try:
    names = compose.Sums.parse(reward["terms"], reward["by_task"]).names()
    # `preflight` tries a user's function, in its own process.
    ours = [f"0*{name}" for name in names if ":" not in name]
    settings = {name: reward[name] for name in score.REWARD_FIELDS}
    if ours:
      score.build_rewards(
        lambda _: (), **settings | {"terms": " + ".join(ours), "by_task": {}}
      )
  except (ValueError, TypeError) as error:
    yield f"{place}: {error}"
  if "data" not in wrong:
    yield from _by_task(config)
  if "rl" not in stages:
    return
  rl = config["rl"]
  try:
    advantages.build(rl["advantage"], rl["advantage_options"])
  except (ValueError, TypeError) as error:
    yield f"config.rl.advantage = {rl['advantage']!r}: {error}"
  decides = rl["filter_reward"]
  if decides and names and decides not in names:
    yield (
      f"config.rl.filter_reward is {decides!r}; name one of the terms of "
      f'config.reward.terms, {names}, or "" for their weighted sum'
      f"{user_errors.nearest(decides, names)}"
    )


def _by_task(config: Mapping[str, Any]) -> Iterator[str]:
  """Finds weighted sums of tasks and data sets that there are not."""
  sets = mixture.parse(config["data"]["mix"])
  known = [*prompts.TASKS, *(one.name for one in sets)]
  for name in config["reward"]["by_task"]:
    if name not in known:
      yield (
        f"config.reward.by_task holds {name!r}; name a kind of task or a data "
        f"set of config.data.mix: {', '.join(known)}"
        f"{user_errors.nearest(name, known)}"
      )


def _stages(
  config: Mapping[str, Any],
  stages: set[str],
  workdir: str | os.PathLike | None,
) -> Iterator[str]:
  """Finds stages whose inputs neither this run nor an earlier one makes."""
  try:
    dropped = workdir_lib.redo_names(config["redo"])
  except ValueError as error:
    yield f"{error}"
    return

  def made(name: str) -> bool:
    """Whether an earlier run has finished the stage."""
    finished = workdir and workdir_lib.result(workdir, name)
    return bool(finished) and name not in dropped

  for stage, inputs in NEEDS.items():
    if stage not in stages:
      continue
    lacking = [name for name in inputs if name not in stages and not made(name)]
    if lacking:
      yield (
        f"config.stages holds {stage}, which reads what "
        f"{' and '.join(lacking)} left, and nothing is there; add "
        f"{','.join(lacking)} to config.stages, or name the --workdir that "
        "has it"
      )
  for stage, allowed in (("sft", ("base",)), ("rl", ("base", "sft"))):
    init = config[stage]["init"]
    if stage not in stages or made(stage):
      continue
    if init:
      fault = initial_model.fault(
        f"config.{stage}.init", init, allowed, workdir
      )
      if fault:
        yield fault
      elif initial_model.is_checkpoint(init) and not config["checkpoint"]:
        yield (
          f"config.{stage}.init is the checkpoint {init!r}, and "
          "config.checkpoint, which says the model's sizes and its tokenizer, "
          f"is empty; use --config.checkpoint={init} --config.{stage}.init=base"
        )
    from_sft = stage == "rl" and init in ("", "sft")
    if from_sft and "sft" not in stages and not made("sft"):
      yield (
        "config.stages holds rl, which starts from the SFT model, and there is "
        "none; start from the base model with --config.rl.init=base (or from "
        "another run's, --config.rl.init=runs/other/sft), add sft to "
        "config.stages, or name the --workdir that has it"
      )
  models = initial_model.lineage(config)
  if "evaluate" in stages and not any(
    name not in initial_model.STAGES
    or name == "base"
    or name in stages
    or made(name)
    for name in models
  ):
    yield (
      f"config.stages holds evaluate, which compares {', '.join(models)}, and "
      "none of them is there; add one of them to config.stages, or name the "
      "--workdir that has them"
    )
  teacher = config["rl"]["teacher"]
  known = teacher in ("", "base") or (teacher == "sft" and "sft" in stages)
  known = known or (
    workdir and os.path.exists(os.path.join(workdir, teacher, "model"))
  )
  if "rl" in stages and not known:
    yield (
      f"config.rl.teacher is {teacher!r}, and the workdir has no model of that "
      'name; use "base" or "sft", or "" for the model that RL starts from'
    )


def _data(config: Mapping[str, Any], stages: set[str]) -> Iterator[str]:
  data = config["data"]
  files = ("path", "math_path", "responses_path", "mix")
  if data["kind"] == "storyworld":
    for name in files:
      if data[name]:
        yield (
          f"config.data.{name} is {data[name]!r} beside "
          'config.data.kind="storyworld", which reads no file; set '
          'config.data.kind="jsonl", or leave the file out'
        )
  elif not data["path"] and not data["math_path"] and not data["mix"]:
    yield (
      "config.data.path and config.data.math_path are both empty with "
      'config.data.kind="jsonl"; name a file of tasks with '
      "--config.data.path=FILE"
    )
  if data["mix"] and data["path"]:
    yield (
      f"config.data.path is {data['path']!r} beside config.data.mix, which "
      "takes its place; move it into the mix with a weight"
    )
  if data["mix"] and data["math_path"]:
    sources = [one.source for one in mixture.parse(data["mix"])]
    if data["math_path"] not in sources:
      yield (
        f"config.data.math_path is {data['math_path']!r}, which is not in "
        f"config.data.mix {sources}; add it there with a weight, since it is "
        "the set of the mix that is read with config.data.math_fields"
        f"{user_errors.nearest(data['math_path'], sources)}"
      )
  wrong = {n for n in data["task_map"].values() if n not in prompts.TASKS}
  if wrong:
    yield (
      f"config.data.task_map leads to {sorted(wrong)}; its values are among "
      f"{prompts.TASKS}"
    )
  if _pretrains(config, stages) and not data["documents"]:
    yield (
      "config.data.documents is 0 and config.checkpoint is empty, so there is "
      "no base model and nothing to train one on; set one of them"
    )
  for place, (stage, name) in enumerate(
    (("synthesize", "synthesis"), ("rl", "rl"), ("evaluate", "held_out"))
  ):
    if stage in stages and not data["shares"] and not data[name]:
      yield f"config.data.{name} is 0, and stage {stage} needs tasks; raise it"
    if stage in stages and data["shares"] and not data["shares"][place]:
      yield (
        f"config.data.shares is {data['shares']}, and stage {stage} needs "
        f"tasks; raise its fraction, number {place + 1}"
      )


def _lengths(config: Mapping[str, Any], stages: set[str]) -> Iterator[str]:
  """Finds lengths that exceed all buckets, and batches that do not divide."""
  longest, new = (
    config["max_prompt_tokens"],
    config["rollout"]["max_new_tokens"],
  )
  most = max(config["engine"]["prompt_buckets"])
  if longest > most and stages & {"rl", "evaluate"}:
    yield (
      f"config.max_prompt_tokens is {longest} and the largest of "
      f"config.engine.prompt_buckets {most}; raise that, or lower the limit"
    )
  for stage in ("base", "sft"):
    section = config[stage]
    reads = stage in stages or (stage == "base" and _pretrains(config, stages))
    if reads and section["batch_size"] % section["micro_batches"]:
      yield (
        f"config.{stage}.batch_size is {section['batch_size']}, which does not "
        f"divide into config.{stage}.micro_batches = "
        f"{section['micro_batches']}; change one"
      )
  if "rl" not in stages:
    return
  rl = config["rl"]
  need = new if rl["completions_per_row"] > 1 else longest + new
  if need > max(rl["row_buckets"]):
    what = (
      "completions"
      if rl["completions_per_row"] > 1
      else "prompt and completion"
    )
    yield (
      f"config.rl.row_buckets holds rows of {max(rl['row_buckets'])} tokens at "
      f"most, and {what} may have {need} (config.max_prompt_tokens = "
      f"{longest}, config.rollout.max_new_tokens = {new}); add a bucket of "
      f"{need}, or lower a limit"
    )
  if config["rollout"]["min_new_tokens"] > new:
    yield (
      f"config.rollout.min_new_tokens is above max_new_tokens = {new}; lower it"
    )


def _optimizers(config: Mapping[str, Any], stages: set[str]) -> Iterator[str]:
  """Finds optimizers that cannot keep their moments as asked."""
  for stage in ("base", "sft", "rl"):
    section = config[stage]
    reads = stage in stages or (stage == "base" and not config["checkpoint"])
    if not reads:
      continue
    try:
      optimizer.check_moments(section["optimizer"], section["moment_dtype"])
    except ValueError as error:
      yield f"config.{stage}.moment_dtype: {error}"


def _update(config: Mapping[str, Any]) -> Iterator[str]:
  """Checks an RL step: divisibility, and fields that depend on each other."""
  rl = config["rl"]
  pairs = rl["loss"] == "dpo"
  if rl["prompts"] % rl["mini_batch"]:
    yield (
      f"A step's {rl['prompts']} prompts do not divide into mini-batches of "
      f"{rl['mini_batch']}; change config.rl.prompts or config.rl.mini_batch"
    )
  if rl["samples"] % rl["completions_per_row"]:
    yield (
      f"config.rl.completions_per_row is {rl['completions_per_row']}: a row of "
      f"an update holds a whole part of a group's {rl['samples']} samples; use "
      "a divisor of config.rl.samples, 1 gives each sample a row"
    )
  elif pairs and rl["completions_per_row"] > 1:
    yield (
      "config.rl.loss is 'dpo', which compares two rows of a group, so that "
      f"config.rl.completions_per_row = {rl['completions_per_row']} cannot be; "
      "set it to 1"
    )
  else:
    rows = rl["mini_batch"] * (
      2 if pairs else rl["samples"] // rl["completions_per_row"]
    )
    if rows % rl["micro_batches"]:
      yield (
        f"config.rl.mini_batch x rows of a group gives {rows} rows an update, "
        "which do not divide into config.rl.micro_batches = "
        f"{rl['micro_batches']}; change one"
      )
  if rl["dual_clip"] and rl["dual_clip"] <= 1 + rl["clip_high"]:
    yield (
      f"config.rl.dual_clip is {rl['dual_clip']}; it must exceed 1 + clip_high "
      f"= {1 + rl['clip_high']:g}, 3.0 is usual, and 0 turns it off"
    )
  if rl["reduction"] == "constant" and not rl["constant"]:
    yield (
      "config.rl.reduction is 'constant' and config.rl.constant 0; set the "
      "divisor, for example the limit of a response"
    )
  in_loss = not pairs and rl["kl_coef"] and rl["kl_in"] == "loss"
  if in_loss and rl["kl_estimator"] == "k1":
    try:
      kl.estimator("k1", in_loss=True)
    except ValueError as error:
      yield f"config.rl.kl_estimator is 'k1': {error}"
  try:
    rules = advantages.build(rl["advantage"], rl["advantage_options"])
  except (ValueError, TypeError):
    return  # reported above
  ours = set(rules) <= set(OURS)
  if "gdpo" in rules and rl["kl_coef"] and rl["kl_in"] == "reward":
    yield (
      "config.rl.kl_in is 'reward', and gdpo of config.rl.advantage normalises "
      "every reward term by itself, of which KL is none; set it to 'loss'"
    )
  if rl["importance_floor"] > rl["importance_cap"] > 0:
    yield (
      f"config.rl.importance_floor is {rl['importance_floor']}, above "
      f"config.rl.importance_cap = {rl['importance_cap']}, so that every token "
      "is masked; lower it, 0.5 is usual"
    )
  if rl["value_coef"] and "gae" not in rules and ours:
    yield (
      "config.rl.value_coef trains a critic, and no advantage estimator gives "
      "it targets; add gae to config.rl.advantage, or set it to 0"
    )
  if "gae" in rules and not rl["value_coef"]:
    yield (
      "config.rl.advantage holds gae, which needs a critic's values; set "
      "config.rl.value_coef above 0"
    )
  if rl["divergence_coef"] and ours and not rules.keys() & {
    "sdpo", "distillation",
  }:  # fmt: skip
    yield (
      "config.rl.divergence_coef needs an advantage estimator with a teacher; "
      "add "
      '"0*sdpo" or "0*distillation" to config.rl.advantage'
    )
  if getattr(rules.get("sdpo"), "model", "") == "ema" and not rl["ema"]:
    yield (
      "config.rl.advantage holds sdpo, whose teacher is the policy's moving "
      "mean; set config.rl.ema above 0, 0.05 is usual"
    )


@dataclasses.dataclass(frozen=True)
class Read:
  """When a value is read; changing one that nothing reads is a mistake."""

  default: Any  # of configs/common.py
  when: Callable[[Mapping[str, Any], set[str]], bool]
  reader: str  # the condition in words


def _rl(
  test: Callable[[Mapping[str, Any]], Any],
) -> Callable[[Mapping[str, Any], set[str]], bool]:
  return lambda config, stages: "rl" not in stages or bool(test(config["rl"]))


def _trains(
  stage: str, test: Callable[[Mapping[str, Any]], Any]
) -> Callable[[Mapping[str, Any], set[str]], bool]:
  return lambda config, stages: stage not in stages or bool(test(config[stage]))


def _penalised(rl: Mapping[str, Any]) -> bool:
  return rl["loss"] != "dpo" or rl["kl_in"] == "reward"


def _uses(rl: Mapping[str, Any], *models: str) -> bool:
  """Whether an advantage estimator of the run may use one of these models."""
  for name, rule in advantages.build(
    rl["advantage"], rl["advantage_options"]
  ).items():
    asked = {
      "distillation": ("teacher",),
      "sdpo": (getattr(rule, "model", ""),),
      "oppo": ("teacher",) if isinstance(rule, oppo.AdvantageEstimator)
      and rule.oracle == "teacher" else (),
    } | dict.fromkeys(ALONE, ())  # fmt: skip
    if set(asked.get(name, models)) & set(models):
      return True
  return False


def _file(name: str) -> Callable[[Mapping[str, Any], set[str]], bool]:
  return lambda config, stages: bool(config["data"][name])


def _adapts(stage: str) -> Callable[[Mapping[str, Any], set[str]], bool]:
  return lambda config, stages: (
    stage not in stages or config[stage]["lora"]["rank"] > 0
  )


def _opera(config: Mapping[str, Any], stages: set[str]) -> bool:
  """Whether evaluation or OPERA's own term uses the reward's settings."""
  reward = config["reward"]
  names = compose.Sums.parse(reward["terms"], reward["by_task"]).names()
  return "opera" in names or "evaluate" in stages


_LOSS = "config.rl.loss is not 'dpo'"
_STORY_WORDS = 80  # no text of storyworld has so many


def _limits_words(name: str) -> Callable[[Mapping, set], bool]:
  """Whether a limit of words is read, or holds without being read."""

  def read(config: Mapping[str, Any], stages: set[str]) -> bool:
    data = config["data"]
    return data["kind"] == "jsonl" or data[name] >= _STORY_WORDS

  return read


READ: dict[str, Read] = {
  **{
    f"{stage}.b2": Read(
      default,
      _trains(stage, lambda section: section["optimizer"] in ("adamw", "muon")),
      f"config.{stage}.optimizer is 'adamw' or 'muon'",
    )
    for stage, default in (("base", 0.95), ("sft", 0.999))
  },
  **{
    f"{stage}.validation_every": Read(
      50,
      _trains(stage, lambda section: section["validation_share"] > 0),
      f"config.{stage}.validation_share is above 0",
    )
    for stage in ("base", "sft")
  },
  "rl.balance_tokens": Read(
    False, _rl(lambda rl: rl["mini_batch"] < rl["prompts"]),
    "config.rl.mini_batch is below config.rl.prompts",
  ),
  "rl.beta": Read(
    0.1, _rl(lambda rl: rl["loss"] == "dpo"), "config.rl.loss is 'dpo'"
  ),
  **{
    f"rl.{name}": Read(default, _rl(lambda rl: rl["loss"] != "dpo"), _LOSS)
    for name, default in (
      ("clip_low", 0.2), ("clip_high", 0.2), ("dual_clip", 3.0),
      ("reduction", "sequence_mean"), ("entropy_coef", 0.0),
      ("value_coef", 0.0), ("divergence_coef", 0.0), ("importance_cap", 0.0),
    )
  },
  "rl.kl_coef": Read(
    0.001, _rl(_penalised), f"{_LOSS}, or config.rl.kl_in is 'reward'"
  ),
  "rl.kl_in": Read(
    "loss", _rl(lambda rl: rl["kl_coef"]), "config.rl.kl_coef is not 0"
  ),
  "rl.kl_estimator": Read(
    "k3", _rl(lambda rl: rl["kl_coef"] and _penalised(rl)),
    f"config.rl.kl_coef is not 0, and {_LOSS} or config.rl.kl_in is 'reward'",
  ),
  "rl.constant": Read(
    0.0, _rl(lambda rl: rl["reduction"] == "constant"),
    "config.rl.reduction is 'constant'",
  ),
  "rl.value_clip": Read(
    0.2, _rl(lambda rl: rl["value_coef"]), "config.rl.value_coef is above 0"
  ),
  "rl.teacher_top_k": Read(
    100, _rl(lambda rl: rl["divergence_coef"]),
    "config.rl.divergence_coef is above 0",
  ),
  **{
    f"rl.{name}": Read(
      default, _rl(lambda rl: rl["importance_cap"]),
      "config.rl.importance_cap is above 0",
    )
    for name, default in (
      ("importance_level", "token"), ("importance_mode", "truncate"),
    )
  },
  "rl.importance_floor": Read(
    0.0,
    _rl(lambda rl: rl["importance_cap"] and rl["importance_mode"] == "mask"),
    "config.rl.importance_cap is above 0 and config.rl.importance_mode 'mask'",
  ),
  "rl.ema": Read(
    0.0, _rl(lambda rl: _uses(rl, "ema")),
    "config.rl.advantage holds a rule that asks the moving mean, such as sdpo",
  ),
  "rl.teacher": Read(
    "", _rl(lambda rl: _uses(rl, "teacher")),
    "config.rl.advantage holds a rule that asks a teacher, such as "
    "distillation",
  ),
  "rl.max_logprob_diff_steps": Read(
    3, _rl(lambda rl: rl["max_logprob_diff"]),
    "config.rl.max_logprob_diff is above 0",
  ),
  "rl.sampling_floor": Read(
    0.05, _rl(lambda rl: rl["sampling"] == "pass_rate"),
    "config.rl.sampling is 'pass_rate'",
  ),
  "rl.filter_reward": Read(
    "", _rl(lambda rl: rl["max_resamples"]), "config.rl.max_resamples is above "
    "0"
  ),
  **{
    f"{stage}.lora.{name}": Read(
      default, _adapts(stage), f"config.{stage}.lora.rank is above 0"
    )
    for stage in ("sft", "rl")
    for name, default in (
      ("alpha", 16.0), ("targets", lora.TARGETS), ("base_dtype", "bfloat16"),
    )
  },
  **{
    f"rl.validation.{name}": Read(
      default, _rl(lambda rl: rl["validation"]["every"]),
      "config.rl.validation.every is above 0",
    )
    for name, default in (
      ("prompts", 32), ("samples", 2), ("metric", "reward"), ("patience", 0),
      ("keep_best", True),
    )
  },
  "rollout.loop_tokens": Read(
    0, lambda config, stages: config["rollout"]["loop_period"] > 0,
    "config.rollout.loop_period is above 0",
  ),
  "select.rl.right": Read(
    (1,), lambda config, stages: config["select"]["rl"]["samples"] > 0,
    "config.select.rl.samples is above 0",
  ),
  "select.rl.band": Read(
    (2.0, 3.0), lambda config, stages: bool(config["select"]["rl"]["judge"]),
    "config.select.rl.judge names a judge",
  ),
  "synthesis.choose": Read(
    "", lambda config, stages: config["synthesis"]["method"] == "search",
    "config.synthesis.method is 'search'",
  ),
  "synthesis.score": Read(
    "sequence",
    lambda config, stages: config["synthesis"]["method"] == "search",
    "config.synthesis.method is 'search'",
  ),
  "synthesis.rounds": Read(
    10, lambda config, stages: config["synthesis"]["method"] == "rewrite",
    "config.synthesis.method is 'rewrite'",
  ),
  "data.math_share": Read(
    0.0, lambda config, stages: config["data"]["kind"] == "storyworld",
    "config.data.kind is 'storyworld'",
  ),
  "data.shares": Read(
    (), lambda config, stages: config["data"]["kind"] == "jsonl",
    "config.data.kind is 'jsonl'",
  ),
  "data.near_duplicate": Read(
    0.0, lambda config, stages: config["data"]["kind"] == "jsonl",
    "config.data.kind is 'jsonl'",
  ),
  # Storyworld's texts are shorter than these limits, and so within them.
  **{
    f"data.{name}": Read(
      0, _limits_words(name), "config.data.kind is 'jsonl'"
    )
    for name in ("prompt_words", "excerpt_words")
  },
  "data.default_task": Read(
    "", lambda config, stages: bool(
      config["data"]["path"] or config["data"]["mix"]
    ),
    "config.data.path or config.data.mix names a file",
  ),
  **{
    f"data.{name}": Read(
      default, _file("math_path"), "config.data.math_path names a file"
    )
    for name, default in (
      ("math_fields", {"prompt": "question", "reference": "answer"}),
      ("math_answer", prompts.GSM8K_ANSWER),
    )
  },
  "data.responses_path": Read(
    "", lambda config, stages: config["data"]["documents"] > 0,
    "config.data.documents is above 0",
  ),
  **{
    f"reward.{name}": Read(
      default, _opera,
      "config.reward.terms holds opera, or config.stages evaluate",
    )
    for name, default in (
      ("tau", 2.0), ("mode", "both"), ("compare", "previous"), ("bridge", ""),
    )
  },
  "reward.alpha": Read(
    0.3,
    lambda config, stages: _opera(config, stages)
    and config["reward"]["mode"] in ("both", "one_hot"),
    "config.reward.mode is 'both' or 'one_hot', and config.reward.terms holds "
    "opera or config.stages evaluate",
  ),
}  # fmt: skip


def _unread(config: Mapping[str, Any], stages: set[str]) -> Iterator[str]:
  """Finds changed values that nothing in this run reads."""
  for field, read in READ.items():
    value: Any = config
    for name in field.split("."):
      value = value[name]
    if _plain(value) == _plain(read.default):
      continue
    try:
      matters = read.when(config, stages)
    except ValueError:
      continue  # an invalid term, reported already
    if not matters:
      yield (
        f"config.{field} is {value!r}, and nothing in this run reads it: it "
        f"matters where {read.reader}; leave it at {read.default!r}, or change "
        "that"
      )


def _plain(value: Any) -> Any:
  """Converts lists to tuples and mappings to dicts, for comparison."""
  if isinstance(value, Mapping):
    return {name: _plain(inner) for name, inner in value.items()}
  return tuple(value) if isinstance(value, list) else value
