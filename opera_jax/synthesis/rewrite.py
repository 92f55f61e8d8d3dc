"""REER: a thought rewritten step by step until the reference is likelier.

Reverse-engineered reasoning (arXiv 2509.06160) looks for
z* = argmin_z PPL(y_ref | x, z). Here, for every prompt:

1. draft: sample a thought after the meta-prompt;
2. rewrite: for one step of it after the other, sample k steps in its place, by
   a policy that is shown the thought up to there, and by its own template the
   reference;
3. score: mean log p(y_ref | x, z') of each whole thought z' after the ORIGINAL
   prompt, which says nothing of the reference;
4. keep the best of them if it is above the thought as it stands;
5. a round takes each step once; stop after a round without gain, or the last;
6. the answer is sampled from the original prompt followed by the thought, as
   in `search`, of which this is the ablation.

Prompts advance together, some at a time. What a prompt draws is folded from
(key, round, step, its id, candidate), so that a trace depends on no other.
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
from opera_jax.synthesis import stop_words as stop_words_lib
from opera_jax.synthesis import templates
from opera_jax.text import automaton, stop_automaton
from opera_jax.text import thought as thought_lib
from opera_jax.text import tokenizer as tokenizer_lib

_TOGETHER = 64  # prompts; what a kill loses at most
_DRAFT, _ANSWER = 1 << 30, 1 << 31  # beside the numbers of the rounds


@dataclasses.dataclass
class _Draft:
  """One prompt on its way; the thought is its steps, </think> left out."""

  prompt: structs.Prompt
  head: np.ndarray  # tokens of the original prompt, <think> included
  guide: np.ndarray  # of the prompt with its reference, <think> included
  reference: np.ndarray
  steps: list[np.ndarray]
  logprob: float = -np.inf  # mean log p of the reference, nats a token
  rounds: list[traces.Round] = dataclasses.field(default_factory=list)
  answer: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int32)
  )
  status: str = "rewrite"


def check(prompt: structs.Prompt) -> None:
  """Raises a ValueError where there is nothing to rewrite against."""
  if not prompt.reference:
    raise ValueError(
      f"Prompt {prompt.id!r} has no reference, against which its thought "
      "would be rewritten. Drop such prompts, or set "
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
    template: str = "{prompt}",
    guide: str = "{prompt}\n\n{reference}",
  ):
    """Compiles the separator.

    Args:
      engine: samples; its prompt buckets must hold prompt and thought.
      scorer: scores references.
      tokenizer: of the policy.
      candidates: k.
      rounds: most of them.
      temperature: of all sampling here.
      top_k: of all sampling here.
      top_p: of all sampling here.
      max_step_tokens: a longer step is not taken.
      max_thought_tokens: a longer draft is given up, a rewrite that makes a
        longer thought is not taken.
      max_answer_tokens: a longer answer is given up.
      template: the meta-prompt of the draft, with one `{prompt}`.
      guide: that of a rewrite, with one `{prompt}`; without `{reference}` the
        rewriter does not see it, and steps are but sampled anew.

    Raises:
      ValueError: no candidate, no round, a template without its placeholder.
    """
    if candidates < 1 or rounds < 1:
      raise ValueError(
        f"Rewriting needs at least 1 candidate and 1 round, got candidates="
        f"{candidates}, rounds={rounds}. Change config.synthesis."
      )
    self._engine, self._logprob_scorer, self._tokenizer = (
      engine,
      logprob_scorer,
      tokenizer,
    )
    self._candidates, self._rounds = candidates, rounds
    self._template = templates.load(
      template, ("prompt",), "config.synthesis.template"
    )
    self._guide = templates.load(guide, ("prompt",), "config.synthesis.guide")
    self._most = max_thought_tokens
    self._stops = stop_automaton.compile(
      (thought_lib.SEPARATOR,), tokenizer.vocab_bytes
    )

    def drawing(most: int, *stop_ids: int) -> sampling.Sampling:
      return sampling.for_tokenizer(
        sampling.Sampling(
          max_new_tokens=most,
          stop_ids=stop_ids,
          temperature=temperature,
          top_k=top_k,
          top_p=top_p,
        ),
        tokenizer,
        engine.head_rows(),
      )

    self._draft, self._step = (
      drawing(most, tokenizer.think_close_id)
      for most in (max_thought_tokens, max_step_tokens)
    )
    self._last = drawing(max_answer_tokens)
    self._opened = tokenizer.encode_template("<think>\n")
    self._close = np.asarray([tokenizer.think_close_id], np.int32)
    self._gap = tokenizer.encode(thought_lib.SEPARATOR)

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
      prompts: tasks with references.
      key: random key.
      advance: called with the tokens sampled as they come.
      ended: called with each trace when it has ended.

    Returns:
      A trace for each prompt, in order. A round of it is a step that was
      tried: `trigger` is empty, candidate 0 the step as it stood, and the
      perplexities are those of the reference.

    Raises:
      ValueError: a prompt without a reference, or one that is too long for the
        sampler together with a thought.
    """
    drafts = [self._new(prompt) for prompt in prompts]
    out = []
    for start in range(0, len(drafts), _TOGETHER):
      group = drafts[start : start + _TOGETHER]
      self._run(sample_params, score_params, group, key, advance)
      for one in group:
        out.append(self._trace(one))
        if ended is not None:
          ended(out[-1])
    return out

  def _run(self, sample_params, score_params, drafts, key, advance) -> None:
    def sample(group, contexts, settings, at, samples=1, stops=None):
      round_index, place = at
      return self._engine.sample(
        sample_params,
        contexts,
        settings,
        jax.random.fold_in(jax.random.fold_in(key, round_index), place),
        samples=samples,
        ids=[one.prompt.id for one in group],
        stops=stops,
        advance=advance,
      )

    heads = [self._head(self._template, one.prompt) for one in drafts]
    drawn = sample(drafts, heads, self._draft, (_DRAFT, 0))
    for one, (draft,) in zip(drafts, drawn):
      self._begin(one, draft)
    open_ = [one for one in drafts if one.status == "rewrite"]
    logprobs = self._logprobs(score_params, open_, [one.steps for one in open_])
    for one, logprob in zip(open_, logprobs):
      one.logprob = logprob
    active = open_
    for round_index in range(self._rounds):
      before = [one.logprob for one in active]
      for place in range(max((len(one.steps) for one in active), default=0)):
        group = [one for one in active if place < len(one.steps)]
        drawn = sample(
          group,
          [np.concatenate([one.guide, *one.steps[:place]]) for one in group],
          self._step,
          (round_index, place),
          self._candidates,
          self._stops,
        )
        self._keep_best(score_params, group, place, drawn)
      active = [one for one, old in zip(active, before) if one.logprob > old]
    contexts = [
      np.concatenate([one.head, *one.steps, self._close]) for one in open_
    ]
    drawn = sample(open_, contexts, self._last, (_ANSWER, 0))
    for one, (answer,) in zip(open_, drawn):
      one.answer = answer.tokens
      one.status = "complete" if answer.finished else "answer too long"

  def _new(self, prompt: structs.Prompt) -> _Draft:
    check(prompt)
    made = _Draft(
      prompt=prompt,
      head=self._head("{prompt}", prompt),
      guide=self._head(self._guide, prompt),
      reference=self._tokenizer.encode(prompt.reference),
      steps=[],
    )
    longest = max(len(made.head), len(made.guide)) + self._most
    self._engine.check([np.zeros(longest, np.int32)], self._step)
    return made

  def _head(self, template: str, prompt: structs.Prompt) -> np.ndarray:
    values = {"prompt": prompt.prompt, "reference": prompt.reference}
    text = templates.fill(template, values)
    return np.concatenate([self._tokenizer.chat_prompt(text), self._opened])

  def _begin(self, one: _Draft, draft: structs.Sample) -> None:
    tokens = draft.tokens
    closed = draft.finished and tokens[-1] == self._tokenizer.think_close_id
    if not closed:
      one.status = (
        stop_words_lib.TURN_ENDED if draft.finished else stop_words_lib.TOO_LONG
      )
    one.steps = self._split(tokens[:-1] if draft.finished else tokens)
    if closed and not one.steps:
      one.status = "thought missing"

  def _split(self, tokens: np.ndarray) -> list[np.ndarray]:
    """Steps with the separators behind them; together they are the tokens."""
    text, ends = automaton.spell(tokens, self._tokenizer.vocab_bytes)
    mark, cuts, at = thought_lib.SEPARATOR.encode(), [], 0
    while (at := text.find(mark, at)) >= 0:
      at += len(mark)
      cuts.append(int(np.searchsorted(ends, at)) + 1)
    return [part for part in np.split(tokens, sorted(set(cuts))) if len(part)]

  def _logprobs(
    self,
    params: Any,
    group: Sequence[_Draft],
    thoughts: Sequence[Sequence[np.ndarray]],
  ) -> list[float]:
    """Mean log p of each one's reference after the thought, nats a token."""
    prefixes = [
      np.concatenate([one.head, *steps, self._close])
      for one, steps in zip(group, thoughts)
    ]
    continuations = [
      structs.Continuation(
        prefix=place,
        fork=len(prefix),
        tokens=np.concatenate([self._gap, one.reference]),
        skip=len(self._gap),
      )
      for place, (one, prefix) in enumerate(zip(group, prefixes))
    ]
    scored = self._logprob_scorer.score(
      params, prefixes, continuations
    ).continuation_logprob
    return [float(logprob.mean(dtype=np.float64)) for logprob in scored]

  def _keep_best(self, params, group, place, drawn) -> None:
    """Takes the best rewrite of a step, where one is better than the step."""
    owners, tried, thoughts = [], [], []
    for one, samples in zip(group, drawn):
      for sample in samples:
        step = self._whole(sample, last=place + 1 == len(one.steps))
        steps = [*one.steps[:place], step, *one.steps[place + 1 :]]
        if len(step) and sum(map(len, steps)) <= self._most:
          owners.append(one)
          tried.append(step)
          thoughts.append(steps)
    found: dict[int, list[tuple[float, np.ndarray]]] = {
      id(one): [(one.logprob, one.steps[place])] for one in group
    }
    for one, step, logprob in zip(
      owners, tried, self._logprobs(params, owners, thoughts)
    ):
      found[id(one)].append((logprob, step))
    for one in group:
      mine = found[id(one)]
      # The first of equals is the step as it stands.
      kept = max(range(len(mine)), key=lambda i: (mine[i][0], -i))
      one.rounds.append(
        traces.Round(
          trigger="",
          kept=kept,
          candidates=tuple(
            traces.Candidate(
              text=self._tokenizer.decode(step),
              perplexity=float(np.exp(-logprob)),
              tokens=len(step),
            )
            for logprob, step in mine
          ),
        )
      )
      one.logprob, one.steps[place] = mine[kept]

  def _whole(self, sample: structs.Sample, *, last: bool) -> np.ndarray:
    """A drawn step as it would stand in the thought; empty if it broke off."""
    tokens = sample.tokens
    if not sample.finished or tokens[-1] in self._tokenizer.end_ids:
      return tokens[:0]
    if tokens[-1] == self._tokenizer.think_close_id:
      tokens = tokens[:-1]
    text = self._tokenizer.decode(tokens)
    if not text.strip():
      return tokens[:0]
    # It may have closed the thought, or not closed it: set that right.
    said, end = text.rstrip(), "\n" if last else thought_lib.SEPARATOR
    return tokens if text == said + end else self._tokenizer.encode(said + end)

  def _trace(self, one: _Draft) -> traces.Trace:
    none = np.zeros(0, np.int32)
    body = np.concatenate([none, *one.steps])
    closed = self._close if len(one.answer) else none
    answer = one.answer
    if len(answer) and answer[-1] in self._tokenizer.end_ids:
      answer = answer[:-1]
    return traces.Trace(
      id=one.prompt.id,
      prompt=one.prompt.prompt,
      reference=one.prompt.reference,
      thought=self._tokenizer.decode(body),
      answer=self._tokenizer.decode(answer).strip(),
      completion=np.concatenate([self._opened, body, closed, one.answer]),
      rounds=tuple(one.rounds),
      status=one.status,
    )
