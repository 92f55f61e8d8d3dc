"""Rewards to advantages, by the estimators that a config names.

Shape key: B prompts, N samples a prompt, R = B * N rows.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax import structs
from opera_jax.advantages import inputs as inputs_lib
from opera_jax.losses import kl
from opera_jax.losses import policy as policy_loss
from opera_jax.rewards import compose
from opera_jax.rl import score as score_lib
from opera_jax.scoring import logprob_scorer as scorer_lib

_PACKAGE, _CLASS = "opera_jax.advantages", "AdvantageEstimator"


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Advantages of a step, and what was scored to get them."""

  advantage: Sequence[np.ndarray]  # [R] of float32 [C_r]
  returns: Sequence[np.ndarray] | None  # a critic's targets, [R] of [C_r]
  requests: Mapping[str, inputs_lib.ScoringRequest]  # by name
  metrics: Mapping[str, float]


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

  def estimate(
    self,
    models: Mapping[str, Any],
    scored: score_lib.Scored,
    old: Sequence[np.ndarray],
    *,
    penalty: Sequence[np.ndarray],
    value: Sequence[np.ndarray] | None = None,
  ) -> Estimate:
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
    combined = inputs_lib.combine(by_name)
    return Estimate(
      advantage=combined.advantage,
      returns=combined.returns,
      requests=requests,
      metrics={**combined.metrics, "scoring/advantage_tokens": tokens},
    )


def success(rollouts: structs.Rollouts, scored: score_lib.Scored) -> np.ndarray:
  """Success of each sample, 0 to 1: for maths whether it is correct, where
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


def kl_penalties(
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
