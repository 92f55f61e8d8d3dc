"""Computes advantages with the estimators that a config names.

Shape key: B prompts, N samples per prompt, R = B * N completions.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax import structs, user_errors
from opera_jax.advantages import inputs as inputs_lib
from opera_jax.losses import kl
from opera_jax.losses import policy as policy_loss
from opera_jax.rewards import compose
from opera_jax.rl import score as score_lib
from opera_jax.scoring import logprob_scorer as scorer_lib

_PACKAGE, _CLASS = "opera_jax.advantages", "AdvantageEstimator"


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Advantages of a step, and the scoring requests they needed."""

  advantage: Sequence[np.ndarray]  # [R] of float32 [C_r]
  returns: Sequence[np.ndarray] | None  # a critic's targets, [R] of [C_r]
  requests: Mapping[str, inputs_lib.ScoringRequest]  # by name
  metrics: Mapping[str, float]


class WeightedEstimators:
  """A weighted sum of advantage estimators, see `advantages.inputs`."""

  def __init__(
    self,
    weighted_sum: str,
    options: Mapping[str, Mapping[str, Any]],
    logprob_scorer: scorer_lib.LogprobScorer,
  ):
    """Builds the estimators.

    Args:
      weighted_sum: names and weights, as in "grpo + 0.5*oppo".
      options: settings of estimators by name that differ from their defaults.
      logprob_scorer: scores completions at the policy's temperature.

    Raises:
      ValueError: an unknown estimator or setting.
    """
    self._weights = compose.weights(weighted_sum)
    self._estimators = build(weighted_sum, options)
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
    """Computes the advantage of every token of a step's completions.

    Args:
      models: parameters of "policy", "teacher" and "ema"; None for one that
        the run does not have.
      scored: rewards of the samples.
      old: [R] of [C_r], log-probabilities under the old policy.
      penalty: [R] of [C_r], KL to subtract from the reward.
      value: [R] of [C_r], a critic's values.

    Raises:
      ValueError: an estimator requests a model that the run does not have.
    """
    rollouts, reward_BN = scored.rollouts, scored.total_BN
    by_name, requests, tokens = {}, {}, 0
    for name, estimator in self._estimators.items():
      logprobs = {}
      for key, request in estimator.scoring_requests(
        rollouts, reward_BN
      ).items():
        if models[request.model] is None:
          raise ValueError(
            f"Advantage estimator {name!r} requests the model "
            f"{request.model!r}, which this run does not have. Set "
            "config.rl.ema above 0."
          )
        scored_logprobs = self._logprob_scorer.score(
          models[request.model], rollouts.after(request.turns)
        )
        tokens += scored_logprobs.prefix_tokens
        requests[key] = request
        logprobs[key] = [
          row[len(row) - len(s.tokens) :]
          for row, s in zip(
            scored_logprobs.prefix_logprob, rollouts.completions
          )
        ]
      inputs = inputs_lib.AdvantageInputs(
        rollouts=rollouts,
        reward_BN=reward_BN,
        success_BN=success(rollouts, scored),
        logprob=old,
        penalty=penalty,
        logprobs=logprobs,
        value=value,
        terms={
          name: (weight, scored.terms[name])
          for name, weight in scored.weights.items()
        },
      )
      by_name[name] = (self._weights[name], estimator.advantages(inputs))
    combined = inputs_lib.combine(by_name)
    return Estimate(
      advantage=combined.advantage,
      returns=combined.returns,
      requests=requests,
      metrics={**combined.metrics, "scoring/advantage_tokens": tokens},
    )


def success(rollouts: structs.Rollouts, scored: score_lib.Scored) -> np.ndarray:
  """Success of each sample, 0 to 1: the term `correct` for maths if there is
  one, otherwise the reward, clipped."""
  clipped_BN = np.clip(scored.total_BN, 0.0, 1.0)
  if "correct" not in scored.terms:
    return clipped_BN
  maths_B1 = np.asarray([[p.task == "math"] for p in rollouts.prompts])
  return np.where(maths_B1, scored.terms["correct"], clipped_BN)


def importance_weighted(
  advantage: Sequence[np.ndarray],
  *,
  old: Sequence[np.ndarray],
  completions: Sequence[structs.Sample],
  cap: float,
  level: str,
  mode: str,
  floor: float,
) -> tuple[Sequence[np.ndarray], dict[str, float]]:
  """Multiplies advantages by importance weights (trainer / sampler).

  Args:
    advantage: [R] of [C_r].
    old: [R] of [C_r], log-probabilities under the trainer's policy.
    completions: [R], with the sampler's log-probabilities.
    cap: see `policy.importance_weight`; 0 turns the correction off.
    level: "token" or "sequence".
    mode: "truncate" or "mask".
    floor: lower bound of "mask"; 0 is none.

  Returns:
    The weighted advantages, and metrics of the weights.
  """
  if not cap:
    return advantage, {}
  weight = [
    policy_loss.importance_weight(
      o, s.behavior_logprob(), cap, level=level, mode=mode, floor=floor
    )
    for o, s in zip(old, completions)
  ]
  every = np.concatenate(weight)
  bound = np.float32(cap) * (1 - np.finfo(np.float32).eps)
  metrics = {
    "sampler_trainer/weight_mean": float(every.mean()),
    "sampler_trainer/weight_min": float(every.min()),
    "sampler_trainer/weight_max": float(every.max()),
    "sampler_trainer/masked_ratio": float(np.mean(every == 0)),
    "sampler_trainer/capped_ratio": float(np.mean(every >= bound)),
  }
  return [a * w for a, w in zip(advantage, weight)], metrics


def spread(advantage: Sequence[np.ndarray]) -> dict[str, float]:
  """Metrics of the advantages of a step's tokens, before importance weights.

  Args:
    advantage: [R] of [C_r].
  """
  every = np.concatenate(advantage)
  return {
    "advantage/mean": float(every.mean()),
    "advantage/std": float(every.std()),
    "advantage/min": float(every.min()),
    "advantage/max": float(every.max()),
  }


def kl_penalties(
  old: Sequence[np.ndarray],
  ref: Sequence[np.ndarray],
  *,
  coef: float,
  estimator: str,
) -> list[np.ndarray]:
  """`coef * KL` of each token, to subtract from rewards; [R] of [C_r]."""
  divergence = kl.estimator(estimator)
  return [
    np.asarray(coef * divergence(o, r), np.float32) if coef else 0.0 * o
    for o, r in zip(old, ref)
  ]


def build(
  weighted_sum: str, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
  """Builds the advantage estimators of a weighted sum, by name.

  Args:
    weighted_sum: names and weights, as in "grpo + 0.5*oppo".
    options: settings of estimators by name that differ from their defaults.

  Raises:
    ValueError: an unknown estimator or setting, or options of an estimator that
      is not in the sum.
  """
  names = list(compose.weights(weighted_sum))
  for name in options:
    if name not in names:
      raise ValueError(
        f"config.rl.advantage_options sets {name!r}, which is none of the "
        f"estimators {names} of config.rl.advantage. Add it there, or remove "
        "its options."
      )
  return {name: _build(name, dict(options.get(name, {}))) for name in names}


def _build(name: str, settings: dict[str, Any]) -> Any:
  try:
    estimator = getattr(importlib.import_module(f"{_PACKAGE}.{name}"), _CLASS)
  except (ModuleNotFoundError, AttributeError) as error:
    raise ValueError(
      f"There is no advantage estimator {name!r}"
      f"{user_errors.nearest(name, compose.files(_PACKAGE, _CLASS))}. "
      "Name a file of opera_jax/advantages that has an AdvantageEstimator."
    ) from error
  try:
    return estimator(**settings)
  except TypeError as error:
    raise ValueError(
      f"Advantage estimator {name!r} takes the settings "
      f"{sorted(estimator.__dataclass_fields__)}, got {sorted(settings)}: "
      f"{error}."
    ) from error
