"""Builds optimizer updates on a mini-batch, for SFT and for the policy.

The model is a function `logprob_fn(params, batch) -> (logprob_RT, entropy_RT)`:
float32, entry t for token t given the tokens before it in its segment. A model
with further heads returns a dict as third value: "value" [R, T] of a critic,
"top_logprob" [R, T, K] of the tokens `batch.extra["top_ids"]`.

Micro-batches are rows r, r + M, r + 2M, ... of the mini-batch, so that each
micro-batch covers all data shards. Token weights are computed on the whole
mini-batch first, so losses and gradients of the micro-batches just add up.

Shape key: R rows, T tokens of a row, M micro-batches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opera_jax import structs
from opera_jax.losses import (
  cross_entropy,
  distillation,
  exponent,
  kl,
  policy,
  preference,
  reduce,
  value,
)
from opera_jax.train import state as train_state

LogprobFn = Callable[[Any, structs.Batch], tuple[Any, ...]]
Metrics = dict[str, jax.Array]
# update(state, batch, frozen=None) -> (state, metrics); `frozen` are the
# parameters that `join` adds to the trained ones.
Update = Callable[..., tuple[train_state.TrainState, Metrics]]
# join(trained, frozen) -> the parameters that `logprob_fn` takes.
Join = Callable[[Any, Any], Any]


class NonFiniteError(FloatingPointError):
  """A loss or a gradient became infinite or NaN."""


def make_sft_update(
  logprob_fn: LogprobFn,
  optimizer: optax.GradientTransformation,
  *,
  name: str = "sft",
  reduction: str = "token_mean",
  constant: float | None = None,
  micro_batches: int = 1,
  state_sharding: Any = None,
  schedule: optax.Schedule | None = None,
  join: Join | None = None,
) -> Update:
  """Builds an update that minimises cross entropy on the tokens of `loss_mask`.

  Args:
    logprob_fn: see the module; its entropies are logged.
    optimizer: an optax transformation.
    name: prefix of the metrics, "sft" or "pretrain".
    reduction: one of `reduce.NAMES`.
    constant: the divisor of reduction "constant".
    micro_batches: number of micro-batches, for gradient accumulation.
    state_sharding: tree of shardings that the new state must keep; None lets
      the compiler carry over those of the old.
    schedule: learning-rate schedule, logged as a metric; None logs nothing.
    join: adds frozen parameters to the trained ones; None trains all.

  Returns:
    A jitted `update(state, batch, frozen=None) -> (state, metrics)` that
    donates `state`. Metrics, scalars: `<name>/loss` (nats),
    `<name>/entropy`, `<name>/tokens`, `grad_norm` (before clipping),
    `optim/update_norm`, `optim/param_norm`.

  Raises:
    ValueError: when traced, rows that do not divide into micro-batches.
  """

  def objective(
    params: Any, batch: structs.Batch, weight_RT: jax.Array, mean_RT: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    logprob_RT, entropy_RT = logprob_fn(params, batch)
    loss_RT = cross_entropy.cross_entropy(logprob_RT)
    loss = reduce.weighted_sum(weight_RT, loss_RT)
    return loss, {
      f"{name}/loss": loss,
      f"{name}/entropy": reduce.weighted_sum(mean_RT, entropy_RT),
      f"{name}/tokens": jnp.sum(mean_RT > 0),
    }

  return _make_update(
    objective,
    optimizer,
    reduction,
    constant,
    micro_batches,
    state_sharding,
    schedule,
    join,
  )


def make_validation_loss(
  logprob_fn: LogprobFn, *, join: Join | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Builds the cross entropy of a batch, without an update.

  Args:
    logprob_fn: see the module.
    join: adds frozen parameters to the trained ones; None trains all.

  Returns:
    A jitted `loss(params, batch, frozen=None)` that returns the sum over the
    target tokens, nats, and their number.
  """

  def loss(
    params: Any, batch: structs.Batch, frozen: Any = None
  ) -> tuple[jax.Array, jax.Array]:
    whole = params if join is None else join(params, frozen)
    logprob_RT = logprob_fn(whole, batch)[0]
    target_RT = (batch.loss_mask > 0) & (batch.segments > 0)
    loss_RT = cross_entropy.cross_entropy(logprob_RT)
    return jnp.sum(jnp.where(target_RT, loss_RT, 0.0)), jnp.sum(target_RT)

  return jax.jit(loss)


def make_policy_update(
  logprob_fn: LogprobFn,
  optimizer: optax.GradientTransformation,
  *,
  loss: str = "clipped",
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = 3.0,
  kl_coef: float = 0.001,
  kl_estimator: str = "k3",
  entropy_coef: float = 0.0,
  value_coef: float = 0.0,
  value_clip: float = 0.2,
  divergence_coef: float = 0.0,
  reduction: str = "sequence_mean",
  constant: float | None = None,
  micro_batches: int = 1,
  state_sharding: Any = None,
  schedule: optax.Schedule | None = None,
  join: Join | None = None,
) -> Update:
  """Builds an update of `surrogate + kl_coef * KL(policy || reference)`, and
  more.

  It adds `- entropy_coef * entropy`, `+ value_coef * critic's loss` and `+
  divergence_coef * JS(policy, teacher)` if their coefficients are not 0.

  Args:
    logprob_fn: see the module; its entropies are logged.
    optimizer: an optax transformation.
    loss: "clipped" (ratio per token) or "gspo" (ratio per sequence).
    clip_low: see `policy.clipped_surrogate`.
    clip_high: see `policy.clipped_surrogate`.
    dual_clip: see `policy.clipped_surrogate`.
    kl_coef: weight of the KL term; 0 turns it off, and `ref_logprob` is unused.
    kl_estimator: "k2" or "k3"; "k1" where `kl_coef` is 0.
    entropy_coef: weight of the entropy bonus.
    value_coef: weight of `value.clipped_value`; needs a critic's head, and
      "value" and "returns" in `batch.extra`.
    value_clip: see `value.clipped_value`.
    divergence_coef: weight of `distillation.top_k_jensen_shannon`; needs
      "top_ids" and "top_logprob" in `batch.extra`.
    reduction: one of `reduce.NAMES`.
    constant: the divisor of reduction "constant".
    micro_batches: number of micro-batches, for gradient accumulation.
    state_sharding: tree of shardings that the new state must keep; None lets
      the compiler carry over those of the old.
    schedule: learning-rate schedule, logged as a metric; None logs nothing.
    join: adds frozen parameters to the trained ones; None trains all.

  Returns:
    A jitted `update(state, batch, frozen=None) -> (state, metrics)` that
    donates `state`. Metrics, scalars, token means unless said: `policy/`
    `loss` (the reduced total), `surrogate` (reduced), `kl`, `ratio_mean`,
    `old_gap` (|logprob - old_logprob|), `clip_low`, `clip_high`, `clip_dual`,
    `ratio_bounded`, `kl_bounded` (shares of tokens), `entropy`, `tokens` (a
    count), and `grad_norm` (before clipping), `optim/update_norm`,
    `optim/param_norm`.

  Raises:
    ValueError: an unknown estimator or loss, or k1 in the loss; when traced,
      an unknown reduction, a bad clip bound, or rows that do not divide into
      micro-batches.
  """
  divergence = kl.estimator(kl_estimator, in_loss=kl_coef != 0)
  if loss not in policy.NAMES:
    raise ValueError(f"Unknown loss {loss!r}. Use one of {policy.NAMES}.")

  def objective(
    params: Any, batch: structs.Batch, weight_RT: jax.Array, mean_RT: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    target_RT = weight_RT > 0
    logprob_RT, entropy_RT, *heads = logprob_fn(params, batch)
    # Other tokens may have any value, even NaN; they must not get a gradient.
    logprob_RT = jnp.where(target_RT, logprob_RT, 0.0)
    now_RT, then_RT = logprob_RT, batch.old_logprob
    if loss == "gspo":
      now_RT = policy.sequence_ratio(
        now_RT, then_RT, batch.loss_mask, batch.segments
      )
      then_RT = jnp.zeros_like(now_RT)
    loss_RT, aux = policy.clipped_surrogate(
      now_RT,
      then_RT,
      batch.advantage,
      clip_low=clip_low,
      clip_high=clip_high,
      dual_clip=dual_clip,
    )
    total = surrogate = reduce.weighted_sum(weight_RT, loss_RT)
    per_token = {
      "policy/ratio_mean": aux["ratio"],
      "clip_ratio/low": aux["clip_low"],
      "clip_ratio/high": aux["clip_high"],
      "clip_ratio/dual": aux["clip_dual"],
      "policy/ratio_bounded": aux["ratio_bounded"],
      # KL(old || new) from samples of the old policy.
      "approx_kl": kl.estimator("k3")(batch.old_logprob, logprob_RT),
      "entropy": entropy_RT,
    }
    if kl_coef:
      kl_RT = divergence(logprob_RT, batch.ref_logprob)
      total = total + kl_coef * reduce.weighted_sum(weight_RT, kl_RT)
      per_token["kl"] = kl_RT
      per_token["policy/kl_bounded"] = exponent.bounded(
        batch.ref_logprob - logprob_RT
      )[1].astype(jnp.float32)
    if entropy_coef:
      total -= entropy_coef * reduce.weighted_sum(weight_RT, entropy_RT)
    if value_coef:
      critic_RT = value.clipped_value(
        heads[0]["value"],
        batch.extra["value"],
        batch.extra["returns"],
        clip=value_clip,
      )
      total += value_coef * reduce.weighted_sum(weight_RT, critic_RT)
      per_token["policy/value_loss"] = critic_RT
    if divergence_coef:
      gap_RT = distillation.top_k_jensen_shannon(
        heads[0]["top_logprob"], batch.extra["top_logprob"]
      )
      total += divergence_coef * reduce.weighted_sum(weight_RT, gap_RT)
      per_token["policy/divergence"] = gap_RT
    metrics = {
      name: reduce.weighted_sum(mean_RT, value_RT)
      for name, value_RT in per_token.items()
    }
    metrics["loss"] = total
    metrics["policy/surrogate"] = surrogate
    metrics["policy/tokens"] = jnp.sum(target_RT)
    return total, metrics

  return _make_update(
    objective,
    optimizer,
    reduction,
    constant,
    micro_batches,
    state_sharding,
    schedule,
    join,
  )


def make_preference_update(
  logprob_fn: LogprobFn,
  optimizer: optax.GradientTransformation,
  *,
  beta: float = 0.1,
  micro_batches: int = 1,
  state_sharding: Any = None,
  schedule: optax.Schedule | None = None,
  join: Join | None = None,
) -> Update:
  """Builds an update of DPO, see `preference.dpo`.

  The first half of the rows holds the better sample of every pair, the second
  half the worse ones in the same order. Pairs without targets do not count.

  Args:
    logprob_fn: see the module; its entropies are logged.
    optimizer: an optax transformation.
    beta: see `preference.dpo`.
    micro_batches: number of micro-batches; must divide the pairs.
    state_sharding: see `make_policy_update`.
    schedule: learning-rate schedule, logged as a metric; None logs nothing.
    join: adds frozen parameters to the trained ones; None trains all.

  Returns:
    A jitted `update(state, batch, frozen=None) -> (state, metrics)`. Metrics:
    `policy/` `loss` (mean over pairs), `margin`, `preferred` (share of pairs),
    `entropy`, `tokens`, and the norms of `make_policy_update`.
  """

  def objective(
    params: Any, batch: structs.Batch, weight_RT: jax.Array, mean_RT: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    logprob_RT, entropy_RT, *_ = logprob_fn(params, batch)
    better_P, worse_P = preference.paired_sums(logprob_RT, weight_RT)
    loss_P, margin_P = preference.dpo(
      better_P,
      worse_P,
      *preference.paired_sums(batch.ref_logprob, weight_RT),
      beta=beta,
    )
    # A row's weights sum to 1 / rows, a pair's to 1 / pairs.
    pair_P = sum(preference.paired_sums(weight_RT, weight_RT))
    total = jnp.sum(pair_P * loss_P)
    return total, {
      "loss": total,
      "policy/margin": jnp.sum(pair_P * margin_P),
      "policy/preferred": jnp.sum(pair_P * (margin_P > 0)),
      "entropy": reduce.weighted_sum(mean_RT, entropy_RT),
      "policy/tokens": jnp.sum(weight_RT > 0),
    }

  return _make_update(
    objective,
    optimizer,
    "sequence_mean",
    None,
    micro_batches,
    state_sharding,
    schedule,
    join,
  )


def check_finite(metrics: Metrics, step: int) -> None:
  """Raises an error if a loss or gradient is not finite; blocks on `metrics`.

  Args:
    metrics: what an update returned.
    step: the step to name in the message.

  Raises:
    NonFiniteError: a loss or norm is infinite or NaN.
  """
  wrong = {
    name: float(value)
    for name, value in metrics.items()
    if name.rpartition("/")[2].endswith(("loss", "_norm"))
    and not np.isfinite(value)
  }
  if wrong:
    listed = ", ".join(f"{name} = {value}" for name, value in wrong.items())
    raise NonFiniteError(
      f"Step {step}: {listed}; a loss and its gradient must be finite. The "
      "last checkpoint holds the state before it: resume from there with a "
      "lower learning rate or max_grad_norm, and look at that step's rewards "
      "and log-probabilities in the metrics."
    )


def _make_update(
  objective: Callable[..., tuple[jax.Array, Metrics]],
  optimizer: optax.GradientTransformation,
  reduction: str,
  constant: float | None,
  micro_batches: int,
  state_sharding: Any,
  schedule: optax.Schedule | None,
  join: Join | None,
) -> Update:
  """Jits the update: token weights, gradients over micro-batches, optimizer.

  Only the trained parameters, those of the state, are differentiated.
  """

  def update(
    state: train_state.TrainState, batch: structs.Batch, frozen: Any = None
  ) -> tuple[train_state.TrainState, Metrics]:
    def of_trained(trained: Any, *rows: Any) -> tuple[jax.Array, Metrics]:
      params = trained if join is None else join(trained, frozen)
      return objective(params, *rows)

    weight_RT = reduce.token_weight(
      reduction, batch.loss_mask, batch.segments, constant=constant
    )
    mean_RT = reduce.token_weight("token_mean", batch.loss_mask, batch.segments)
    with jax.named_scope("gradients"):
      grads, metrics = _accumulate(
        jax.grad(of_trained, has_aux=True),
        state.params,
        (batch, weight_RT, mean_RT),
        micro_batches,
      )
    with jax.named_scope("optimizer"):
      updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = optax.global_norm(grads)
    metrics["optim/update_norm"] = optax.global_norm(updates)
    metrics["optim/param_norm"] = optax.global_norm(params)
    if schedule is not None:
      metrics["learning_rate"] = schedule(state.step)
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, metrics

  out_shardings = None if state_sharding is None else (state_sharding, None)
  return jax.jit(update, donate_argnums=0, out_shardings=out_shardings)


def _accumulate(
  grad_fn: Callable[..., tuple[Any, Metrics]],
  params: Any,
  rows: Any,
  micro_batches: int,
) -> tuple[Any, Metrics]:
  """Sum of gradients and metrics over the micro-batches of `rows`."""
  count = jax.tree.leaves(rows)[0].shape[0]
  if micro_batches < 1 or count % micro_batches:
    raise ValueError(
      f"{count} rows do not divide into {micro_batches} micro-batches. Choose "
      "a number of micro-batches that divides the rows of a mini-batch."
    )
  if micro_batches == 1:
    return grad_fn(params, *rows)

  def split(leaf: jax.Array) -> jax.Array:
    shape = (count // micro_batches, micro_batches, *leaf.shape[1:])
    return jnp.swapaxes(leaf.reshape(shape), 0, 1)

  def add(total: Any, part: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, grad_fn(params, *part)), None

  parts = jax.tree.map(split, rows)
  first = jax.tree.map(lambda leaf: leaf[0], parts)
  shapes = jax.eval_shape(grad_fn, params, *first)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  total, _ = jax.lax.scan(add, zeros, parts)
  return total
