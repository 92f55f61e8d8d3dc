"""Selects the prompts of RL by how well the model it starts from answers."""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from opera_jax import structs
from opera_jax.data import digest
from opera_jax.data import prompts as prompts_lib
from opera_jax.rewards import function, verifiable
from opera_jax.rollout import sampling
from opera_jax.run import partial_results as partial_lib
from opera_jax.run import setup as setup_lib
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import exchange, runtime
from opera_jax.synthesis import rl_filter
from opera_jax.train import checkpoint


def select(
  run: setup_lib.Run,
  rules: rl_filter.Rules,
  settings: sampling.Sampling,
  preemption: checkpoint.Preemption,
  *,
  init: str = "sft",
) -> setup_lib.Run:
  """Selects RL prompts; returns the run unchanged if no rule is active.

  Writes `select_rl/prompts.jsonl` and `select_rl/rejected.jsonl`, with each
  prompt's number of right samples or its score, and counts by reason.

  Args:
    run: the run, with the model that RL starts from.
    rules: which prompts to keep.
    settings: sampling settings.
    preemption: checked after every call; partial results are saved in
      `select_rl/pieces`, a block of prompts each.
    init: the model that RL starts from, see `Run.load`.
  """
  if not rules.active():
    return run
  stage = run.stage(
    "select_rl",
    tasks=("rl",),
    models=(init,),
    select_rl=dataclasses.asdict(rules),
    rollout=dataclasses.asdict(settings),
    reward={"math_check": run.reward["math_check"]},
  )
  with stage.locked(preemption):
    if not stage.finished():
      partial = partial_lib.PartialResults(stage.path / "pieces", stage.begin)
      found = _found(run, rules, settings, partial, preemption, init)
      why, counts = rl_filter.verdicts(run.tasks.rl, rules, **found)
      if runtime.is_main_process():
        for name in ("prompts", "rejected"):
          prompts_lib.write(
            stage.path / f"{name}.jsonl",
            (
              _row(prompt, word, found)
              for prompt, word in zip(run.tasks.rl, why, strict=True)
              if (word is None) == (name == "prompts")
            ),
          )
      print(f"select_rl: {counts}", flush=True)
      stage.finish(counts)
  chosen = stage.path / "prompts.jsonl"
  source = digest.Source(exchange.read_file)
  kept = _ids(chosen, source)
  rl = [p for p in run.tasks.rl if p.id in kept]
  if len(rl) != len(kept) or len(rl) != stage.result().get("kept"):
    raise ValueError(
      f"{chosen} names {len(kept)} prompts, of which {len(rl)} are tasks of "
      f"RL, and the stage kept {stage.result().get('kept')}: it has changed. "
      f"Restore it from a copy, {workdir_lib.remedy('select_rl')}."
    )
  digests = {"select_rl/prompts": (str(chosen), source.hexdigest())}
  return dataclasses.replace(
    run,
    tasks=dataclasses.replace(
      run.tasks, rl=rl, digests={**run.tasks.digests, **digests}
    ),
  )


def uses_function(rules: rl_filter.Rules) -> bool:
  """Whether open-ended prompts are scored by a user's function."""
  return bool(rules.judge) and not rules.judge.startswith(rl_filter.COLUMN)


def user_judge(run: setup_lib.Run, rules: rl_filter.Rules) -> function.Reward:
  """The user's function that scores open-ended prompts.

  Raises:
    ValueError: rules.judge is not the import path of a function.
  """
  return function.Reward(
    rules.judge, run.reward["timeout"], tuple(run.reward["environment"])
  )


def _ids(path: pathlib.Path, source: digest.Source) -> set[str]:
  """Reads the ids of the selected prompts."""
  try:
    text = source.read(path).decode()
    return {json.loads(line)["id"] for line in text.splitlines()}
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(
      f"{path} is damaged ({error!r}). Restore it from a copy, "
      f"{workdir_lib.remedy('select_rl')}."
    ) from error
  except OSError as error:
    raise OSError(
      f"{path} cannot be read ({error}). Fix its permissions, restore it "
      f"from a copy, {workdir_lib.remedy('select_rl')}."
    ) from error


def _found(
  run: setup_lib.Run,
  rules: rl_filter.Rules,
  settings: sampling.Sampling,
  partial: partial_lib.PartialResults,
  preemption: checkpoint.Preemption,
  init: str,
) -> dict[str, dict[str, Any]]:
  """Computes the arguments `right` and `score` of `rl_filter.verdicts`."""
  maths = [p for p in run.tasks.rl if p.task == "math" and rules.samples]
  open_ended = [
    p for p in run.tasks.rl if p.task == "open_ended" and rules.judge
  ]
  if rules.judge.startswith(rl_filter.COLUMN):
    score = rl_filter.column_scores(open_ended, rules.judge)
    judged = []
  else:
    score, judged = {}, open_ended
  if not maths and not judged:
    return {"right": {}, "score": score}
  params = functools.cache(lambda: run.for_rollout(run.load(init)))

  def texts(prompts: list[structs.Prompt], samples: int) -> list[list[str]]:
    groups = run.engine.sample(
      params(),
      run.prompt_ids(prompts),
      settings,
      jax.random.key(run.seed + 4),
      samples=samples,
      ids=[p.id for p in prompts],
      advance=lambda _: preemption.exit_if_requested(),
    )
    return [
      [run.tokenizer.completion_text(s.tokens) for s in group]
      for group in groups
    ]

  def check(items: Sequence[tuple[structs.Prompt, list[str]]]) -> list[int]:
    right = iter(
      verifiable.correct_many(
        [text for _, group in items for text in group],
        [prompt.reference for prompt, group in items for _ in group],
        method=run.reward["math_check"],
        **run.reward["options"].get("verifiable", {}),
      )
    )
    return [sum(itertools.islice(right, len(group))) for _, group in items]

  def judge(
    items: Sequence[tuple[structs.Prompt, list[str]]],
  ) -> list[float]:
    scores = user_judge(run, rules).values(
      [prompt for prompt, _ in items], [group[0] for _, group in items]
    )
    return [float(score) for score in scores]

  def compute(
    name: str,
    prompts: list[structs.Prompt],
    samples: int,
    work: Callable[[Sequence[Any]], list[Any]],
  ) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for block in partial_lib.blocks(len(prompts)):
      some = partial_lib.take(prompts, block)

      def results(some: list[structs.Prompt] = some) -> list[Any]:
        pairs = list(zip(some, texts(some, samples), strict=True))
        preemption.exit_if_requested()
        return exchange.map_across_processes(pairs, work)

      kept = partial.get(f"{name}-{block.start:08d}", results)
      out |= {p.id: one for p, one in zip(some, kept, strict=True)}
    return out

  right = compute("right", maths, rules.samples, check)
  return {"right": right, "score": score | compute("score", judged, 1, judge)}


def _row(
  prompt: structs.Prompt,
  reason: str | None,
  found: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  row = prompts_lib.row(prompt)
  for name in ("right", "score"):
    if prompt.id in found[name]:
      row[name] = found[name][prompt.id]
  return row if reason is None else row | {"reason": reason}
