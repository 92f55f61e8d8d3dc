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

from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import struct

from opera_jax.models import decoder, small_batch_matmul
from opera_jax.sharding import rules


@struct.dataclass
class Layer:
  """Weights of one layer; matrices are [outputs, inputs]."""

  input_norm: jax.Array  # [D]
  q: jax.Array  # [N * H, D]
  k: jax.Array  # [K * H, D]
  v: jax.Array  # [K * H, D]
  o: jax.Array  # [D, N * H]
  q_norm: jax.Array  # [H]
  k_norm: jax.Array  # [H]
  post_norm: jax.Array  # [D]
  gate: jax.Array  # [F, D]
  up: jax.Array  # [F, D]
  down: jax.Array  # [D, F]


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

    def scale(weights: Any) -> jax.Array:
      return weights[...].astype(dtype)[index]

    return Layer(
      input_norm=scale(stacked.input_norm),
      q=matrix(attention.q, "D N H -> (N H) D"),
      k=matrix(attention.k, "D K H -> (K H) D"),
      v=matrix(attention.v, "D K H -> (K H) D"),
      o=matrix(attention.o, "N H D -> D (N H)"),
      q_norm=scale(attention.q_norm),
      k_norm=scale(attention.k_norm),
      post_norm=scale(stacked.post_norm),
      gate=matrix(mlp.gate, "D F -> F D"),
      up=matrix(mlp.up, "D F -> F D"),
      down=matrix(mlp.down, "F D -> D F"),
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
  x_BSD = model.embed[...].astype(config.dtype)[token_BS]
  x_BSD = rules.constrain(x_BSD, ("batch", "length", None))
  rope = decoder.rope_tables(position_BS, config.head_dim, config.rope_theta)
  epsilon = config.rms_norm_eps
  for index, layer in enumerate(layers):
    normed_BSD = rms_norm(x_BSD, layer.input_norm, epsilon)
    q_BSNH, k_BSKH, v_BSKH = _project_qkv(layer, normed_BSD, rope, epsilon)
    out_BSNH, cache = attend(cache, index, q_BSNH, k_BSKH, v_BSKH)
    out_BSX = einops.rearrange(out_BSNH, "B S N H -> B S (N H)")
    x_BSD = x_BSD + small_batch_matmul.small_batch_matmul(out_BSX, layer.o)
    normed_BSD = rms_norm(x_BSD, layer.post_norm, epsilon)
    x_BSD = x_BSD + _mlp(layer, normed_BSD)
    x_BSD = rules.constrain(x_BSD, ("batch", "length", None))
  return rms_norm(x_BSD, model.final_norm[...], epsilon), cache


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


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """`decoder.rms_norm` whose order of summation depends on D alone.

  XLA's own order depends on the shape of the whole array.

  Args:
    x: floating, [..., D].
    scale: [D].
    epsilon: added to the mean square.

  Returns:
    Like x.
  """
  x32 = x.astype(jnp.float32)
  square = x32 * x32
  while square.shape[-1] % 2 == 0:
    half = square.shape[-1] // 2
    square = square[..., :half] + square[..., half:]
  mean = jnp.sum(square, axis=-1, keepdims=True) / x.shape[-1]
  normed = (x32 * jax.lax.rsqrt(mean + epsilon)).astype(x.dtype)
  scale = scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)
  return normed * scale


def _project_qkv(
  layer: Layer,
  x_BSD: jax.Array,
  rope: tuple[jax.Array, jax.Array],
  epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries [B, S, N, H], keys and values [B, S, K, H] of the new tokens."""
  H = layer.q_norm.shape[0]
  q_BSNH, k_BSKH, v_BSKH = (
    einops.rearrange(
      small_batch_matmul.small_batch_matmul(x_BSD, weight),
      "B S (heads H) -> B S heads H",
      H=H,
    )
    for weight in (layer.q, layer.k, layer.v)
  )
  q_BSNH = decoder.apply_rope(rms_norm(q_BSNH, layer.q_norm, epsilon), *rope)
  k_BSKH = decoder.apply_rope(rms_norm(k_BSKH, layer.k_norm, epsilon), *rope)
  q_BSNH = rules.constrain(q_BSNH, ("batch", "length", "heads", None))
  return q_BSNH, k_BSKH, v_BSKH


def _mlp(layer: Layer, x_BSD: jax.Array) -> jax.Array:
  """SwiGLU: down(silu(gate(x)) * up(x)), [B, S, D]."""
  matmul = small_batch_matmul.small_batch_matmul
  gate_BSF = jax.nn.silu(matmul(x_BSD, layer.gate))
  hidden_BSF = gate_BSF * matmul(x_BSD, layer.up)
  hidden_BSF = rules.constrain(hidden_BSF, ("batch", "length", "mlp"))
  return matmul(hidden_BSF, layer.down)
