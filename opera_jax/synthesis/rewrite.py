"""REER: rewrites a thought step by step to make the reference more likely.

Reverse-engineered reasoning (arXiv 2509.06160) searches for
z* = argmin_z PPL(y_ref | x, z). For every prompt:

1. Draft: sample a thought after the meta-prompt.
2. Rewrite: for each step in turn, sample k replacements. The policy is given
   the thought up to that step and, in the template `guide`, the reference.
3. Score: mean log p(y_ref | x, z') of every resulting thought z', after the
   ORIGINAL prompt, which does not contain the reference.
4. Keep the best replacement if it scores higher than the current step.
5. A round rewrites each step once. Stop after a round without improvement, or
   after the last round.
6. Sample the answer after the original prompt and the thought, as in `search`,
   of which this is an ablation.

Prompts are processed in groups. Random keys are folded from (key, round, step,
prompt id, candidate), so that a trace does not depend on the other prompts.
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
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.synthesis import search, templates
from opera_jax.synthesis import stop_words as stop_words_lib
from opera_jax.text import automaton, stop_automaton
from opera_jax.text import thought as thought_lib
from opera_jax.text import tokenizer as tokenizer_lib

_GROUP = 64  # prompts processed together; a kill loses at most these
_DRAFT, _ANSWER = 1 << 30, 1 << 31  # folded into the key like a round's index


@dataclasses.dataclass
class _Draft:
  """The state of one prompt; the thought is its steps, without </think>."""

  prompt: structs.Prompt
  head: np.ndarray  # tokens of the original prompt, <think> included
  guide: np.ndarray  # tokens of the prompt with its reference, and <think>
  reference: np.ndarray
  steps: list[np.ndarray]
  logprob: float = -np.inf  # mean log p of the reference, nats per token
  rounds: list[traces.Round] = dataclasses.field(default_factory=list)
  answer: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int32)
  )
  status: str = "rewrite"
  forced: bool = False  # the draft was closed by force


def check(prompt: structs.Prompt) -> None:
  """Raises a ValueError if the prompt has no reference to score."""
  if not prompt.reference:
    raise ValueError(
      f"Prompt {prompt.id!r} has no reference, whose log-probability scores "
      "rewrites of the thought. Drop such prompts, or set "
      "config.synthesis.method=search."
    )


class Rewriter:
  """Synthesises traces with a policy given at each call."""

  def __init__(
    self,
    engine: engine_lib.Engine,
    logprob_scorer: scorer_lib.LogprobScorer,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    candidates: int = 4,
    rounds: int = 10,
    temperature: float = 0.6,
    top_k: int = 20,
    top_p: float = 0.95,
    max_step_tokens: int = 512,
    max_thought_tokens: int = 8192,
    max_answer_tokens: int = 2048,
    close_thought: bool = False,
    template: str = "{prompt}",
    guide: str = "{prompt}\n\n{reference}",
  ):
    """Compiles the separator.

    Args:
      engine: samples; its prompt buckets must hold prompt and thought.
      logprob_scorer: scores references.
      tokenizer: of the policy.
      candidates: k.
      rounds: maximum number of rounds.
      temperature: of all sampling here.
      top_k: of all sampling here.
      top_p: of all sampling here.
      max_step_tokens: a longer replacement is rejected.
      max_thought_tokens: a longer draft is abandoned, or closed; a replacement
        that makes the thought longer is rejected.
      max_answer_tokens: a longer answer is abandoned.
      close_thought: close a draft by force that is too long, or in which the
        turn ended.
      template: the meta-prompt of the draft, with one `{prompt}`.
      guide: the meta-prompt of a rewrite, with one `{prompt}`. Without
        `{reference}`, steps are resampled without knowledge of the reference.

    Raises:
      ValueError: no candidate, no round, a template without its placeholder, or
        a chat template that closes the thought.
    """
    search.check_opens(tokenizer)
    if candidates < 1 or rounds < 1:
      raise ValueError(
        f"Rewriting needs at least 1 candidate and 1 round, got candidates="
        f"{candidates}, rounds={rounds}. Change config.synthesis."
      )
    self._engine = engine
    self._logprob_scorer = logprob_scorer
    self._tokenizer = tokenizer
    self._candidates, self._rounds = candidates, rounds
    self._template = templates.load(
      template, ("prompt",), "config.synthesis.template"
    )
    self._guide = templates.load(guide, ("prompt",), "config.synthesis.guide")
    self._max_thought_tokens = max_thought_tokens
    self._close_thought = close_thought
    close_id = tokenizer.think_close_id
    tags = () if close_id is not None else (tokenizer.think[1],)
    self._stops = stop_automaton.compile(
      (thought_lib.SEPARATOR, *tags), tokenizer.vocab_bytes
    )
    self._draft_stops = (
      stop_automaton.compile(tags, tokenizer.vocab_bytes) if tags else None
    )
    close_ids = () if close_id is None else (close_id,)

    def settings(max_new_tokens: int, *stop_ids: int) -> sampling.Sampling:
      return sampling.for_tokenizer(
        sampling.Sampling(
          max_new_tokens=max_new_tokens,
          stop_ids=stop_ids,
          temperature=temperature,
          top_k=top_k,
          top_p=top_p,
        ),
        tokenizer,
        engine.padded_vocab_size(),
      )

    self._draft_sampling = settings(max_thought_tokens, *close_ids)
    self._step_sampling = settings(max_step_tokens, *close_ids)
    self._answer_sampling = settings(max_answer_tokens)
    self._opened = tokenizer.thought_head
    self._close = tokenizer.closing_tag
    self._separator = tokenizer.encode(thought_lib.SEPARATOR)

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
      prompts: tasks with references.
      key: random key.
      advance: called with the number of tokens sampled after each step.
      ended: called with each trace when it has ended.

    Returns:
      A trace for each prompt, in order. A round of a trace is a step that was
      rewritten: `trigger` is empty, candidate 0 is the step before, and the
      perplexities are those of the reference.

    Raises:
      ValueError: a prompt without a reference, or a prompt that together with a
        thought exceeds the engine's largest bucket.
    """
    drafts = [self._new(prompt) for prompt in prompts]
    out = []
    for start in range(0, len(drafts), _GROUP):
      group = drafts[start : start + _GROUP]
      self._run(sample_params, score_params, group, key=key, advance=advance)
      for draft in group:
        out.append(self._trace(draft))
        if ended is not None:
          ended(out[-1])
    return out

  def _run(
    self,
    sample_params: Any,
    score_params: Any,
    drafts: Sequence[_Draft],
    *,
    key: jax.Array,
    advance: Callable[[int], None] | None,
  ) -> None:
    """Runs a group of prompts to their end."""

    def sample(
      group: Sequence[_Draft],
      contexts: Sequence[np.ndarray],
      settings: sampling.Sampling,
      *,
      round_index: int,
      step: int = 0,
      samples: int = 1,
      stops: automaton.Automaton | None = None,
    ) -> list[list[structs.Sample]]:
      return self._engine.sample(
        sample_params,
        contexts,
        settings,
        jax.random.fold_in(jax.random.fold_in(key, round_index), step),
        samples=samples,
        ids=[draft.prompt.id for draft in group],
        stops=stops,
        advance=advance,
      )

    heads = [self._head(self._template, draft.prompt) for draft in drafts]
    thoughts = sample(
      drafts,
      heads,
      self._draft_sampling,
      round_index=_DRAFT,
      stops=self._draft_stops,
    )
    for draft, (thought,) in zip(drafts, thoughts):
      self._begin(draft, thought)
    rewritable = [draft for draft in drafts if draft.status == "rewrite"]
    logprobs = self._logprobs(
      score_params, rewritable, [draft.steps for draft in rewritable]
    )
    for draft, logprob in zip(rewritable, logprobs):
      draft.logprob = logprob
    active = rewritable
    for round_index in range(self._rounds):
      before = [draft.logprob for draft in active]
      longest = max((len(draft.steps) for draft in active), default=0)
      for step in range(longest):
        group = [draft for draft in active if step < len(draft.steps)]
        replacements = sample(
          group,
          [np.concatenate([d.guide, *d.steps[:step]]) for d in group],
          self._step_sampling,
          round_index=round_index,
          step=step,
          samples=self._candidates,
          stops=self._stops,
        )
        self._keep_best(
          score_params, group, step=step, replacements=replacements
        )
      active = [
        draft for draft, old in zip(active, before) if draft.logprob > old
      ]
    contexts = [
      np.concatenate([draft.head, *draft.steps, self._close])
      for draft in rewritable
    ]
    answers = sample(
      rewritable, contexts, self._answer_sampling, round_index=_ANSWER
    )
    for draft, (answer,) in zip(rewritable, answers):
      draft.answer = answer.tokens
      draft.status = "complete" if answer.finished else "answer too long"

  def _new(self, prompt: structs.Prompt) -> _Draft:
    check(prompt)
    draft = _Draft(
      prompt=prompt,
      head=self._head("{prompt}", prompt),
      guide=self._head(self._guide, prompt),
      reference=self._tokenizer.encode(prompt.reference),
      steps=[],
    )
    longest = max(len(draft.head), len(draft.guide)) + self._max_thought_tokens
    self._engine.check([np.zeros(longest, np.int32)], self._step_sampling)
    return draft

  def _head(self, template: str, prompt: structs.Prompt) -> np.ndarray:
    """Tokens of the templated chat prompt and the opening <think>."""
    values = {"prompt": prompt.prompt, "reference": prompt.reference}
    text = templates.fill(template, values)
    return np.concatenate([self._tokenizer.chat_prompt(text), self._opened])

  def _begin(self, draft: _Draft, sample: structs.Sample) -> None:
    """Splits the sampled thought into the draft's steps."""
    tokens = self._tokenizer.before_closing_tag(sample.tokens)
    closed = tokens is not None
    if tokens is None:
      tokens = sample.tokens[: len(sample.tokens) - sample.finished]
      if self._close_thought:
        closed = draft.forced = True
      else:
        draft.status = (
          stop_words_lib.TURN_ENDED
          if sample.finished
          else stop_words_lib.TOO_LONG
        )
    draft.steps = self._split(tokens)
    if closed and not draft.steps:
      draft.status = "thought missing"

  def _split(self, tokens: np.ndarray) -> list[np.ndarray]:
    """Splits tokens into steps, each with the separator that ends it."""
    text, ends = automaton.spell(tokens, self._tokenizer.vocab_bytes)
    separator = thought_lib.SEPARATOR.encode()
    cuts, offset = [], 0
    while (offset := text.find(separator, offset)) >= 0:
      offset += len(separator)
      cuts.append(int(np.searchsorted(ends, offset)) + 1)
    return [step for step in np.split(tokens, sorted(set(cuts))) if len(step)]

  def _logprobs(
    self,
    params: Any,
    group: Sequence[_Draft],
    thoughts: Sequence[Sequence[np.ndarray]],
  ) -> list[float]:
    """Mean log p of the reference after each thought, nats per token.

    Args:
      params: the policy in the TRAIN layout.
      group: a draft for each thought.
      thoughts: the steps of each thought.
    """
    prefixes = [
      np.concatenate([draft.head, *steps, self._close])
      for draft, steps in zip(group, thoughts)
    ]
    continuations = [
      structs.Continuation(
        prefix=index,
        fork=len(prefix),
        tokens=np.concatenate([self._separator, draft.reference]),
        skip=len(self._separator),
      )
      for index, (draft, prefix) in enumerate(zip(group, prefixes))
    ]
    scored = self._logprob_scorer.score(
      params, prefixes, continuations
    ).continuation_logprob
    return [float(logprob.mean(dtype=np.float64)) for logprob in scored]

  def _keep_best(
    self,
    params: Any,
    group: Sequence[_Draft],
    *,
    step: int,
    replacements: Sequence[Sequence[structs.Sample]],
  ) -> None:
    """Replaces a step by its best replacement, if that improves the score.

    Args:
      params: the policy in the TRAIN layout.
      group: drafts, updated in place.
      step: index of the step.
      replacements: k samples for each draft.
    """
    owners, tried, thoughts = [], [], []
    for draft, samples in zip(group, replacements):
      for sample in samples:
        tokens = self._clean(sample, last=step + 1 == len(draft.steps))
        steps = [*draft.steps[:step], tokens, *draft.steps[step + 1 :]]
        if len(tokens) and sum(map(len, steps)) <= self._max_thought_tokens:
          owners.append(draft)
          tried.append(tokens)
          thoughts.append(steps)
    scored: dict[int, list[tuple[float, np.ndarray]]] = {
      id(draft): [(draft.logprob, draft.steps[step])] for draft in group
    }
    for draft, tokens, logprob in zip(
      owners, tried, self._logprobs(params, owners, thoughts)
    ):
      scored[id(draft)].append((logprob, tokens))
    for draft in group:
      options = scored[id(draft)]
      # On a tie the first wins; option 0 is the current step.
      kept = max(range(len(options)), key=lambda i: (options[i][0], -i))
      draft.rounds.append(
        traces.Round(
          trigger="",
          kept=kept,
          candidates=tuple(
            traces.Candidate(
              text=self._tokenizer.decode(tokens),
              perplexity=float(np.exp(-logprob)),
              tokens=len(tokens),
            )
            for logprob, tokens in options
          ),
        )
      )
      draft.logprob, draft.steps[step] = options[kept]

  def _clean(self, sample: structs.Sample, *, last: bool) -> np.ndarray:
    """A sampled step with the right separator after it.

    Args:
      sample: of one step.
      last: whether the step is the last of its thought.

    Returns:
      int32 tokens; none if the sample broke off or is only white space.
    """
    tokens = sample.tokens
    if not sample.finished or tokens[-1] in self._tokenizer.end_ids:
      return tokens[:0]
    body_tokens = self._tokenizer.before_closing_tag(tokens)
    tokens = tokens if body_tokens is None else body_tokens
    text = self._tokenizer.decode(tokens)
    if not text.strip():
      return tokens[:0]
    # A step in the middle may end with </think>, and the last step with a
    # separator. In both cases the end is corrected.
    body, end = text.rstrip(), "\n" if last else thought_lib.SEPARATOR
    return tokens if text == body + end else self._tokenizer.encode(body + end)

  def _trace(self, draft: _Draft) -> traces.Trace:
    none = np.zeros(0, np.int32)
    thought = np.concatenate([none, *draft.steps])
    close = self._close if len(draft.answer) else none
    answer = draft.answer
    if len(answer) and answer[-1] in self._tokenizer.end_ids:
      answer = answer[:-1]
    plain = self._tokenizer.plain_tags
    return traces.Trace(
      id=draft.prompt.id,
      prompt=draft.prompt.prompt,
      reference=draft.prompt.reference,
      thought=plain(self._tokenizer.decode(thought)),
      answer=plain(self._tokenizer.decode(answer)).strip(),
      completion=np.concatenate([self._opened, thought, close, draft.answer]),
      rounds=tuple(draft.rounds),
      status=draft.status,
      forced=draft.forced,
    )
