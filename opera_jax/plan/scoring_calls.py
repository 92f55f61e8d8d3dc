"""How many calls the packer makes of the scoring of one RL step.

The plan has no completions, so it states some: all of one length, with a prompt
a twelfth as long as the longest, a thought of two fifths and an answer of a
tenth of the longest response, and a reference a quarter as long as the longest
continuation. At the paper's lengths these are 512, 4,096, 1,024 and 1,024
tokens. A thought has 32 steps of which 12 reflect, no two of them neighbours,
so that the reference forks at 24 positions and once more at the end.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from opera_jax import structs
from opera_jax.models import decoder
from opera_jax.plan import cost
from opera_jax.scoring import packing

STEPS, REFLECTIVE = 32, 12
SIZES = ("batch_size", "prefix_buckets", "slot_buckets", "continuation_buckets")


@dataclasses.dataclass(frozen=True)
class Calls:
  """The scoring calls of one RL step."""

  count: int
  work: float  # in FLOPs of one call at the largest shape
  useful: float  # share of the FLOPs that is not padding or repetition


def count(
  config: decoder.Config,
  scoring: Mapping[str, Any],
  *,
  completions: int,
  longest_prompt: int,
  longest_response: int,
  largest: cost.Flops,
  continued: bool,
) -> Calls:
  """Packs the stated completions as a run would.

  Args:
    config: of the model.
    scoring: the config's section.
    completions: of one RL step.
    longest_prompt: tokens.
    longest_response: tokens.
    largest: FLOPs of one call at the largest shape.
    continued: whether the reference is scored after each completion; otherwise
      completions alone are.
  """
  prompt = max(longest_prompt // 12, 1)
  thought = max(2 * longest_response // 5, STEPS)
  total = prompt + thought + max(longest_response // 10, 1)
  reference = max(max(scoring["continuation_buckets"]) // 4, 1)
  forks = [*_forks(prompt, thought), total] if continued else []
  prefix = np.zeros(total, np.int32)
  tokens = np.zeros(reference, np.int32)
  batches = packing.pack(
    [prefix] * completions,
    [
      structs.Continuation(prefix=i, fork=fork, tokens=tokens)
      for i in range(completions)
      for fork in forks
    ],
    **{name: scoring[name] for name in SIZES},
  )
  computed = sum(
    cost.score(config, *b.token_BT.shape, *b.input_BSG.shape[1:]).total
    for b in batches
  )
  needed = cost.score(config, completions, total, 0, 0).total
  needed += completions * sum(_continued(config, f, reference) for f in forks)
  return Calls(len(batches), computed / largest.total, needed / computed)


def _forks(prompt: int, thought: int) -> list[int]:
  """Ends of reflective steps and of the steps before them, as prefix tokens."""
  reflective = {STEPS * i // REFLECTIVE + 1 for i in range(REFLECTIVE)}
  steps = reflective | {step - 1 for step in reflective}
  return sorted(prompt + thought * step // STEPS for step in steps)


def _continued(config: decoder.Config, fork: int, tokens: int) -> float:
  """FLOPs of one continuation that sees `fork` prefix tokens."""
  per_token = cost.layer_flops(config) + cost.head_flops(config)
  pairs = tokens * fork + cost.causal_pairs(tokens)
  return tokens * per_token + cost.attention_flops(config, pairs)
