"""Qwen3, the dense decoder, in one file (Flax NNX, layers stacked and scanned).

The model maps tokens to final hidden states and never builds logits: the head
is a matrix that `kernels.token_logprob` (scoring) and the sampler multiply by.
Which tokens attend to which is an argument (`opera_jax.models.attention`), so
that training, prefixes with continuations, prefill and decode share one set of
layers. A CPU decodes with `opera_jax.models.decode_model`.

Shape key: B rows, T tokens, D hidden, N query heads, K key/value heads,
H head dimension, F feed-forward, V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opera_jax.models import linear, self_attention, windowed_attention
from opera_jax.models import lora as lora_lib
from opera_jax.sharding import rules

# attend(cache, layer, q, k, v) -> (out, cache), see `models.attention`.
Attend = Callable[..., tuple[jax.Array, Any]]

# What the backward pass keeps; it recomputes the rest (`jax.checkpoint`).
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
  # "dots" saves the matmuls and attention for the backward pass and
  # rematerialises the rest, which moves less memory than saving everything.
  remat: str = "dots"
  attention: str = ""  # see `self_attention`; "" lets the device choose
  lora: lora_lib.Settings | None = None  # adapters beside the projections

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
        f"Rotary embedding rotates pairs of channels, got head_dim="
        f"{self.head_dim}. Make model.head_dim even."
      )
    if self.remat not in REMAT:
      raise ValueError(
        f"Unknown model.remat {self.remat!r}; use one of {sorted(REMAT)}."
      )
    if self.attention not in ("", *self_attention.IMPLEMENTATIONS):
      raise ValueError(
        f"Unknown model.attention {self.attention!r}; use one of "
        f"{self_attention.IMPLEMENTATIONS}, or '' to let the device choose."
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
AXES |= lora_lib.axes(AXES)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """x / rms(x) * scale over the last axis, statistics in float32.

  Args:
    x: floating, [..., D].
    scale: [D].
    epsilon: added to the mean square.

  Returns:
    Like x.
  """
  x32 = x.astype(jnp.float32)
  mean = jnp.sum(x32 * x32, axis=-1, keepdims=True) / x.shape[-1]
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


def _normal(
  key: jax.Array, shape: tuple[int, ...], fan_in: int
) -> nnx.Param[jax.Array]:
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

  def __call__(
    self,
    x_BTD: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    attend: Callable[..., tuple[jax.Array, Any]],
  ) -> tuple[jax.Array, Any]:
    """Attends with `attend(q, k, v)`, which also returns the cache."""
    epsilon = self.config.rms_norm_eps
    q_BTNH = lora_lib.project(self, "q", x_BTD)
    k_BTKH = lora_lib.project(self, "k", x_BTD)
    v_BTKH = lora_lib.project(self, "v", x_BTD)
    q_BTNH = apply_rope(rms_norm(q_BTNH, self.q_norm[...], epsilon), cos, sin)
    k_BTKH = apply_rope(rms_norm(k_BTKH, self.k_norm[...], epsilon), cos, sin)
    q_BTNH = rules.constrain(q_BTNH, ("batch", "length", "heads", None))
    out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH)
    return lora_lib.project(self, "o", out_BTNH), cache


class MLP(nnx.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    D, F = config.hidden_size, config.intermediate_size
    self.gate = _normal(rngs.params(), (D, F), D)
    self.up = _normal(rngs.params(), (D, F), D)
    self.down = _normal(rngs.params(), (F, D), F * 2 * config.num_hidden_layers)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Computes [B, T, D]."""
    gate_BTF = jax.nn.silu(lora_lib.project(self, "gate", x_BTD))
    hidden_BTF = gate_BTF * lora_lib.project(self, "up", x_BTD)
    hidden_BTF = rules.constrain(hidden_BTF, ("batch", "length", "mlp"))
    return lora_lib.project(self, "down", hidden_BTF)


class Block(nnx.Module):
  """Pre-norm decoder layer."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.input_norm = nnx.Param(jnp.ones((config.hidden_size,)))
    self.attention = Attention(config, rngs=rngs)
    self.post_norm = nnx.Param(jnp.ones((config.hidden_size,)))
    self.mlp = MLP(config, rngs=rngs)
    lora_lib.attach(self, config.lora, rngs)

  def __call__(
    self,
    x_BTD: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    attend: Callable[..., tuple[jax.Array, Any]],
  ) -> tuple[jax.Array, Any]:
    """Attention and MLP, each behind an RMSNorm and added to its input."""
    epsilon = self.config.rms_norm_eps
    normed_BTD = rms_norm(x_BTD, self.input_norm[...], epsilon)
    attended_BTD, cache = self.attention(normed_BTD, cos, sin, attend)
    x_BTD = x_BTD + attended_BTD
    normed_BTD = rms_norm(x_BTD, self.post_norm[...], epsilon)
    return x_BTD + self.mlp(normed_BTD), cache


class Decoder(nnx.Module):
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
    def stacked_layers(key: jax.Array) -> Block:
      return Block(config, rngs=nnx.Rngs(params=key))

    self.layers = stacked_layers(
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
  ) -> tuple[jax.Array, Any]:
    """Runs all layers.

    Args:
      token_BT: int32 token ids.
      position_BT: int32 rotary positions.
      attend: `attend(cache, layer, q, k, v) -> (out, cache)`, one of
        `opera_jax.models.attention`.
      cache: what `attend` carries from layer to layer, or None.

    Returns:
      Normed hidden states [B, T, D] in the compute dtype, and the cache.
    """
    config = self.config
    x_BTD = linear.embedding_lookup(self.embed[...], token_BT, config.dtype)
    x_BTD = rules.constrain(x_BTD, ("batch", "length", None))
    cos, sin = rope_tables(position_BT, config.head_dim, config.rope_theta)
    graphdef, stacked = nnx.split(self.layers)
    # Cast before the scan, so that devices exchange weights in this dtype.
    stacked = jax.tree.map(lambda x: x.astype(config.dtype), stacked)

    def layer(carry: Any, inputs: Any) -> tuple[Any, None]:
      x_BTD, cache = carry
      index, params = inputs
      block = nnx.merge(graphdef, params)
      x_BTD, cache = block(
        x_BTD, cos, sin, functools.partial(attend, cache, index)
      )
      return (rules.constrain(x_BTD, ("batch", "length", None)), cache), None

    if REMAT[config.remat] is not None:
      layer = jax.checkpoint(
        layer, policy=REMAT[config.remat], prevent_cse=False
      )
    (x_BTD, cache), _ = jax.lax.scan(
      layer, (x_BTD, cache), (jnp.arange(config.num_hidden_layers), stacked)
    )
    x_BTD = rms_norm(x_BTD, self.final_norm[...], config.rms_norm_eps)
    return x_BTD, cache

  def head_matrix(self) -> tuple[jax.Array, bool]:
    """The output head, and whether it is [V, D] (tied) or [D, V] (untied)."""
    if self.config.tie_word_embeddings:
      return self.embed[...], True
    return self.head[...], False


def create(config: Config, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
  """A randomly initialised model, split once: (graphdef, params)."""
  return nnx.split(Decoder(config, rngs=nnx.Rngs(params=seed)))


def abstract(config: Config) -> tuple[nnx.GraphDef, nnx.State]:
  """Like `create` without allocating: params are ShapeDtypeStructs."""
  return nnx.split(
    nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
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
