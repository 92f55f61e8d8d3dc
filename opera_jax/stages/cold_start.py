"""The cold start: synthesises traces with the base model, then selects among
them. Synthesis is split into shards of `Search.batch` prompts. Any number of
processes may share the run's folder. Each shard is claimed by one of them; if a
process dies, another one finishes its shard, now or at the next start. A kill
loses only the traces in flight. Memory does not grow with the number of
finished traces.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import traces
from opera_jax.rewards import function
from opera_jax.run import setup as setup_lib
from opera_jax.run import shards as shards_lib
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import exchange, layout, runtime
from opera_jax.stages import dataset_card as dataset_card_lib
from opera_jax.stages import first_sample
from opera_jax.synthesis import filters, rewrite, search, templates
from opera_jax.train import checkpoint, metrics
from opera_jax.train import progress as progress_lib

METHODS = ("search", "rewrite")


@dataclasses.dataclass(frozen=True)
class Search:
  """Settings of `search.Searcher` or `rewrite.Rewriter`, and of the batches."""

  batch: int  # prompts per shard; one process works on a shard
  candidates: int
  budget: int
  score: str
  choose: (
    str  # "package.module:function" in place of the log-probability, or ""
  )
  temperature: float
  top_k: int
  top_p: float
  max_step_tokens: int
  max_thought_tokens: int
  max_answer_tokens: int
  stop_words: tuple[str, ...]
  template: str  # text, or the path of a .txt file
  close_thought: bool  # by force, where it is too long or the turn ended
  method: str  # "search", or "rewrite" (REER, without stop words)
  rounds: int  # of rewriting
  guide: str  # prompt template of rewriting, which contains the reference
  seed: int = -1  # random seed of this stage; below 0 takes the run's

  def __post_init__(self):
    """Reads the templates from their files, so that the stage records their
    text."""
    if self.method not in METHODS:
      raise ValueError(
        f"Unknown config.synthesis.method {self.method!r}; use one of "
        f"{METHODS}."
      )
    for setting in self.templates():
      text = templates.load(
        getattr(self, setting), ("prompt",), f"config.synthesis.{setting}"
      )
      object.__setattr__(self, setting, text)

  def templates(self) -> tuple[str, ...]:
    """Names of the fields whose templates this method uses."""
    return ("template",) if self.method == "search" else ("template", "guide")


def synthesize(
  run: setup_lib.Run,
  settings: Search,
  card: dataset_card_lib.Card,
  preemption: checkpoint.Preemption,
) -> None:
  """Writes `synthesize/traces`: one trace a prompt, complete or not.

  If each host holds a whole model (`sharding.mesh.local_mesh`), the hosts split
  the shards; otherwise all hosts work on each shard together.

  Args:
    run: the run, with a finished base model.
    settings: of the search.
    card: of the data set.
    preemption: checked after every call; all finished traces are saved.

  Raises:
    OSError: a shard cannot be written.
  """
  recorded = dataclasses.asdict(settings)
  stage = run.stage(
    "synthesize", tasks=("synthesis",), models=("base",), synthesize=recorded
  )
  if _whole(stage):
    return
  prompts, longer = _fitting(run, settings)
  if longer and runtime.is_main_process():
    print(
      f"synthesize: {longer} prompts with their template exceed the engine's "
      "prompt buckets and are skipped.",
      flush=True,
    )
  shards = shards_lib.Shards(
    stage.path / "shards", [p.id for p in prompts], settings.batch
  )
  _make(run, stage, prompts, shards, settings, preemption)

  def write() -> dict[str, int]:
    forced = 0

    def counted() -> Iterator[traces.Trace]:
      nonlocal forced
      for trace in shards.read():
        forced += trace.forced
        yield trace

    with preemption.exit_at_once():
      counts = traces.write(
        stage.path / "traces",
        counted(),
        card=lambda counts: dataset_card_lib.write(
          run, card, counts, {"Search": recorded}
        ),
      )
      _write_metrics(stage, counts, forced, run.log)
    return counts

  with stage.locked(preemption):
    if not _whole(stage):
      stage.begin()
      stage.finish(exchange.on_main_process(write))


def _write_metrics(
  stage: workdir_lib.Stage,
  counts: Mapping[str, int],
  forced: int,
  log: Sequence[str],
) -> None:
  """Writes the shares of complete traces, and of thoughts closed by force."""
  total = sum(counts.values())
  written = metrics.Metrics(stage.path, "metrics", log=log)
  written.write(
    total,
    {
      "synthesis/complete": counts.get("complete", 0) / total,
      "synthesis/forced_close": forced / total,
    },
  )
  written.close()


def select(
  run: setup_lib.Run,
  settings: filters.Rules,
  keywords: Sequence[str],
  card: dataset_card_lib.Card,
  preemption: checkpoint.Preemption,
) -> None:
  """Writes `select/traces` and `select/rejected`, with counts by reason."""
  recorded = dataclasses.asdict(settings)
  stage = run.stage(
    "select",
    sets=("synthesize",),
    computes=False,
    select=recorded,
    reward={"keywords": list(keywords)},
  )
  source = run.workdir / "synthesize" / "traces"

  def write() -> dict[str, int]:
    # Two passes over the file: only an id and a number per trace stay in
    # memory.
    why, counts = filters.verdicts(traces.read(source), settings, keywords)
    tables = {"Filters": recorded | {"keywords": tuple(keywords)}}
    tables["Of all traces"] = counts
    tables["Search"] = {
      name.removeprefix("synthesize."): value
      for name, value in workdir_lib.settings(run.workdir, "synthesize").items()
      if name.startswith("synthesize.")
    }
    for name in ("traces", "rejected"):
      kept = name == "traces"
      if kept or set(counts) != {"kept"}:
        traces.write(
          stage.path / name,
          _chosen(source, why, kept),
          card=lambda here: dataset_card_lib.write(run, card, here, tables),
        )
    print(f"select: {counts}", flush=True)
    return counts

  def write_interruptibly() -> dict[str, int]:
    with preemption.exit_at_once():
      return write()

  with stage.locked(preemption):
    if not _whole(stage):
      stage.begin()
      stage.finish(exchange.on_main_process(write_interruptibly))


def _chosen(
  source: pathlib.Path, why: list[str | None], kept: bool
) -> Iterator[traces.Trace]:
  """Yields the kept traces, or the rejected ones with the reason as their
  status."""
  for trace, word in zip(traces.read(source), why, strict=True):
    if (word is None) == kept:
      yield trace if word is None else dataclasses.replace(trace, status=word)


def _whole(stage: workdir_lib.Stage) -> bool:
  """Whether the stage is finished and its trace files are intact."""
  damage = ""
  if stage.finished():
    folders = [stage.path / "traces", stage.path / "rejected"]
    found = [f for f in folders if f.name == "traces" or f.exists()]
    damage = next(filter(None, map(traces.damage, found)), "")
    if damage and runtime.is_main_process():
      print(
        f"{stage.name}: {damage}; the traces are written again.", flush=True
      )
  whole = stage.finished() and not damage
  return bool(runtime.from_main_process(np.asarray(whole)))


def _make(
  run: setup_lib.Run,
  stage: workdir_lib.Stage,
  prompts: list[structs.Prompt],
  shards: shards_lib.Shards,
  settings: Search,
  preemption: checkpoint.Preemption,
) -> None:
  """Synthesises the traces that the shards lack and no other process works
  on."""
  done = len(prompts) - int(
    runtime.from_main_process(np.asarray(shards.num_missing()))
  )
  if done == len(prompts):
    return
  own, params = run.on_local_devices(), run.load("base")
  if own is None:
    local, work = run, _claims_of_main_process(shards, preemption)
    leave = preemption.exit_if_requested
  else:
    local = own
    mine = range(jax.process_index(), len(shards), jax.process_count())
    if jax.process_count() > 1:
      print(f"this host makes {len(mine)} of {len(shards)} shards", flush=True)
    work = shards.work(mine, preemption.exit_if_requested_here)
    params = layout.local_copy(params, own.mesh)
    # Hosts run independently here, so collectives would deadlock.
    leave = preemption.exit_if_requested_here
  rollout_params = local.for_rollout(params)
  searcher = _searcher(local, settings)
  seed = run.seed if settings.seed < 0 else settings.seed
  key = jax.random.key(seed + 1)
  shown: list[str] = []
  with progress_lib.Progress(
    len(prompts), "synthesize", unit="trace", done=done
  ) as progress:

    def count_others() -> None:
      progress.update(len(prompts) - shards.num_missing() - progress.done)

    for index, items in work:

      def ended(trace: traces.Trace, index: int = index) -> None:
        if own is not None or runtime.is_main_process():
          if not shown:
            stage.begin_here()
          shards.add(index, trace)
        if not shown:
          shown.append(trace.id)
          first_sample.show(
            "synthesize",
            "the base model",
            trace.prompt,
            run.tokenizer.completion_text(trace.completion),
          )
        progress.update()
        leave()

      def advance(tokens: int) -> None:
        progress.update(0, tokens=tokens)
        leave()

      # A trace depends on its prompt's id and the key, not on its shard.
      searcher.run(
        rollout_params,
        params,
        [prompts[i] for i in items],
        key,
        advance=advance,
        ended=ended,
      )
      count_others()
    count_others()


def _claims_of_main_process(
  shards: shards_lib.Shards, preemption: checkpoint.Preemption
) -> Iterator[tuple[int, list[int]]]:
  """Broadcasts the shards that process 0 claims to every process."""
  work = shards.work(range(len(shards)), preemption.exit_if_requested_here)
  while True:
    note = np.asarray(exchange.on_main_process(lambda: _note(next(work, None))))
    if not note.size:
      return
    yield int(note[0]), [int(item) for item in note[1:]]


def _note(claimed: tuple[int, list[int]] | None) -> list[int]:
  """A shard's index and its items in one list; [] if no shard is left."""
  return [] if claimed is None else [claimed[0], *claimed[1]]


def _searcher(
  run: setup_lib.Run, settings: Search
) -> search.Searcher | rewrite.Rewriter:
  shared = run.engine, run.logprob_scorer, run.tokenizer
  common: dict[str, Any] = {
    "candidates": settings.candidates,
    "temperature": settings.temperature,
    "top_k": settings.top_k,
    "top_p": settings.top_p,
    "max_step_tokens": settings.max_step_tokens,
    "max_thought_tokens": settings.max_thought_tokens,
    "max_answer_tokens": settings.max_answer_tokens,
    "close_thought": settings.close_thought,
    "template": settings.template,
  }
  if settings.method == "rewrite":
    return rewrite.Rewriter(
      *shared, rounds=settings.rounds, guide=settings.guide, **common
    )
  return search.Searcher(
    *shared,
    stop_words=settings.stop_words,
    budget=settings.budget,
    score=settings.score,
    choose=user_choice(run, settings),
    **common,
  )


def user_choice(run: setup_lib.Run, settings: Search) -> function.Choice | None:
  """Loads the user's function that replaces the log-probability choice; None if
  unset.

  Raises:
    ValueError: it cannot be imported.
  """
  if not settings.choose or settings.method != "search":
    return None
  choice = function.Choice(
    settings.choose, run.reward["timeout"], tuple(run.reward["environment"])
  )
  choice.process.start()
  return choice


def _fitting(
  run: setup_lib.Run, settings: Search
) -> tuple[list[structs.Prompt], int]:
  """Returns the prompts that fit the engine with their templates, and the
  number of those that do not.

  Raises:
    ValueError: no prompt fits, or one lacks the reference that rewriting needs.
  """
  opened = len(run.tokenizer.thought_head)
  room = run.engine.longest_prompt() - opened
  if settings.method == "rewrite":
    room -= settings.max_thought_tokens
    for prompt in run.tasks.synthesis:
      rewrite.check(prompt)
  texts = [getattr(settings, name) for name in settings.templates()]

  def lengths(items: Sequence[structs.Prompt]) -> list[int]:
    return [
      max(
        len(
          run.tokenizer.chat_prompt(
            templates.fill(text, {"prompt": p.prompt, "reference": p.reference})
          )
        )
        for text in texts
      )
      for p in items
    ]

  prompts = run.tasks.synthesis
  found = exchange.map_across_processes(prompts, lengths)
  kept = [p for p, length in zip(prompts, found, strict=True) if length <= room]
  if not kept:
    raise ValueError(
      f"None of {len(prompts)} prompts fits in {room} tokens with its "
      f"template; the shortest has {min(found, default=0)}. Raise "
      "config.engine.prompt_buckets, or shorten the template."
    )
  return kept, len(prompts) - len(kept)
