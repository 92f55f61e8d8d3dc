"""Completions to rewards: find the steps, score in one pass, add the terms.

The log-probability requests of all rewards go into one scoring pass. The prefix
pass that scores a completion's continuations also gives its own tokens'
log-probabilities, which the update needs as those of the old policy.

Shape key: B prompts, N samples a prompt, R = B * N rows, J steps.
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
  deltas_RJ: np.ndarray  # P_j - P_{j-1}; NaN where it was not scored
  opened_B: np.ndarray  # bool, open-ended prompts; the others are maths
  separate_tokens: (
    int  # tokens that one row for each prefix of every step would take
  )
  rollouts: structs.Rollouts

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


# Rows whose steps are found in one call, and their shortest width.
_ROWS_AT_ONCE, _LEAST_WIDTH = 128, 128
# Arguments of `build_rewards` that are fields of config.reward.
OF_TERMS = (
  *("terms", "options", "timeout", "environment", "alpha", "tau", "mode"),
  *("compare", "bridge", "match", "math_check"),
)
# Settings of a term that fields of config.reward give, and which field.
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
) -> tuple[dict[str, float], dict[str, Any]]:
  """The reward terms of a run: weights, and rewards, by name.

  Args:
    encode: text of ours to token ids.
    terms: see `RewardScorer`; and so on.
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
    ValueError: an unknown reward or setting, a setting of a reward that is no
      term, or one that a field of config.reward has.
  """
  weights = compose.weights(terms)
  given = {name: dict(value) for name, value in (options or {}).items()}
  for name, settings in given.items():
    if name not in weights:
      raise ValueError(
        f"config.reward.options sets {sorted(settings)} of {name!r}, which is "
        f"no term of config.reward.terms = {terms!r}. Add it (0*{name} "
        "measures and does not pay), or leave its options out."
      )
    for setting in settings:
      field = _OWN.get(name, {}).get(setting, "")
      if field is None or field:
        raise ValueError(
          f"config.reward.options.{name}.{setting} is set elsewhere: "
          + (f"use config.reward.{field}." if field else "by what is scored.")
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
  return weights, {
    name: compose.build(
      name, given.get(name, {}) | own.get(name, {}), timeout, environment
    )
    for name in weights
  }


@functools.partial(jax.jit, static_argnames="max_steps")
def _find(
  table: automaton.Automaton,
  tokens_RT: np.ndarray,
  length_R: np.ndarray,
  max_steps: int,
) -> tuple[structs.Thoughts, jax.Array]:
  """Steps of each row, and their true number, in one program."""
  codes_RT = automaton.run(table, tokens_RT, length_R)
  return thought.from_codes(codes_RT, max_steps), thought.total_steps(codes_RT)


class RewardScorer:
  """Scores completions under the policy given at each call."""

  def __init__(
    self,
    logprob_scorer: scorer_lib.LogprobScorer,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    terms: str = "opera + verifiable",
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
    """Builds the rewards, and the automaton of the reflective states.

    Args:
      scorer: scores prefixes and continuations at temperature 1.
      tokenizer: of the policy.
      terms: which rewards, with which weights; see `compose.weights`.
      options: settings of rewards by name, where their defaults do not do;
        arguments of this function cannot be among them.
      timeout: seconds that a user's function may take for one step.
      environment: variables that it sees although they look like keys.
      alpha: weight of R_ppl.
      tau: R_self = tanh(count / tau).
      mode: see `opera_reward.rewards`.
      compare: what a reflective step must beat, see `opera_requests.plan`.
      keywords: words that make a step reflective.
      match: "word" or "substring"; "any" drops the condition: every step may
        count.
      separator: what divides steps.
      bridge: text between a partial thought and the reference.
      max_steps: steps told apart in a thought; more are counted in a metric.
      math_check: see `verifiable.correct_many`.
      cache_dir: where built automata are kept; None builds anew.

    Raises:
      ValueError: an unknown reward, setting or comparison.
    """
    self._logprob_scorer, self._tokenizer = logprob_scorer, tokenizer
    self._max_steps = max_steps
    self._weights, self._rewards = build_rewards(
      tokenizer.encode_template,
      terms=terms,
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
      tokenizer.think_open_id,
      tokenizer.think_close_id,
      cache_dir=cache_dir,
    )

  def probe(self, prompts: Sequence[structs.Prompt]) -> None:
    """Tries every reward that has a `probe`, on one process each.

    A judge's endpoint or a user's function fails here, before anything
    expensive runs.

    Args:
      prompts: that will be rewarded; none leaves nothing to try.

    Raises:
      RuntimeError: a judge that does not answer.
      ValueError: a user's function that cannot be called.
    """
    probes = [r.probe for r in self._rewards.values() if hasattr(r, "probe")]

    def work(indices: Sequence[int]) -> list[None]:
      return [probes[at](prompts) for at in indices]

    if prompts:
      exchange.each(range(len(probes)), work)

  def thoughts(self, samples: Sequence[structs.Sample]):
    """Where the steps lie: host `Thoughts`, and each row's true count.

    Rows come in blocks of one size, and lengths are padded to powers of two
    times the shortest, so that few programs are compiled.
    """
    longest = max(len(s.tokens) for s in samples)
    width = _LEAST_WIDTH << max(0, (longest - 1) // _LEAST_WIDTH).bit_length()
    found = []
    for start in range(0, len(samples), _ROWS_AT_ONCE):
      rows = [s.tokens for s in samples[start : start + _ROWS_AT_ONCE]]
      more = _ROWS_AT_ONCE - len(rows)
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
    """Scores N samples of each of B prompts.

    Args:
      params: the policy before this step's update.
      prompts: tasks.
      prompt_ids: their tokens.
      groups: N >= 2 samples of each.
      all_steps: score the end of every step, for pictures.
      advance: called with the tokens scored as they are done.

    Returns:
      Rewards, terms and log-probabilities.

    Raises:
      ValueError: an empty reference, fewer than two samples for a reward that
        ranks, a reward that is not finite.
    """
    rollouts, total_R = self._rollouts(prompts, prompt_ids, groups)
    prefixes = [
      np.concatenate([prompt_ids[rollouts.prompt_index(r)], s.tokens])
      for r, s in enumerate(rollouts.completions)
    ]
    rewards = dict(self._rewards)
    if all_steps and "opera" in rewards:
      rewards["opera"] = dataclasses.replace(rewards["opera"], all_steps=True)
    asked = {
      n: reward.logprob_request(rollouts) for n, reward in rewards.items()
    }
    every, continuations = _joined(prefixes, asked)
    if continuations:
      logprobs = self._logprob_scorer.score(
        params, every, continuations, advance=advance
      )
    else:
      rows = rollouts.tokens()
      logprobs = self._logprob_scorer.score_completions(
        params, rows[0], rows[1], every[len(prefixes) :], advance=advance
      )
    result = _results(logprobs, rollouts, asked)
    total_BN, terms = compose.weighted_sum(
      {n: _given(r, rollouts, asked[n], result[n]) for n, r in rewards.items()},
      self._weights,
    )
    thoughts = rollouts.thoughts
    deltas_RJ = np.full(thoughts.step_end.shape, np.nan, np.float32)
    opened_B = np.asarray([p.task == "open_ended" for p in prompts])
    opened = np.flatnonzero(np.repeat(opened_B, rollouts.samples))
    if "opera" in rewards and opened.size:
      mine = result["opera"]
      deltas_RJ[opened] = opera_reward.step_deltas(
        mine.continuation_logprob, mine.aux
      )
    shape = total_BN.shape
    terms |= {
      "reflections": thoughts.reflective.sum(1).reshape(shape),
      "steps": total_R.reshape(shape),
      "closed": thoughts.closed.reshape(shape),
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
      opened_B,
      self._separate_tokens(rollouts, prefixes, opened),
      rollouts,
    )

  def _rollouts(self, prompts, prompt_ids, groups):
    """What rewards see of the samples, and each row's true count of steps."""
    flat = [s for group in groups for s in group]
    thoughts, total_R = self.thoughts(flat)
    tokenizer = self._tokenizer
    return structs.Rollouts(
      prompts=prompts,
      samples=len(groups[0]),
      prompt_ids=prompt_ids,
      completions=flat,
      texts=[tokenizer.decode(s.tokens, skip_special=True) for s in flat],
      thoughts=thoughts,
      encode=tokenizer.encode,
      chat_prompt=tokenizer.chat_prompt,
    ), total_R

  def _separate_tokens(self, rollouts, prefixes, rows) -> int:
    """Tokens of the released code's way: a row for P_0, every P_j, and L."""
    total, thoughts = 0, rollouts.thoughts
    for r in rows:
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


def _joined(prefixes, asked: Mapping[str, structs.LogprobRequest]):
  """All rewards' prefixes behind the rows, and all their continuations."""
  every, continuations = list(prefixes), []
  for request in asked.values():
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
  asked: Mapping[str, structs.LogprobRequest],
) -> dict[str, structs.LogprobResult]:
  """Each reward's indices of the log-probabilities, in the order it asked."""
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
  for name, request in asked.items():
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


def _given(
  reward: Any,
  rollouts: structs.Rollouts,
  asked: structs.LogprobRequest,
  result: structs.LogprobResult,
) -> dict[str, np.ndarray]:
  """A reward's terms, [B, N] each, the same on every process.

  Every process computes every reward on all prompts, and they must agree. A
  reward that is expensive or not reproducible (a judge, a user's function, a
  checker in processes of its own) says `by_host = True`: each process then
  computes its own prompts, and all take its values.

  Raises:
    ValueError: a reward by host that asked for log-probabilities.
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
  if asked.prefixes or asked.continuations:
    raise ValueError(
      f"The reward {name} has by_host = True and asks for log-probabilities, "
      "which all processes score together. Drop one of the two."
    )

  def terms(indices: Sequence[int]) -> list[dict[str, list[float]]]:
    mine = rollouts.select(indices)
    rows = [
      b * rollouts.samples + n for b in indices for n in range(mine.samples)
    ]
    got = reward.rewards(
      mine,
      structs.LogprobResult(
        completion_logprob=[result.completion_logprob[r] for r in rows],
        completion_entropy=[result.completion_entropy[r] for r in rows],
      ),
    )
    return [
      {name: part[b].tolist() for name, part in got.items()}
      for b in range(len(indices))
    ]

  each = exchange.each(range(len(rollouts.prompts)), terms)
  return {
    name: np.asarray([part[name] for part in each], np.float32)
    for name in each[0]
  }


def join(chosen: Sequence[tuple[Scored, Sequence[int]]]) -> Scored:
  """Some groups of several scorings, as one.

  Log-probabilities of continuations are left out; the counts of tokens are
  those of all that was scored.

  Args:
    chosen: scorings with the places of their prompts to be kept; a scoring
      that comes twice counts once.

  Returns:
    The groups in the order given.
  """
  if len(chosen) == 1 and len(chosen[0][1]) == len(chosen[0][0].opened_B):
    return chosen[0][0]
  distinct = list({id(scored): scored for scored, _ in chosen}.values())
  samples = distinct[0].rollouts.samples
  rows = [
    [b * samples + n for b in kept for n in range(samples)]
    for _, kept in chosen
  ]

  def prompts(get):
    return np.concatenate([get(s)[list(kept)] for s, kept in chosen])

  def flat(get):
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
    completions=flat(lambda s: s.rollouts.completions),
    texts=flat(lambda s: s.rollouts.texts),
    thoughts=thoughts,
  )
  return Scored(
    total_BN=prompts(lambda s: s.total_BN),
    terms={
      name: prompts(lambda s, name=name: s.terms[name])
      for name in distinct[0].terms
    },
    prefixes=flat(lambda s: s.prefixes),
    logprobs=structs.Logprobs(
      prefix_logprob=flat(lambda s: s.logprobs.prefix_logprob),
      prefix_entropy=flat(lambda s: s.logprobs.prefix_entropy),
      continuation_logprob=[],
      continuation_entropy=[],
      prefix_tokens=sum(s.logprobs.prefix_tokens for s in distinct),
      continuation_tokens=sum(s.logprobs.continuation_tokens for s in distinct),
    ),
    thoughts=thoughts,
    deltas_RJ=np.concatenate(
      [s.deltas_RJ[mine] for (s, _), mine in zip(chosen, rows)]
    ),
    opened_B=prompts(lambda s: s.opened_B),
    separate_tokens=sum(s.separate_tokens for s in distinct),
    rollouts=rollouts,
  )
