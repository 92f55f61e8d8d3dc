"""Perplexity-guided trace synthesis: stop, fork, score, keep.

Every prompt occupies a prompt slot of the engine and is prefilled once. Each
prompt advances independently of the others:

1. Stop: sample the thought until a reflection word appears. Tokens after the
   word are dropped; the word is the trigger of the next round.
2. Fork: from the end of the prefix sample k candidates. A candidate begins with
   the trigger and ends before the next reflection word that opens a sentence,
   or at </think>.
3. Score: PPL_i = exp(-mean log p(X_i)), X_i = prompt + thought so far + c_i, at
   temperature 1 and untruncated. The log-probabilities come from sampling.
4. Keep the candidate with the lowest perplexity: its keys and values are
   appended to the prefix.
5. After `budget` rounds, sample the rest of the thought up to </think>. A
   thought that reaches its maximum length, or in which the model ends its turn,
   is abandoned, or closed by force (`close_thought`): a model that has never
   seen the tag does not write it.
6. Sample the answer after the ORIGINAL prompt and the thought. The prefix is
   reused, unless the prompt stood in a template; then it is prefilled again.

A finished prompt frees its slot for the next one. The trigger belongs to the
candidate, so the score covers exactly the tokens that are kept. Random keys are
folded from (key, round, prompt id, candidate), so that a trace does not depend
on the other prompts.
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


def _no_tokens() -> np.ndarray:
  return np.zeros(0, np.int32)


@dataclasses.dataclass
class _Search:
  """The state of one prompt; `status` is its phase, or how it ended."""

  index: int
  prompt: structs.Prompt
  head: np.ndarray  # tokens of the meta-prompt, <think> included
  # Tokens after <think>; in the end including </think>.
  thought: np.ndarray = dataclasses.field(default_factory=_no_tokens)
  trigger: np.ndarray = dataclasses.field(default_factory=_no_tokens)
  answer: np.ndarray = dataclasses.field(default_factory=_no_tokens)
  rounds: list[traces.Round] = dataclasses.field(default_factory=list)
  logprob: float = 0.0  # sum over head and thought, at temperature 1
  trigger_logprob: float = 0.0
  status: str = "stop"
  forced: bool = False  # the thought was closed by force


@dataclasses.dataclass(frozen=True)
class _Segment:
  """A sampled piece of thought, cut at its stop word."""

  kept: np.ndarray
  trigger: np.ndarray
  status: str
  logprob: float  # sum over the kept tokens, at temperature 1
  trigger_logprob: float


def check_opens(tokenizer: tokenizer_lib.Tokenizer) -> None:
  """Raises a ValueError if the chat template closes the thought.

  A search writes a thought, and there would be nowhere to write it.
  """
  if tokenizer.closes_thought:
    raise ValueError(
      "The chat template writes an empty thought into the prompt, and the cold"
      " start searches for thoughts. Set config.tokenizer.enable_thinking to"
      ' "on", or leave it "".'
    )


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
    close_thought: bool = False,
    template: str = "{prompt}",
  ):
    """Compiles the stop words.

    Args:
      engine: samples; each of its prompt slots holds one prompt and has a
        sample slot per candidate.
      logprob_scorer: scores each prompt once.
      tokenizer: of the policy.
      stop_words: reflection words, or ("\\n\\n",) to search at every step; see
        `stop_words.StopWords`.
      candidates: k.
      budget: maximum number of rounds; 0 is plain sampling.
      score: "sequence" scores prompt, thought and candidate (the paper);
        "candidate" scores the candidate's tokens only.
      choose: chooses a candidate instead of the perplexity, which is still
        recorded. It is called with (prompt, thought so far, candidates that
        ended properly) as text and returns the index to keep. Every process
        calls it and must get the same result.
      temperature: of all sampling here.
      top_k: of all sampling here.
      top_p: of all sampling here.
      max_step_tokens: maximum tokens of a candidate and of every other piece of
        thought that is sampled at once.
      max_thought_tokens: a longer thought is abandoned, or closed.
      max_answer_tokens: a longer answer is abandoned.
      close_thought: close a thought by force that is too long, or in which the
        turn ended, and go on with the answer.
      template: the meta-prompt, with one `{prompt}`; see `templates.load`.

    Raises:
      ValueError: an unknown score, no candidate, a negative budget, a template
        without its placeholder, invalid stop words, or a chat template that
        closes the thought.
    """
    check_opens(tokenizer)
    if score not in SCORES:
      raise ValueError(f"score must be one of {SCORES}, got {score!r}.")
    if candidates < 1:
      raise ValueError(f"candidates must be at least 1, got {candidates}.")
    if budget < 0:
      raise ValueError(
        f"budget must be at least 0, got {budget}. Use 0 for plain sampling."
      )
    self._engine = engine
    self._logprob_scorer = logprob_scorer
    self._tokenizer = tokenizer
    self._candidates, self._budget = candidates, budget
    self._score, self._choose = score, choose
    self._stop_words = stop_words_lib.StopWords(stop_words, tokenizer)
    self._max_tokens = dict.fromkeys(stop_words_lib.PHASES, max_step_tokens)
    self._max_tokens["answer"] = max_answer_tokens
    self._max_thought_tokens = max_thought_tokens
    self._close_thought = close_thought
    self._forced_close = np.concatenate(
      [tokenizer.encode("\n"), tokenizer.closing_tag]
    )
    self._gap = tokenizer.encode("\n\n")
    self._settings = sampling.for_tokenizer(
      sampling.Sampling(
        max_new_tokens=max(self._max_tokens.values()),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
      ),
      tokenizer,
      engine.padded_vocab_size(),
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
    """Synthesises one trace per prompt.

    Args:
      sample_params: the policy in the ROLLOUT layout.
      score_params: the policy in the TRAIN layout.
      prompts: tasks.
      key: random key.
      advance: called with the number of tokens sampled after each step.
      ended: called with each trace when it has ended, in any order.

    Returns:
      A trace for each prompt, in order; `status` is "complete" or the reason
      why it is not.

    Raises:
      ValueError: a prompt longer than the largest bucket, or `choose` returns
        an invalid index.
      FloatingPointError: logits that are not finite.
    """
    searches = [
      _Search(index=i, prompt=p, head=self._head(self._template, p))
      for i, p in enumerate(prompts)
    ]
    heads = [search.head for search in searches]
    self._engine.check(heads, self._settings)
    if self._budget and self._score == "sequence":
      self._score_heads(score_params, searches)
    with self._engine.start_workers(
      sample_params,
      self._candidates if self._budget else 1,
      self._settings,
      self._stop_words.table,
      contexts=heads,
      extra_prefix_tokens=self._max_thought_tokens
      + (len(self._forced_close) + len(self._gap)) * self._close_thought,
      per_prompt_slot=True,
      with_model_logprob=self._budget > 0,
    ) as workers:
      self._drive(workers, searches, key=key, advance=advance, ended=ended)
    return [self._trace(search) for search in searches]

  def _drive(
    self,
    workers: Any,
    searches: Sequence[_Search],
    *,
    key: jax.Array,
    advance: Callable[[int], None] | None,
    ended: Callable[[traces.Trace], None] | None,
  ) -> None:
    """Runs all searches to their end on the engine's prompt slots."""

    @functools.cache
    def keys(round_index: int) -> np.ndarray:
      """Random keys of a round: one per search and candidate."""
      folded = jax.random.fold_in(key, round_index)
      prompt_ids = [search.prompt.id for search in searches]
      return engine_lib.keys(folded, prompt_ids, workers.slots_per_prompt)

    waiting = collections.deque(
      sorted(searches, key=lambda s: (self._engine.bucket(s.head), s.index))
    )
    running: dict[int, _Search] = {}  # by prompt slot
    # Arguments of the next step:
    contexts: list[tuple[int, str, np.ndarray]] = []  # prefixes to compute
    kept: list[tuple[int, int, np.ndarray]] = []  # samples to add to prefixes
    ready: list[int] = []  # prompt slots that fork
    # Pieces of every unfinished sample, by prompt slot and sample slot.
    unfinished: dict[tuple[int, int], list[prompt_slots_lib.Piece]] = {}
    while True:
      free = [p for p in range(workers.num_prompt_slots) if p not in running]
      for prompt_slot in free[: len(waiting)]:
        search = waiting.popleft()
        running[prompt_slot] = search
        contexts.append((prompt_slot, search.prompt.id, search.head))
        ready.append(prompt_slot)
      if not running:
        return
      pieces = workers.step(
        stop_after=lambda live: max(1, live // 8),
        kept=kept,
        contexts=contexts,
        finished=[p for p in free if p not in running],
        forks=[f for p in ready for f in self._forks(p, running[p], keys)],
      )
      live = {piece.prompt_slot for piece in pieces if piece.live}
      for piece in pieces:
        unfinished.setdefault((piece.prompt_slot, piece.slot), []).append(piece)
        if advance is not None:
          advance(len(piece.tokens))
      contexts, ready, kept = [], [], []
      for prompt_slot in sorted({piece.prompt_slot for piece in pieces} - live):
        search = running[prompt_slot]
        samples = [
          unfinished.pop((prompt_slot, slot))
          for slot in range(self._width(search))
        ]
        slot, tokens = self._finish_phase(search, samples)
        if search.status not in stop_words_lib.PHASES:
          del running[prompt_slot]
          if ended is not None:
            ended(self._trace(search))
          continue
        ready.append(prompt_slot)
        rewritten = search.forced or self._template != "{prompt}"
        if search.status == "answer" and rewritten:
          # The answer follows the original prompt, without the template.
          context = [self._head("{prompt}", search.prompt), search.thought]
          if search.forced:
            context.append(self._gap)
          contexts.append(
            (prompt_slot, search.prompt.id, np.concatenate(context))
          )
        else:
          kept.append((prompt_slot, slot, tokens))

  def _head(self, template: str, prompt: structs.Prompt) -> np.ndarray:
    """Tokens of the templated chat prompt and the opening <think>."""
    text = template.replace("{prompt}", prompt.prompt)
    return np.concatenate(
      [self._tokenizer.chat_prompt(text), self._tokenizer.thought_head]
    )

  def _score_heads(self, params: Any, searches: Sequence[_Search]) -> None:
    """Starts each search's `logprob` with the sum over its head."""
    by_bucket = collections.defaultdict(list)
    for search in searches:
      by_bucket[self._logprob_scorer.bucket(search.head)].append(search)
    # One call per padded length, so that a prompt's log-probability does not
    # depend on the prompts that it is batched with.
    for _, group in sorted(by_bucket.items()):
      logprobs = self._logprob_scorer.score(
        params, [search.head for search in group]
      )
      for search, logprob_T in zip(group, logprobs.prefix_logprob):
        # The first token has no context, and so no log-probability.
        search.logprob = float(logprob_T[1:].sum(dtype=np.float64))

  def _width(self, search: _Search) -> int:
    """Number of samples that the search's phase takes."""
    return self._candidates if search.status == "candidate" else 1

  def _forks(
    self, prompt_slot: int, search: _Search, keys: Callable[[int], np.ndarray]
  ) -> list[prompt_slots_lib.Fork]:
    """The samples that a prompt slot begins for the search's phase."""
    phase = search.status
    round_index = {
      "stop": 0,
      "candidate": len(search.rounds) + 1,
      "rest": self._budget + 1,
      "answer": self._budget + 2,
    }[phase]
    return [
      prompt_slots_lib.Fork(
        prompt_slot,
        slot,
        key=keys(round_index)[search.index, slot],
        budget=self._max_tokens[phase],
        state=self._stop_words.start[phase],
      )
      for slot in range(self._width(search))
    ]

  def _finish_phase(
    self, search: _Search, samples: Sequence[Sequence[prompt_slots_lib.Piece]]
  ) -> tuple[int, np.ndarray]:
    """Adds the samples of a phase to the search and moves it to the next phase.

    Args:
      search: updated in place.
      samples: pieces of the sample of each slot.

    Returns:
      The slot of the sample that is kept, and its tokens that are kept.
    """
    if search.status == "answer":
      sample = prompt_slots_lib.joined(samples[0])
      gap = self._gap if search.forced else _no_tokens()
      search.answer = np.concatenate([gap, sample.tokens])
      search.status = "complete" if sample.finished else "answer too long"
      return 0, sample.tokens
    segments = [self._segment(search.status, pieces) for pieces in samples]
    best = 0
    if search.status == "candidate":
      best = self._keep_best(search, segments)
    segment = segments[best]
    search.thought = np.concatenate(
      [search.thought, search.trigger, segment.kept]
    )
    search.logprob += search.trigger_logprob + segment.logprob
    search.trigger = segment.trigger
    search.trigger_logprob = segment.trigger_logprob
    search.status = segment.status
    if len(search.thought) > self._max_thought_tokens:
      search.status = stop_words_lib.TOO_LONG
    elif segment.status == "candidate" and len(search.rounds) >= self._budget:
      search.status = "rest"
    if self._close_thought and search.status in stop_words_lib.UNCLOSED:
      self._close(search)
    return best, np.concatenate([segment.kept, segment.trigger])

  def _close(self, search: _Search) -> None:
    """Closes a thought by force and moves on to the answer."""
    thought = search.thought
    if search.status == stop_words_lib.TURN_ENDED:
      thought = thought[:-1]  # the token that ended the turn
    thought = thought[: self._max_thought_tokens]
    search.thought = np.concatenate([thought, self._forced_close])
    search.forced, search.status = True, "answer"

  def _segment(
    self, phase: str, pieces: Sequence[prompt_slots_lib.Piece]
  ) -> _Segment:
    """Cuts a sample at its stop word and sums its log-probabilities."""
    sample = prompt_slots_lib.joined(pieces)
    kept, trigger, status = self._stop_words.cut(sample, phase)
    logprob = trigger_logprob = 0.0
    if self._budget:
      logprob_T = np.concatenate([piece.model_logprob for piece in pieces])
      end = len(kept) + len(trigger)
      logprob = float(logprob_T[: len(kept)].sum(dtype=np.float64))
      trigger_logprob = float(logprob_T[len(kept) : end].sum(dtype=np.float64))
    return _Segment(
      kept=kept,
      trigger=trigger,
      status=status,
      logprob=logprob,
      trigger_logprob=trigger_logprob,
    )

  def _keep_best(self, search: _Search, segments: Sequence[_Segment]) -> int:
    """Scores the candidates and records the round.

    Returns:
      The index of the candidate that is kept.
    """
    candidates = []
    for segment in segments:
      tokens = np.concatenate([search.trigger, segment.kept])
      total, count = search.trigger_logprob + segment.logprob, len(tokens)
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
    # A candidate that was cut off or ended the turn is only kept if all did.
    every = range(len(segments))
    proper = [i for i in every if segments[i].status in stop_words_lib.PHASES]
    best = self._best(search, candidates, proper or every)
    search.rounds.append(
      traces.Round(
        trigger=self._tokenizer.decode(search.trigger),
        kept=best,
        candidates=tuple(candidates),
      )
    )
    return best

  def _best(
    self,
    search: _Search,
    candidates: Sequence[traces.Candidate],
    among: Sequence[int],
  ) -> int:
    """The best of the candidates with indices `among`."""
    if self._choose is None:
      return min(among, key=lambda i: candidates[i].perplexity)
    chosen = self._choose(
      search.prompt.prompt,
      self._tokenizer.decode(search.thought),
      [candidates[i].text for i in among],
    )
    try:
      index = operator.index(chosen)
    except TypeError:
      index = -1
    if isinstance(chosen, bool) or not 0 <= index < len(among):
      raise ValueError(
        f"The choice among {len(among)} candidates of prompt "
        f"{search.prompt.id!r} is {chosen!r}; it must be an index from 0 to "
        f"{len(among) - 1}. Correct the function of config.synthesis.choose."
      )
    return among[index]

  def _trace(self, search: _Search) -> traces.Trace:
    thought = self._tokenizer.before_closing_tag(search.thought)
    if thought is None:
      thought = search.thought
    answer = search.answer
    if len(answer) and answer[-1] in self._tokenizer.end_ids:
      answer = answer[:-1]
    plain = self._tokenizer.plain_tags
    return traces.Trace(
      id=search.prompt.id,
      prompt=search.prompt.prompt,
      reference=search.prompt.reference,
      thought=plain(self._tokenizer.decode(thought)),
      answer=plain(self._tokenizer.decode(answer)).strip(),
      completion=np.concatenate(
        [self._tokenizer.thought_head, search.thought, search.answer]
      ),
      rounds=tuple(search.rounds),
      status=search.status,
      forced=search.forced,
    )
