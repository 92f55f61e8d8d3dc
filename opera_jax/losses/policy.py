"""The clipped policy-gradient surrogates, per token.

Shape key: R rows, T tokens of a row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from opera_jax.losses import exponent, reduce

NAMES = ("clipped", "gspo")
IMPORTANCE_LEVELS = ("token", "sequence")
IMPORTANCE_MODES = ("truncate", "mask")


def clipped_surrogate(
  logprob_RT: jax.Array,
  old_logprob_RT: jax.Array,
  advantage_RT: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = 3.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """PPO's clipped objective with separate bounds and a dual clip.

  With `r = exp(logprob - old_logprob)` and advantage `A`,

      loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
      loss = min(loss, -A dual_clip)                      where A < 0

  The first line is PPO (arXiv 1707.06347) with DAPO's two bounds (arXiv
  2503.14476); the second bounds the loss of a token with negative advantage
  whose ratio has grown large (arXiv 1912.09729). At `r = 1` the gradient is
  REINFORCE's, `-A grad logprob`. The log-ratio is clipped by
  `exponent.bounded`: a token beyond the bound has a finite loss and no
  gradient.

  Args:
    logprob_RT: float32, log-probability of each token under the live policy.
    old_logprob_RT: float32, the same under the policy that sampled.
    advantage_RT: float32.
    clip_low: the ratio is clipped below at `1 - clip_low`, 0 < clip_low <= 1.
    clip_high: the ratio is clipped above at `1 + clip_high`, positive.
    dual_clip: bound in units of |A|, above `1 + clip_high`; None turns it off.

  Returns:
    The loss of each token, float32 [R, T], and per-token diagnostics of the
    same shape without gradient: `ratio`, and 0/1 flags `clip_low`,
    `clip_high`, `clip_dual` for tokens whose gradient the clip removed, and
    `ratio_bounded` for tokens whose log-ratio was out of bounds.

  Raises:
    ValueError: a bound is out of its range.
  """
  if not 0 < clip_low <= 1 or clip_high <= 0:
    raise ValueError(
      f"The ratio is clipped to [1 - clip_low, 1 + clip_high]; got "
      f"clip_low={clip_low}, clip_high={clip_high}. Use 0 < clip_low <= 1 "
      "and clip_high > 0."
    )
  if dual_clip is not None and dual_clip <= 1 + clip_high:
    raise ValueError(
      f"dual_clip must exceed 1 + clip_high = {1 + clip_high}, got "
      f"{dual_clip}. Raise it (3.0 is usual) or pass None."
    )
  log_ratio_RT, bounded_RT = exponent.bounded(
    logprob_RT - jax.lax.stop_gradient(old_logprob_RT)
  )
  ratio_RT = jnp.exp(log_ratio_RT)
  advantage_RT = jax.lax.stop_gradient(advantage_RT)
  clipped_RT = jnp.clip(ratio_RT, 1 - clip_low, 1 + clip_high)
  loss_RT = jnp.maximum(-advantage_RT * ratio_RT, -advantage_RT * clipped_RT)
  bad_RT = advantage_RT < 0
  over_RT = jnp.zeros_like(bad_RT)
  if dual_clip is not None:
    over_RT = bad_RT & (ratio_RT > dual_clip)
    loss_RT = jnp.where(over_RT, -advantage_RT * dual_clip, loss_RT)
  flags = {
    "clip_low": bad_RT & (ratio_RT < 1 - clip_low),
    "clip_high": (advantage_RT > 0) & (ratio_RT > 1 + clip_high),
    "clip_dual": over_RT,
    "ratio_bounded": bounded_RT,
  }
  aux = {name: flag.astype(jnp.float32) for name, flag in flags.items()}
  aux["ratio"] = jax.lax.stop_gradient(ratio_RT)
  return loss_RT, aux


def sequence_ratio(
  logprob_RT: jax.Array,
  old_logprob_RT: jax.Array,
  weight_RT: jax.Array,
  segments_RT: jax.Array,
) -> jax.Array:
  """GSPO's log-ratio of each token (arXiv 2507.18071), for `clipped_surrogate`.

  With `s = exp(mean_t(logprob_t - old_t))` over a sequence's targets, every
  token of the sequence gets the value `log s`, with the gradient of that mean.
  So the sum over its tokens with equal weights has the gradient of `s A`.

  Args:
    logprob_RT: float32, under the live policy.
    old_logprob_RT: float32, under the policy that sampled.
    weight_RT: 1 where token t is a target.
    segments_RT: int32, the sequences of a row; see `reduce.token_weight`.

  Returns:
    float32 [R, T], the mean log-ratio of its sequence at every token.
  """
  delta_RT = jnp.where(weight_RT > 0, logprob_RT - old_logprob_RT, 0.0)
  count_RT = reduce.sequence_sum(weight_RT, segments_RT)
  total_RT = reduce.sequence_sum(delta_RT, segments_RT)
  return total_RT / jnp.maximum(count_RT, 1.0)


def importance_weight(
  old_logprob: np.ndarray,
  sampler_logprob: np.ndarray,
  cap: float,
  *,
  level: str = "token",
  mode: str = "truncate",
  floor: float = 0.0,
) -> np.ndarray:
  """The importance weight trainer / sampler of each token of a completion.

  It corrects the gradient if the sampler's probabilities differ from the
  trainer's. It multiplies the advantage, so no gradient passes through it. With
  `w = exp(old - sampler)`:

      truncate  min(w, cap), of bounded variance (Ionides, "Truncated importance
                sampling", 2008; TIS of Yao et al., "Your efficient RL framework
                secretly brings you off-policy RL training", 2025)
      mask      w where floor <= w <= cap, else 0: what the sampler drew from
                another distribution teaches nothing (MIS of Liu et al., "When
                speed kills stability", 2025; with a floor IcePop, arXiv
                2510.18855)

  At level "sequence", w is the product over the completion's tokens, on all of
  them: unbiased, of a variance that grows with the length. A truncating sampler
  (top k, top p, min p) renormalises the kept tokens, so their weight is the
  kept probability mass, below 1.

  Args:
    old_logprob: float32 [C], log-probability of each sampled token under the
      trainer's policy before the update.
    sampler_logprob: float32 [C], under the sampler's distribution, see
      `structs.Sample.behavior_logprob`.
    cap: upper bound, positive; 2 is usual.
    level: one of `IMPORTANCE_LEVELS`.
    mode: one of `IMPORTANCE_MODES`.
    floor: lower bound of "mask"; 0 is none.

  Raises:
    ValueError: a cap of 0 or less, or an unknown level or mode.
  """
  if cap <= 0:
    raise ValueError(
      f"Importance weights need a positive cap, got {cap}. Use 2.0, or turn "
      "them off with config.rl.importance_cap = 0."
    )
  if level not in IMPORTANCE_LEVELS or mode not in IMPORTANCE_MODES:
    raise ValueError(
      f"Importance weights take a level of {IMPORTANCE_LEVELS} and a mode of "
      f"{IMPORTANCE_MODES}, got {level!r} and {mode!r}."
    )
  gap = old_logprob - sampler_logprob
  if level == "sequence":
    gap = np.full_like(gap, gap.sum())
  within = gap <= np.log(cap)
  weight = np.exp(np.minimum(gap, np.log(cap)))
  if mode == "mask":
    weight = np.where(within & (weight >= floor), weight, 0.0)
  return weight.astype(np.float32)
