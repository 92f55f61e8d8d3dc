"""Measures one model on held-out prompts.

Shape key: B prompts, N samples a prompt.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import storyworld
from opera_jax.run import setup as setup_lib
from opera_jax.stages import evaluate

# Measure -> its description.
MEASURES = {
  "facts": "facts kept, of 5",
  "correct": "sums right",
  "tokens": "tokens a completion",
  "math_tokens": "of a sum",
  "reflections": "reflections a thought",
  "r_self": "R_self",
  "score": "L, nats a token",
  "logp_thought": "log P(y_ref given x, own thought), nats a token",
  "finished": "completions that end",
}
OPEN_ENDED = ("facts", "r_self", "score", "logp_thought")
MATHS = ("correct", "math_tokens")


def draw(
  run: setup_lib.Run,
  params: Any,
  prompts: Sequence[structs.Prompt],
  *,
  samples: int,
  max_new_tokens: int,
  advance: evaluate.Advance | None = None,
) -> list[list[structs.Sample]]:
  """Draws N samples of each prompt at temperature 1, from the run's seed.

  `advance` is called with the number of tokens of each finished sample.
  """
  return run.engine.sample(
    run.for_rollout(params),
    run.prompt_ids(prompts),
    run.sampling(max_new_tokens=max_new_tokens),
    jax.random.key(run.seed + 3),
    samples=samples,
    ids=[p.id for p in prompts],
    advance=advance,
  )


def measure(
  run: setup_lib.Run,
  params: Any,
  prompts: Sequence[structs.Prompt],
  groups: Sequence[Sequence[structs.Sample]],
  advance: evaluate.Advance | None = None,
) -> dict[str, list[float]]:
  """Computes means over each prompt's samples, by measure.

  Args:
    run: the run; its `eval_scorer` is used.
    params: the model that generated the samples.
    prompts: B tasks.
    groups: N >= 2 samples of each.
    advance: progress callback, called with the number of tokens scored.

  Returns:
    One number per prompt, in the order of the prompts: `OPEN_ENDED` measures
    over open-ended prompts, `MATHS` over maths, the rest over all. A measure
    without any prompt is left out.
  """
  ids = run.prompt_ids(prompts)
  scored = run.eval_scorer.score(params, prompts, ids, groups, advance=advance)
  open_ended = [b for b, p in enumerate(prompts) if p.task == "open_ended"]
  maths = [b for b, p in enumerate(prompts) if p.task == "math"]
  with_facts = [b for b in open_ended if "facts" in prompts[b].columns]
  terms = scored.terms
  out = {
    "tokens": scored.rollouts.lengths().mean(axis=1),
    "reflections": terms["reflections"].mean(axis=1),
    "finished": np.asarray([np.mean([s.finished for s in g]) for g in groups]),
  }
  if open_ended:
    out["r_self"] = terms["r_self"][open_ended].mean(axis=1)
    out["score"] = terms["score"][open_ended].mean(axis=1)
    logprobs = evaluate.thought_logprobs(
      run,
      params,
      [prompts[b] for b in open_ended],
      [ids[b] for b in open_ended],
      [groups[b] for b in open_ended],
      advance=advance,
    )
    out["logp_thought"] = logprobs["logp_thought"]
  if maths:
    out["correct"] = terms["correct"][maths].mean(axis=1)
    out["math_tokens"] = out["tokens"][maths]
  if with_facts:
    out["facts"] = np.asarray(
      [_facts(run, prompts[b], groups[b]) for b in with_facts]
    )
  return {
    name: [float(v) for v in out[name]] for name in MEASURES if name in out
  }


def _facts(
  run: setup_lib.Run, prompt: structs.Prompt, group: Sequence[structs.Sample]
) -> float:
  kept = [
    storyworld.facts_kept(evaluate.answer_text(run, s), prompt.columns["facts"])
    for s in group
  ]
  return float(np.mean([sum(k.values()) for k in kept]))
