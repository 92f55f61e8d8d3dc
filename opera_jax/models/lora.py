"""LoRA: trained low-rank adapters beside frozen weights (arXiv 2106.09685).

A target's projection computes x W + (alpha / rank) (x A) B. W is frozen, A is
random and B zero at the start, so a new adapter changes nothing. An adapter
with B = 0 is also how a trained one is switched off: the frozen weights alone
are then the reference of KL, and no second copy of them is needed.

This is a file of its own because qwix 0.1.8, the library for it, does not fit:
it wraps every parameter and intercepts JAX's matmuls, and our layers are
stacked, cast as one tree and scanned, where the wrapper has no `astype` and new
parameters cannot be created inside the scan.

Shape key: L layers, D hidden, N query heads, H head dimension, r rank.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opera_jax.models import linear

DTYPES = ("float32", "bfloat16")
# Target -> the submodule of a layer that holds its weight.
_MODULES = {
  **dict.fromkeys(("q", "k", "v", "o"), "attention"),
  **dict.fromkeys(("gate", "up", "down"), "mlp"),
}
TARGETS = tuple(_MODULES)
# Axes of a weight that its projection contracts, the first ones; the output
# projection contracts heads and their channels.
_CONTRACTED = {**dict.fromkeys(TARGETS, 1), "o": 2}
_A, _B = "_lora_a", "_lora_b"


@dataclasses.dataclass(frozen=True)
class Settings:
  """An adapter's size and place, and how the frozen weights are stored."""

  rank: int
  alpha: float = 16.0
  targets: tuple[str, ...] = TARGETS
  base_dtype: str = "bfloat16"  # of the frozen weights; adapters are float32

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(
        f"A LoRA adapter has a rank of at least 1, got rank={self.rank}. Raise "
        "it; a config switches LoRA off with rank 0."
      )
    if not (math.isfinite(self.alpha) and self.alpha > 0):
      raise ValueError(
        f"LoRA scales by alpha / rank, got alpha={self.alpha}. Use a finite "
        "number above 0; twice the rank is usual."
      )
    if self.base_dtype not in DTYPES:
      raise ValueError(
        f"Frozen weights are stored in one of {DTYPES}, got base_dtype="
        f"{self.base_dtype!r}."
      )
    if not self.targets:
      raise ValueError(
        f"LoRA with rank {self.rank} has no targets, so nothing would be "
        f"trained. Name some of {', '.join(TARGETS)}, or set rank 0."
      )
    unknown = [_nearest(name) for name in self.targets if name not in TARGETS]
    if unknown:
      raise ValueError(
        f"LoRA targets that match no projection: {'; '.join(unknown)}. The "
        f"projections are {', '.join(TARGETS)}."
      )
    if len(set(self.targets)) < len(self.targets):
      raise ValueError(
        f"LoRA targets {self.targets} name a projection twice. Name each once."
      )

  @property
  def scale(self) -> float:
    """What an adapter's product is multiplied by."""
    return self.alpha / self.rank


def settings(
  rank: int, alpha: float, targets: Sequence[str], base_dtype: str
) -> Settings | None:
  """The settings of a config; None where rank 0 switches LoRA off.

  Args:
    rank: columns of A and rows of B.
    alpha: the product is scaled by alpha / rank.
    targets: some of TARGETS.
    base_dtype: "bfloat16" or "float32", of the frozen weights.

  Raises:
    ValueError: a rank below 0, no targets, or unknown ones.
  """
  if rank == 0:
    return None
  return Settings(rank, alpha, tuple(targets), base_dtype)


def axes(
  of_weights: Mapping[str, tuple[str, ...]],
) -> dict[str, tuple[str, ...]]:
  """Logical axes of all adapters, from those of their weights.

  Args:
    of_weights: logical axes by parameter name, stacked over layers.

  Returns:
    The same for the names `layers/attention/q_lora_a` and so on. A has the
    weight's input axes and B its output axes; the rank is not sharded.
  """
  found: dict[str, tuple[str, ...]] = {}
  for target, module in _MODULES.items():
    name = f"layers/{module}/{target}"
    layers, *rest = of_weights[name]
    count = _CONTRACTED[target]
    found[name + _A] = (layers, *rest[:count], "rank")
    found[name + _B] = (layers, "rank", *rest[count:])
  return found


def attach(
  layer: nnx.Module, settings: Settings | None, rngs: nnx.Rngs
) -> None:
  """Gives a decoder layer its adapters.

  A is uniform in +-1 / sqrt(inputs) as in peft, and B is zero.

  Args:
    layer: with `attention` and `mlp`, not stacked yet.
    settings: None attaches nothing.
    rngs: drawn from after the layer's own weights, which so do not depend on
      `settings`.
  """
  if settings is None:
    return
  for target in settings.targets:
    module = getattr(layer, _MODULES[target])
    shape, count = getattr(module, target).shape, _CONTRACTED[target]
    bound = math.prod(shape[:count]) ** -0.5
    a = jax.random.uniform(
      rngs.params(),
      (*shape[:count], settings.rank),
      jnp.float32,
      minval=-bound,
      maxval=bound,
    )
    b = jnp.zeros((settings.rank, *shape[count:]))
    setattr(module, target + _A, nnx.LoRAParam(a))
    setattr(module, target + _B, nnx.LoRAParam(b))
    module.lora_scale = settings.scale


def project(module: Any, target: str, x: jax.Array) -> jax.Array:
  """x times a weight, plus its adapter's product where it has one.

  Args:
    module: submodule of a layer, with the weight `target`.
    target: one of TARGETS.
    x: [..., inputs]; "o" takes [B, T, N, H].

  Returns:
    [..., outputs] in x's dtype, in which everything is computed.
  """
  count = _CONTRACTED[target]
  weight = getattr(module, target)[...].astype(x.dtype)
  if weight.ndim == 2:
    out = linear.matmul(x, weight)
  else:
    out = jnp.tensordot(x, weight, count)
  if not hasattr(module, target + _A):
    return out
  a = getattr(module, target + _A)[...].astype(x.dtype)
  b = getattr(module, target + _B)[...].astype(x.dtype)
  low = jnp.tensordot(x, a, count) * module.lora_scale
  return out + jnp.tensordot(low, b, 1)


def split(params: Any) -> tuple[Any, Any]:
  """Splits a model's parameters into (adapters, all others); copies nothing."""
  adapters, others = nnx.split_state(params, nnx.LoRAParam, ...)
  return adapters, others


def combine(adapters: Any, base: Any) -> Any:
  """The inverse of `split`; copies nothing."""
  return nnx.merge_state(base, adapters)


def switched_off(adapters: Any) -> Any:
  """Adapters like these that change nothing."""
  return jax.tree.map(jnp.zeros_like, adapters)


def targets_of(weights: Any, settings: Settings) -> Any:
  """The tree of those weights that an adapter changes."""
  return nnx.from_flat_state(
    [
      (path, weight)
      for path, weight in nnx.to_flat_state(weights)
      if path[-1] in settings.targets
    ]
  )


@functools.partial(jax.jit, static_argnames=("settings", "dtype"))
def merge(params: Any, settings: Settings, dtype: str) -> Any:
  """The parameters of the plain model that computes the same.

  Args:
    params: of a model with adapters.
    settings: of the adapters.
    dtype: of the result; W + (alpha / rank) A B is computed in float32.

  Returns:
    The tree of a model without LoRA.
  """
  adapters, base = split(params)
  low = dict(nnx.to_flat_state(adapters))
  merged = {}
  for path, weight in nnx.to_flat_state(base):
    value = weight[...]
    *outer, name = path
    a = low.get((*outer, f"{name}{_A}"))
    if a is not None:
      b = low[(*outer, f"{name}{_B}")]
      delta = jax.vmap(
        functools.partial(jnp.tensordot, axes=1, precision="highest")
      )(a[...], b[...])
      value = value.astype(jnp.float32) + settings.scale * delta
    merged[path] = weight.replace(value.astype(dtype))
  return nnx.from_flat_state(merged)


def _nearest(name: str) -> str:
  """A wrong target's name, and the one that was probably meant."""
  plain = name.removesuffix("_proj")
  close = (
    [plain] if plain in TARGETS else difflib.get_close_matches(name, TARGETS)
  )
  return f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else "")
