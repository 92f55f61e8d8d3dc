"""Compares variants over seeds on one task, starting from one model.

  python -m experiments.ablate --config=configs/ablations.py --workdir=runs/abl
  python -m experiments.ablate --config=configs/cold_start.py --workdir=runs/cs

The first compares RL methods from one SFT model at equal sampled tokens. The
second compares synthesis methods from one base model by the resulting SFT
model.

Every cell is a run of `experiments.opera_rl` in its own process and folder; a
finished cell is skipped, and a killed one resumes. Writes `ablation.md`
(results, costs, and for RL also reward probes), `ablation.json` and
`curves.png`, again after every cell.
"""

import ast
import contextlib
import functools
import hashlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epy

from opera_jax import commands, config_file, config_flag

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  from opera_jax import atomic_file
  from opera_jax.data import traces
  from opera_jax.evals import ablation
  from opera_jax.report import learning_curves
  from opera_jax.rl import score
  from opera_jax.run import setup, sizes, workdir
  from opera_jax.stages import config_check, held_out, reward_probes
  from opera_jax.train import checkpoint, metrics


def ablate(config, folder: str, preemption: "checkpoint.Preemption") -> None:
  """Runs the grid cell by cell, and writes its tables."""
  root = workdir.make(folder).resolve()
  with workdir.hold_lock(root / "ablate.lock", "ablate", preemption):
    grid(config, root, preemption)


def grid(config, root: pathlib.Path, preemption) -> None:
  """Runs the grid while holding the folder's lock."""
  common_flags = split(config.flags)
  check(config, common_flags)
  # 1. Train the model that all cells start from.
  start = root / "start"
  run_driver(
    config.task,
    start,
    [f"--config.stages={config.start}"],
    common_flags,
    preemption,
  )
  task = sizes.derive(load(config.task, common_flags))
  with preemption.exit_at_once():
    run = setup.setup(
      start,
      temperature=task.rollout.temperature,
      **{name: task[name] for name in setup.SECTIONS},
    )
  # 2. Measure that model, and any before it.
  measure = functools.partial(
    measure_once, run, config=config, task=task, preemption=preemption
  )
  values = {
    name: {0: measure(name, start / f"measured_{name}.json")}
    for name in config.first.split(",")
  }
  # 3. Compute each reward on completions that are built to exploit it.
  preemption.exit_if_requested()
  probed = probe(run, config, task, common_flags) if config.probes else {}
  # 4. Train and measure every row and seed; the tables and curves so far are
  # written after each.
  cost: dict[str, Any] = {}
  text = ""
  for seed in config.seeds:
    for name, path, changes in config.rows:
      cell = root / "cells" / f"{slug(name)}-{seed}"
      path = config_of(path, config)
      train(
        cell,
        start,
        path=path,
        seed=seed,
        config=config,
        common_flags=common_flags,
        changes=changes,
        preemption=preemption,
      )
      values.setdefault(name, {})[seed] = measure(
        str(cell / config.last), cell / "measured.json"
      )
      cost.setdefault(name, {})[seed] = cost_of(cell)
      print(f"ablate: {name}, seed {seed}: {cost[name][seed]}", flush=True)
      with preemption.exit_at_once():
        text = write(root, config, values, cost, probed)
  print(text, flush=True)


def check(config, common_flags) -> None:
  """Refuses invalid configs of rows, before any run starts.

  Raises:
    ValueError: names the row and what is wrong with it.
  """
  names = [name for name, _, _ in config.rows]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice or not all(names):
    raise ValueError(
      f"config.rows has the names {twice} twice, or an empty name; names must "
      "be distinct, since each names a cell's folder. Rename one."
    )
  before = {name for name in config.start.split(",") if name != "base"}
  stages = before | set(config.stages.split(","))
  for name, path, changes in config.rows:
    made = load(config_of(path, config), [*common_flags, *split(changes)])
    try:
      config_check.check(made.to_dict(), stages)
    except config_check.ConfigError as error:
      raise ValueError(f"Row {name!r}: {error}") from error


def run_driver(path: str, folder, settings, common_flags, preemption) -> None:
  """Runs the `opera_rl` driver in a subprocess.

  Raises:
    SystemExit: the subprocess or this process was told to stop; both have
      stopped.
    CalledProcessError: the subprocess failed.
  """
  command = [
    *(sys.executable, "-m", "opera_jax.experiments.opera_rl"),
    *(f"--config={path}", f"--workdir={folder}", *common_flags, *settings),
  ]
  preemption.exit_if_requested()
  stopping = False
  with subprocess.Popen(command) as process:
    while process.poll() is None:
      if preemption.requested_here() and not stopping:
        process.terminate()  # it saves before it exits
        stopping = True
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.5)
  if stopping:
    raise SystemExit(preemption.exit_code())
  if process.returncode in (preemption.EXIT_CODE, preemption.INTERRUPTED):
    raise SystemExit(process.returncode)
  if process.returncode:
    raise subprocess.CalledProcessError(process.returncode, command)


def train(
  cell, start, *, path, seed, config, common_flags, changes, preemption
) -> None:
  """Runs the stages of one cell, starting from the shared model."""
  settings = [
    f"--config.stages={config.stages}",
    *split(config.each.format(seed=seed)),
    *split(changes),
  ]
  stage = workdir.Stage(
    cell.parent,
    cell.name,
    {"config": path, "flags": [*common_flags, *settings]},
    {
      f"{name}/model": workdir.model(start, name)
      for name in config.shared
      if name != "tokenizer"
    },
  )
  with stage.locked(preemption):
    if stage.finished():
      return
    for name in config.shared:
      if not (cell / name).exists():
        (cell / name).symlink_to(start / name)
    begin = time.monotonic()
    run_driver(path, cell, settings, common_flags, preemption)
    print(f"ablate: {cell.name}: {time.monotonic() - begin:.0f} s", flush=True)
    stage.finish({})


def load(path: str, changes):
  """Loads a config file, and applies flags of the form --config.NAME=VALUE."""
  config = config_file.load(path).unlock()
  for change in changes:
    field, _, text = change.removeprefix("--config.").partition("=")
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = text
    config.update_from_flattened_dict({field: value})
  return config


def measure_once(
  run, stage: str, path: pathlib.Path, *, config, task, preemption
):
  """Measures a model on the held-out prompts, and caches the result in
  `path`."""
  sampling = {
    "samples": config.samples,
    "max_new_tokens": task.rollout.max_new_tokens,
  }
  made_from = {"model": run.model_digest(stage), **sampling}
  if os.path.lexists(path):
    try:
      found = workdir.read(path, "leave it: it is measured again")
    except (ValueError, OSError) as error:
      found = {}
      print(f"ablate: {error}", flush=True)
    if found.get("made_from") == made_from:
      return found["numbers"]
    print(f"ablate: {path} has other inputs; measuring again.", flush=True)

  def advance(_: int) -> None:
    preemption.exit_if_requested()

  params, prompts = run.load(stage), run.tasks.held_out
  groups = held_out.draw(run, params, prompts, **sampling, advance=advance)
  numbers = held_out.measure(run, params, prompts, groups, advance)
  workdir.write(path, {"made_from": made_from, "numbers": numbers})
  return numbers


def cost_of(cell: pathlib.Path) -> dict[str, float]:
  """The cost of a cell."""
  if not (cell / "rl").exists():
    made = list(traces.read(cell / "synthesize" / "traces"))
    done = workdir.result(cell, "select")
    return {
      "sampled_tokens": sum(sampled_tokens(trace) for trace in made),
      "traces": done["kept"],
    }
  lines = metrics.read(cell / "rl" / "metrics.jsonl")
  scored = (
    "scoring/prefix_tokens",
    "scoring/continuation_tokens",
    "scoring/advantage_tokens",
  )
  return {
    "sampled_tokens": sum(line["rollout/tokens"] for line in lines),
    "scored_tokens": sum(line[name] for line in lines for name in scored),
    "seconds": sum(line["step_time"] for line in lines),
    "steps": len(lines),
  }


def sampled_tokens(trace: "traces.Trace") -> int:
  """Tokens sampled for a trace, including those of dropped candidates."""
  dropped = [
    one.tokens
    for round_ in trace.rounds
    for place, one in enumerate(round_.candidates)
    if place != round_.kept
  ]
  return len(trace.completion) + sum(dropped)


def probe(run, config, task, common_flags):
  """Computes each row's reward on probes made of the SFT model's samples."""
  params = run.load("sft")
  prompts = run.tasks.held_out[: config.probes]
  groups = held_out.draw(
    run,
    params,
    prompts,
    samples=1,
    max_new_tokens=task.rollout.max_new_tokens,
  )
  scorers: dict[str, Any] = {}
  for name, path, changes in config.rows:
    reward = load(
      config_of(path, config), [*common_flags, *split(changes)]
    ).reward.to_dict()
    if reward not in [known for known, _ in scorers.values()]:
      made = score.RewardScorer(run.logprob_scorer, run.tokenizer, **reward)
      scorers[name] = (reward, made)
  return reward_probes.answers(
    run,
    {name: scorer for name, (_, scorer) in scorers.items()},
    params,
    prompts,
    [run.tokenizer.completion_text(g[0].tokens) for g in groups],
  )


def write(root, config, values, cost, probed) -> str:
  """Writes the tables as Markdown, all numbers as JSON, and the curves as
  PNG.

  Args:
    root: folder of the grid.
    config: of the grid.
    values: numbers of every measured model, by row and seed.
    cost: of every cell, by row and seed.
    probed: rewards of probes.

  Returns:
    The Markdown. While the grid runs, it shows the seeds that all rows so far
    have.
  """
  size = {"resamples": config.resamples}
  rows = [name for name, _, _ in config.rows if name in cost]
  seeds = sorted(set.intersection(*(set(cost[name]) for name in rows)))
  values = values | {
    name: {seed: values[name][seed] for seed in seeds} for name in rows
  }
  cost = {name: {seed: cost[name][seed] for seed in seeds} for name in rows}
  shown = {name: held_out.MEASURES[name] for name in config.measures}
  text = "\n\n".join(
    [
      ablation.results(values, shown, baseline=config.baseline, **size),
      ablation.answers(values, config.questions, **size),
      ablation.costs(cost),
      ablation.efficiency(values, config.first.split(",")[-1]),
      *([ablation.probes(probed)] if probed else []),
    ]
  )
  atomic_file.write(root / "ablation.md", text + "\n")
  workdir.write(
    root / "ablation.json",
    {
      "values": values,
      "cost": cost,
      "probes": {
        reward: {name: np.asarray(v).tolist() for name, v in by.items()}
        for reward, by in probed.items()
      },
    },
  )
  curves = {
    name: [
      metrics.read(
        root / "cells" / f"{slug(name)}-{s}" / config.last / "metrics.jsonl"
      )
      for s in seeds
    ]
    for name in rows
  }
  learning_curves.write(
    curves,
    config.curves,
    root / "curves.png",
    config.over,
  )
  return text


def config_of(path: str, config) -> str:
  """A row's config with its size; config.task if the row names none."""
  return f"{path}:{config.size}" if path else config.task


def split(changes: str) -> list[str]:
  """Splits a string of flags, with shell quotes."""
  return shlex.split(changes)


def slug(name: str) -> str:
  """Converts a row's name to a folder name; distinct names stay distinct."""
  plain = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:60]
  if plain == name:
    return name
  return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def main(_) -> None:
  with checkpoint.Preemption() as preemption:
    ablate(_CONFIG.value, _WORKDIR.value, preemption)


if __name__ == "__main__":
  _CONFIG = config_flag.define("configs/ablations.py")
  _WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the grid.", required=True
  )
  logging.set_verbosity(logging.WARNING)  # orbax logs every file
  commands.run(main)
