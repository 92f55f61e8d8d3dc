"""Base, SFT and RL models on held-out prompts, by measures of their own.

Shape key: B prompts, N samples a prompt, M models.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import storyworld
from opera_jax.evals import table
from opera_jax.stages import score as score_lib
from opera_jax.stages import setup as setup_lib
from opera_jax.stages import workdir as workdir_lib
from opera_jax.train import metrics

MODELS = ("base", "sft", "rl")

OPEN_ENDED = (
  table.Measure("r_self", "R_self"),
  table.Measure("r_ppl", "R_ppl among all models' samples, priced by SFT"),
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


@dataclasses.dataclass(frozen=True)
class Settings:
  """How held-out prompts are sampled and judged."""

  samples: int  # N, at least 2
  temperature: float
  top_p: float
  max_new_tokens: int
  thoughts: int  # completions priced step by step for the report
  resamples: int  # of the bootstrap


def evaluate(run: setup_lib.Run, settings: Settings) -> None:
  """Writes `evaluate/result.json`: measures, table, and samples to read.

  Raises:
    FileNotFoundError: a model is missing.
  """
  stage = run.stage(
    "evaluate", evaluate=dataclasses.asdict(settings), reward=run.reward
  )
  if stage.finished():
    return
  for model in MODELS:
    if not workdir_lib.result(run.workdir, model):
      raise FileNotFoundError(
        f"Stage {model!r} has not finished in {run.workdir}, and evaluation "
        f"compares {', '.join(MODELS)}. Add it to config.stages."
      )
  prompts = run.tasks.held_out
  ids = run.prompt_ids(prompts)
  samples, scored, values = {}, {}, {}
  with metrics.Progress(len(MODELS), "evaluate", unit="model") as progress:
    for model in MODELS:
      params = run.load(model)
      samples[model] = run.engine.sample(
        run.for_rollout(params),
        ids,
        run.sampling(
          max_new_tokens=settings.max_new_tokens,
          temperature=settings.temperature,
          top_p=settings.top_p,
        ),
        jax.random.key(run.seed + 3),
        samples=settings.samples,
        ids=[p.id for p in prompts],
        advance=lambda tokens: progress.update(0, tokens=tokens),
      )
      scored[model] = run.measurer.score(params, prompts, ids, samples[model])
      values[model] = _measures(
        run, params, prompts, ids, samples[model], scored[model]
      )
      progress.update()
  opened = np.asarray([p.task == "open_ended" for p in prompts])
  if opened.any():
    pooled = _pooled_rank(run, prompts, ids, samples, opened)
    for model in MODELS:
      values[model]["r_ppl"] = pooled[model]
  rows = _table(values, opened, prompts, settings)
  print(table.as_markdown(rows), flush=True)
  shown = _shown(run, prompts, ids, samples, settings)
  stage.finish(
    {
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
  )


def answer_text(run: setup_lib.Run, sample: structs.Sample) -> str:
  """What a completion answers: the text after its thought, "" without one."""
  text = run.tokenizer.decode(sample.tokens, skip_special=True)
  _, closed, answer = text.partition("</think>")
  return answer.strip() if closed else ""


def _measures(
  run, params, prompts, ids, groups, scored: score_lib.Scored
) -> dict[str, np.ndarray]:
  """Per-prompt means over its samples, [B] each."""
  parts = {
    name: part_BN.mean(axis=1)
    for name, part_BN in scored.parts.items()
    if name != "r_ppl"
  }
  parts["finished"] = np.asarray(
    [np.mean([s.finished for s in group]) for group in groups]
  )
  if all("facts" in p.columns for p in prompts):
    parts["facts"] = np.asarray(
      [
        np.mean(
          [
            sum(
              storyworld.facts_kept(
                answer_text(run, s), p.columns["facts"]
              ).values()
            )
            for s in group
          ]
        )
        for p, group in zip(prompts, groups)
      ]
    )
  parts |= thought_prices(run, params, prompts, ids, groups)
  return {name: np.asarray(v, np.float64) for name, v in parts.items()}


def thought_prices(
  run: setup_lib.Run,
  params: Any,
  prompts: Sequence[structs.Prompt],
  ids: Sequence[np.ndarray],
  groups: Sequence[Sequence[structs.Sample]],
) -> dict[str, np.ndarray]:
  """What the reference costs after an empty thought, and after the model's own.

  Args:
    run: its pricer.
    params: the model that prices.
    prompts: B tasks.
    ids: their chat prompts as tokens.
    groups: samples of each, whose thoughts alone are read.

  Returns:
    "logp_direct" and "logp_thought", nats a token, [B] each; the second is the
    mean over a prompt's samples.
  """
  empty = run.tokenizer.encode_template("<think>\n\n</think>\n\n")
  gap = run.tokenizer.encode("\n\n")
  trunks, branches = [], []
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
      branches.append(
        structs.Branch(
          trunk=len(trunks), fork=len(context), tokens=tokens, skip=skip
        )
      )
      trunks.append(context)
  prices = run.pricer.price(params, trunks, branches)
  mean_BX = np.asarray([p.mean() for p in prices.branch_logprob]).reshape(
    len(prompts), -1
  )
  return {
    "logp_direct": mean_BX[:, 0],
    "logp_thought": mean_BX[:, 1:].mean(axis=1),
  }


def _thought(run: setup_lib.Run, sample: structs.Sample) -> np.ndarray:
  """Tokens up to and with </think>; all but the end where there is none."""
  close = np.flatnonzero(sample.tokens == run.tokenizer.think_close_id)
  if close.size:
    return sample.tokens[: close[0] + 1]
  return sample.tokens[: len(sample.tokens) - sample.finished]


def _pooled_rank(run, prompts, ids, samples, opened) -> dict[str, np.ndarray]:
  """R_ppl where the group is every model's samples, priced by one model."""
  judge = run.load("sft")
  chosen = [b for b in range(len(prompts)) if opened[b]]
  pooled = [[s for m in MODELS for s in samples[m][b]] for b in chosen]
  scored = run.measurer.score(
    judge, [prompts[b] for b in chosen], [ids[b] for b in chosen], pooled
  )
  out = {}
  rank_BX = scored.parts["r_ppl"].reshape(len(chosen), len(MODELS), -1)
  for m, model in enumerate(MODELS):
    out[model] = np.zeros(len(prompts))
    out[model][chosen] = rank_BX[:, m].mean(axis=1)
  return out


def _table(values, opened, prompts, settings) -> list[table.Row]:
  """Open-ended measures over open-ended prompts, the rest over all."""
  if "facts" in values[MODELS[0]]:
    general = (FACTS, *GENERAL)
  else:
    general = GENERAL

  def rows(measures, keep):
    kept = {m: {k: v[keep] for k, v in a.items()} for m, a in values.items()}
    return table.assemble(
      kept, measures, resamples=settings.resamples, seed=len(prompts)
    )

  out = []
  if opened.any():
    out += rows(OPEN_ENDED, opened)
  if not opened.all():
    out += rows((CORRECT,), ~opened)
  return out + rows(general, np.ones(len(prompts), bool))


def _shown(
  run: setup_lib.Run,
  prompts: Sequence[structs.Prompt],
  ids: Sequence[np.ndarray],
  samples: dict[str, Any],
  settings: Settings,
) -> list[dict[str, Any]]:
  """A few completions of every model, with each step's effect on y_ref."""
  chosen = [b for b, p in enumerate(prompts) if p.task == "open_ended"]
  chosen = chosen[: settings.thoughts]
  out = []
  for model in MODELS if chosen else ():
    groups = [samples[model][b] for b in chosen]
    scored = run.measurer.score(
      run.load(model),
      [prompts[b] for b in chosen],
      [ids[b] for b in chosen],
      groups,
      all_steps=True,
    )
    for place, b in enumerate(chosen):
      row = place * settings.samples
      out.append(
        {
          "model": model,
          "prompt": prompts[b].prompt,
          "reference": prompts[b].reference,
          "text": run.tokenizer.decode(
            groups[place][0].tokens, skip_special=True
          ),
          "answer": answer_text(run, groups[place][0]),
          "steps": _steps(run, scored, row, groups[place][0]),
          "parts": {
            k: float(scored.parts[k][place, 0])
            for k in ("r_self", "r_ppl", "count", "score")
          },
        }
      )
  return out


def _steps(run, scored, row, sample) -> list[dict[str, Any]]:
  thoughts, begin, out = scored.thoughts, int(scored.thoughts.start[row]), []
  for j in range(int(thoughts.count[row])):
    end = int(thoughts.step_end[row, j])
    delta = float(scored.deltas_RJ[row, j])
    out.append(
      {
        "text": run.tokenizer.decode(sample.tokens[begin:end]).strip(),
        "delta": delta,
        "reflective": bool(thoughts.reflective[row, j]),
      }
    )
    begin = end
  return out
