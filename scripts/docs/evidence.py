"""Writes docs/evidence from the recorded runs of configs/evidence.py.

  python -m experiments.ablate --config=configs/evidence.py \
    --workdir=runs/evidence
  python -m scripts.docs.evidence --grid=runs/evidence \
    --path=TASKS.jsonl --math_path=GSM8K.jsonl

The tables of storyworld are the grid's. Its models, before, after SFT and after
RL with the first seed, are then measured once on held-out prompts of the files,
and three whole completions of each are kept to read.
"""

import json
import os
import pathlib
import platform
import statistics
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from opera_jax.configs import evidence, smollm2
from opera_jax.evals import ablation, table
from opera_jax.run import setup
from opera_jax.stages import held_out

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "docs" / "evidence"

# Measures for which more is better, or fewer.
BETTER = ("facts", "correct", "r_self", "score", "finished", "logp_thought")
STEPS = (("base", "sft"), ("sft", "rl"))
RESAMPLES = 2_000


def not_better(values: ablation.Values, names: Mapping[str, str]) -> list[str]:
  """Sentences on every measure that a stage did not raise.

  Args:
    values: by row and seed, per-prompt numbers of every measure.
    names: measure -> heading.
  """
  out = []
  for before, after in STEPS:
    for measure in BETTER:
      rows = [values[row].values() for row in (before, after)]
      if not all(measure in seed for row in rows for seed in row):
        continue
      change = ablation.difference(
        values, after, before, measure, resamples=RESAMPLES
      )
      if change.low > 0:
        continue
      verb = "fell" if change.high < 0 else "did not rise"
      out.append(
        f"- {names[measure]} {verb} from {before} to {after}: "
        f"{table.format_interval(change, sign=True)}."
      )
  return out


def results(values: ablation.Values) -> str:
  """The table of one set of prompts, and first what did not get better."""
  names = held_out.MEASURES
  worse = not_better(values, names)
  text = ablation.results(
    values, names, baseline="sft", resamples=RESAMPLES
  ).replace("| method |", "| model |")
  listed = "\n".join(worse) if worse else "- Every measure rose at each stage."
  return f"What did not get better:\n\n{listed}\n\n{text}\n"


def real_tasks(
  grid: pathlib.Path,
  models: Mapping[str, str],
  *,
  path: str,
  math_path: str,
  tasks: int,
) -> dict[str, dict[int, dict[str, list[float]]]]:
  """Measures the models once on held-out prompts of the files."""
  config = smollm2.get_config().copy_and_resolve_references().unlock()
  config.data.path, config.data.math_path = path, math_path
  config.data.default_task = "open_ended"
  config.data.synthesis = config.data.rl = 1
  config.data.held_out = tasks
  config.data.math_limit = max(2 * tasks, 40)
  run = setup.setup(
    grid / "real_tasks",
    temperature=1.0,
    **{name: config[name] for name in setup.SECTIONS},
  )
  values = {}
  for name, folder in models.items():
    params, prompts = run.load(folder), run.tasks.held_out
    groups = held_out.draw(
      run,
      params,
      prompts,
      samples=2,
      max_new_tokens=config.rollout.max_new_tokens,
    )
    values[name] = {0: held_out.measure(run, params, prompts, groups)}
    print(f"evidence: {name}: measured on {len(prompts)} prompts", flush=True)
  return values


def to_read(grid: pathlib.Path, models: Mapping[str, str]) -> str:
  """Three whole completions of each model."""
  config = smollm2.get_config("story")
  run = setup.setup(
    grid / "start",
    temperature=1.0,
    **{name: config[name] for name in setup.SECTIONS},
  )
  prompts = run.tasks.held_out[:3]
  parts = []
  for name, folder in models.items():
    groups = held_out.draw(
      run,
      run.load(folder),
      prompts,
      samples=1,
      max_new_tokens=config.rollout.max_new_tokens,
    )
    parts.append(f"### {name}\n")
    for prompt, (sample,) in zip(prompts, groups):
      text = run.tokenizer.decode(sample.tokens, skip_special=True)
      ended = "it ends here" if sample.finished else "cut at the limit"
      parts.append(f"{prompt.prompt}\n\n{_quoted(text)}\n\n({ended})\n")
  return "\n".join(parts)


def _quoted(text: str) -> str:
  """Text as an indented block, in which nothing is Markdown or HTML."""
  lines = text.replace("\r", "").expandtabs(4).split("\n")
  return "\n".join(f"    {line}" for line in lines)


def by_seed(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
  """Rows whose seeds, which JSON writes as text, are numbers again."""
  return {row: {int(k): v for k, v in by.items()} for row, by in rows.items()}


def hardware() -> str:
  """Cores and kind of the machine that runs this."""
  cores = len(os.sched_getaffinity(0))
  return f"{cores} cores ({platform.machine()})"


def page(
  story: ablation.Values, real: ablation.Values | None, **parts: Any
) -> str:
  """The page: what was run, tables, completions."""
  lines = [
    "# Recorded runs of a pretrained model",
    "",
    "Written by `python -m scripts.docs.evidence` from a run of "
    "`configs/evidence.py`: SmolLM2-135M-Instruct (Q4_1 weights, trained in "
    f"float32) on {parts['hardware']}, beside other work; the steps of RL took "
    f"{parts['minutes']:.0f} minutes a seed. One SFT model, "
    f"{len(story['rl'])} seeds of RL from it. Intervals are 95% over prompts "
    "(and seeds), Δ the paired difference from the SFT model. Sizes are those "
    "of `configs/smollm2.py:story`; this says nothing of a model that reasons.",
    "",
    "## Storyworld",
    "",
    f"{len(story['base'][0]['facts'])} held-out prompts, 2 samples each. Facts "
    "kept are the outside measure: no reward sees them. Samples are drawn at "
    "temperature 1, as the method trains; at that temperature this model "
    "writes little that holds together. The own thought of a completion that "
    "closes none is all of it.",
    "",
    results(story),
  ]
  if real is not None:
    tasks = len(real["base"][0]["tokens"])
    maths = len(real["base"][0].get("correct", ()))
    lines += [
      "## Real tasks, measured once",
      "",
      f"{tasks} held-out prompts, {maths} of them maths (GSM8K) and the rest "
      "open-ended (HelloBench), 2 samples each; the models are those of "
      "storyworld and were trained on no such task.",
      "",
      results(real),
    ]
  return "\n".join([*lines, "## Three completions of each", "", parts["read"]])


def main(_) -> None:
  grid = pathlib.Path(_GRID.value).resolve()
  made = json.loads((grid / "ablation.json").read_text())
  story, cost = by_seed(made["values"]), made["cost"]
  first = evidence.get_config().seeds[0]
  models = {
    "base": str(grid / "start" / "base"),
    "sft": str(grid / "start" / "sft"),
    "rl": str(grid / "cells" / f"rl-{first}" / "rl"),
  }
  real = None
  if _PATH.value or _MATH.value:
    real = real_tasks(
      grid,
      models,
      path=_PATH.value,
      math_path=_MATH.value,
      tasks=_TASKS.value,
    )
  text = page(
    story,
    real,
    hardware=hardware(),
    minutes=statistics.mean(c["seconds"] for c in cost["rl"].values()) / 60,
    read=to_read(grid, models),
  )
  FOLDER.mkdir(parents=True, exist_ok=True)
  (FOLDER / "README.md").write_text(text.rstrip() + "\n")
  (FOLDER / "values.json").write_text(
    json.dumps({"storyworld": story, "real_tasks": real}) + "\n"
  )


if __name__ == "__main__":
  _GRID = flags.DEFINE_string(
    "grid", None, "Folder of the grid.", required=True
  )
  _PATH = flags.DEFINE_string("path", "", "Open-ended tasks, JSONL.")
  _MATH = flags.DEFINE_string("math_path", "", "GSM8K's rows, JSONL.")
  _TASKS = flags.DEFINE_integer("tasks", 24, "Held-out prompts of the files.")
  app.run(main)
