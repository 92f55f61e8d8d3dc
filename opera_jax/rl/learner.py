"""The update of an RL step by the names in a config: loss, critic, teacher."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from opera_jax import structs
from opera_jax.data import rl as rl_data
from opera_jax.losses import policy as policy_loss
from opera_jax.run import setup as setup_lib
from opera_jax.scoring import heads, logprob_scorer
from opera_jax.sharding import layout
from opera_jax.train import ema as ema_lib
from opera_jax.train import step as step_lib

LOSSES = (*policy_loss.NAMES, "dpo")
# Arguments of `build` that a driver takes from its config by the same name.
SETTINGS = (
  *("loss", "clip_low", "clip_high", "dual_clip", "kl_estimator"),
  *(
    "entropy_coef",
    "value_coef",
    "value_clip",
    "divergence_coef",
    "teacher_top_k",
  ),
  *("ema", "beta", "reduction", "constant", "micro_batches"),
)


@dataclasses.dataclass(frozen=True)
class Learner:
  """An update and how its parameters are laid out."""

  optimizer: optax.GradientTransformation
  update: step_lib.Update
  critic: bool  # params are {"policy": ..., "value": ...}
  pairs: bool  # rows are better samples first, then worse ones
  averaged: bool  # the optimizer keeps a moving mean
  values: Callable[[Any, structs.Batch], jax.Array] | None
  top: Callable[[Any, structs.Batch], tuple[jax.Array, jax.Array]] | None

  def initial(self, params: Any, hidden: int) -> Any:
    """What the update changes, from the policy's parameters."""
    if not self.critic:
      return params
    return {"policy": params, "value": heads.init_value(hidden)}

  def policy(self, params: Any) -> Any:
    """The policy's parameters out of what the update changes."""
    return params["policy"] if self.critic else params

  def mean(self, opt_state: Any) -> Any:
    """The moving mean of the policy's parameters; None where none is kept."""
    return self.policy(opt_state.mean) if self.averaged else None


def build(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  *,
  schedule: optax.Schedule | None = None,
  temperature: float,
  loss: str,
  clip_low: float,
  clip_high: float,
  dual_clip: float,
  kl_coef: float,
  kl_estimator: str,
  entropy_coef: float,
  value_coef: float,
  value_clip: float,
  divergence_coef: float,
  teacher_top_k: int,
  ema: float,
  beta: float,
  reduction: str,
  constant: float,
  micro_batches: int,
) -> Learner:
  """The update that a config names.

  Args:
    graphdef: of the model.
    optimizer: an optax transformation.
    schedule: of the optimizer's learning rate, which becomes a metric.
    temperature: at which the policy is sampled.
    loss: "clipped", "gspo" or "dpo".
    clip_low: see `losses.policy`.
    clip_high: see `losses.policy`.
    dual_clip: see `losses.policy`; 0 turns it off.
    kl_coef: weight of KL in the loss.
    kl_estimator: see `losses.kl`.
    entropy_coef: weight of the entropy bonus.
    value_coef: above 0 adds a critic.
    value_clip: see `losses.value`.
    divergence_coef: above 0 adds the divergence from a teacher's top tokens.
    teacher_top_k: how many of them.
    ema: rate of the policy's moving mean; 0 keeps none.
    beta: of DPO.
    reduction: one of `losses.reduce.NAMES`.
    constant: divisor of reduction "constant"; 0 for the others.
    micro_batches: see `train.step`.

  Raises:
    ValueError: an unknown loss.
  """
  if loss not in LOSSES:
    raise ValueError(f"config.rl.loss is {loss!r}. Use one of {LOSSES}.")
  critic = value_coef > 0 or divergence_coef > 0
  if ema:
    optimizer = ema_lib.with_ema(optimizer, ema)
  view = heads.row_heads if critic else logprob_scorer.row_logprob
  logprob_fn = view(graphdef, temperature=temperature)
  if loss == "dpo":
    update = step_lib.make_preference_update(
      logprob_fn,
      optimizer,
      beta=beta,
      micro_batches=micro_batches,
      schedule=schedule,
    )
  else:
    update = step_lib.make_policy_update(
      logprob_fn,
      optimizer,
      loss=loss,
      clip_low=clip_low,
      clip_high=clip_high,
      dual_clip=dual_clip or None,
      kl_coef=kl_coef,
      kl_estimator=kl_estimator,
      entropy_coef=entropy_coef,
      value_coef=value_coef,
      value_clip=value_clip,
      divergence_coef=divergence_coef,
      reduction=reduction,
      constant=constant or None,
      micro_batches=micro_batches,
      schedule=schedule,
    )
  tops = heads.row_top(graphdef, teacher_top_k, temperature=temperature)
  return Learner(
    optimizer=optimizer,
    update=update,
    critic=critic,
    pairs=loss == "dpo",
    averaged=ema > 0,
    values=jax.jit(lambda params, batch: logprob_fn(params, batch)[2]["value"])
    if value_coef > 0
    else None,
    top=jax.jit(tops) if divergence_coef > 0 else None,
  )


def programs(
  row_buckets: Sequence[int],
  completions_per_row: int,
  prompt_lengths: Sequence[int],
) -> int:
  """How many programs updates can need: one a shape; see `data.rl`."""
  return len(row_buckets) * (
    len(prompt_lengths) if completions_per_row > 1 else 1
  )


def by_parts(
  run: setup_lib.Run,
  fn: Callable[[Any, structs.Batch], Any],
  params: Any,
  batch: structs.Batch,
  parts: int,
) -> Any:
  """`fn` of a host batch, mini-batch by mini-batch; host arrays, joined."""
  outs = [
    layout.to_host(fn(params, layout.to_devices(part, layout.rows(run.mesh))))
    for part in rl_data.mini_batches(batch, parts)
  ]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *outs)
