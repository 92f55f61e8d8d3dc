"""Builds the update of an RL step: loss, critic and teacher by config."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from opera_jax import structs
from opera_jax.advantages import inputs as inputs_lib
from opera_jax.data import rl as rl_data
from opera_jax.losses import policy as policy_loss
from opera_jax.scoring import heads, packed_rows, packing
from opera_jax.sharding import layout
from opera_jax.train import ema as ema_lib
from opera_jax.train import step as step_lib

LOSSES = (*policy_loss.NAMES, "dpo")
# Arguments of `build` that are fields of config.rl with the same name.
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
  """An update function and the structure of its parameters.

  With LoRA only an adapter is trained; `frozen` below are the model's other
  parameters, and None without LoRA.
  """

  optimizer: optax.GradientTransformation
  update: step_lib.Update
  critic: bool  # params are {"policy": ..., "value": ...}
  pairs: bool  # rows are DPO pairs: preferred samples first, then the others
  averaged: bool  # the optimizer keeps an EMA of the parameters
  join: step_lib.Join | None  # see `build`
  values: Callable[[Any, structs.Batch], jax.Array] | None
  teacher_top: (
    Callable[[Any, structs.Batch], tuple[jax.Array, jax.Array]] | None
  )

  def initial(self, params: Any, hidden: int) -> Any:
    """The initial trained parameters: the policy's, and a critic's if there is
    one."""
    if not self.critic:
      return params
    return {"policy": params, "value": heads.init_value(hidden)}

  def whole(self, params: Any, frozen: Any = None) -> Any:
    """The trained and the frozen parameters in one tree."""
    return _whole(params, frozen, join=self.join, critic=self.critic)

  def policy(self, params: Any, frozen: Any = None) -> Any:
    """The policy's parameters, frozen ones included, without a critic's."""
    whole = self.whole(params, frozen)
    return whole["policy"] if self.critic else whole

  def mean(self, opt_state: Any, frozen: Any = None) -> Any:
    """The EMA of the policy's parameters; None without EMA."""
    return self.policy(opt_state.mean, frozen) if self.averaged else None

  def critic_values(
    self,
    params: Any,
    rows: structs.Batch,
    placement: rl_data.Placement,
    *,
    mesh: jax.sharding.Mesh,
    mini_batches: int,
  ) -> list[np.ndarray] | None:
    """Computes the critic's value before each completion token; None without
    critic.

    Args:
      params: of `whole`, including the critic's.
      rows: packed rows of the step.
      placement: of the completions in the rows.
      mesh: over which rows are split.
      mini_batches: number per step; they are evaluated one after the other.

    Returns:
      [R] of float32 [C_r].
    """
    if self.values is None:
      return None
    value_RT = _by_mini_batch(self.values, params, rows, mesh, mini_batches)
    return placement.gather(value_RT)

  def extra_targets(
    self,
    placement: rl_data.Placement,
    rollouts: structs.Rollouts,
    *,
    value: Sequence[np.ndarray] | None,
    returns: Sequence[np.ndarray] | None,
    requests: Mapping[str, inputs_lib.ScoringRequest],
    models: Mapping[str, Any],
    buckets: Sequence[int],
    mesh: jax.sharding.Mesh,
    mini_batches: int,
  ) -> dict[str, np.ndarray]:
    """Further inputs of the loss besides advantages, [rows, T, ...] by name.

    Args:
      placement: of the completions in the rows.
      rollouts: of the step.
      value: of `critic_values`.
      returns: a critic's targets, [R] of [C_r].
      requests: scoring requests of the advantage estimators, by name.
      models: parameters by name of a request's model.
      buckets: allowed padded lengths of the teacher's rows.
      mesh: over which rows are split.
      mini_batches: number per step.

    Returns:
      "value" and "returns" for a critic; "top_ids" and "top_logprob" for the
      divergence from a teacher.

    Raises:
      ValueError: a critic without targets, or a divergence without a teacher.
    """
    extra = {}
    if value is not None:
      if returns is None:
        raise ValueError(
          "config.rl.value_coef trains a critic, and no advantage estimator "
          "returns targets for it. Add gae to config.rl.advantage, or set it "
          "to 0."
        )
      extra = {
        "value": placement.scatter(value),
        "returns": placement.scatter(returns),
      }
    if self.teacher_top is not None:
      request = requests.get("teacher")
      if request is None:
        raise ValueError(
          "config.rl.divergence_coef needs an advantage estimator with a "
          'teacher. Add "0*sdpo" or "0*distillation" to config.rl.advantage.'
        )
      top_ids, top_logprob = self._teacher_top_tokens(
        self.teacher_top,
        rollouts.after(request.turns),
        [len(s.tokens) for s in rollouts.completions],
        models[request.model],
        buckets,
        mesh,
        mini_batches,
      )
      extra["top_ids"] = placement.scatter(top_ids)
      extra["top_logprob"] = placement.scatter(top_logprob)
    return extra

  def _teacher_top_tokens(
    self,
    fn: Callable[[Any, structs.Batch], tuple[jax.Array, jax.Array]],
    prefixes: Sequence[np.ndarray],
    sizes: Sequence[int],
    params: Any,
    buckets: Sequence[int],
    mesh: jax.sharding.Mesh,
    mini_batches: int,
  ) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The teacher's top-K tokens in its own context, [R] of [C_r, K]."""
    lengths = [len(prefix) for prefix in prefixes]
    zeros = [np.zeros(length, np.float32) for length in lengths]
    placement = rl_data.one_per_row(
      [0] * len(prefixes),
      lengths,
      (packing.bucket(max(lengths), buckets),),
    )
    batch = rl_data.build_batch(placement, prefixes, zeros, zeros)
    top_ids, top_logprob = (
      [
        row[length - size : length]
        for row, length, size in zip(top, lengths, sizes)
      ]
      for top in _by_mini_batch(fn, params, batch, mesh, mini_batches)
    )
    return top_ids, top_logprob


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
  join: step_lib.Join | None = None,
) -> Learner:
  """Builds the update that a config names.

  Args:
    graphdef: of the model.
    optimizer: an optax transformation.
    schedule: learning-rate schedule, logged as a metric.
    temperature: sampling temperature of the policy.
    loss: "clipped", "gspo" or "dpo".
    clip_low: see `losses.policy`.
    clip_high: see `losses.policy`.
    dual_clip: see `losses.policy`; 0 turns it off.
    kl_coef: weight of KL in the loss.
    kl_estimator: see `losses.kl`.
    entropy_coef: weight of the entropy bonus.
    value_coef: above 0 adds a critic.
    value_clip: see `losses.value`.
    divergence_coef: above 0 adds the divergence from a teacher's top-K tokens.
    teacher_top_k: K of those top tokens.
    ema: rate of the policy's EMA; 0 turns it off.
    beta: of DPO.
    reduction: one of `losses.reduce.NAMES`.
    constant: divisor of reduction "constant"; 0 for the others.
    micro_batches: see `train.step`.
    join: puts the trained and the frozen parameters of the policy in one
      tree; None where all are trained.

  Raises:
    ValueError: an unknown loss.
  """
  if loss not in LOSSES:
    raise ValueError(f"config.rl.loss is {loss!r}. Use one of {LOSSES}.")
  critic = value_coef > 0 or divergence_coef > 0
  if ema:
    optimizer = ema_lib.with_ema(optimizer, ema)
  view = heads.logprob_and_heads_fn if critic else packed_rows.logprob_fn
  logprob_fn = view(graphdef, temperature=temperature)
  whole = None
  if join is not None:
    whole = functools.partial(_whole, join=join, critic=critic)
  if loss == "dpo":
    update = step_lib.make_preference_update(
      logprob_fn,
      optimizer,
      beta=beta,
      micro_batches=micro_batches,
      schedule=schedule,
      join=whole,
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
      join=whole,
    )
  tops = heads.top_tokens_fn(graphdef, teacher_top_k, temperature=temperature)
  return Learner(
    optimizer=optimizer,
    update=update,
    critic=critic,
    pairs=loss == "dpo",
    averaged=ema > 0,
    join=join,
    values=jax.jit(lambda params, batch: logprob_fn(params, batch)[2]["value"])
    if value_coef > 0
    else None,
    teacher_top=jax.jit(tops) if divergence_coef > 0 else None,
  )


def _whole(
  params: Any, frozen: Any, *, join: step_lib.Join | None, critic: bool
) -> Any:
  """Adds the frozen parameters to the policy's; a critic's are all trained."""
  if join is None:
    return params
  if not critic:
    return join(params, frozen)
  return params | {"policy": join(params["policy"], frozen)}


def programs(
  row_buckets: Sequence[int],
  completions_per_row: int,
  prompt_lengths: Sequence[int],
) -> int:
  """Upper bound of compiled update programs: one per shape, see `data.rl`."""
  return len(row_buckets) * (
    len(prompt_lengths) if completions_per_row > 1 else 1
  )


def _by_mini_batch(
  fn: Callable[[Any, structs.Batch], Any],
  params: Any,
  batch: structs.Batch,
  mesh: jax.sharding.Mesh,
  count: int,
) -> Any:
  """Applies `fn` to each mini-batch of a host batch; returns concatenated host
  arrays."""
  outs = [
    layout.to_host(
      fn(params, layout.to_devices(mini_batch, layout.batch_sharding(mesh)))
    )
    for mini_batch in rl_data.mini_batches(batch, count)
  ]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *outs)
