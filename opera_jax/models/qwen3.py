"""Qwen3, the dense decoder, in one file (Flax NNX, layers stacked and scanned).

The model maps tokens to final hidden states and never builds logits: the head
is a matrix that `kernels.token_logprob` (scoring) and the sampler multiply by.
How a token sees others is an argument (`opera_jax.models.attention`), so that
training, prefixes with continuations, prefill and decode are one set of layers.

Shape key: B rows, T tokens, D hidden, N query heads, K key/value heads,
H head dimension, F feed-forward, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from opera_jax.models import (
  self_attention,
  small_batch_matmul,
  windowed_attention,
)
from opera_jax.sharding import rules

Attend = Callable[..., tuple[jax.Array, Any]]

REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "attention": jax.checkpoint_policies.save_only_these_names(
    windowed_attention.OUTPUT
  ),
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(windowed_attention.OUTPUT),
  ),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The published fields of a Qwen3 `config.json`, under our names."""

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  intermediate_size: int
  rope_theta: float = 1_000_000.0
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = True
  dtype: str = "float32"
  # Products and attention are kept for the backward pass, the rest is made
  # anew: less memory traffic than keeping all.
  remat: str = "dots"
  attention: str = ""  # see `self_attention`; "" goes by the device

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"Grouped-query attention shares each key head evenly, got heads="
        f"{self.num_attention_heads}, "
        f"num_key_value_heads={self.num_key_value_heads}. Make "
        "model.num_attention_heads a multiple of model.num_key_value_heads."
      )
    if self.head_dim % 2:
      raise ValueError(
        f"Rotary embedding turns pairs of channels, got head_dim="
        f"{self.head_dim}. Make model.head_dim even."
      )
    if self.remat not in REMAT:
      raise ValueError(
        f"Unknown model.remat {self.remat!r}; use one of {sorted(REMAT)}."
      )
    if self.attention not in ("", *self_attention.IMPLEMENTATIONS):
      raise ValueError(
        f"Unknown model.attention {self.attention!r}; use one of "
        f"{self_attention.IMPLEMENTATIONS}, or '' to go by the device."
      )


# Logical axes of every parameter; layers carry a leading "layers" axis.
AXES = {
  "embed": ("vocab", "embed"),
  "head": ("embed", "vocab"),
  "final_norm": ("norm",),
  "layers/input_norm": ("layers", "norm"),
  "layers/post_norm": ("layers", "norm"),
  "layers/attention/q": ("layers", "embed", "heads", "head_dim"),
  "layers/attention/k": ("layers", "embed", "kv_heads", "head_dim"),
  "layers/attention/v": ("layers", "embed", "kv_heads", "head_dim"),
  "layers/attention/o": ("layers", "heads", "head_dim", "embed"),
  "layers/attention/q_norm": ("layers", "head_dim"),
  "layers/attention/k_norm": ("layers", "head_dim"),
  "layers/mlp/gate": ("layers", "embed", "mlp"),
  "layers/mlp/up": ("layers", "embed", "mlp"),
  "layers/mlp/down": ("layers", "mlp", "embed"),
}


def rms_norm(
  x: jax.Array, scale: jax.Array, epsilon: float, *, ordered: bool = False
) -> jax.Array:
  """x / rms(x) * scale over the last axis, statistics in float32.

  Args:
    x: floating, [..., D].
    scale: [D].
    epsilon: what is added to the mean square.
    ordered: adds the squares up in an order that goes by D alone; XLA's own
      goes by the shape of the whole array.
  """
  x32 = x.astype(jnp.float32)
  square = x32 * x32
  while ordered and square.shape[-1] % 2 == 0:
    half = square.shape[-1] // 2
    square = square[..., :half] + square[..., half:]
  mean = jnp.sum(square, axis=-1, keepdims=True) / x.shape[-1]
  normed = (x32 * jax.lax.rsqrt(mean + epsilon)).astype(x.dtype)
  scale = scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)
  return normed * scale


def rope_tables(
  position_BT: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [B, T, 1, H / 2] of rotary embedding, float32."""
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency = 1.0 / theta**exponent
  angle = position_BT[..., None, None].astype(jnp.float32) * frequency.reshape(
    1, 1, 1, -1
  )
  return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates channel i with channel i + H / 2 (the Hugging Face layout)."""
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
    [a * cos - b * sin, b * cos + a * sin], axis=-1
  ).astype(x_BTNH.dtype)


class Arithmetic(NamedTuple):
  """How a layer computes; products are called like `jnp.tensordot`."""

  norm: Callable[..., jax.Array] = rms_norm
  mix: Callable[..., jax.Array] = jnp.tensordot  # attention's products
  project: Callable[..., jax.Array] = (
    small_batch_matmul.project
  )  # the feed-forward's


USUAL = Arithmetic()
# Few tokens on a CPU, without gradients: numbers of a token that do not change
# with how many there are.
FEW = Arithmetic(
  functools.partial(rms_norm, ordered=True),
  small_batch_matmul.small_batch_matmul,
  small_batch_matmul.small_batch_matmul,
)


def _normal(key, shape, fan_in):
  return nnx.Param(jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5)


class Attention(nnx.Module):
  """Grouped-query attention with normed queries and keys."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    D, N, K, H = (
      config.hidden_size,
      config.num_attention_heads,
      config.num_key_value_heads,
      config.head_dim,
    )
    self.config = config
    self.q = _normal(rngs.params(), (D, N, H), D)
    self.k = _normal(rngs.params(), (D, K, H), D)
    self.v = _normal(rngs.params(), (D, K, H), D)
    self.o = _normal(
      rngs.params(), (N, H, D), N * H * 2 * config.num_hidden_layers
    )
    self.q_norm = nnx.Param(jnp.ones((H,)))
    self.k_norm = nnx.Param(jnp.ones((H,)))

  def __call__(self, x_BTD, cos, sin, attend: Attend, how: Arithmetic):
    epsilon, dtype = self.config.rms_norm_eps, x_BTD.dtype
    norm = how.norm
    q_BTNH = how.mix(x_BTD, self.q[...].astype(dtype), 1)
    k_BTKH = how.mix(x_BTD, self.k[...].astype(dtype), 1)
    v_BTKH = how.mix(x_BTD, self.v[...].astype(dtype), 1)
    q_BTNH = apply_rope(norm(q_BTNH, self.q_norm[...], epsilon), cos, sin)
    k_BTKH = apply_rope(norm(k_BTKH, self.k_norm[...], epsilon), cos, sin)
    q_BTNH = rules.constrain(q_BTNH, ("batch", "length", "heads", None))
    out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH)
    return how.mix(out_BTNH, self.o[...].astype(dtype), 2), cache


class MLP(nnx.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    D, F = config.hidden_size, config.intermediate_size
    self.gate = _normal(rngs.params(), (D, F), D)
    self.up = _normal(rngs.params(), (D, F), D)
    self.down = _normal(rngs.params(), (F, D), F * 2 * config.num_hidden_layers)

  def __call__(self, x_BTD, how: Arithmetic):
    dtype = x_BTD.dtype
    gate_BTF = jax.nn.silu(how.project(x_BTD, self.gate[...].astype(dtype)))
    hidden_BTF = gate_BTF * how.project(x_BTD, self.up[...].astype(dtype))
    hidden_BTF = rules.constrain(hidden_BTF, ("batch", "length", "mlp"))
    return how.project(hidden_BTF, self.down[...].astype(dtype))


class Block(nnx.Module):
  """Pre-norm decoder layer."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.input_norm = nnx.Param(jnp.ones((config.hidden_size,)))
    self.attention = Attention(config, rngs=rngs)
    self.post_norm = nnx.Param(jnp.ones((config.hidden_size,)))
    self.mlp = MLP(config, rngs=rngs)

  def __call__(self, x_BTD, cos, sin, attend: Attend, how: Arithmetic = USUAL):
    epsilon = self.config.rms_norm_eps
    normed = how.norm(x_BTD, self.input_norm[...], epsilon)
    mixed, cache = self.attention(normed, cos, sin, attend, how)
    x_BTD = x_BTD + mixed
    normed = how.norm(x_BTD, self.post_norm[...], epsilon)
    return x_BTD + self.mlp(normed, how), cache


class Qwen3(nnx.Module):
  """Tokens to final hidden states; see `head_matrix` for the output head."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.embed = nnx.Param(
      jax.random.normal(
        rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32
      )
      * 0.02
    )

    @nnx.vmap(in_axes=0, out_axes=0)
    def create(key):
      return Block(config, rngs=nnx.Rngs(params=key))

    self.layers = create(
      jax.random.split(rngs.params(), config.num_hidden_layers)
    )
    self.final_norm = nnx.Param(jnp.ones((config.hidden_size,)))
    if not config.tie_word_embeddings:
      self.head = _normal(
        rngs.params(),
        (config.hidden_size, config.vocab_size),
        config.hidden_size,
      )

  def __call__(
    self,
    token_BT: jax.Array,
    position_BT: jax.Array,
    attend: Attend,
    cache: Any = None,
    layers: Sequence[Any] | None = None,
  ) -> tuple[jax.Array, Any]:
    """Runs all layers.

    Args:
      token_BT: int32 token ids.
      position_BT: int32 rotary positions.
      attend: `attend(cache, layer, q, k, v) -> (out, cache)`, one of
        `opera_jax.models.attention`.
      cache: what `attend` carries from layer to layer; None for none.
      layers: what `apart` gave, to be run one after the other, without
        gradients; None scans.

    Returns:
      Normed hidden states [B, T, D] in the compute dtype, and the cache.
    """
    config = self.config
    x_BTD = small_batch_matmul.look_up(self.embed[...], token_BT, config.dtype)
    x_BTD = rules.constrain(x_BTD, ("batch", "length", None))
    cos, sin = rope_tables(position_BT, config.head_dim, config.rope_theta)
    graphdef, stacked = self._layers()
    how = USUAL if layers is None else FEW

    def layer(carry, inputs):
      x_BTD, cache = carry
      index, params = inputs
      block = nnx.merge(graphdef, params)
      x_BTD, cache = block(
        x_BTD, cos, sin, functools.partial(attend, cache, index), how
      )
      return (rules.constrain(x_BTD, ("batch", "length", None)), cache), None

    if layers is None:
      if REMAT[config.remat] is not None:
        layer = jax.checkpoint(
          layer, policy=REMAT[config.remat], prevent_cse=False
        )
      (x_BTD, cache), _ = jax.lax.scan(
        layer, (x_BTD, cache), (jnp.arange(config.num_hidden_layers), stacked)
      )
    else:
      for index, params in enumerate(layers):
        params = jax.tree.map(
          lambda x, like: x.T.reshape(like.shape[1:]), params, stacked
        )
        (x_BTD, cache), _ = layer((x_BTD, cache), (index, params))
    x_BTD = how.norm(x_BTD, self.final_norm[...], config.rms_norm_eps)
    return x_BTD, cache

  def _layers(self):
    """The layers' graph and stacked parameters, in the compute dtype."""
    graphdef, stacked = nnx.split(self.layers)
    # Before the scan, so that devices send one another the compute dtype.
    dtype = self.config.dtype
    return graphdef, jax.tree.map(lambda x: x.astype(dtype), stacked)

  def apart(self) -> list[Any]:
    """The layers' parameters, each layer's on its own.

    A loop around `__call__` that is given them does not cut every layer out of
    the stack in each of its turns. The program grows with the depth. Each
    weight is a matrix whose last axis is summed over, as
    `small_batch_matmul.few` likes it.
    """
    _, stacked = self._layers()

    def one(index):
      return jax.tree_util.tree_map_with_path(
        lambda path, x: _input_last(
          x[index], AXES["layers/" + path_name(path)][1:]
        ),
        stacked,
      )

    return [one(index) for index in range(self.config.num_hidden_layers)]

  def head_matrix(self) -> tuple[jax.Array, bool]:
    """The output head, and whether it is [V, D] (tied) rather than [D, V]."""
    if self.config.tie_word_embeddings:
      return self.embed[...], True
    return self.head[...], False


def _input_last(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """A layer's weight as a matrix [output, input]; a norm as it is."""
  if len(axes) == 1:
    return x
  # "embed" is all of a projection's input, or all of its output.
  lead = 1 if axes[0] == "embed" else len(axes) - 1
  return x.reshape(math.prod(x.shape[:lead]), -1).T


def create(config: Config, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
  """A randomly initialised model, split once: (graphdef, params)."""
  return nnx.split(Qwen3(config, rngs=nnx.Rngs(params=seed)))


def abstract(config: Config) -> tuple[nnx.GraphDef, nnx.State]:
  """Like `create` without allocating: params are ShapeDtypeStructs."""
  return nnx.split(
    nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(params=0)))
  )


def parameter_count(params: Any) -> int:
  """Number of scalars in a tree."""
  return sum(x.size for x in jax.tree.leaves(params))


def path_name(path: tuple[Any, ...]) -> str:
  """The AXES key of a tree path, e.g. `layers/attention/q`."""
  keys = []
  for entry in path:
    key = getattr(entry, "key", getattr(entry, "name", None))
    if key is not None and key not in ("value", "raw_value"):
      keys.append(str(key))
  return "/".join(keys)


def logical_axes(params: Any) -> Any:
  """A tree like `params` whose leaves are tuples of logical axis names."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: AXES[path_name(path)], params
  )
