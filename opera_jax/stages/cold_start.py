"""The cold start: synthesise traces with the base model, then select."""

import dataclasses
import pathlib

import jax

from opera_jax.data import traces
from opera_jax.sharding import runtime
from opera_jax.stages import setup as setup_lib
from opera_jax.synthesis import filters, search
from opera_jax.train import metrics


@dataclasses.dataclass(frozen=True)
class Search:
  """Settings of `synthesis.search.Searcher`, and of the batches of prompts."""

  batch: int  # prompts that advance together; work is kept batch by batch
  candidates: int
  budget: int
  price: str
  temperature: float
  top_k: int
  top_p: float
  max_step_tokens: int
  max_thought_tokens: int
  max_answer_tokens: int
  brakes: tuple[str, ...]
  template: str


@dataclasses.dataclass(frozen=True)
class Select:
  """Settings of `synthesis.filters.select`."""

  min_reflections: int
  max_repeat: float
  keep_share: float


def synthesize(run: setup_lib.Run, settings: Search) -> None:
  """Writes `synthesize/traces`: one trace a prompt, complete or not.

  Every batch of prompts is written when it is done, so that a killed run
  loses one batch at the most.
  """
  stage = run.stage("synthesize", synthesize=dataclasses.asdict(settings))
  if stage.finished():
    return
  params = run.load("base")
  rollout_params = run.for_rollout(params)
  searcher = search.Searcher(
    run.engine,
    run.pricer,
    run.tokenizer,
    brakes=settings.brakes,
    candidates=settings.candidates,
    budget=settings.budget,
    price=settings.price,
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    max_step_tokens=settings.max_step_tokens,
    max_thought_tokens=settings.max_thought_tokens,
    max_answer_tokens=settings.max_answer_tokens,
    template=settings.template,
  )
  prompts, key = run.tasks.synthesis, jax.random.key(run.seed + 1)
  done: list[traces.Trace] = []
  with metrics.Progress(len(prompts), "synthesize", unit="trace") as progress:
    for start in range(0, len(prompts), settings.batch):
      part = stage.path / "parts" / f"{start:08d}"
      if part.exists():
        batch = traces.read(part)
      else:
        batch = searcher.run(
          rollout_params,
          params,
          prompts[start : start + settings.batch],
          jax.random.fold_in(key, start),
          advance=lambda tokens: progress.update(0, tokens=tokens),
        )
        _write(part, batch)
      done += batch
      progress.update(len(batch))
  _write(stage.path / "traces", done)
  statuses = [trace.status for trace in done]
  stage.finish({s: statuses.count(s) for s in sorted(set(statuses))})


def select(run: setup_lib.Run, settings: Select, keywords: list[str]) -> None:
  """Writes `select/traces` and `select/rejected`, with counts by reason."""
  stage = run.stage("select", select=dataclasses.asdict(settings))
  if stage.finished():
    return
  kept, rejected, counts = filters.select(
    traces.read(run.workdir / "synthesize" / "traces"),
    min_reflections=settings.min_reflections,
    max_repeat=settings.max_repeat,
    keep_share=settings.keep_share,
    keywords=keywords,
  )
  _write(stage.path / "traces", kept)
  if rejected:
    _write(
      stage.path / "rejected",
      [dataclasses.replace(t, status=why) for t, why in rejected],
    )
  print(f"select: {counts}", flush=True)
  stage.finish(counts)


def _write(folder: pathlib.Path, done: list[traces.Trace]) -> None:
  if runtime.lead():
    traces.write(folder, done)
