"""Writes the report page: settings, measures, curves and samples."""

from collections.abc import Mapping, Sequence
from typing import Any

from opera_jax.evals import bootstrap, table
from opera_jax.models import decoder
from opera_jax.report import curves, page, views
from opera_jax.run import setup as setup_lib
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import exchange
from opera_jax.stages import evaluate
from opera_jax.train import checkpoint, metrics

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
  path = run.workdir / "report.html"
  page.write(
    path,
    views.Page(
      title=f"OPERA on {config['data']['kind']}",
      summary=_summary(run, result, rows),
      config=config,
      captions=_captions(run, result),
      charts={
        title: curves.charts(
          metrics.read(run.workdir / stage / "metrics.jsonl")
        )
        for stage, title in SECTIONS.items()
      },
      rows=rows,
      samples=_samples(result.get("shown", ())),
      thoughts=[_thought(shown) for shown in result.get("shown", ())],
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


def _thought(shown: Mapping[str, Any]) -> views.ThoughtView:
  return views.ThoughtView(
    stage=shown["model"],
    prompt=shown["prompt"],
    reference=shown["reference"],
    steps=[views.StepView(**step) for step in shown["steps"]],
    answer=shown["answer"],
    terms=shown["terms"],
    note="" if shown["steps"] else "no closed thought: " + shown["text"],
  )


def _samples(every: Sequence[Mapping[str, Any]]) -> list[views.SampleView]:
  by_prompt: dict[str, list[Mapping[str, Any]]] = {}
  for shown in every:
    by_prompt.setdefault(shown["prompt"], []).append(shown)
  return [
    views.SampleView(
      prompt=prompt,
      reference=group[0]["reference"],
      answers=[
        views.AnswerView(
          stage=shown["model"],
          thought="\n\n".join(s["text"] for s in shown["steps"])
          or shown["text"],
          answer=shown["answer"],
          terms=shown["terms"],
        )
        for shown in group
      ],
    )
    for prompt, group in by_prompt.items()
  ]
