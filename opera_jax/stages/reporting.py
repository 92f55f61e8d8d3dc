"""Writes the report page: settings, measures, curves and samples."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from opera_jax.evals import bootstrap, table
from opera_jax.models import decoder
from opera_jax.report import curves, names, page, views
from opera_jax.rl import rollout_files, step_metrics
from opera_jax.run import setup as setup_lib
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import exchange
from opera_jax.stages import evaluate
from opera_jax.train import checkpoint, metrics

# Terms whose distribution never changes, says nothing, or is that of the reward
# and of R_self.
_NOT_DRAWN = ("r_ppl", "opera", "verifiable", "closed", "steps_beyond_max")
SECTIONS = {"base": "Base model", "sft": "SFT", "rl": "RL"}


def write(
  run: setup_lib.Run,
  config: Mapping[str, Any],
  preemption: checkpoint.Preemption,
) -> None:
  """Writes `report.html` from the stages that have finished.

  The page is rebuilt each time from the stages' files. On several hosts process
  0 writes it.
  """

  def write_interruptibly() -> None:
    with preemption.exit_at_once():
      _write(run, config)

  with workdir_lib.hold_lock(run.workdir / "report.lock", "report", preemption):
    exchange.on_main_process(write_interruptibly)


def _write(run: setup_lib.Run, config: Mapping[str, Any]) -> None:
  result = workdir_lib.result(run.workdir, "evaluate")
  rows = [_row(row) for row in result.get("table", ())]
  lines = {
    title: metrics.read(run.workdir / stage / "metrics.jsonl")
    for stage, title in SECTIONS.items()
  }
  path = run.workdir / "report.html"
  page.write(
    path,
    views.Page(
      title=f"OPERA on {config['data']['kind']}",
      summary=_summary(run, result, rows),
      config=config,
      captions=_captions(run, result),
      charts={title: curves.charts(read) for title, read in lines.items()},
      constants={
        title: curves.constants(read) for title, read in lines.items()
      },
      histograms=_histograms(run.workdir),
      rows=rows,
      cards=_cards(result.get("shown", ())),
    ),
  )
  print(f"report: {path}", flush=True)


def _row(row: Mapping[str, Any]) -> table.Row:
  def interval(value: Mapping[str, Any] | None) -> bootstrap.Interval | None:
    return None if value is None else bootstrap.Interval(**value)

  return table.Row(
    measure=table.Measure(**row["measure"]),
    cells=tuple(
      table.Cell(
        **(
          cell
          | {
            "value": interval(cell["value"]),
            "change": interval(cell["change"]),
          }
        )
      )
      for cell in row["cells"]
    ),
  )


def _summary(
  run: setup_lib.Run, result: Mapping[str, Any], rows: Sequence[table.Row]
) -> str:
  count = decoder.parameter_count(decoder.abstract(run.model)[1])
  words = [
    f"A model of family {run.model.family}, {count:,} parameters, vocabulary "
    f"{run.tokenizer.vocab_size:,}, {len(run.tasks.synthesis):,} prompts for "
    f"the cold start, {len(run.tasks.rl):,} for RL.",
    *run.tasks.notes,
  ]
  lost = {
    name: n for name, n in run.dropped.items() if not name.endswith("kept")
  }
  if any(lost.values()):
    words.append(f"Dropped for length: {lost}.")
  if result:
    words.append(
      f"Evaluated on {result['prompts']} held-out prompts, "
      f"{result['samples']} samples each."
    )
  outside = [r for r in rows if r.measure.key in ("facts", "correct")]
  for row in outside:
    last = row.cells[-1]
    if last.change is None:
      continue
    before, after = (evaluate.TITLES[c.stage] for c in row.cells[-2:])
    words.append(
      f"Outside measure, which no reward sees: from {before} to {after}, "
      f"{last.verdict} ({table.format_interval(last.change, sign=True)})."
    )
  return " ".join(words)


def _captions(run: setup_lib.Run, result: Mapping[str, Any]) -> dict[str, str]:
  out = {
    "prompts": f"{len(run.tasks.rl):,} tasks",
    "base model": f"{run.model.num_hidden_layers} layers, width "
    f"{run.model.hidden_size}",
  }
  for stage, box in (("synthesize", "synthesis"), ("select", "selection")):
    done = workdir_lib.result(run.workdir, stage)
    if done:
      kept = done.get("complete", done.get("kept", 0))
      out[box] = f"{kept:,} of {sum(done.values()):,} traces"
  done = workdir_lib.result(run.workdir, "sft")
  if done:
    out["SFT"] = f"{done['updates']:,} updates"
  done = workdir_lib.result(run.workdir, "rl")
  if done:
    out["rollouts"] = f"{done['steps']} steps"
  if result:
    out["evaluation"] = f"{result['prompts']} held-out prompts"
  return out


def _cards(every: Sequence[Mapping[str, Any]]) -> list[views.PromptCard]:
  """One card a prompt, with the completions of all models."""
  by_prompt: dict[str, list[Mapping[str, Any]]] = {}
  for shown in every:
    by_prompt.setdefault(shown["prompt"], []).append(shown)
  return [
    views.PromptCard(
      prompt=prompt,
      reference=group[0]["reference"],
      completions=[
        views.CompletionView(
          stage=shown["model"],
          steps=[views.StepView(**step) for step in shown["steps"]],
          answer=shown["answer"],
          terms=shown["terms"],
          note="" if shown["steps"] else "no closed thought: " + shown["text"],
        )
        for shown in group
      ],
    )
    for prompt, group in by_prompt.items()
  ]


def _histograms(
  workdir: pathlib.Path,
) -> dict[str, list[views.Histogram]]:
  """Distributions over held-out samples by model, and over RL's first and last
  rollouts.

  R_ppl is left out: ranks in a group have one distribution, whatever is learnt.
  """
  held_out = {
    path.name.partition(".")[0]: _records(path)
    for path in (workdir / "evaluate" / evaluate.SAMPLES).glob("*.jsonl.gz")
  }
  files = rollout_files.steps(workdir / "rl" / "rollouts")
  steps = list(files)
  # A tenth of the steps each, where they do not overlap.
  few = max(len(steps) // 10, 1)
  rollouts = {
    _span(some): [r for step in some for r in _records(files[step])]
    for some in (steps[:few], steps[-few:])
    if len(steps) > 1
  }
  return {
    "Held-out prompts, by model": _distributions(
      {m: held_out[m] for m in evaluate.TITLES if m in held_out}
    ),
    "RL's rollouts, at the start and at the end": _distributions(rollouts),
  }


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a file; none, with a warning, if it is damaged."""
  try:
    return list(rollout_files.read(path))
  except ValueError as error:
    print(f"report: warning: its histograms lack a file: {error}", flush=True)
    return []


def _span(steps: Sequence[int]) -> str:
  if len(steps) == 1:
    return f"step {steps[0]}"
  return f"steps {steps[0]} to {steps[-1]}"


def _distributions(
  records: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[views.Histogram]:
  """A histogram of each number that the records hold and that varies."""
  by_name: dict[str, dict[str, list[float]]] = {}
  for label, group in records.items():
    for record in group:
      for name, value in _numbers(record).items():
        if value is not None:
          values = by_name.setdefault(name, {}).setdefault(label, [])
          values.append(value)
  return [
    views.Histogram(names.label(name), values, note=names.meaning(name))
    for name, values in by_name.items()
    if len({v for group in values.values() for v in group}) > 1
  ]


def _numbers(record: Mapping[str, Any]) -> dict[str, float | None]:
  """The numbers of a completion whose distribution says something."""
  numbers: dict[str, float | None] = {}
  if "facts" in record:
    numbers["facts"] = sum(record["facts"].values())
  numbers["reward"] = record["reward"]
  numbers["advantage"] = record["advantage"]
  other_task = "math" if record["task"] == "open_ended" else "open_ended"
  skipped = {*_NOT_DRAWN, *step_metrics.BY_TASK[other_task]}
  numbers |= {k: v for k, v in record["terms"].items() if k not in skipped}
  return numbers | {"completion_tokens": record["completion_tokens"]}
