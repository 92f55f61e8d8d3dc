"""The dense decoder in one file (Flax NNX, layers stacked and scanned).

Qwen3, Qwen2, Llama, Phi-3 and Gemma 3 are this model with other values of
`Config`; `opera_jax.models.families` has the table of what a family changes.

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

from opera_jax.models import (
  linear,
  rope,
  self_attention,
  sliding_window,
  windowed_attention,
)
from opera_jax.models import lora as lora_lib
from opera_jax.sharding import rules

# attend(cache, layer, q, k, v, window) -> (out, cache), see `models.attention`.
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
  """Sizes under the names of `config.json`, and what the families change.

  A field that a family sets has the value of Qwen3 as its default.
  """

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
  max_position_embeddings: int = 40_960  # the context that it was trained for
  family: str = "qwen3"  # names its tensors, see `families`
  qk_norm: bool = True  # RMSNorm of each head's queries and keys
  qkv_bias: bool = False  # bias of the query, key and value projections
  hidden_act: str = "silu"  # of the MLP's gate
  norm_offset: bool = False  # norms multiply by 1 + weight
  output_norms: bool = False  # norms behind attention and MLP too
  embedding_scale: bool = False  # embeddings are multiplied by sqrt(D)
  query_scale: float = 0.0  # multiplies q.k; 0 is head_dim ** -0.5
  sliding_window: int = 0  # positions that a query sees; 0 is all
  # Every so-manieth layer sees all positions nevertheless; 0 is none.
  sliding_window_pattern: int = 0
  rope_local_theta: float = 0.0  # of layers with a window; 0 is rope_theta
  rope_scaling: rope.Scaling | None = None  # of layers that see everything
  # LongRoPE's set of factors for the whole run: short or long.
  rope_factors: str = "short"
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
    if self.hidden_act not in ACTIVATIONS:
      raise ValueError(
        f"Unknown model.hidden_act {self.hidden_act!r}; use one of "
        f"{sorted(ACTIVATIONS)}."
      )
    if min(self.sliding_window, self.sliding_window_pattern) < 0:
      raise ValueError(
        f"A window holds positions, got sliding_window={self.sliding_window}, "
        f"sliding_window_pattern={self.sliding_window_pattern}. Use 0 for no "
        "window."
      )
    if self.rope_factors not in rope.SETS:
      raise ValueError(
        f"LongRoPE has the factors {rope.SETS}, got model.rope_factors="
        f"{self.rope_factors!r}. Name one of them."
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


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

# Logical axes of every parameter; layers carry a leading "layers" axis.
AXES = {
  "embed": ("vocab", "embed"),
  "head": ("embed", "vocab"),
  "final_norm": ("norm",),
  "layers/input_norm": ("layers", "norm"),
  "layers/post_norm": ("layers", "norm"),
  "layers/attention_out_norm": ("layers", "norm"),
  "layers/mlp_out_norm": ("layers", "norm"),
  "layers/attention/q": ("layers", "embed", "heads", "head_dim"),
  "layers/attention/k": ("layers", "embed", "kv_heads", "head_dim"),
  "layers/attention/v": ("layers", "embed", "kv_heads", "head_dim"),
  "layers/attention/o": ("layers", "heads", "head_dim", "embed"),
  "layers/attention/q_bias": ("layers", "heads", "head_dim"),
  "layers/attention/k_bias": ("layers", "kv_heads", "head_dim"),
  "layers/attention/v_bias": ("layers", "kv_heads", "head_dim"),
  "layers/attention/q_norm": ("layers", "head_dim"),
  "layers/attention/k_norm": ("layers", "head_dim"),
  "layers/mlp/gate": ("layers", "embed", "mlp"),
  "layers/mlp/up": ("layers", "embed", "mlp"),
  "layers/mlp/down": ("layers", "mlp", "embed"),
}
AXES |= lora_lib.axes(AXES)


def rms_norm(
  x: jax.Array, weight: jax.Array, epsilon: float, *, offset: bool = False
) -> jax.Array:
  """x / rms(x) * weight over the last axis, statistics in float32.

  Args:
    x: floating, [..., D].
    weight: [D].
    epsilon: added to the mean square.
    offset: multiply by 1 + weight, in float32, as Gemma does.

  Returns:
    Like x.
  """
  x32 = x.astype(jnp.float32)
  mean = jnp.sum(x32 * x32, axis=-1, keepdims=True) / x.shape[-1]
  return apply_norm(x, x32 * jax.lax.rsqrt(mean + epsilon), weight, offset)


def apply_norm(
  x: jax.Array, normed32: jax.Array, weight: jax.Array, offset: bool
) -> jax.Array:
  """The normed float32 values times the weight (or 1 + it), in x's dtype."""
  weight = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
  if offset:
    return (normed32 * (1 + weight.astype(jnp.float32))).astype(x.dtype)
  return normed32.astype(x.dtype) * weight.astype(x.dtype)


def embed_tokens(
  config: Config, embed_VD: jax.Array, token_BT: jax.Array
) -> jax.Array:
  """Embeddings of tokens in the compute dtype, [B, T, D]."""
  x_BTD = linear.embedding_lookup(embed_VD, token_BT, config.dtype)
  if config.embedding_scale:
    x_BTD = x_BTD * jnp.asarray(config.hidden_size**0.5, config.dtype)
  return rules.constrain(x_BTD, ("batch", "length", None))


# Cosines and sines of layers that see everything, and of those with a window.
RopeTables = tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def rope_tables(config: Config, position_BT: jax.Array) -> RopeTables:
  """Rotary tables of both kinds of layers; see `rope.tables`."""
  theta, scaling = config.rope_theta, config.rope_scaling
  everything = rope.tables(
    position_BT,
    rope.frequencies(config.head_dim, theta, scaling, config.rope_factors),
    rope.amplitude(scaling, config.max_position_embeddings),
  )
  if not config.sliding_window or not config.rope_local_theta:
    return everything, everything
  local = rope.frequencies(config.head_dim, config.rope_local_theta)
  return everything, rope.tables(position_BT, local)


def rotate_queries_and_keys(
  config: Config,
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  rotation: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Rotary embedding of both, and the queries scaled as the model asks.

  Attention multiplies scores by H ** -0.5; another scale goes to the queries.
  """
  q_BTNH, k_BTKH = (rope.apply(x, *rotation) for x in (q_BTNH, k_BTKH))
  if config.query_scale:
    q_BTNH = q_BTNH * (config.query_scale * config.head_dim**0.5)
  return q_BTNH, k_BTKH


def _normal(
  key: jax.Array, shape: tuple[int, ...], fan_in: int
) -> nnx.Param[jax.Array]:
  return nnx.Param(jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5)


def _norm(config: Config, size: int) -> nnx.Param[jax.Array]:
  """A norm's weight that multiplies by 1."""
  return nnx.Param(jnp.zeros(size) if config.norm_offset else jnp.ones(size))


class Attention(nnx.Module):
  """Grouped-query attention; queries and keys may be normed or biased."""

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
    if config.qkv_bias:
      self.q_bias = nnx.Param(jnp.zeros((N, H)))
      self.k_bias = nnx.Param(jnp.zeros((K, H)))
      self.v_bias = nnx.Param(jnp.zeros((K, H)))
    if config.qk_norm:
      self.q_norm = _norm(config, H)
      self.k_norm = _norm(config, H)

  def __call__(
    self,
    x_BTD: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    attend: Callable[..., tuple[jax.Array, Any]],
  ) -> tuple[jax.Array, Any]:
    """Attends with `attend(q, k, v)`, which also returns the cache."""
    config, dtype = self.config, x_BTD.dtype
    q_BTNH = lora_lib.project(self, "q", x_BTD)
    k_BTKH = lora_lib.project(self, "k", x_BTD)
    v_BTKH = lora_lib.project(self, "v", x_BTD)
    if config.qkv_bias:
      q_BTNH = q_BTNH + self.q_bias[...].astype(dtype)[None, None]
      k_BTKH = k_BTKH + self.k_bias[...].astype(dtype)[None, None]
      v_BTKH = v_BTKH + self.v_bias[...].astype(dtype)[None, None]
    if config.qk_norm:
      norm = functools.partial(
        rms_norm, epsilon=config.rms_norm_eps, offset=config.norm_offset
      )
      q_BTNH = norm(q_BTNH, self.q_norm[...])
      k_BTKH = norm(k_BTKH, self.k_norm[...])
    q_BTNH, k_BTKH = rotate_queries_and_keys(config, q_BTNH, k_BTKH, rotation)
    q_BTNH = rules.constrain(q_BTNH, ("batch", "length", "heads", None))
    out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH)
    return lora_lib.project(self, "o", out_BTNH), cache


class MLP(nnx.Module):
  """Gated MLP: down(activation(gate(x)) * up(x))."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    D, F = config.hidden_size, config.intermediate_size
    self.config = config
    self.gate = _normal(rngs.params(), (D, F), D)
    self.up = _normal(rngs.params(), (D, F), D)
    self.down = _normal(rngs.params(), (F, D), F * 2 * config.num_hidden_layers)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Computes [B, T, D]."""
    activation = ACTIVATIONS[self.config.hidden_act]
    gate_BTF = activation(lora_lib.project(self, "gate", x_BTD))
    hidden_BTF = gate_BTF * lora_lib.project(self, "up", x_BTD)
    hidden_BTF = rules.constrain(hidden_BTF, ("batch", "length", "mlp"))
    return lora_lib.project(self, "down", hidden_BTF)


class Block(nnx.Module):
  """Pre-norm decoder layer; its outputs may be normed too."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.input_norm = _norm(config, config.hidden_size)
    self.attention = Attention(config, rngs=rngs)
    self.post_norm = _norm(config, config.hidden_size)
    self.mlp = MLP(config, rngs=rngs)
    if config.output_norms:
      self.attention_out_norm = _norm(config, config.hidden_size)
      self.mlp_out_norm = _norm(config, config.hidden_size)
    lora_lib.attach(self, config.lora, rngs)

  def __call__(
    self,
    x_BTD: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    attend: Callable[..., tuple[jax.Array, Any]],
  ) -> tuple[jax.Array, Any]:
    """Attention and MLP, each behind an RMSNorm and added to its input."""
    config = self.config
    norm = functools.partial(
      rms_norm, epsilon=config.rms_norm_eps, offset=config.norm_offset
    )
    attended_BTD, cache = self.attention(
      norm(x_BTD, self.input_norm[...]), rotation, attend
    )
    if config.output_norms:
      attended_BTD = norm(attended_BTD, self.attention_out_norm[...])
    x_BTD = x_BTD + attended_BTD
    out_BTD = self.mlp(norm(x_BTD, self.post_norm[...]))
    if config.output_norms:
      out_BTD = norm(out_BTD, self.mlp_out_norm[...])
    return x_BTD + out_BTD, cache


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
    self.final_norm = _norm(config, config.hidden_size)
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
      attend: `attend(cache, layer, q, k, v, window) -> (out, cache)`, one of
        `opera_jax.models.attention`.
      cache: what `attend` carries from layer to layer, or None.

    Returns:
      Normed hidden states [B, T, D] in the compute dtype, and the cache.
    """
    config = self.config
    x_BTD = embed_tokens(config, self.embed[...], token_BT)
    everything, local = rope_tables(config, position_BT)
    graphdef, stacked = nnx.split(self.layers)
    # Cast before the scan, so that devices exchange weights in this dtype.
    stacked = jax.tree.map(lambda x: x.astype(config.dtype), stacked)

    def layer(carry: Any, inputs: Any) -> tuple[Any, None]:
      x_BTD, cache = carry
      index, params = inputs
      block = nnx.merge(graphdef, params)
      rotation, window = everything, None
      if config.sliding_window:
        slides = sliding_window.slides(index, config.sliding_window_pattern)
        window = sliding_window.SlidingWindow(config.sliding_window, slides)
        rotation = jax.tree.map(
          lambda x, y: jnp.where(slides, x, y), local, everything
        )
      x_BTD, cache = block(
        x_BTD,
        rotation,
        functools.partial(attend, cache, index, window=window),
      )
      return (rules.constrain(x_BTD, ("batch", "length", None)), cache), None

    if REMAT[config.remat] is not None:
      layer = jax.checkpoint(
        layer, policy=REMAT[config.remat], prevent_cse=False
      )
    (x_BTD, cache), _ = jax.lax.scan(
      layer, (x_BTD, cache), (jnp.arange(config.num_hidden_layers), stacked)
    )
    x_BTD = rms_norm(
      x_BTD,
      self.final_norm[...],
      config.rms_norm_eps,
      offset=config.norm_offset,
    )
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


def matrix_axes(params: Any) -> Any:
  """The input and the output axes of every matrix that multiplies states.

  Embedding and head, which look tokens up, are none; nor are norms, biases and
  a critic.

  Args:
    params: of a model or an adapter, or a tree that holds them as "policy".

  Returns:
    A tree like `params`: a pair of axes' tuples, such as ((1,), (2, 3)) of a
    query projection, or None.
  """
  groups = {"heads": "all", "kv_heads": "all", "head_dim": "all"}

  def visit(path: Any, _: Any) -> tuple[tuple[int, ...], ...] | None:
    names = AXES.get(path_name(path).removeprefix("policy/"), ())
    sides: dict[str, tuple[int, ...]] = {}
    for axis, name in enumerate(names):
      if name != "layers":
        side = groups.get(name, name)
        sides[side] = (*sides.get(side, ()), axis)
    if len(sides) != 2 or "vocab" in sides:
      return None
    return tuple(sides.values())

  return jax.tree_util.tree_map_with_path(visit, params)
