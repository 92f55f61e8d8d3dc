"""The perplexity-reduction reward, from token log-probabilities to numbers.

  mean_s = mean log-probability of the tokens of slot s
  gain_s = mean_s - mean_previous(s)         at reflective states, else 0
  r_self = tanh(#{s : gain_s > 0} / tau)
  r_ppl_i = #{k != i : score_k < score_i} / (N - 1)        within a group

(OPERA, arXiv 2606.25757.) Rewards are constants of the update; no gradient
flows through them.

Shape key: R rows, M tokens of a row, S slots (one scored continuation each),
B prompts, N samples of a prompt.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opera_jax.kernels import target
from opera_jax.kernels.perplexity_reward import pallas_tpu, reference, xla

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")


class PerplexityReward(NamedTuple):
  """The reward of each row, and the gains behind it."""

  mean_RS: jax.Array  # [R, S] float32, nats per token, 0 for an empty slot
  gain_RS: jax.Array  # [R, S] float32, nats per token, 0 if not compared
  count_R: jax.Array  # [R] int32, gains above 0
  r_self_R: jax.Array  # [R] float32 in [0, 1)


def perplexity_reward(
  logprob_RM: jax.Array,
  continuation_RM: jax.Array,
  previous_RS: jax.Array,
  *,
  tau: float = 2.0,
  implementation: str | None = None,
) -> PerplexityReward:
  """Counts the reflective states that made the reference more likely.

  A comparison needs tokens in both slots. If one is empty, or the previous slot
  is outside of [0, S), the gain is 0 and does not count.

  Args:
    logprob_RM: [R, M] floating, log-probability of each token; converted to
      float32, ignored where `continuation_RM` is -1.
    continuation_RM: [R, M] integer, the slot that a token belongs to, -1 for
      none.
    previous_RS: [R, S] integer, the slot that slot s is compared with, -1 if s
      is not a reflective state.
    tau: the number of gains whose reward is tanh(1); above 0.
    implementation: "reference", "xla" or "pallas_tpu"; None lets the platform
      choose.

  Returns:
    A `PerplexityReward`.

  Raises:
    ValueError: shapes that do not match, floating slots, a tau of 0 or
      less, an unknown implementation.
    NotImplementedError: "pallas_tpu" is named but does not apply.
  """
  _check(logprob_RM, continuation_RM, previous_RS, tau)
  module = _choose(implementation, previous_RS.shape[1])
  logprob_RM = jax.lax.stop_gradient(logprob_RM.astype(jnp.float32))
  return PerplexityReward(
    *module.perplexity_reward(
      logprob_RM, continuation_RM, previous_RS, tau=float(tau)
    )
  )


def group_rank(
  score_BN: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """The fraction of the group's other samples with a strictly lower score.

  Args:
    score_BN: [B, N] floating, comparable within a row; NaN is neither lower nor
      higher than any score.
    implementation: "reference", "xla" or "pallas_tpu"; None lets the platform
      choose.

  Returns:
    r_ppl [B, N] float32 in [0, 1]; tied samples get the lower rank.

  Raises:
    ValueError: a score that is not [B, N] floating, a group of one, an
      unknown implementation.
    NotImplementedError: "pallas_tpu" is named but does not apply.
  """
  if score_BN.ndim != 2 or not jnp.issubdtype(score_BN.dtype, jnp.floating):
    raise ValueError(
      f"Ranks are taken within rows of a floating [B, N], got "
      f"{score_BN.dtype} {score_BN.shape}. Reshape the scores by group."
    )
  if score_BN.shape[1] < 2:
    raise ValueError(
      f"A rank needs at least 2 samples a prompt, got {score_BN.shape[1]}. "
      "Raise config.rl.samples."
    )
  module = _choose(implementation, score_BN.shape[1])
  return module.group_rank(jax.lax.stop_gradient(score_BN))


def _choose(implementation: str | None, slots: int) -> Any:
  """The module that implements it, for so many slots or samples."""
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"The perplexity reward has the implementations {IMPLEMENTATIONS}, got "
      f"{implementation!r}. Name one of them, or None."
    )
  if implementation is None and target.platform() == "tpu":
    applies = pallas_tpu.unsupported(slots) is None
    implementation = "pallas_tpu" if applies else "xla"
  modules = {"reference": reference, "pallas_tpu": pallas_tpu, "xla": xla}
  return modules[implementation or "xla"]


def _check(
  logprob_RM: jax.Array,
  continuation_RM: jax.Array,
  previous_RS: jax.Array,
  tau: float,
) -> None:
  if logprob_RM.ndim != 2 or continuation_RM.shape != logprob_RM.shape:
    raise ValueError(
      "Each token [R, M] has one log-probability and one slot, got "
      f"{logprob_RM.shape} and {continuation_RM.shape}. Pad with slot -1."
    )
  if previous_RS.ndim != 2 or previous_RS.shape[0] != logprob_RM.shape[0]:
    raise ValueError(
      f"Slots to compare with are [R, S] for {logprob_RM.shape[0]} rows, got "
      f"{previous_RS.shape}. Pad with -1."
    )
  if not jnp.issubdtype(logprob_RM.dtype, jnp.floating):
    raise ValueError(
      f"Log-probabilities must be floating, got {logprob_RM.dtype}. Swap the "
      "arguments or convert to float32."
    )
  for name, x in (("continuation", continuation_RM), ("previous", previous_RS)):
    if not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(
        f"Slots are integers, got {name} of {x.dtype}. Convert to int32."
      )
  if tau <= 0:
    raise ValueError(
      f"tau scales the count of gains and must be above 0, got {tau}. The "
      "paper takes 2."
    )
