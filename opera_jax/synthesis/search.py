"""Perplexity-guided trace synthesis: stop, fork, score, keep.

Every prompt has a row of the sampler, which computes it once; then, by itself:

1. stop: sample the thought until a reflection word appears; what follows the
   word is dropped, the word becomes the trigger;
2. fork: from the prefix's end sample k candidates that open with the trigger
   and run to the next reflection word that opens a sentence, or to </think>;
3. score: PPL_i = exp(-mean log p(X_i)), X_i = prompt + thought so far + c_i, at
   temperature 1 and untruncated, from what sampling computed anyway;
4. keep the candidate of lowest perplexity: its keys and values become prefix;
5. past the budget of reflections the thought runs on to </think>;
6. sample the answer from the ORIGINAL prompt and the thought: from the same
   prefix, or, where a template stood around the prompt, after one more pass.

A row that is through takes the next prompt. The trigger opens the candidate,
and the log-probability covers exactly what is kept. What a prompt draws is
folded from (key, round, its id, candidate), so that a trace depends on no other
prompt.
"""

import collections
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import traces
from opera_jax.rollout import engine as engine_lib
from opera_jax.rollout import prompt_slots as prompt_slots_lib
from opera_jax.rollout import sampling
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.synthesis import stop_words as stop_words_lib
from opera_jax.synthesis import templates
from opera_jax.text import tokenizer as tokenizer_lib

STOP_WORDS = stop_words_lib.WORDS
SCORES = ("sequence", "candidate")
# (prompt, thought so far, candidates) -> index of the one to keep.
Choose = Callable[[str, str, Sequence[str]], int]


@dataclasses.dataclass
class _Search:
  """One prompt on its way; `status` is its phase, or how it ended."""

  index: int
  prompt: structs.Prompt
  head: np.ndarray  # tokens of the meta-prompt, <think> included
  thought: np.ndarray  # tokens after <think>, up to and with </think> at last
  trigger: np.ndarray
  rounds: list[traces.Round]
  answer: np.ndarray
  logprob: float = 0.0  # of head and thought, summed, at temperature 1
  trigger_logprob: float = 0.0
  status: str = "stop"


@dataclasses.dataclass(frozen=True)
class _Stretch:
  """What one slot drew, cut."""

  kept: np.ndarray
  trigger: np.ndarray
  status: str
  logprob: float  # of the kept tokens, summed, at temperature 1
  trigger_logprob: float


class Searcher:
  """Synthesises traces with a policy given at each call."""

  def __init__(
    self,
    engine: engine_lib.Engine,
    logprob_scorer: scorer_lib.LogprobScorer,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    stop_words: Sequence[str] = STOP_WORDS,
    candidates: int = 4,
    budget: int = 20,
    score: str = "sequence",
    choose: Choose | None = None,
    temperature: float = 0.6,
    top_k: int = 20,
    top_p: float = 0.95,
    max_step_tokens: int = 512,
    max_thought_tokens: int = 8192,
    max_answer_tokens: int = 2048,
    template: str = "{prompt}",
  ):
    """Builds the stop word automata.

    Args:
      engine: samples; its rows are the prompts that advance together, each
        with a slot for every candidate.
      scorer: scores the prompts, once each.
      tokenizer: of the policy.
      stop_words: reflection words, or ("\\n\\n",) to search at every step; see
        `stop_words.StopWords`.
      candidates: k.
      budget: reflections searched before the thought runs on unsearched; 0 is
        plain sampling.
      score: "sequence" (the paper's) or "candidate" (its tokens alone).
      choose: takes (prompt, thought so far, candidates that came to an end) as
        text and returns the index to keep, in place of the perplexities, which
        are recorded all the same. Every process asks it, and must hear the
        same.
      temperature: of all sampling here.
      top_k: of all sampling here.
      top_p: of all sampling here.
      max_step_tokens: longest stretch sampled at once.
      max_thought_tokens: a longer thought is given up.
      max_answer_tokens: a longer answer is given up.
      template: the meta-prompt, with one `{prompt}`; see `templates.load`.

    Raises:
      ValueError: an unknown score, no candidate, a negative budget, a template
        without its placeholder, stop words that cannot be.
    """
    if score not in SCORES:
      raise ValueError(f"score must be one of {SCORES}, got {score!r}.")
    if candidates < 1:
      raise ValueError(f"candidates must be at least 1, got {candidates}.")
    if budget < 0:
      raise ValueError(
        f"budget must be at least 0, got {budget}. Use 0 for plain sampling."
      )
    self._engine, self._logprob_scorer, self._tokenizer = (
      engine,
      logprob_scorer,
      tokenizer,
    )
    self._candidates, self._budget = candidates, budget
    self._score, self._choose = score, choose
    self._stop_words = stop_words_lib.StopWords(stop_words, tokenizer)
    self._most = dict.fromkeys(stop_words_lib.PHASES, max_step_tokens)
    self._most["answer"] = max_answer_tokens
    self._max_thought_tokens = max_thought_tokens
    self._settings = sampling.for_tokenizer(
      sampling.Sampling(
        max_new_tokens=max(self._most.values()),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
      ),
      tokenizer,
      engine.head_rows(),
    )
    self._template = templates.load(
      template, ("prompt",), "config.synthesis.template"
    )

  def run(
    self,
    sample_params: Any,
    score_params: Any,
    prompts: Sequence[structs.Prompt],
    key: jax.Array,
    *,
    advance: Callable[[int], None] | None = None,
    ended: Callable[[traces.Trace], None] | None = None,
  ) -> list[traces.Trace]:
    """Synthesises one trace a prompt.

    Args:
      sample_params: the policy in the ROLLOUT layout.
      score_params: the policy in the TRAIN layout.
      prompts: tasks.
      key: random key.
      advance: called with the tokens sampled as they come.
      ended: called with each trace when it has ended, in whatever order.

    Returns:
      A trace for each prompt, in order; `status` is "complete" or the reason
      why it is not.

    Raises:
      ValueError: a prompt beyond the largest bucket, or `choose` returns no
        index of what it was given.
      FloatingPointError: logits that are not finite.
    """
    searches = self._searches(prompts)
    heads = [search.head for search in searches]
    self._engine.check(heads, self._settings)
    if self._budget and self._score == "sequence":
      self._score_heads(score_params, searches)
    with self._engine.rows(
      sample_params,
      self._candidates if self._budget else 1,
      self._settings,
      self._stop_words.table,
      contexts=heads,
      more=self._max_thought_tokens,
      whole_rows=True,
      with_model_logprob=self._budget > 0,
    ) as rows:
      self._drive(rows, searches, key, advance, ended)
    return [self._trace(search) for search in searches]

  def _drive(self, rows, searches, key, advance, ended) -> None:
    """Runs all searches to their ends."""

    @functools.cache
    def keys(number: int) -> np.ndarray:
      folded = jax.random.fold_in(key, number)
      names = [search.prompt.id for search in searches]
      return engine_lib.keys(folded, names, rows.width)

    waiting = collections.deque(
      sorted(searches, key=lambda s: (self._engine.bucket(s.head), s.index))
    )
    sitting: dict[int, _Search] = {}
    contexts: list[tuple[int, str, np.ndarray]] = []  # to be computed
    kept: list[tuple[int, int, np.ndarray]] = []
    ready: list[int] = []  # rows that go on
    drawn: dict[tuple[int, int], list[prompt_slots_lib.Piece]] = {}
    while True:
      free = [row for row in range(rows.count) if row not in sitting]
      for row in free[: len(waiting)]:
        sitting[row] = waiting.popleft()
        contexts.append((row, sitting[row].prompt.id, sitting[row].head))
        ready.append(row)
      if not sitting:
        return
      pieces = rows.step(
        free=lambda live: max(1, live // 8),
        kept=kept,
        contexts=contexts,
        finished=[row for row in free if row not in sitting],
        forks=[f for r in ready for f in self._forks(r, sitting[r], keys)],
      )
      live = {piece.row for piece in pieces if piece.live}
      for piece in pieces:
        drawn.setdefault((piece.row, piece.slot), []).append(piece)
        if advance is not None:
          advance(len(piece.tokens))
      contexts, ready, kept = [], [], []
      for row in sorted({piece.row for piece in pieces} - live):
        search = sitting[row]
        slots = range(self._width(search))
        mine = [drawn.pop((row, s)) for s in slots]
        slot, tokens = self._go_on(search, mine)
        if search.status not in stop_words_lib.PHASES:
          del sitting[row]
          if ended is not None:
            ended(self._trace(search))
          continue
        ready.append(row)
        if search.status == "answer" and self._template != "{prompt}":
          context = self._head("{prompt}", search.prompt), search.thought
          contexts.append((row, search.prompt.id, np.concatenate(context)))
        else:
          kept.append((row, slot, tokens))

  def _searches(self, prompts) -> list[_Search]:
    none = np.zeros(0, np.int32)  # thought, trigger, answer
    return [
      _Search(i, p, self._head(self._template, p), none, none, [], none)
      for i, p in enumerate(prompts)
    ]

  def _head(self, template: str, prompt: structs.Prompt) -> np.ndarray:
    text = template.replace("{prompt}", prompt.prompt)
    opened = self._tokenizer.encode_template("<think>\n")
    return np.concatenate([self._tokenizer.chat_prompt(text), opened])

  def _score_heads(self, params, searches) -> None:
    """Sums of the prompts' own log-probabilities."""
    by_bucket = collections.defaultdict(list)
    for search in searches:
      by_bucket[self._logprob_scorer.bucket(search.head)].append(search)
    # Shape by shape, so that no prompt's log-probability depends on its
    # neighbours.
    for _, group in sorted(by_bucket.items()):
      logprobs = self._logprob_scorer.score(
        params, [search.head for search in group]
      )
      for search, logprob_T in zip(group, logprobs.prefix_logprob):
        # The first token of the prompt has no context and no log-probability.
        search.logprob = float(logprob_T[1:].sum(dtype=np.float64))

  def _width(self, search: _Search) -> int:
    return self._candidates if search.status == "candidate" else 1

  def _forks(
    self, row: int, search: _Search, keys
  ) -> list[prompt_slots_lib.Fork]:
    phase = search.status
    number = {
      "stop": 0,
      "candidate": len(search.rounds) + 1,
      "rest": self._budget + 1,
      "answer": self._budget + 2,
    }[phase]
    return [
      prompt_slots_lib.Fork(
        row,
        slot,
        key=keys(number)[search.index, slot],
        budget=self._most[phase],
        state=self._stop_words.start[phase],
      )
      for slot in range(self._width(search))
    ]

  def _go_on(
    self, search: _Search, drawn: Sequence[Sequence[prompt_slots_lib.Piece]]
  ) -> tuple[int, np.ndarray]:
    """Takes what a row drew; which slot is kept, and its tokens that are."""
    if search.status == "answer":
      sample = prompt_slots_lib.joined(drawn[0])
      search.answer = sample.tokens
      search.status = "complete" if sample.finished else "answer too long"
      return 0, sample.tokens
    stretches = [self._stretch(search.status, pieces) for pieces in drawn]
    best = 0
    if search.status == "candidate":
      best = self._keep_best(search, stretches)
    one = stretches[best]
    search.thought = np.concatenate([search.thought, search.trigger, one.kept])
    search.logprob += search.trigger_logprob + one.logprob
    search.trigger, search.trigger_logprob = one.trigger, one.trigger_logprob
    search.status = one.status
    if len(search.thought) > self._max_thought_tokens:
      search.status = stop_words_lib.TOO_LONG
    elif one.status == "candidate" and len(search.rounds) >= self._budget:
      search.status = "rest"
    return best, np.concatenate([one.kept, one.trigger])

  def _stretch(
    self, phase: str, pieces: Sequence[prompt_slots_lib.Piece]
  ) -> _Stretch:
    sample = prompt_slots_lib.joined(pieces)
    kept, trigger, status = self._stop_words.cut(sample, phase)
    sums = [0.0, 0.0]
    if self._budget:
      score_T = np.concatenate([piece.model_logprob for piece in pieces])
      stop = len(kept) + len(trigger)
      parts = score_T[: len(kept)], score_T[len(kept) : stop]
      sums = [float(part.sum(dtype=np.float64)) for part in parts]
    return _Stretch(kept, trigger, status, *sums)

  def _keep_best(self, search: _Search, stretches: Sequence[_Stretch]) -> int:
    """Records a round; the index of the candidate that is kept."""
    candidates = []
    for stretch in stretches:
      tokens = np.concatenate([search.trigger, stretch.kept])
      total, count = search.trigger_logprob + stretch.logprob, len(tokens)
      if self._score == "sequence":
        total += search.logprob
        count += len(search.head) - 1 + len(search.thought)
      candidates.append(
        traces.Candidate(
          text=self._tokenizer.decode(tokens),
          perplexity=float(np.exp(-total / count)),
          tokens=len(tokens),
        )
      )
    # A candidate that ran out of length or turn is kept only if all did.
    every = range(len(stretches))
    whole = [i for i in every if stretches[i].status in stop_words_lib.PHASES]
    best = self._best(search, candidates, whole or every)
    search.rounds.append(
      traces.Round(
        trigger=self._tokenizer.decode(search.trigger),
        kept=best,
        candidates=tuple(candidates),
      )
    )
    return best

  def _best(self, search, candidates, among: Sequence[int]) -> int:
    if self._choose is None:
      return min(among, key=lambda i: candidates[i].perplexity)
    chosen = self._choose(
      search.prompt.prompt,
      self._tokenizer.decode(search.thought),
      [candidates[i].text for i in among],
    )
    try:
      place = operator.index(chosen)
    except TypeError:
      place = -1
    if isinstance(chosen, bool) or not 0 <= place < len(among):
      raise ValueError(
        f"The choice among {len(among)} candidates of prompt "
        f"{search.prompt.id!r} is {chosen!r}; it must be an index from 0 to "
        f"{len(among) - 1}. Correct the function of config.synthesis.choose."
      )
    return among[place]

  def _trace(self, search: _Search) -> traces.Trace:
    opened = self._tokenizer.encode_template("<think>\n")
    thought = search.thought
    if len(thought) and thought[-1] == self._tokenizer.think_close_id:
      thought = thought[:-1]
    answer = search.answer
    if len(answer) and answer[-1] in self._tokenizer.end_ids:
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
