"""Completions to rewards: mark the steps, price one pass, count.

The trunk pass that prices a completion's branches also gives its own tokens'
log-probabilities, which the update needs as those of the old policy.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import batching
from opera_jax.rewards import compose, opera, verifiable
from opera_jax.scoring import price as price_lib
from opera_jax.text import automaton, thought
from opera_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Scored:
  """Rewards of B prompts x N samples, and what they were made of."""

  total_BN: np.ndarray
  parts: dict[str, np.ndarray]  # [B, N] each: r_ppl, r_self, count, score, ...
  trunks: list[np.ndarray]  # prompt + completion tokens, prompt-major
  prices: structs.Prices
  thoughts: structs.Thoughts  # host arrays, R = B * N rows
  deltas_RJ: np.ndarray  # P_j - P_{j-1}; NaN where it was not priced
  opened_B: np.ndarray  # bool, open-ended prompts; the others are maths
  separate_tokens: int  # what one row for each prefix of every step would cost


class Scorer:
  """Scores completions under the policy given at each call."""

  def __init__(
    self,
    pricer: price_lib.Pricer,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    alpha: float = 0.3,
    tau: float = 2.0,
    mode: str = "both",
    keywords: Sequence[str] = thought.KEYWORDS,
    match: str = "word",
    separator: str = thought.SEPARATOR,
    bridge: str = "",
    max_steps: int = 64,
    math_check: str = "exact",
    cache_dir: str | None = None,
  ):
    """Builds the automaton of the reflective states.

    Args:
      pricer: prices trunks and branches at temperature 1.
      tokenizer: of the policy.
      alpha: weight of R_ppl.
      tau: R_self = tanh(count / tau).
      mode: see `opera.rewards`.
      keywords: words that make a step reflective.
      match: "word" or "substring".
      separator: what parts steps.
      bridge: text between a partial thought and the reference.
      max_steps: steps told apart in a thought; more are counted in a metric.
      math_check: see `verifiable.correct`.
      cache_dir: where built automata are kept; None builds anew.
    """
    self._pricer, self._tokenizer = pricer, tokenizer
    self._reward = {"alpha": alpha, "tau": tau, "mode": mode}
    self._bridge = tokenizer.encode_template(bridge)
    self._max_steps, self._math_check = max_steps, math_check
    self._table = automaton.compile(
      keywords,
      separator,
      match,
      tokenizer.vocab_bytes,
      tokenizer.think_open_id,
      tokenizer.think_close_id,
      cache_dir=cache_dir,
    )

  def thoughts(self, samples: Sequence[structs.Sample]):
    """Where the steps lie: host `Thoughts`, and each row's true count."""
    longest = max(len(s.tokens) for s in samples)
    tokens_RT, length_R = batching.pad_rows(
      [s.tokens for s in samples],
      length=-(-longest // 128) * 128,
      pad_id=self._tokenizer.pad_id,
    )
    codes = automaton.run(self._table, tokens_RT, length_R)
    return jax.device_get(
      (thought.from_codes(codes, self._max_steps), thought.total_steps(codes))
    )

  def score(
    self,
    params: Any,
    prompts: Sequence[structs.Prompt],
    prompt_ids: Sequence[np.ndarray],
    groups: Sequence[Sequence[structs.Sample]],
    *,
    all_steps: bool = False,
    advance: Callable[[int], None] | None = None,
  ) -> Scored:
    """Scores N samples of each of B prompts.

    Args:
      params: the policy before this step's update.
      prompts: tasks.
      prompt_ids: their tokens.
      groups: N >= 2 samples of each.
      all_steps: price the end of every step, for pictures.
      advance: called with the tokens priced as they are done.

    Returns:
      Rewards, parts and prices.

    Raises:
      ValueError: an empty reference, fewer than two samples, a reward that
        is not finite.
    """
    flat = [s for group in groups for s in group]
    count = len(groups[0])
    owner = [b for b, group in enumerate(groups) for _ in group]
    thoughts, total_R = self.thoughts(flat)
    trunks = [
      np.concatenate([prompt_ids[b], s.tokens]) for b, s in zip(owner, flat)
    ]
    opened = [r for r, b in enumerate(owner) if prompts[b].task == "open_ended"]
    branches, layout = self._queries(
      prompts, prompt_ids, owner, flat, thoughts, opened, all_steps
    )
    prices = self._pricer.price(params, trunks, branches, advance=advance)
    deltas_RJ = np.full(thoughts.step_end.shape, np.nan, np.float32)
    parts = None
    if opened:
      parts = opera.rewards(
        prices.branch_logprob, layout, samples=count, **self._reward
      )
      deltas_RJ[opened] = opera.step_deltas(prices.branch_logprob, layout)
    correct = [
      [
        verifiable.correct(
          self._tokenizer.decode(s.tokens, skip_special=True),
          prompt.reference,
          method=self._math_check,
        )
        for s in group
      ]
      for prompt, group in zip(prompts, groups)
      if prompt.task == "math"
    ]
    total_BN, parts = compose.compose(
      [p.task for p in prompts],
      open_ended=parts,
      correct_VN=np.asarray(correct) if correct else None,
    )
    shape = (len(groups), count)
    parts |= {
      "reflections": thoughts.reflective.sum(1).reshape(shape),
      "steps": total_R.reshape(shape),
      "closed": thoughts.closed.reshape(shape),
      "thought_tokens": np.where(
        thoughts.closed, thoughts.end - thoughts.start, 0
      ).reshape(shape),
      "steps_beyond_max": (total_R > self._max_steps).reshape(shape),
    }
    opened_B = np.asarray([p.task == "open_ended" for p in prompts])
    return Scored(
      total_BN,
      parts,
      trunks,
      prices,
      thoughts,
      deltas_RJ,
      opened_B,
      self._separate_tokens(
        prompts, prompt_ids, owner, trunks, thoughts, opened
      ),
    )

  def _queries(
    self, prompts, prompt_ids, owner, flat, thoughts, rows, all_steps
  ):
    if not rows:
      return [], None
    return opera.queries(
      jax.tree.map(lambda x: x[rows], thoughts),
      np.asarray([len(prompt_ids[owner[r]]) for r in rows]),
      np.asarray([len(flat[r].tokens) for r in rows]),
      [self._tokenizer.encode(prompts[owner[r]].reference) for r in rows],
      bridge_ids=self._bridge,
      all_steps=all_steps,
      trunks=rows,
    )

  def _separate_tokens(
    self, prompts, prompt_ids, owner, trunks, thoughts, rows
  ) -> int:
    """Tokens of the released code's way: a row for P_0, every P_j, and L."""
    total = 0
    for r in rows:
      reference = len(self._tokenizer.encode(prompts[owner[r]].reference))
      count = int(thoughts.count[r])
      ends = [len(trunks[r])]
      if count:
        prompt = len(prompt_ids[owner[r]])
        ends += [prompt + int(thoughts.start[r])]
        ends += [prompt + int(e) for e in thoughts.step_end[r, :count]]
      total += sum(ends) + len(ends) * reference
    return total
