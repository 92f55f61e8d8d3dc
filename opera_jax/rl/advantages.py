"""Rewards to advantages, by the rules that a config names.

Shape key: B prompts, N samples a prompt, R = B * N rows.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax import structs
from opera_jax.advantages import inputs as inputs_lib
from opera_jax.data import rl as rl_data
from opera_jax.losses import kl
from opera_jax.losses import policy as policy_loss
from opera_jax.rewards import compose
from opera_jax.rl import learner as learner_lib
from opera_jax.rl import score as score_lib
from opera_jax.run import setup as setup_lib
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.scoring import packing as packing_lib

_PACKAGE, _CLASS = "opera_jax.advantages", "AdvantageEstimator"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Advantages of a step, and what they took."""

  advantages: inputs_lib.Advantages
  scoring_requests: Mapping[str, inputs_lib.ScoringRequest]  # what was scored
  tokens: int  # scored for it


class WeightedEstimators:
  """Weighted advantage estimators, see `advantages.inputs`."""

  def __init__(
    self,
    rules: str,
    options: Mapping[str, Mapping[str, Any]],
    logprob_scorer: scorer_lib.LogprobScorer,
  ):
    """Builds the rules.

    Args:
      rules: names and weights, as in "grpo + 0.5*oppo".
      options: settings of rules by name, where their defaults do not do.
      scorer: scores completions at the policy's temperature.

    Raises:
      ValueError: an unknown rule or setting.
    """
    self._weights = compose.weights(rules)
    self._rules = build(rules, options)
    self._logprob_scorer = logprob_scorer

  def advantages(
    self,
    models: Mapping[str, Any],
    scored: score_lib.Scored,
    old: Sequence[np.ndarray],
    *,
    penalty: Sequence[np.ndarray],
    value: Sequence[np.ndarray] | None = None,
  ) -> Outcome:
    """Advantages of every token of a step's completions.

    Args:
      models: parameters of "policy", "teacher" and "ema"; None for one that
        the run does not have.
      scored: rewards of the samples.
      old: [R] of [C_r], log-probabilities under the old policy.
      penalty: [R] of [C_r], KL to be taken off the reward.
      value: [R] of [C_r], a critic's values.

    Raises:
      ValueError: a rule asks for a model that the run does not have.
    """
    rollouts, reward_BN = scored.rollouts, scored.total_BN
    by_name, requests, tokens = {}, {}, 0
    for name, rule in self._rules.items():
      logprobs = {}
      for key, request in rule.scoring_requests(rollouts, reward_BN).items():
        if models[request.model] is None:
          raise ValueError(
            f"Advantage estimator {name!r} asks for the model "
            f"{request.model!r}, which this run does not have. Set "
            "config.rl.ema above 0."
          )
        got = self._logprob_scorer.score(
          models[request.model], rollouts.after(request.turns)
        )
        tokens += got.prefix_tokens
        requests[key] = request
        logprobs[key] = [
          row[len(row) - len(s.tokens) :]
          for row, s in zip(got.prefix_logprob, rollouts.completions)
        ]
      inputs = inputs_lib.AdvantageInputs(
        rollouts=rollouts,
        reward_BN=reward_BN,
        success_BN=success(rollouts, scored),
        logprob=old,
        penalty=penalty,
        logprobs=logprobs,
        value=value,
      )
      by_name[name] = (self._weights[name], rule.advantages(inputs))
    return Outcome(inputs_lib.combine(by_name), requests, tokens)


def assign(
  run: setup_lib.Run,
  learn: learner_lib.Learner,
  estimators: WeightedEstimators,
  models: Mapping[str, Any],
  params: Any,
  scored: score_lib.Scored,
  old: structs.Logprobs,
  ref: structs.Logprobs,
  *,
  kl_coef: float,
  kl_estimator: str,
  importance_cap: float,
  buckets: Sequence[int],
  completions_per_row: int,
  parts: int,
) -> tuple[structs.Batch, dict[str, float]]:
  """The rows of a step's updates, with every token's advantage.

  Args:
    run: the run.
    learn: what the update needs besides advantages.
    estimators: its rules.
    models: see `WeightedEstimators.advantages`.
    params: what the update changes; a critic's are among them.
    scored: the samples.
    old: scores of their rows under the policy before the update.
    ref: the same under the reference policy.
    kl_coef: weight of KL taken off the reward.
    kl_estimator: see `losses.kl`.
    importance_cap: see `policy.truncated_weight`; 0 weighs nothing.
    buckets: allowed lengths of rows, or of completions that share a prompt.
    completions_per_row: completions of a prompt that one row holds; 1 gives
      each a row.
    parts: mini-batches of the step.

  Returns:
    The host batch, and metrics.
  """
  rollouts, prefixes = scored.rollouts, scored.prefixes
  sizes = [len(s.tokens) for s in rollouts.completions]
  begins = [len(prefix) - size for prefix, size in zip(prefixes, sizes)]
  if completions_per_row > 1:
    longest = max(map(run.engine.bucket, rollouts.prompt_ids))
    place = rl_data.shared(sizes, completions_per_row, longest, buckets)
  else:
    place = rl_data.whole(begins, sizes, buckets)

  def own(rows):
    return [row[begin:] for row, begin in zip(rows, begins)]

  old_logprob, ref_logprob = own(old.prefix_logprob), own(ref.prefix_logprob)
  rows = rl_data.rows(
    place,
    prefixes,
    [np.zeros(size, np.float32) for size in sizes],
    old_logprob,
    ref_logprob,
  )
  extra, value = {}, None
  if learn.values is not None:
    extra["value"] = learner_lib.by_parts(
      run, learn.values, params, rows, parts
    )
    value = place.cut(extra["value"])
  outcome = estimators.advantages(
    models,
    scored,
    old_logprob,
    penalty=penalties(
      old_logprob, ref_logprob, coef=kl_coef, estimator=kl_estimator
    ),
    value=value,
  )
  advantage = importance_weighted(
    outcome.advantages.advantage,
    old_logprob,
    rollouts.completions,
    importance_cap,
  )
  if learn.values is not None:
    if outcome.advantages.returns is None:
      raise ValueError(
        "config.rl.value_coef trains a critic, and no advantage estimator "
        "gives it targets. Add gae to config.rl.advantage, or set it to 0."
      )
    extra["returns"] = place.spread(outcome.advantages.returns)
  metrics = {
    **outcome.advantages.metrics,
    "scoring/advantage_tokens": outcome.tokens,
  }
  if learn.top is not None:
    top_ids, top_logprob = _teacher_tops(
      run, learn, outcome, models, rollouts, buckets, parts
    )
    extra["top_ids"] = place.spread(top_ids)
    extra["top_logprob"] = place.spread(top_logprob)
  rows = rows.replace(advantage=place.spread(advantage), extra=extra)
  if learn.pairs:
    rows = rl_data.pairs(rows, rollouts.samples, parts)
  return rows, {name: float(value) for name, value in metrics.items()}


def _teacher_tops(run, learn, outcome, models, rollouts, buckets, parts):
  """The likeliest tokens of the teacher in its own context, [R] of [C_r, K]."""
  request = outcome.scoring_requests.get("teacher")
  if request is None:
    raise ValueError(
      "config.rl.divergence_coef needs an advantage estimator with a teacher. "
      "Add "
      '"0*sdpo" or "0*distillation" to config.rl.advantage.'
    )
  prefixes = rollouts.after(request.turns)
  longest = max(map(len, prefixes))
  zeros = [np.zeros(len(prefix), np.float32) for prefix in prefixes]
  place = rl_data.whole(
    [0] * len(prefixes),
    list(map(len, prefixes)),
    (packing_lib.bucket(longest, buckets),),
  )
  batch = rl_data.rows(place, prefixes, zeros, zeros, zeros)
  tops = learner_lib.by_parts(
    run, learn.top, models[request.model], batch, parts
  )
  return tuple(
    [
      row[len(prefix) - len(s.tokens) : len(prefix)]
      for row, prefix, s in zip(top, prefixes, rollouts.completions)
    ]
    for top in tops
  )


def success(rollouts: structs.Rollouts, scored: score_lib.Scored) -> np.ndarray:
  """How right each sample is, 0 to 1: of maths whether it is correct, where
  that was checked; else the reward, clipped."""
  clipped_BN = np.clip(scored.total_BN, 0.0, 1.0)
  if "correct" not in scored.terms:
    return clipped_BN
  maths_B1 = np.asarray([[p.task == "math"] for p in rollouts.prompts])
  return np.where(maths_B1, scored.terms["correct"], clipped_BN)


def importance_weighted(
  advantage: Sequence[np.ndarray],
  old: Sequence[np.ndarray],
  completions: Sequence[structs.Sample],
  cap: float,
) -> Sequence[np.ndarray]:
  """Advantages corrected for the distribution that the sampler drew from.

  Args:
    advantage: [R] of [C_r].
    old: [R] of [C_r], log-probabilities under the trainer's policy.
    completions: [R], with their log-probabilities as drawn.
    cap: see `policy.truncated_weight`; 0 corrects nothing.
  """
  if not cap:
    return advantage
  return [
    a * policy_loss.truncated_weight(o, s.behavior_logprob(), cap)
    for a, o, s in zip(advantage, old, completions)
  ]


def penalties(
  old: Sequence[np.ndarray],
  ref: Sequence[np.ndarray],
  *,
  coef: float,
  estimator: str,
) -> list[np.ndarray]:
  """`coef * KL` of each token, to be taken off rewards; [R] of [C_r]."""
  divergence = kl.estimator(estimator)
  return [
    np.asarray(coef * divergence(o, r), np.float32) if coef else 0.0 * o
    for o, r in zip(old, ref)
  ]


def build(
  rules: str, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
  """The advantage estimators of a weighted sum, by name.

  Args:
    rules: names and weights, as in "grpo + 0.5*oppo".
    options: settings of rules by name, where their defaults do not do.

  Raises:
    ValueError: an unknown rule or setting, or settings of another rule.
  """
  names = list(compose.weights(rules))
  for name in options:
    if name not in names:
      raise ValueError(
        f"config.rl.advantage_options sets {name!r}, which is none of the "
        f"rules {names} of config.rl.advantage. Add it there, or leave its "
        "options out."
      )
  return {name: _build(name, dict(options.get(name, {}))) for name in names}


def _build(name: str, settings: dict[str, Any]) -> Any:
  try:
    rule = getattr(importlib.import_module(f"{_PACKAGE}.{name}"), _CLASS)
  except (ModuleNotFoundError, AttributeError) as error:
    raise ValueError(
      f"There is no advantage estimator {name!r}"
      f"{compose.nearest(name, compose.files(_PACKAGE, _CLASS))}. "
      "Name a file of opera_jax/advantages that has an AdvantageEstimator."
    ) from error
  try:
    return rule(**settings)
  except TypeError as error:
    raise ValueError(
      f"Advantage estimator {name!r} takes the settings "
      f"{sorted(rule.__dataclass_fields__)}, got {sorted(settings)}: {error}."
    ) from error
