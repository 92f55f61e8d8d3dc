"""The decoder with unstacked layers: a CPU decodes one token per slot with it.

`decoder.Decoder` scans over layers that are stacked in one array. On a CPU
every decoding step would copy each layer's weights and caches out of their
stacks. Here each layer has arrays of its own and the layers run in a Python
loop, so the compiled program grows with the number of layers.

The equations are those of `decoder.Block`, without gradients. The matmuls and
the RMSNorm sum in an order that does not depend on how many tokens are computed
together, so that a sample's log-probabilities do not depend on its neighbours
(see `small_batch_matmul`).

Shape key: B prompt slots and S slots of each, or B compacted active slots and
S = 1; D hidden, N query heads, K key/value heads, H head dimension,
F feed-forward, V vocabulary, L layers, X tokens.
"""

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import struct

from opera_jax.models import decoder, sliding_window, small_batch_matmul
from opera_jax.sharding import rules


@struct.dataclass
class Layer:
  """Weights of one layer; matrices are [outputs, inputs]."""

  input_norm: jax.Array  # [D]
  q: jax.Array  # [N * H, D]
  k: jax.Array  # [K * H, D]
  v: jax.Array  # [K * H, D]
  o: jax.Array  # [D, N * H]
  post_norm: jax.Array  # [D]
  gate: jax.Array  # [F, D]
  up: jax.Array  # [F, D]
  down: jax.Array  # [D, F]
  q_bias: jax.Array | None  # [N, H]
  k_bias: jax.Array | None  # [K, H]
  v_bias: jax.Array | None  # [K, H]
  q_norm: jax.Array | None  # [H]
  k_norm: jax.Array | None  # [H]
  attention_out_norm: jax.Array | None  # [D]
  mlp_out_norm: jax.Array | None  # [D]


def unstack_layers(model: decoder.Decoder) -> list[Layer]:
  """Copies every layer's weights out of the stacks, in the compute dtype.

  Args:
    model: with weights stacked over layers.

  Returns:
    L layers.

  Raises:
    ValueError: a model with LoRA adapters, which these layers do not have.
  """
  if model.config.lora is not None:
    raise ValueError(
      "A CPU decodes a model without LoRA adapters beside its weights. Merge "
      "them first (models.lora.merge)."
    )
  dtype = model.config.dtype
  stacked = model.layers
  attention, mlp = stacked.attention, stacked.mlp

  def unstack(index: int) -> Layer:
    def matrix(weights: Any, pattern: str) -> jax.Array:
      weight = weights[...].astype(dtype)[index]
      return einops.rearrange(weight, pattern)

    def vector(module: Any, name: str) -> jax.Array | None:
      """A bias or a norm; None if the model has none."""
      weights = getattr(module, name, None)
      return None if weights is None else weights[...].astype(dtype)[index]

    return Layer(
      input_norm=stacked.input_norm[...].astype(dtype)[index],
      q=matrix(attention.q, "D N H -> (N H) D"),
      k=matrix(attention.k, "D K H -> (K H) D"),
      v=matrix(attention.v, "D K H -> (K H) D"),
      o=matrix(attention.o, "N H D -> D (N H)"),
      post_norm=stacked.post_norm[...].astype(dtype)[index],
      gate=matrix(mlp.gate, "D F -> F D"),
      up=matrix(mlp.up, "D F -> F D"),
      down=matrix(mlp.down, "F D -> D F"),
      **{
        name: vector(attention, name)
        for name in ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm")
      },
      **{
        name: vector(stacked, name)
        for name in ("attention_out_norm", "mlp_out_norm")
      },
    )

  return [unstack(index) for index in range(model.config.num_hidden_layers)]


def hidden_states(
  model: decoder.Decoder,
  layers: list[Layer],
  token_BS: jax.Array,
  position_BS: jax.Array,
  attend: decoder.Attend,
  cache: Any,
) -> tuple[jax.Array, Any]:
  """Runs all layers on one new token of every slot, like `Decoder.__call__`.

  Args:
    model: whose embedding and final norm are used.
    layers: from `unstack_layers`.
    token_BS: int32 token ids.
    position_BS: int32 rotary positions.
    attend: `attention.decode(...)`; it is called with the layer's index.
    cache: key/value caches with unstacked layers.

  Returns:
    Normed hidden states [B, S, D] in the compute dtype, and the caches.
  """
  config = model.config
  x_BSD = decoder.embed_tokens(config, model.embed[...], token_BS)
  everything, local = decoder.rope_tables(config, position_BS)
  norm = functools.partial(
    rms_norm, epsilon=config.rms_norm_eps, offset=config.norm_offset
  )
  for index, layer in enumerate(layers):
    rotation, window = everything, None
    if config.sliding_window and sliding_window.slides(
      index, config.sliding_window_pattern
    ):
      rotation = local
      window = sliding_window.SlidingWindow(config.sliding_window)
    normed_BSD = norm(x_BSD, layer.input_norm)
    q_BSNH, k_BSKH, v_BSKH = _project_qkv(config, layer, normed_BSD, rotation)
    out_BSNH, cache = attend(cache, index, q_BSNH, k_BSKH, v_BSKH, window)
    out_BSX = einops.rearrange(out_BSNH, "B S N H -> B S (N H)")
    out_BSD = small_batch_matmul.small_batch_matmul(out_BSX, layer.o)
    if layer.attention_out_norm is not None:
      out_BSD = norm(out_BSD, layer.attention_out_norm)
    x_BSD = x_BSD + out_BSD
    out_BSD = _mlp(config, layer, norm(x_BSD, layer.post_norm))
    if layer.mlp_out_norm is not None:
      out_BSD = norm(out_BSD, layer.mlp_out_norm)
    x_BSD = rules.constrain(x_BSD + out_BSD, ("batch", "length", None))
  return norm(x_BSD, model.final_norm[...]), cache


def logits(
  hidden_XD: jax.Array, head_DV: jax.Array, *, tied: bool
) -> jax.Array:
  """Multiplies hidden states by the output head.

  A tied head is the transpose of the embedding [V, D], which
  `small_batch_matmul` reads as it is stored. An untied head is stored as [D, V]
  and would need a transpose each step, so it takes a plain matmul.

  Args:
    hidden_XD: normed hidden states.
    head_DV: the output head; the decode loop should transpose a tied one
      outside of the loop.
    tied: whether the head is the embedding.

  Returns:
    float32 [X, V].
  """
  head_DV = head_DV.astype(hidden_XD.dtype)
  if tied:
    return small_batch_matmul.small_batch_matmul(
      hidden_XD, head_DV.T, preferred_element_type=jnp.float32
    )
  return jnp.tensordot(
    hidden_XD, head_DV, 1, preferred_element_type=jnp.float32
  )


def rms_norm(
  x: jax.Array, weight: jax.Array, epsilon: float, *, offset: bool = False
) -> jax.Array:
  """`decoder.rms_norm` whose order of summation depends on D alone.

  XLA's own order depends on the shape of the whole array.

  Args:
    x: floating, [..., D].
    weight: [D].
    epsilon: added to the mean square.
    offset: multiply by 1 + weight.

  Returns:
    Like x.
  """
  x32 = x.astype(jnp.float32)
  square = x32 * x32
  while square.shape[-1] % 2 == 0:
    half = square.shape[-1] // 2
    square = square[..., :half] + square[..., half:]
  mean = jnp.sum(square, axis=-1, keepdims=True) / x.shape[-1]
  normed32 = x32 * jax.lax.rsqrt(mean + epsilon)
  return decoder.apply_norm(x, normed32, weight, offset)


def _project_qkv(
  config: decoder.Config,
  layer: Layer,
  x_BSD: jax.Array,
  rotation: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries [B, S, N, H], keys and values [B, S, K, H] of the new tokens."""

  def project(
    weight: jax.Array, bias: jax.Array | None, norm: jax.Array | None = None
  ) -> jax.Array:
    out = einops.rearrange(
      small_batch_matmul.small_batch_matmul(x_BSD, weight),
      "B S (heads H) -> B S heads H",
      H=config.head_dim,
    )
    if bias is not None:
      out = out + bias[None, None]
    if norm is not None:
      out = rms_norm(out, norm, config.rms_norm_eps, offset=config.norm_offset)
    return out

  q_BSNH = project(layer.q, layer.q_bias, layer.q_norm)
  k_BSKH = project(layer.k, layer.k_bias, layer.k_norm)
  q_BSNH, k_BSKH = decoder.rotate_queries_and_keys(
    config, q_BSNH, k_BSKH, rotation
  )
  q_BSNH = rules.constrain(q_BSNH, ("batch", "length", "heads", None))
  return q_BSNH, k_BSKH, project(layer.v, layer.v_bias)


def _mlp(config: decoder.Config, layer: Layer, x_BSD: jax.Array) -> jax.Array:
  """Gated MLP: down(activation(gate(x)) * up(x)), [B, S, D]."""
  matmul = small_batch_matmul.small_batch_matmul
  activation = decoder.ACTIVATIONS[config.hidden_act]
  hidden_BSF = activation(matmul(x_BSD, layer.gate)) * matmul(x_BSD, layer.up)
  hidden_BSF = rules.constrain(hidden_BSF, ("batch", "length", "mlp"))
  return matmul(hidden_BSF, layer.down)
