"""Computes each reward on completions that are built to exploit it.

Shape key: B prompts, K probes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax import structs
from opera_jax.evals import probes
from opera_jax.rl import score as score_lib
from opera_jax.run import setup as setup_lib


def answers(
  run: setup_lib.Run,
  scorers: Mapping[str, score_lib.RewardScorer],
  params: Any,
  prompts: Sequence[structs.Prompt],
  texts: Sequence[str],
) -> dict[str, dict[str, np.ndarray]]:
  """Computes each reward of each probe.

  The probes of one prompt form one group, so ranks compare them with each
  other.

  Args:
    run: the run; its tokenizer and keywords are used.
    scorers: rewards by name.
    params: the policy that scores.
    prompts: B tasks.
    texts: an honest completion of each, with think tags.

  Returns:
    The total reward by reward name and probe, float32 [B].
  """
  separator = run.reward["separator"]
  made = [
    probes.make(
      probes.read(text, separator), prompt, keywords=run.reward["keywords"]
    )
    for prompt, text in zip(prompts, texts, strict=True)
  ]
  groups = [
    [probes.sample(m[name], run.tokenizer, separator) for name in probes.NAMES]
    for m in made
  ]
  ids = run.prompt_ids(prompts)
  out = {}
  for reward, scorer in scorers.items():
    total_BK = scorer.score(params, prompts, ids, groups).total_BN
    out[reward] = {n: total_BK[:, k] for k, n in enumerate(probes.NAMES)}
  return out
