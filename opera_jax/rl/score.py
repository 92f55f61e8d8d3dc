"""Computes rewards: finds the steps, scores in one pass, sums the terms.

One scoring pass answers the log-probability requests of all rewards. It also
returns the log-probabilities of the completions' own tokens, which the update
uses as those of the old policy.

Shape key: B prompts, N samples per prompt, R = B * N completions, J steps.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.data import batching
from opera_jax.rewards import compose, opera_reward
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.sharding import exchange
from opera_jax.text import automaton, thought, thought_automaton
from opera_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Scored:
  """Rewards of B prompts x N samples, with their terms and
  log-probabilities."""

  total_BN: np.ndarray
  terms: dict[str, np.ndarray]  # [B, N] each: r_ppl, r_self, count, score, ...
  prefixes: list[np.ndarray]  # prompt + completion tokens, prompt-major
  logprobs: structs.Logprobs  # of the prefixes, and of all continuations
  thoughts: structs.Thoughts  # host arrays, R = B * N rows
  deltas_RJ: np.ndarray  # P_j - P_{j-1}; NaN where not scored
  open_ended_B: np.ndarray  # bool; False for maths prompts
  # Tokens if every prefix of every step were scored in a row of its own.
  separate_tokens: int
  rollouts: structs.Rollouts
  # Weight of each reward in `total_BN`, a number or float32 [B, 1]; `terms` has
  # its values by this name.
  weights: Mapping[str, compose.Weight] = dataclasses.field(
    default_factory=dict
  )

  def completion_sizes(self) -> list[int]:
    """Tokens of each completion, [R]."""
    return [len(s.tokens) for s in self.rollouts.completions]

  def of_completions(self, logprobs: structs.Logprobs) -> list[np.ndarray]:
    """The log-probabilities of the completions' tokens alone, [R] of [C_r].

    Args:
      logprobs: of prompt + completion, one prefix a completion.
    """
    return [
      row[len(row) - size :]
      for row, size in zip(logprobs.prefix_logprob, self.completion_sizes())
    ]


# Completions per call of the step finder, and their minimum padded length.
_STEP_BATCH, _MIN_PADDED_LENGTH = 128, 128
# Fields of config.reward that `build_rewards` takes as arguments.
REWARD_FIELDS = (
  *("terms", "by_task", "options", "timeout", "environment", "alpha", "tau"),
  *("mode", "compare", "bridge", "match", "math_check"),
)
# For each term, its settings that come from fields of config.reward. None marks
# a setting that the code sets itself.
_OWN: dict[str, dict[str, str | None]] = {
  "opera": {
    "alpha": "alpha",
    "tau": "tau",
    "mode": "mode",
    "compare": "compare",
    "bridge_ids": "bridge",
    "every_step": "match",
    "all_steps": None,
  },
  "verifiable": {"method": "math_check"},
  "length": {"method": "math_check"},
}


def build_rewards(
  encode: Callable[[str], Iterable[int]],
  *,
  terms: str,
  by_task: Mapping[str, str] | None,
  options: Mapping[str, Mapping[str, Any]] | None,
  timeout: float,
  environment: Sequence[str],
  alpha: float,
  tau: float,
  mode: str,
  compare: str,
  bridge: str,
  match: str,
  math_check: str,
) -> tuple[compose.Sums, dict[str, Any]]:
  """Builds the reward terms of a run: weighted sums, and rewards by name.

  Args:
    encode: tokenizes the bridge text.
    terms: see `RewardScorer`.
    by_task: see `RewardScorer`.
    options: see `RewardScorer`.
    timeout: see `RewardScorer`.
    environment: see `RewardScorer`.
    alpha: see `RewardScorer`.
    tau: see `RewardScorer`.
    mode: see `RewardScorer`.
    compare: see `RewardScorer`.
    bridge: see `RewardScorer`.
    match: see `RewardScorer`.
    math_check: see `RewardScorer`.

  Raises:
    ValueError: an unknown reward or setting, options of a reward that is not a
      term, or an option that duplicates a field of config.reward.
  """
  sums = compose.Sums.parse(terms, by_task or {})
  names = sums.names()
  given = {name: dict(value) for name, value in (options or {}).items()}
  for name, settings in given.items():
    if name not in names:
      raise ValueError(
        f"config.reward.options sets {sorted(settings)} of {name!r}, which is "
        f"not a term of config.reward.terms = {terms!r}"
        + " or config.reward.by_task" * bool(by_task)
        + f". Add it (0*{name} only logs it), or remove its options."
      )
    for setting in settings:
      field = _OWN.get(name, {}).get(setting, "")
      if field is None or field:
        raise ValueError(
          f"config.reward.options.{name}.{setting} is set elsewhere: "
          + (f"use config.reward.{field}." if field else "the code sets it.")
        )
  own: dict[str, dict[str, Any]] = {
    "opera": {
      "alpha": alpha,
      "tau": tau,
      "mode": mode,
      "bridge_ids": tuple(encode(bridge)),
      "compare": compare,
      "every_step": match == "any",
    },
    "verifiable": {"method": math_check},
    "length": {"method": math_check},
  }
  return sums, {
    name: compose.build(
      name, given.get(name, {}) | own.get(name, {}), timeout, environment
    )
    for name in names
  }


@functools.partial(jax.jit, static_argnames="max_steps")
def _find(
  table: automaton.Automaton,
  tokens_RT: np.ndarray,
  length_R: np.ndarray,
  max_steps: int,
) -> tuple[structs.Thoughts, jax.Array]:
  """Finds the steps of each completion, and their untruncated number."""
  codes_RT = automaton.run(table, tokens_RT, length_R)
  return thought.from_codes(codes_RT, max_steps), thought.total_steps(codes_RT)


class RewardScorer:
  """Computes rewards of completions under the policy given at each call."""

  def __init__(
    self,
    logprob_scorer: scorer_lib.LogprobScorer,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    terms: str = "opera + verifiable",
    by_task: Mapping[str, str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    timeout: float = 60.0,
    environment: Sequence[str] = (),
    alpha: float = 0.3,
    tau: float = 2.0,
    mode: str = "both",
    compare: str = "previous",
    keywords: Sequence[str] = thought.KEYWORDS,
    match: str = "word",
    separator: str = thought.SEPARATOR,
    bridge: str = "",
    max_steps: int = 64,
    math_check: str = "exact",
    cache_dir: str | None = None,
  ):
    """Builds the rewards, and the automaton that finds reflective states.

    Args:
      logprob_scorer: scores prefixes and continuations at temperature 1.
      tokenizer: of the policy.
      terms: weighted sum of rewards; see `compose.weights`.
      by_task: weighted sums by kind of task or data set, in place of `terms`
        for their prompts; see `compose.Sums`.
      options: settings of rewards by name that differ from their defaults;
        settings that are arguments of this function are refused.
      timeout: time limit in seconds of a user's function for one step.
      environment: variables passed to it although their names look like keys.
      alpha: weight of R_ppl.
      tau: R_self = tanh(count / tau).
      mode: see `opera_reward.rewards`.
      compare: what a reflective step must beat, see `opera_requests.plan`.
      keywords: words that make a step reflective.
      match: "word", "substring", or "any", which lets every step count.
      separator: text between steps.
      bridge: text inserted between a partial thought and the reference.
      max_steps: maximum steps per thought that are scored; a metric counts the
        rest.
      math_check: see `verifiable.correct_many`.
      cache_dir: folder that caches built automata; None builds one each time.

    Raises:
      ValueError: an unknown reward, setting or comparison.
    """
    self._logprob_scorer, self._tokenizer = logprob_scorer, tokenizer
    self._max_steps = max_steps
    self._sums, self._rewards = build_rewards(
      tokenizer.encode_template,
      terms=terms,
      by_task=by_task,
      options=options,
      timeout=timeout,
      environment=environment,
      alpha=alpha,
      tau=tau,
      mode=mode,
      compare=compare,
      bridge=bridge,
      match=match,
      math_check=math_check,
    )
    self._table = thought_automaton.compile(
      keywords,
      separator,
      "word" if match == "any" else match,
      tokenizer.vocab_bytes,
      tokenizer.think_open,
      tokenizer.think_close,
      cache_dir=cache_dir,
      opened=tokenizer.opens_thought,
    )

  def probe(self, prompts: Sequence[structs.Prompt]) -> None:
    """Calls `probe` of every reward that has one, each on one process.

    So a broken judge endpoint or user function fails before anything expensive
    runs.

    Args:
      prompts: that will be rewarded; nothing is probed if empty.

    Raises:
      RuntimeError: the judge does not answer.
      ValueError: the user's function cannot be called.
    """
    probes = [r.probe for r in self._rewards.values() if hasattr(r, "probe")]

    def work(indices: Sequence[int]) -> list[None]:
      return [probes[at](prompts) for at in indices]

    if prompts:
      exchange.map_across_processes(range(len(probes)), work)

  def thoughts(self, samples: Sequence[structs.Sample]):
    """Finds the steps: host `Thoughts`, and each completion's untruncated
    count.

    Completions are batched to one size, and lengths are padded to powers of two
    times a minimum, so that few programs are compiled.
    """
    longest = max(len(s.tokens) for s in samples)
    width = (
      _MIN_PADDED_LENGTH
      << max(0, (longest - 1) // _MIN_PADDED_LENGTH).bit_length()
    )
    found = []
    for start in range(0, len(samples), _STEP_BATCH):
      rows = [s.tokens for s in samples[start : start + _STEP_BATCH]]
      more = _STEP_BATCH - len(rows)
      tokens_RT, length_R = batching.pad_rows(
        rows + [np.zeros(0, np.int32)] * more,
        length=width,
        pad_id=self._tokenizer.pad_id,
      )
      block = jax.device_get(
        _find(self._table, tokens_RT, length_R, self._max_steps)
      )
      count = len(rows)
      found.append(jax.tree.map(lambda x, n=count: x[:n], block))
    return jax.tree.map(lambda *blocks: np.concatenate(blocks), *found)

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
    """Computes the rewards of N samples of each of B prompts.

    Args:
      params: the policy before this step's update.
      prompts: tasks.
      prompt_ids: their tokens.
      groups: N >= 2 samples of each.
      all_steps: score the end of every step, for the report.
      advance: progress callback, called with the number of tokens scored.

    Returns:
      Rewards, terms and log-probabilities.

    Raises:
      ValueError: an empty reference, a single sample for a reward that ranks,
        or a reward that is not finite.
    """
    rollouts, total_R = self._rollouts(prompts, prompt_ids, groups)
    prefixes = [
      np.concatenate([prompt_ids[rollouts.prompt_index(r)], s.tokens])
      for r, s in enumerate(rollouts.completions)
    ]
    rewards = dict(self._rewards)
    if all_steps and "opera" in rewards:
      rewards["opera"] = dataclasses.replace(rewards["opera"], all_steps=True)
    requests = {
      n: reward.logprob_request(rollouts) for n, reward in rewards.items()
    }
    every, continuations = _joined(prefixes, requests)
    if continuations:
      logprobs = self._logprob_scorer.score(
        params, every, continuations, advance=advance
      )
    else:
      rows = rollouts.tokens()
      logprobs = self._logprob_scorer.score_completions(
        params, rows[0], rows[1], every[len(prefixes) :], advance=advance
      )
    result = _results(logprobs, rollouts, requests)
    weights = self._sums.weights(prompts)
    total_BN, terms = compose.weighted_sum(
      {
        n: _terms_of(r, rollouts, requests[n], result[n])
        for n, r in rewards.items()
      },
      weights,
    )
    thoughts = rollouts.thoughts
    deltas_RJ = np.full(thoughts.step_end.shape, np.nan, np.float32)
    open_ended_B = np.asarray([p.task == "open_ended" for p in prompts])
    opened = np.flatnonzero(np.repeat(open_ended_B, rollouts.samples))
    if "opera" in rewards and opened.size:
      mine = result["opera"]
      deltas_RJ[opened] = opera_reward.step_deltas(
        mine.continuation_logprob, mine.aux
      )
    shape = total_BN.shape
    terms |= {
      "reflections": np.sum(thoughts.reflective, axis=1).reshape(shape),
      "steps": total_R.reshape(shape),
      "closed": np.reshape(thoughts.closed, shape),
      "thought_tokens": np.where(
        thoughts.closed, thoughts.end - thoughts.start, 0
      ).reshape(shape),
      "steps_beyond_max": (total_R > self._max_steps).reshape(shape),
    }
    return Scored(
      total_BN,
      terms,
      prefixes,
      dataclasses.replace(
        logprobs,
        prefix_logprob=logprobs.prefix_logprob[: len(prefixes)],
        prefix_entropy=logprobs.prefix_entropy[: len(prefixes)],
      ),
      thoughts,
      deltas_RJ,
      open_ended_B,
      self._separate_tokens(rollouts, prefixes, opened),
      rollouts,
      weights,
    )

  def _rollouts(
    self,
    prompts: Sequence[structs.Prompt],
    prompt_ids: Sequence[np.ndarray],
    groups: Sequence[Sequence[structs.Sample]],
  ) -> tuple[structs.Rollouts, np.ndarray]:
    """Builds `Rollouts`, and counts the steps of each completion."""
    flat = [s for group in groups for s in group]
    thoughts, total_R = self.thoughts(flat)
    tokenizer = self._tokenizer
    return structs.Rollouts(
      prompts=prompts,
      samples=len(groups[0]),
      prompt_ids=prompt_ids,
      completions=flat,
      texts=[tokenizer.completion_text(s.tokens) for s in flat],
      thoughts=thoughts,
      encode=tokenizer.encode,
      chat_prompt=tokenizer.chat_prompt,
    ), total_R

  def _separate_tokens(
    self,
    rollouts: structs.Rollouts,
    prefixes: Sequence[np.ndarray],
    completions: np.ndarray,
  ) -> int:
    """Tokens that the released code scores: a row for P_0, every P_j, and L."""
    total, thoughts = 0, rollouts.thoughts
    for r in completions:
      owner = rollouts.prompt_index(r)
      reference = len(rollouts.encode(rollouts.prompts[owner].reference))
      count = int(thoughts.count[r])
      ends = [len(prefixes[r])]
      if count:
        prompt = len(rollouts.prompt_ids[owner])
        ends += [prompt + int(thoughts.start[r])]
        ends += [prompt + int(e) for e in thoughts.step_end[r, :count]]
      total += sum(ends) + len(ends) * reference
    return total


def _joined(
  prefixes: Sequence[np.ndarray],
  requests: Mapping[str, structs.LogprobRequest],
) -> tuple[list[np.ndarray], list[structs.Continuation]]:
  """Concatenates all requests: prefixes (completions first) and
  continuations."""
  every, continuations = list(prefixes), []
  for request in requests.values():
    shift = len(every) - len(prefixes)
    continuations += [
      b
      if b.prefix < len(prefixes)
      else dataclasses.replace(b, prefix=b.prefix + shift)
      for b in request.continuations
    ]
    every += request.prefixes
  return every, continuations


def _results(
  logprobs: structs.Logprobs,
  rollouts: structs.Rollouts,
  requests: Mapping[str, structs.LogprobRequest],
) -> dict[str, structs.LogprobResult]:
  """Splits the log-probabilities into one result per request."""
  rows = len(rollouts.completions)
  begins = [
    len(rollouts.prompt_ids[rollouts.prompt_index(r)]) for r in range(rows)
  ]
  completion_logprob = [
    logprobs.prefix_logprob[r][b:] for r, b in enumerate(begins)
  ]
  completion_entropy = [
    logprobs.prefix_entropy[r][b:] for r, b in enumerate(begins)
  ]
  prefix, continuation, out = rows, 0, {}
  for name, request in requests.items():
    prefix_end = prefix + len(request.prefixes)
    continuation_end = continuation + len(request.continuations)
    out[name] = structs.LogprobResult(
      completion_logprob=completion_logprob,
      completion_entropy=completion_entropy,
      prefix_logprob=logprobs.prefix_logprob[prefix:prefix_end],
      continuation_logprob=logprobs.continuation_logprob[
        continuation:continuation_end
      ],
      aux=request.aux,
    )
    prefix, continuation = prefix_end, continuation_end
  return out


def _terms_of(
  reward: Any,
  rollouts: structs.Rollouts,
  request: structs.LogprobRequest,
  result: structs.LogprobResult,
) -> dict[str, np.ndarray]:
  """Computes a reward's terms, [B, N] each, identical on every process.

  By default every process computes the reward of all prompts, and the values
  must agree. A reward that is expensive or not reproducible (a judge, a user's
  function, a checker in subprocesses) sets `by_host = True`: each process then
  computes its share of the prompts, and the values are gathered.

  Raises:
    ValueError: a `by_host` reward requests log-probabilities.
    RuntimeError: processes computed different values.
  """
  name = type(reward).__module__
  if not getattr(reward, "by_host", False):
    everywhere = reward.rewards(rollouts, result)
    exchange.check_same(
      {term: np.asarray(value) for term, value in everywhere.items()},
      f"The reward {name} gives different values on different processes. Make "
      "it a function of its arguments alone, or set by_host = True in its "
      "class, so that each process computes its own prompts",
    )
    return everywhere
  if request.prefixes or request.continuations:
    raise ValueError(
      f"The reward {name} has by_host = True and asks for log-probabilities, "
      "which all processes score together. Drop one of the two."
    )

  def terms(indices: Sequence[int]) -> list[dict[str, list[float]]]:
    mine = rollouts.select(indices)
    rows = [
      b * rollouts.samples + n for b in indices for n in range(mine.samples)
    ]
    computed = reward.rewards(
      mine,
      structs.LogprobResult(
        completion_logprob=[result.completion_logprob[r] for r in rows],
        completion_entropy=[result.completion_entropy[r] for r in rows],
      ),
    )
    return [
      {name: part[b].tolist() for name, part in computed.items()}
      for b in range(len(indices))
    ]

  by_prompt = exchange.map_across_processes(range(len(rollouts.prompts)), terms)
  return {
    name: np.asarray([part[name] for part in by_prompt], np.float32)
    for name in by_prompt[0]
  }


def join(chosen: Sequence[tuple[Scored, Sequence[int]]]) -> Scored:
  """Joins selected groups of several scoring calls.

  Log-probabilities of continuations are dropped; token counts include
  everything that was scored.

  Args:
    chosen: (scored, indices of its prompts to keep) pairs; if the same `scored`
      occurs twice, its tokens count once.

  Returns:
    The groups in the order given.
  """
  if len(chosen) == 1 and len(chosen[0][1]) == len(chosen[0][0].open_ended_B):
    return chosen[0][0]
  distinct = list({id(scored): scored for scored, _ in chosen}.values())
  samples = distinct[0].rollouts.samples
  rows = [
    [b * samples + n for b in kept for n in range(samples)]
    for _, kept in chosen
  ]

  def of_prompts(get: Callable[[Scored], np.ndarray]) -> np.ndarray:
    return np.concatenate([get(s)[list(kept)] for s, kept in chosen])

  def of_completions(get: Callable[[Scored], Sequence[Any]]) -> list[Any]:
    return [get(s)[r] for (s, _), mine in zip(chosen, rows) for r in mine]

  thoughts = jax.tree.map(
    lambda *leaves: np.concatenate(
      [leaf[mine] for leaf, mine in zip(leaves, rows)]
    ),
    *(s.thoughts for s, _ in chosen),
  )
  rollouts = dataclasses.replace(
    distinct[0].rollouts,
    prompts=[s.rollouts.prompts[b] for s, kept in chosen for b in kept],
    prompt_ids=[s.rollouts.prompt_ids[b] for s, kept in chosen for b in kept],
    completions=of_completions(lambda s: s.rollouts.completions),
    texts=of_completions(lambda s: s.rollouts.texts),
    thoughts=thoughts,
  )
  return Scored(
    total_BN=of_prompts(lambda s: s.total_BN),
    terms={
      name: np.concatenate([s.terms[name][list(kept)] for s, kept in chosen])
      for name in distinct[0].terms
    },
    prefixes=of_completions(lambda s: s.prefixes),
    logprobs=structs.Logprobs(
      prefix_logprob=of_completions(lambda s: s.logprobs.prefix_logprob),
      prefix_entropy=of_completions(lambda s: s.logprobs.prefix_entropy),
      continuation_logprob=[],
      continuation_entropy=[],
      prefix_tokens=sum(s.logprobs.prefix_tokens for s in distinct),
      continuation_tokens=sum(s.logprobs.continuation_tokens for s in distinct),
    ),
    thoughts=thoughts,
    deltas_RJ=np.concatenate(
      [s.deltas_RJ[mine] for (s, _), mine in zip(chosen, rows)]
    ),
    open_ended_B=of_prompts(lambda s: s.open_ended_B),
    separate_tokens=sum(s.separate_tokens for s in distinct),
    rollouts=rollouts,
    weights={
      name: weight
      if isinstance(weight, float)
      else np.concatenate(
        [np.asarray(s.weights[name])[list(kept)] for s, kept in chosen]
      )
      for name, weight in distinct[0].weights.items()
    },
  )
