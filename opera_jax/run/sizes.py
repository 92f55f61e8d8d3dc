"""Sizes of a run that follow from two lengths.

`config.max_prompt_tokens` and `config.rollout.max_new_tokens` say how long a
prompt and a completion may be. The padded lengths of prompts, caches, scored
prefixes and packed rows follow from them, and so does how long the cold start
thinks. These fields are empty, () or 0, in configs/common.py; a field that is
set keeps its value.

The rule, with P the longest prompt, N the longest completion and R the longest
reference:

| field | value where it is empty |
|---|---|
| synthesis.max_thought_tokens | 4/5 N |
| synthesis.max_answer_tokens | 2/5 N |
| synthesis.max_step_tokens | 1/10 N |
| engine.prompt_buckets | powers of two from P / 16 on, and P |
| engine.cache_buckets | N / 8, N / 4, N / 2, N |
| engine.slots | the most samples of a prompt that a stage takes |
| scoring.prefix_buckets | powers of two from (P + N) / 16 on, and P + N |
| scoring.continuation_buckets | powers of two from R / 16 on, and R |
| scoring.slot_buckets | 1, 4, 8, 16, 32, see `_slot_buckets` |
| base.row_tokens, sft.row_tokens | P + N |
| rl.row_buckets | powers of two from L / 8 on, and L |

L is N where a packed row holds several completions behind one prompt, P + N
otherwise. Rewriting puts the reference and a whole thought into its prompt, so
P is there P + R + the longest thought for the engine. Lengths are multiples of
128, the tile of a TPU, or of 32 up to 512. No bucket is shorter than 64: the
tokens that it would save cost less than compiling its program.

Caches double, because growing holds the old and the new one: a bucket shortly
before the last would cost almost two of the last.
"""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config", bound=Mapping[str, Any])

_SHORTEST = 64  # tokens of a bucket


def derive(config: Config) -> Config:
  """Returns a copy of a config whose empty sizes are filled in.

  Args:
    config: nested values, as in configs/common.py, which
      `config_check.check` accepts.
  """
  out: Any = copy.deepcopy(config)
  engine, scoring, rl = out["engine"], out["scoring"], out["rl"]
  synthesis = out["synthesis"]
  prompt, reference = out["max_prompt_tokens"], out["max_reference_tokens"]
  new = out["rollout"]["max_new_tokens"]

  def fill(section: Any, name: str, value: Any) -> None:
    if not section[name]:
      section[name] = value

  fill(synthesis, "max_thought_tokens", max(1, 4 * new // 5))
  fill(synthesis, "max_answer_tokens", max(1, 2 * new // 5))
  fill(synthesis, "max_step_tokens", max(1, new // 10))
  context = prompt
  if synthesis["method"] == "rewrite":
    context += reference + synthesis["max_thought_tokens"]
  fill(engine, "prompt_buckets", powers_of_two(context, 16))
  fill(engine, "cache_buckets", _halves(new))
  fill(
    engine,
    "slots",
    max(
      rl["samples"],
      synthesis["candidates"],
      out["evaluate"]["samples"],
      out["select"]["rl"]["samples"],
    ),
  )
  fill(scoring, "prefix_buckets", powers_of_two(prompt + new, 16))
  fill(scoring, "continuation_buckets", powers_of_two(reference, 16))
  fill(
    scoring,
    "slot_buckets",
    _slot_buckets(
      max(scoring["prefix_buckets"]), max(scoring["continuation_buckets"])
    ),
  )
  for stage in ("base", "sft"):
    fill(out[stage], "row_tokens", _rounded(prompt + new))
  packs = rl["completions_per_row"] > 1
  fill(rl, "row_buckets", powers_of_two(new if packs else prompt + new, 8))
  return out


def powers_of_two(limit: int, fraction: int) -> tuple[int, ...]:
  """Powers of two from limit / fraction on, and the rounded limit.

  Args:
    limit: longest length, in tokens.
    fraction: the shortest bucket is at least limit / fraction.
  """
  last, length, out = _rounded(limit), _SHORTEST, []
  while length * fraction < limit:
    length *= 2
  while length < last:
    out.append(length)
    length *= 2
  return (*out, last)


def _halves(limit: int) -> tuple[int, ...]:
  """An eighth, a quarter, a half of a length, and the length; rounded up."""
  lengths = {_rounded(-(-limit // part)) for part in (8, 4, 2, 1)}
  last = max(lengths)
  return tuple(sorted(n for n in lengths if n >= _SHORTEST or n == last))


def _slot_buckets(prefix: int, continuation: int) -> tuple[int, ...]:
  """Numbers of continuations of one scored prefix.

  At most 32, and at most twice the prefix's tokens in all, but 8 at least: a
  prefix with more of them is scored in several rows.
  """
  most = max(8, 2 * prefix // continuation)
  return tuple(n for n in (1, 4, 8, 16, 32) if n <= most)


def _rounded(tokens: int) -> int:
  """Rounds up to a multiple of 32, beyond 512 of 128."""
  tile = 128 if tokens > 512 else 32
  return -(-tokens // tile) * tile
