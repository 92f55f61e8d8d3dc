"""Perplexity-guided trace synthesis: brake, branch, price, keep.

For every prompt (all of them advance together):

1. brake: sample the thought until a reflection word appears; the word and
   what follows is cut off, the word becomes the trigger;
2. branch: sample k candidates that open with the trigger and run to the next
   reflection word at the head of a sentence, or to </think>;
3. price: PPL_i = exp(-mean log p(X_i)), X_i = prompt + thought so far + c_i;
4. keep the candidate of lowest perplexity, and go on from its end;
5. past the budget of reflections the thought runs on to </think>;
6. the answer is sampled from the ORIGINAL prompt followed by the thought.

The trigger opens the candidate, and the price covers exactly what is kept.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import traces
from opera_jax.rollout import engine as engine_lib
from opera_jax.rollout import sampling
from opera_jax.scoring import price as price_lib
from opera_jax.text import automaton
from opera_jax.text import tokenizer as tokenizer_lib

BRAKES = ("Wait", "But", "Hmm", "Let me think", "However")
PRICES = ("sequence", "candidate")


@dataclasses.dataclass
class _Search:
  """One prompt on its way; `status` says what comes next, or how it ended."""

  prompt: structs.Prompt
  head: np.ndarray  # tokens of the meta-prompt, <think> included
  thought: np.ndarray  # tokens after <think>, up to and with </think> at last
  trigger: np.ndarray
  rounds: list[traces.Round]
  answer: np.ndarray
  status: str = "brake"

  @property
  def context(self) -> np.ndarray:
    return np.concatenate([self.head, self.thought, self.trigger])


class Searcher:
  """Synthesises traces with a policy given at each call."""

  def __init__(
    self,
    engine: engine_lib.Engine,
    pricer: price_lib.Pricer,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    brakes: Sequence[str] = BRAKES,
    candidates: int = 4,
    budget: int = 20,
    price: str = "sequence",
    temperature: float = 0.6,
    top_k: int = 20,
    top_p: float = 0.95,
    max_step_tokens: int = 512,
    max_thought_tokens: int = 8192,
    max_answer_tokens: int = 2048,
    template: str = "{prompt}",
  ):
    """Builds the brake automata.

    Args:
      engine: samples.
      pricer: prices candidates.
      tokenizer: of the policy.
      brakes: reflection words, exact case, whole words.
      candidates: k; 1 is plain sampling.
      budget: reflections searched before the thought runs on unsearched.
      price: "sequence" (the paper's) or "candidate" (its tokens alone).
      temperature: of all sampling here.
      top_k: of all sampling here.
      top_p: of all sampling here.
      max_step_tokens: longest stretch sampled at once.
      max_thought_tokens: a longer thought is given up.
      max_answer_tokens: a longer answer is given up.
      template: the meta-prompt, with one `{prompt}`.

    Raises:
      ValueError: an unknown price, no candidate, a template without its
        placeholder.
    """
    if price not in PRICES:
      raise ValueError(f"price must be one of {PRICES}, got {price!r}.")
    if candidates < 1:
      raise ValueError(f"candidates must be at least 1, got {candidates}.")
    if template.count("{prompt}") != 1:
      raise ValueError(
        f"The template {template[:60]!r} must hold {{prompt}} exactly once."
      )
    self._engine, self._pricer, self._tokenizer = engine, pricer, tokenizer
    self._candidates, self._budget, self._price = candidates, budget, price
    self._brakes = tuple(brakes)
    # Within a thought a candidate ends at a brake that opens a sentence.
    self._heads = tuple(lead + word for word in brakes for lead in ("\n", ". "))
    self._brake_table, self._head_table = (
      automaton.compile_stops(
        strings, tokenizer.vocab_bytes, right_boundary=True
      )
      for strings in (self._brakes, self._heads)
    )
    stop_ids = (tokenizer.end_id, tokenizer.think_close_id)
    draw = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    self._step = sampling.Sampling(
      max_new_tokens=max_step_tokens, stop_ids=stop_ids, **draw
    )
    self._last = sampling.Sampling(
      max_new_tokens=max_answer_tokens, stop_ids=stop_ids[:1], **draw
    )
    self._max_thought_tokens = max_thought_tokens
    self._template = template

  def run(
    self,
    sample_params: Any,
    price_params: Any,
    prompts: Sequence[structs.Prompt],
    key: jax.Array,
    *,
    advance: Callable[[int], None] | None = None,
  ) -> list[traces.Trace]:
    """Synthesises one trace a prompt.

    Args:
      sample_params: the policy in the ROLLOUT layout.
      price_params: the policy in the TRAIN layout.
      prompts: tasks.
      key: random key.
      advance: called with the tokens sampled as they come.

    Returns:
      A trace for each prompt, in order; `status` is "complete" or the reason
      why it is not.
    """
    opened = self._tokenizer.encode_template("<think>\n")
    none = np.zeros(0, np.int32)
    searches = [
      _Search(
        prompt=prompt,
        head=np.concatenate(
          [self._chat(self._template, prompt.prompt), opened]
        ),
        thought=none,
        trigger=none,
        rounds=[],
        answer=none,
      )
      for prompt in prompts
    ]

    def sample(group, settings, stops, samples, round_index):
      return self._engine.sample(
        sample_params,
        [s.context for s in group],
        settings,
        jax.random.fold_in(key, round_index),
        samples=samples,
        ids=[s.prompt.id for s in group],
        stops=stops,
        advance=advance,
      )

    for search, (one,) in zip(
      searches, sample(searches, self._step, self._brake_table, 1, 0)
    ):
      self._go_on(search, none, one, self._brakes)
    for round_index in range(1, self._budget + 1):
      group = [s for s in searches if s.status == "branch"]
      if not group:
        break
      drawn = sample(
        group, self._step, self._head_table, self._candidates, round_index
      )
      self._keep_best(price_params, group, drawn)
    rest = [s for s in searches if s.status == "branch"]
    for search, (one,) in zip(
      rest, sample(rest, self._step, None, 1, self._budget + 1)
    ):
      self._go_on(search, search.trigger, one, ())
    self._answer(sample_params, searches, key, advance)
    return [self._trace(search) for search in searches]

  def _chat(self, template: str, prompt: str) -> np.ndarray:
    return self._tokenizer.chat_prompt(template.replace("{prompt}", prompt))

  def _cut(self, sample: structs.Sample, stops: Sequence[str]):
    """A stretch without its closing brake, that brake, and how it ended."""
    tokens = sample.tokens
    if not sample.finished:
      return tokens, tokens[:0], "thought too long"
    if tokens[-1] == self._tokenizer.think_close_id:
      return tokens, tokens[:0], "answer"
    if stops:
      found = automaton.find_first(
        tokens, self._tokenizer.vocab_bytes, stops, right_boundary=True
      )
      if found is not None:
        # The stop string may open with "\n" or ". "; those stay behind.
        word = next(w for w in self._brakes if stops[found.string].endswith(w))
        begin = found.stop - len(word.encode())
        _, ends = automaton.spell(tokens, self._tokenizer.vocab_bytes)
        first = int(np.searchsorted(ends, begin, side="right"))
        return tokens[:first], tokens[first : found.token_after], "branch"
    return tokens, tokens[:0], "turn ended inside the thought"

  def _go_on(self, search, opening, sample, stops):
    kept, trigger, status = self._cut(sample, stops)
    search.thought = np.concatenate([search.thought, opening, kept])
    search.trigger, search.status = trigger, status
    if len(search.thought) > self._max_thought_tokens:
      search.status = "thought too long"

  def _keep_best(self, params, group, drawn):
    trunks = [np.concatenate([s.head, s.thought]) for s in group]
    cuts, branches = [], []
    for place, (search, samples) in enumerate(zip(group, drawn)):
      for sample in samples:
        kept, _, status = self._cut(sample, self._heads)
        tokens = np.concatenate([search.trigger, kept])
        cuts.append((tokens, sample, status))
        branches.append(
          structs.Branch(trunk=place, fork=len(trunks[place]), tokens=tokens)
        )
    prices = self._pricer.price(params, trunks, branches)
    for place, search in enumerate(group):
      mine = range(place * self._candidates, (place + 1) * self._candidates)
      perplexity = [
        self._perplexity(prices.trunk_logprob[place], prices.branch_logprob[i])
        for i in mine
      ]
      whole = [cuts[i][2] in ("branch", "answer") for i in mine]
      # A candidate that ran out of length or turn is kept only if all did.
      best = min(
        range(self._candidates), key=lambda c: (not whole[c], perplexity[c])
      )
      search.rounds.append(
        traces.Round(
          trigger=self._tokenizer.decode(search.trigger),
          kept=best,
          candidates=tuple(
            traces.Candidate(
              text=self._tokenizer.decode(cuts[i][0]),
              perplexity=perplexity[c],
              tokens=len(cuts[i][0]),
            )
            for c, i in enumerate(mine)
          ),
        )
      )
      self._go_on(search, search.trigger, cuts[mine[best]][1], self._heads)

  def _perplexity(self, trunk_T: np.ndarray, candidate_G: np.ndarray) -> float:
    if self._price == "candidate":
      return float(np.exp(-candidate_G.mean()))
    # The first token of the prompt has no context and no price.
    total = trunk_T[1:].sum() + candidate_G.sum()
    return float(np.exp(-total / (len(trunk_T) - 1 + len(candidate_G))))

  def _answer(self, params, searches, key, advance):
    group = [s for s in searches if s.status == "answer"]
    opened = self._tokenizer.encode_template("<think>\n")
    drawn = self._engine.sample(
      params,
      [
        np.concatenate(
          [self._chat("{prompt}", s.prompt.prompt), opened, s.thought]
        )
        for s in group
      ],
      self._last,
      jax.random.fold_in(key, self._budget + 2),
      ids=[s.prompt.id for s in group],
      advance=advance,
    )
    for search, (one,) in zip(group, drawn):
      search.answer = one.tokens
      search.status = "complete" if one.finished else "answer too long"

  def _trace(self, search: _Search) -> traces.Trace:
    opened = self._tokenizer.encode_template("<think>\n")
    thought = search.thought
    if len(thought) and thought[-1] == self._tokenizer.think_close_id:
      thought = thought[:-1]
    answer = search.answer
    if len(answer) and answer[-1] == self._tokenizer.end_id:
      answer = answer[:-1]
    return traces.Trace(
      id=search.prompt.id,
      prompt=search.prompt.prompt,
      reference=search.prompt.reference,
      thought=self._tokenizer.decode(thought),
      answer=self._tokenizer.decode(answer).strip(),
      completion=np.concatenate([opened, search.thought, search.answer]),
      rounds=tuple(search.rounds),
      status=search.status,
    )
