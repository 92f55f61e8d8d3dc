"""Evaluates the models of a run on held-out prompts.

Every sample is kept in `evaluate/samples/MODEL.jsonl.gz`, in the records of
`rl.rollout_files`, with "model" and, on storyworld, "facts": which facts the
answer keeps.

Shape key: B prompts, N samples a prompt, M models.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import storyworld
from opera_jax.evals import table
from opera_jax.rewards import compose
from opera_jax.rl import rollout_files
from opera_jax.rl import score as score_lib
from opera_jax.run import initial_model
from opera_jax.run import partial_results as partial_lib
from opera_jax.run import setup as setup_lib
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import runtime
from opera_jax.text import tokenizer as tokenizer_lib
from opera_jax.train import checkpoint
from opera_jax.train import progress as progress_lib

# What the measures call the models.
TITLES = {"base": "base", "init": "init", "sft": "SFT", "rl": "RL"}
POOLED = "R_ppl among all models' samples, scored by"
OPEN_ENDED = (
  table.Measure("r_self", "R_self"),
  table.Measure("r_ppl", POOLED),  # with the name of the model that scores
  table.Measure("count", "productive reflections a thought"),
  table.Measure(
    "logp_direct", "log P(y_ref | x), empty thought", unit="nats/token"
  ),
  table.Measure(
    "logp_thought", "log P(y_ref | x, own thought)", unit="nats/token"
  ),
  table.Measure(
    "score", "L = log P(y_ref | x, own completion)", unit="nats/token"
  ),
)
GENERAL = (
  table.Measure("thought_tokens", "thought length", "neither", "tokens"),
  table.Measure("reflections", "reflections a thought", "neither"),
  table.Measure("closed", "thoughts that close"),
  table.Measure("finished", "completions that end"),
)
FACTS = table.Measure("facts", "facts kept, of 5 (no reward sees it)")
CORRECT = table.Measure("correct", "maths answers right")
REWARD = table.Measure("reward", "reward of the run (config.reward)")
# What the page says of a completion, by task.
SHOWN = {
  "open_ended": ("count", "r_self", "score"),
  "math": ("correct",),
}
SAMPLES = "samples"


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of sampling and scoring the held-out prompts."""

  samples: int  # N, at least 2
  temperature: float
  top_p: float
  max_new_tokens: int
  thoughts: int  # completions scored step by step for the report
  resamples: int  # of the bootstrap
  reward: bool = True  # also the run's own reward, if it has other terms


# Progress callback with a number of tokens; may raise SystemExit.
Advance = Callable[[int], None]


def evaluate(
  run: setup_lib.Run,
  settings: Settings,
  preemption: checkpoint.Preemption,
  *,
  lineage: Sequence[str] = ("base", "sft", "rl"),
) -> None:
  """Writes `evaluate/DONE.json`: measures, their table, and a few samples.

  Partial results are saved in `evaluate/pieces`, a block of prompts of one
  model each.

  Args:
    run: the run, with at least one finished model.
    settings: of sampling and scoring.
    preemption: checked after every call.
    lineage: the run's models in training order, see `initial_model.lineage`;
      those that there are are compared.

  Raises:
    FileNotFoundError: there is none.
  """
  models = {
    initial_model.label(model): model
    for model in lineage
    if model not in initial_model.STAGES
    or workdir_lib.result(run.workdir, model)
  }
  if not models:
    raise FileNotFoundError(
      f"No stage has left a model in {run.workdir}, and evaluation compares "
      f"{', '.join(lineage)}. Add one of them to config.stages."
    )
  stage = run.stage(
    "evaluate",
    tasks=("held_out",),
    models=list(models.values()),
    evaluate=dataclasses.asdict(settings),
    reward=run.reward,
  )
  with stage.locked(preemption):
    if not stage.finished():
      stage.finish(_evaluate(run, stage, settings, preemption, models))


def _evaluate(
  run: setup_lib.Run,
  stage: workdir_lib.Stage,
  settings: Settings,
  preemption: checkpoint.Preemption,
  models: Mapping[str, str],
) -> dict[str, Any]:
  prompts = run.tasks.held_out
  ids = run.prompt_ids(prompts)
  partial = partial_lib.PartialResults(stage.path / "pieces", stage.begin)
  samples, values = {}, {}
  with progress_lib.Progress(len(models), "evaluate", unit="model") as progress:

    def advance(tokens: int) -> None:
      progress.update(0, tokens=tokens)
      preemption.exit_if_requested()

    for name, model in models.items():
      progress.phase(f"the {name} model")
      samples[name], values[name], records = _one_model(
        run, name, model, prompts, ids, settings, partial, advance
      )
      if runtime.is_main_process():
        place = stage.path / SAMPLES / f"{name}.jsonl.gz"
        rollout_files.write(place, records)
      progress.update()
    open_ended = np.asarray([p.task == "open_ended" for p in prompts])
    # The reference of KL: the model before RL, or the first of all.
    judge = "sft" if "sft" in models else next(iter(models))
    if open_ended.any():
      load_judge = functools.cache(lambda: run.load(models[judge]))
      pooled = _pooled_rank(
        run, load_judge, prompts, ids, samples, open_ended, partial, advance
      )
      for name in models:
        values[name]["r_ppl"] = pooled[name]
    shown = _shown(run, models, prompts, ids, samples, settings, advance)
  rows = _table(values, judge, open_ended, prompts, settings)
  print(table.as_markdown(rows), flush=True)
  return {
    "prompts": len(prompts),
    "samples": settings.samples,
    "table": [dataclasses.asdict(row) for row in rows],
    "markdown": table.as_markdown(rows),
    "values": {
      model: {k: v.tolist() for k, v in arrays.items()}
      for model, arrays in values.items()
    },
    "shown": shown,
  }


def _one_model(
  run: setup_lib.Run,
  label: str,
  model: str,
  prompts: Sequence[structs.Prompt],
  ids: Sequence[np.ndarray],
  settings: Settings,
  partial: partial_lib.PartialResults,
  advance: Advance,
) -> tuple[
  list[list[structs.Sample]], dict[str, np.ndarray], list[dict[str, Any]]
]:
  """Samples [B][N] of one model, its measures, [B] each, and a record of each
  sample."""
  load = functools.cache(lambda: run.load(model))
  to_sample = functools.cache(lambda: run.for_rollout(load()))
  has_facts = all("facts" in p.columns for p in prompts)
  own_reward = settings.reward and has_own_terms(run)
  every: list[list[structs.Sample]] = []
  measured: list[dict[str, list[float]]] = []
  records: list[dict[str, Any]] = []
  for block in partial_lib.blocks(len(prompts)):
    mine = partial_lib.take(prompts, block), partial_lib.take(ids, block)

    def draw(mine: Any = mine) -> list[Any]:
      drawn = run.engine.sample(
        to_sample(),
        mine[1],
        run.sampling(
          max_new_tokens=settings.max_new_tokens,
          temperature=settings.temperature,
          top_p=settings.top_p,
        ),
        jax.random.key(run.seed + 3),
        samples=settings.samples,
        ids=[p.id for p in mine[0]],
        advance=advance,
      )
      return partial_lib.samples_to_json(drawn)

    name = f"{label}-{block.start:08d}"
    groups = partial_lib.samples_from_json(partial.get(f"{name}-samples", draw))

    def measure(mine: Any = mine, groups: Any = groups) -> dict[str, Any]:
      scored = run.eval_scorer.score(
        load(), mine[0], mine[1], groups, advance=advance
      )
      own = None
      if own_reward:
        own = run.reward_scorer.score(
          load(), mine[0], mine[1], groups, advance=advance
        )
      facts = _facts(run, mine[0], groups) if has_facts else None
      found = _measures(
        run, load(), mine[0], mine[1], groups, scored, facts, advance
      )
      if own is not None:
        found["reward"] = own.total_BN.mean(axis=1)
      return {
        "values": {key: value.tolist() for key, value in found.items()},
        "records": _records(run, label, scored, own, facts),
      }

    every += groups
    piece = partial.get(f"{name}-scored", measure)
    measured.append(piece["values"])
    records += piece["records"]
  values = _joined(measured, list(partial_lib.blocks(len(prompts))))
  return every, values, records


def has_own_terms(run: setup_lib.Run) -> bool:
  """Whether the run's reward has terms that the evaluation does not measure
  anyway."""
  measured = compose.weights(setup_lib.EVAL_TERMS)
  return bool(set(compose.weights(run.reward["terms"])) - set(measured))


def _facts(
  run: setup_lib.Run,
  prompts: Sequence[structs.Prompt],
  groups: Sequence[Sequence[structs.Sample]],
) -> list[dict[str, bool]]:
  """Which facts each completion's answer keeps, [B * N]."""
  return [
    storyworld.facts_kept(answer_text(run, sample), prompt.columns["facts"])
    for prompt, group in zip(prompts, groups)
    for sample in group
  ]


def _records(
  run: setup_lib.Run,
  model: str,
  scored: score_lib.Scored,
  own: score_lib.Scored | None,
  facts: Sequence[Mapping[str, bool]] | None,
) -> list[dict[str, Any]]:
  """Records of completions, with their model, the facts that they keep, and
  the run's own reward in place of the evaluation's if there is one."""
  records = []
  for r, record in enumerate(
    rollout_files.records(scored, run.tokenizer.decode, step=0)
  ):
    extra: dict[str, Any] = {} if facts is None else {"facts": dict(facts[r])}
    if own is not None:
      b, n = divmod(r, scored.rollouts.samples)
      extra["reward"] = float(own.total_BN[b, n])
      mine = {name: float(term[b, n]) for name, term in own.terms.items()}
      extra["terms"] = record["terms"] | mine
    records.append({"model": model, **record} | extra)
  return records


def _joined(
  partial: Sequence[dict[str, list[float]]], blocks: Sequence[range]
) -> dict[str, np.ndarray]:
  """Joins the measures of all blocks; 0 if a block lacks a measure."""
  names = {name: None for result in partial for name in result}  # in order
  return {
    name: np.concatenate(
      [
        np.asarray(result.get(name, [0.0] * len(block)), np.float64)
        for result, block in zip(partial, blocks, strict=True)
      ]
    )
    for name in names
  }


def answer_text(run: setup_lib.Run, sample: structs.Sample) -> str:
  """The answer of a completion: the text after its thought.

  It is "" where a thought does not end, and all of the text where there is no
  thought: where the prompt closed it, or the model opened none.
  """
  text = run.tokenizer.completion_text(sample.tokens)
  has_tag = any(tag in text for tag in tokenizer_lib.THINK_TAGS)
  if run.tokenizer.closes_thought or not has_tag:
    return text.strip()
  _, closed, answer = text.partition("</think>")
  return answer.strip() if closed else ""


def _measures(
  run: setup_lib.Run,
  params: Any,
  prompts: Sequence[structs.Prompt],
  ids: Sequence[np.ndarray],
  groups: Sequence[Sequence[structs.Sample]],
  scored: score_lib.Scored,
  facts: Sequence[Mapping[str, bool]] | None,
  advance: Advance,
) -> dict[str, np.ndarray]:
  """Means over each prompt's samples, [B] each."""
  parts = {
    name: part_BN.mean(axis=1)
    for name, part_BN in scored.terms.items()
    if name != "r_ppl"
  }
  parts["finished"] = np.asarray(
    [np.mean([s.finished for s in group]) for group in groups]
  )
  if facts is not None:
    kept_R = np.asarray([sum(kept.values()) for kept in facts])
    parts["facts"] = kept_R.reshape(len(prompts), -1).mean(axis=1)
  parts |= thought_logprobs(run, params, prompts, ids, groups, advance)
  return {name: np.asarray(v, np.float64) for name, v in parts.items()}


def thought_logprobs(
  run: setup_lib.Run,
  params: Any,
  prompts: Sequence[structs.Prompt],
  ids: Sequence[np.ndarray],
  groups: Sequence[Sequence[structs.Sample]],
  advance: Advance | None = None,
) -> dict[str, np.ndarray]:
  """Log-probabilities of the reference after an empty and after the own
  thought.

  Args:
    run: the run; its scorer is used.
    params: the model that scores.
    prompts: B tasks.
    ids: their chat prompts as tokens.
    groups: samples of each; only their thoughts are used.
    advance: progress callback, called with the number of tokens scored.

  Returns:
    "logp_direct" and "logp_thought", nats per token, [B] each; the second is
    the mean over a prompt's samples.
  """
  empty = run.tokenizer.empty_thought
  gap = run.tokenizer.encode("" if run.tokenizer.closes_thought else "\n\n")
  prefixes: list[np.ndarray] = []
  continuations = []
  for i, group, prompt in zip(ids, groups, prompts):
    reference = run.tokenizer.encode(prompt.reference)
    for context, tokens, skip in [
      (np.concatenate([i, empty]), reference, 0),
      *(
        (
          np.concatenate([i, _thought(run, s)]),
          np.concatenate([gap, reference]),
          len(gap),
        )
        for s in group
      ),
    ]:
      continuations.append(
        structs.Continuation(
          prefix=len(prefixes), fork=len(context), tokens=tokens, skip=skip
        )
      )
      prefixes.append(context)
  logprobs = run.logprob_scorer.score(
    params, prefixes, continuations, advance=advance
  )
  mean_BX = np.asarray(
    [p.mean() for p in logprobs.continuation_logprob]
  ).reshape(len(prompts), -1)
  return {
    "logp_direct": mean_BX[:, 0],
    "logp_thought": mean_BX[:, 1:].mean(axis=1),
  }


def _thought(run: setup_lib.Run, sample: structs.Sample) -> np.ndarray:
  """Tokens up to </think> inclusive; all but the stop token if there is none,
  and no tokens where the prompt closed the thought."""
  if run.tokenizer.closes_thought:
    return sample.tokens[:0]
  thought = run.tokenizer.through_thought(sample.tokens)
  if thought is not None:
    return thought
  return sample.tokens[: len(sample.tokens) - sample.finished]


def _pooled_rank(
  run: setup_lib.Run,
  load: Callable[[], Any],
  prompts: Sequence[structs.Prompt],
  ids: Sequence[np.ndarray],
  samples: dict[str, list[list[structs.Sample]]],
  open_ended: np.ndarray,
  partial: partial_lib.PartialResults,
  advance: Advance,
) -> dict[str, np.ndarray]:
  """R_ppl in groups that pool the samples of all models, scored by one."""
  chosen = [b for b in range(len(prompts)) if open_ended[b]]
  out = {model: np.zeros(len(prompts)) for model in samples}
  for block in partial_lib.blocks(len(chosen)):
    mine = partial_lib.take(chosen, block)

    def rank(mine: Any = mine) -> list[list[float]]:
      pooled = [
        [s for group in samples.values() for s in group[b]] for b in mine
      ]
      scored = run.eval_scorer.score(
        load(),
        [prompts[b] for b in mine],
        [ids[b] for b in mine],
        pooled,
        advance=advance,
      )
      rank_BX = scored.terms["r_ppl"].reshape(len(mine), len(samples), -1)
      return rank_BX.mean(axis=2).tolist()

    for b, ranks in zip(mine, partial.get(f"pooled-{block.start:08d}", rank)):
      for model, value in zip(samples, ranks, strict=True):
        out[model][b] = value
  return out


def _table(
  values: dict[str, dict[str, np.ndarray]],
  judge: str,
  open_ended: np.ndarray,
  prompts: Sequence[structs.Prompt],
  settings: Settings,
) -> list[table.Row]:
  """The table: open-ended measures over open-ended prompts, the rest over
  all."""
  general: tuple[table.Measure, ...] = GENERAL
  for measure in (FACTS, REWARD):
    if all(measure.key in measured for measured in values.values()):
      general = (measure, *general)

  def rows(
    measures: Sequence[table.Measure], keep: np.ndarray
  ) -> list[table.Row]:
    kept = {m: {k: v[keep] for k, v in a.items()} for m, a in values.items()}
    return table.assemble(
      kept, measures, resamples=settings.resamples, seed=len(prompts)
    )

  out = []
  if open_ended.any():
    scored = {"r_ppl": f"{POOLED} {TITLES[judge]}"}
    measures = [
      dataclasses.replace(m, label=scored.get(m.key, m.label))
      for m in OPEN_ENDED
    ]
    out += rows(measures, open_ended)
  if not open_ended.all():
    out += rows((CORRECT,), ~open_ended)
  return out + rows(general, np.ones(len(prompts), bool))


def _shown(
  run: setup_lib.Run,
  models: Mapping[str, str],
  prompts: Sequence[structs.Prompt],
  ids: Sequence[np.ndarray],
  samples: dict[str, Any],
  settings: Settings,
  advance: Advance,
) -> list[dict[str, Any]]:
  """A completion of a few prompts by every model, its steps scored."""
  # Open-ended prompts first, in the order of the tasks.
  chosen = sorted(
    range(len(prompts)), key=lambda b: prompts[b].task != "open_ended"
  )[: settings.thoughts]
  mine = [prompts[b] for b in chosen]
  out: list[dict[str, Any]] = []
  for name, model in models.items() if chosen else ():
    groups = [samples[name][b] for b in chosen]
    scored = run.eval_scorer.score(
      run.load(model),
      mine,
      [ids[b] for b in chosen],
      groups,
      all_steps=True,
      advance=advance,
    )
    has_facts = all("facts" in p.columns for p in mine)
    facts = _facts(run, mine, groups) if has_facts else None
    own = None
    if settings.reward and has_own_terms(run):
      own = run.reward_scorer.score(
        run.load(model), mine, [ids[b] for b in chosen], groups, advance=advance
      )
    for record in _records(run, name, scored, own, facts):
      if record["sample"]:
        continue
      terms = {"facts": sum(record["facts"].values())} if has_facts else {}
      if own is not None:
        terms["reward"] = record["reward"]
      terms |= {term: record["terms"][term] for term in SHOWN[record["task"]]}
      place = len(out) % len(chosen)
      out.append(
        {
          "model": name,
          "prompt": record["prompt"],
          "reference": record["reference"],
          "text": record["completion"],
          "answer": answer_text(run, groups[place][0]),
          "steps": [
            {key: step[key] for key in ("text", "delta", "reflective")}
            for step in record["steps"]
          ],
          "terms": terms | {"completion_tokens": record["completion_tokens"]},
        }
      )
  return out
