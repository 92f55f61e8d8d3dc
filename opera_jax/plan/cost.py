"""FLOPs of the model's programs, from formulas.

A multiply-add is 2 FLOPs. Only matrix products count, and in attention only the
pairs that the mask allows. The compiler's own count is not used, because it
counts a scanned layer once.

Shape key: B rows, T tokens, S continuations, G tokens of a continuation.
"""

import dataclasses
import functools

import numpy as np

from opera_jax import structs
from opera_jax.models import decoder, lora

# What a layer's backward pass recomputes: (matrices, attention). "attention"
# saves only the output, so the kernel runs again for the softmax normalisers.
_RECOMPUTED = {
  "none": (0, 0),
  "dots": (0, 1),
  "attention": (1, 1),
  "full": (1, 1),
}


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of one call of a program, over all devices."""

  forward: float
  backward: float = 0.0
  recompute: float = 0.0  # forward FLOPs that the backward pass recomputes

  @property
  def total(self) -> float:
    """Total FLOPs."""
    return self.forward + self.backward + self.recompute


def layer_flops(config: decoder.Config) -> float:
  """Forward FLOPs of the matrices of all layers, per token, with those of LoRA
  adapters."""
  return _frozen_flops(config) + adapter_flops(config)


@functools.cache  # it traces the model
def adapter_flops(config: decoder.Config) -> float:
  """Forward FLOPs of all LoRA adapters, per token; 0 without LoRA."""
  if config.lora is None:
    return 0.0
  adapter = lora.split(decoder.abstract(config)[1])[0]
  return 2.0 * decoder.parameter_count(adapter)


def _frozen_flops(config: decoder.Config) -> float:
  """Forward FLOPs of the layers' own matrices, which LoRA freezes."""
  D, H = config.hidden_size, config.head_dim
  attention = (
    D * H * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
  )
  return (
    2.0
    * config.num_hidden_layers
    * (attention + 3 * D * config.intermediate_size)
  )


def attention_flops(config: decoder.Config, pairs: float) -> float:
  """Forward FLOPs of attention in all layers, for a number of visible pairs."""
  return (
    4.0
    * config.num_hidden_layers
    * config.num_attention_heads
    * config.head_dim
    * pairs
  )


def head_flops(config: decoder.Config) -> float:
  """Forward FLOPs of the output head, per token."""
  return 2.0 * config.hidden_size * config.vocab_size


def causal_pairs(T: int) -> float:
  """Number of (query, key) pairs of one causal row."""
  return T * (T + 1) / 2


def update(
  config: decoder.Config, B: int, T: int, S: int = 0, G: int = 0
) -> Flops:
  """Forward and backward over B rows of T tokens.

  If S is not 0, the T tokens of a row are a prompt without targets, followed by
  S completions of G tokens that share it.

  The backward pass of a matrix product takes two products, and one where LoRA
  freezes the matrix. Besides what `config.remat` recomputes, the head's logits
  and the attention scores are always recomputed, because they are never saved.
  """
  pairs = causal_pairs(T) + S * (G * T + causal_pairs(G))
  layers = B * (T + S * G) * layer_flops(config)
  attention = attention_flops(config, B * pairs)
  head = B * (S * G if S else T) * head_flops(config)
  again_layers, again_attention = _RECOMPUTED[config.remat]
  forward = layers + attention + head
  backward = 2 * forward
  if config.lora is not None:
    backward -= B * (T + S * G) * _frozen_flops(config) + head
  return Flops(
    forward,
    backward,
    again_layers * layers + again_attention * attention + attention / 2 + head,
  )


def rows_flops(config: decoder.Config, rows: structs.Batch) -> float:
  """Forward and backward FLOPs over the real tokens of packed rows.

  Recomputation does not count. The head runs on the targets.

  Args:
    config: of the model.
    rows: on the host.
  """
  tokens = pairs = 0.0
  for segments_T in np.asarray(rows.segments):
    _, sizes = np.unique(segments_T[segments_T > 0], return_counts=True)
    tokens += sizes.sum()
    pairs += sum(map(causal_pairs, sizes.tolist()))
    if rows.num_continuations:  # each one sees the prompt, the first segment
      pairs += float(sizes[:1].sum() * sizes[1:].sum())
  targets = float(np.sum(np.asarray(rows.loss_mask) > 0))
  forward = (
    tokens * layer_flops(config)
    + attention_flops(config, pairs)
    + targets * head_flops(config)
  )
  backward = 2 * forward
  if config.lora is not None:
    backward -= tokens * _frozen_flops(config) + targets * head_flops(config)
  return forward + backward


def score(config: decoder.Config, B: int, T: int, S: int, G: int) -> Flops:
  """Forward over B prefixes with S continuations each, which fork at their
  ends."""
  tokens = B * (T + S * G)
  pairs = B * (causal_pairs(T) + S * (G * T + causal_pairs(G)))
  return Flops(
    tokens * (layer_flops(config) + head_flops(config))
    + attention_flops(config, pairs)
  )


def prefill(config: decoder.Config, B: int, T: int) -> Flops:
  """Forward over B prompts; the head runs on their last tokens only."""
  return Flops(
    B * T * layer_flops(config)
    + attention_flops(config, B * causal_pairs(T))
    + B * head_flops(config)
  )


def decode(config: decoder.Config, rows: int, prefix: int, steps: int) -> Flops:
  """Decodes `steps` tokens of `rows` samples, each after `prefix` tokens."""
  pairs = rows * (steps * prefix + causal_pairs(steps))
  return Flops(
    rows * steps * (layer_flops(config) + head_flops(config))
    + attention_flops(config, pairs)
  )
