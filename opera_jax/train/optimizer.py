"""Optimizers and learning-rate schedules by name.

Every optimizer clips the global gradient norm, scales the gradient, adds
decoupled weight decay and multiplies by the learning rate, in this order; they
differ in the scaling alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

MOMENT_DTYPES = ("float32", "bfloat16")
DECAYS = ("constant", "linear", "cosine")
# Optimizer -> arrays like the parameters that its state holds at least.
NAMES = {"adamw": 2, "adafactor": 0, "lion": 1, "muon": 1}
# Muon's updates have this root mean square, about that of AdamW's, so that a
# learning rate of AdamW serves both (arXiv 2502.16982).
_MUON_RMS = 0.2


def schedule(
  learning_rate: float,
  total_steps: int,
  *,
  warmup_fraction: float = 0.0,
  decay: str = "constant",
  final_fraction: float = 0.1,
) -> optax.Schedule:
  """Linear warm-up, then constant, a straight line or a half cosine.

  Update i (from 0) of a warm-up of w updates uses the rate `learning_rate * (i
  + 1) / w`, so the first update has a positive rate.

  Args:
    learning_rate: the peak.
    total_steps: updates in the run, at least 1.
    warmup_fraction: fraction of the updates that warm up, 0 to 1.
    decay: "constant", or "linear" or "cosine" down to `final_fraction *
      learning_rate`.
    final_fraction: final rate of the decay, as a fraction of the peak.

  Returns:
    A function from the update's number to its learning rate.

  Raises:
    ValueError: an argument out of its range.
  """
  if total_steps < 1 or not 0 <= warmup_fraction <= 1:
    raise ValueError(
      "A schedule needs total_steps >= 1 and 0 <= warmup_fraction <= 1, got "
      f"{total_steps} and {warmup_fraction}."
    )
  if decay not in DECAYS:
    raise ValueError(f"Unknown decay {decay!r}. Use one of {DECAYS}.")
  warmup = round(total_steps * warmup_fraction)
  cooling = max(total_steps - warmup, 1)

  def rate(step: jax.Array | int) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
    if decay == "constant":
      return learning_rate * rise
    progress = jnp.clip((step - warmup) / cooling, 0.0, 1.0)
    left = 1 - progress
    if decay == "cosine":
      left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    fall = final_fraction + (1 - final_fraction) * left
    return learning_rate * rise * fall

  return rate


def build(
  name: str,
  learning_rate: optax.Schedule | float,
  *,
  b2: float = 0.999,
  weight_decay: float = 0.01,
  max_grad_norm: float | None = 1.0,
  moment_dtype: str = "float32",
  matrices: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  """The optimizer of that name.

      adamw      arXiv 1711.05101
      adafactor  arXiv 1804.04235: factored second moments, no first moment;
                 the learning rate is absolute, not relative to the parameters
      lion       arXiv 2302.06675: the sign of a momentum; its learning rate is
                 usually 3 to 10 times lower than AdamW's
      muon       arXiv 2502.16982: orthogonalised momentum of the matrices,
                 scaled to AdamW's size; AdamW for all other parameters

  Args:
    name: one of `NAMES`.
    learning_rate: a schedule of the update's number, or a constant.
    b2: Adam's decay of the second moment; lion and adafactor have their own.
    weight_decay: decoupled, multiplied by the learning rate.
    max_grad_norm: gradients are clipped to this global norm; None turns
      clipping off.
    moment_dtype: "float32", or "bfloat16" for half the memory of the moments,
      which adafactor refuses.
    matrices: of muon: from the parameters to a tree of (input axes, output
      axes) of each matrix, None for a parameter that is none; see
      `models.decoder.matrix_axes`.

  Raises:
    ValueError: an unknown name or moment_dtype, bfloat16 moments of adafactor,
      or muon without `matrices`.
  """
  if name not in NAMES:
    raise ValueError(f"Unknown optimizer {name!r}. Use one of {(*NAMES,)}.")
  check_moments(name, moment_dtype)
  if name == "adamw":
    return adamw(
      learning_rate,
      b2=b2,
      weight_decay=weight_decay,
      max_grad_norm=max_grad_norm,
      moment_dtype=moment_dtype,
    )
  if name == "adafactor":
    unclipped = optax.chain(
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
      optax.add_decayed_weights(weight_decay),
      optax.scale_by_learning_rate(learning_rate),
    )
  elif name == "lion":
    unclipped = optax.lion(
      learning_rate, mu_dtype=moment_dtype, weight_decay=weight_decay
    )
  else:
    unclipped = contrib.muon(
      learning_rate,
      mu_dtype=moment_dtype,
      weight_decay=weight_decay,
      adam_b2=b2,
      adam_weight_decay=weight_decay,
      muon_weight_dimension_numbers=_dimension_numbers(matrices),
      consistent_rms=_MUON_RMS,
    )
  return _clipped(unclipped, max_grad_norm)


def adamw(
  learning_rate: optax.Schedule | float,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  max_grad_norm: float | None = 1.0,
  decay_matrices_only: bool = False,
  moment_dtype: str = "float32",
) -> optax.GradientTransformation:
  """AdamW (arXiv 1711.05101) after clipping the global gradient norm.

  By default weight decay applies to every parameter, including norms, as in
  torch's AdamW with one parameter group, which the paper uses.

  Args:
    learning_rate: a schedule of the update's number, or a constant.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled, multiplied by the learning rate.
    max_grad_norm: gradients are clipped to this global norm; None turns
      clipping off.
    decay_matrices_only: exclude leaves with fewer than 2 axes. The norms of
      stacked layers have 2 axes, so they still decay.
    moment_dtype: "float32", or "bfloat16" for half the memory of both moments.

  Returns:
    An optax transformation.

  Raises:
    ValueError: an unknown moment_dtype.
  """
  check_moments("adamw", moment_dtype)
  mask = _has_two_axes if decay_matrices_only else None
  scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  if moment_dtype == "bfloat16":
    scale = _in_bfloat16(scale)
  adam = optax.chain(
    scale,
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  return _clipped(adam, max_grad_norm)


def _clipped(
  unclipped: optax.GradientTransformation, max_grad_norm: float | None
) -> optax.GradientTransformation:
  if max_grad_norm is None:
    return unclipped
  return optax.chain(optax.clip_by_global_norm(max_grad_norm), unclipped)


def check_moments(name: str, moment_dtype: str) -> None:
  """Refuses a dtype in which an optimizer cannot keep its moments.

  Args:
    name: one of `NAMES`.
    moment_dtype: of the config.

  Raises:
    ValueError: an unknown dtype, or one that is not float32 for adafactor.
  """
  if moment_dtype not in MOMENT_DTYPES:
    raise ValueError(
      f"An optimizer's moments are kept in one of {MOMENT_DTYPES}, got "
      f"{moment_dtype!r}. Change moment_dtype of the stage's config."
    )
  if name == "adafactor" and moment_dtype != "float32":
    raise ValueError(
      "adafactor keeps sums over rows and columns in place of moments, small "
      f"already and in float32; got moment_dtype {moment_dtype!r}. Set it to "
      "'float32'."
    )


def _dimension_numbers(
  matrices: Callable[[Any], Any] | None,
) -> Callable[[Any], Any]:
  """Muon's description of the matrices; None where AdamW is used."""
  if matrices is None:
    raise ValueError(
      "muon orthogonalises matrices and must know them. Pass matrices=, for "
      "example models.decoder.matrix_axes."
    )
  # The matrices alone arrive in an update; optax's masks are tuples as well.
  return lambda params: jax.tree.map(
    lambda axes: contrib.MuonDimensionNumbers(*axes),
    matrices(params),
    is_leaf=lambda x: type(x) is tuple,
  )


def _has_two_axes(params: optax.Params) -> optax.Params:
  return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _in_bfloat16(
  scale: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Adam that computes in float32 and keeps its moments in bfloat16.

  Stochastic rounding keeps small changes on average; with rounding to nearest,
  0.999 v would become v again and never decay.
  """

  def cast(state: Any, dtype: Any) -> Any:
    mu, nu = jax.tree.map(lambda x: x.astype(dtype), (state.mu, state.nu))
    return state._replace(mu=mu, nu=nu)

  def init(params: optax.Params) -> Any:
    return cast(scale.init(params), jnp.bfloat16)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = scale.update(updates, cast(state, jnp.float32), params)
    key = jax.random.fold_in(jax.random.key(0), state.count)
    moments, shape = jax.tree.flatten((state.mu, state.nu))
    mu, nu = jax.tree.unflatten(
      shape,
      [
        _stochastic_round(x, jax.random.fold_in(key, i))
        for i, x in enumerate(moments)
      ],
    )
    return updates, state._replace(mu=mu, nu=nu)

  return optax.GradientTransformation(init, update)


def _stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
  """Stochastic rounding of float32 to bfloat16; the mean is x."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  rounded = ((bits + noise) >> 16).astype(jnp.uint16)
  return jax.lax.bitcast_convert_type(rounded, jnp.bfloat16)
