"""FLOPs of the model's programs, counted from the formulas.

A multiplication and its addition are 2 FLOPs; only matrix products count, and
of attention only the pairs that the mask lets through. The compiler's own
count takes a scanned layer once, so it is not used.

Shape key: B rows, T tokens, S continuations, G tokens of a continuation.
"""

import dataclasses

from opera_jax.models import qwen3

# What a layer's backward pass computes again: (matrices, attention). Under
# "attention" only the output is kept, so the kernel runs again for the
# normalisers of its softmax.
_RECOMPUTED = {
  "none": (0, 0),
  "dots": (0, 1),
  "attention": (1, 1),
  "full": (1, 1),
}


@dataclasses.dataclass(frozen=True)
class Flops:
  """Of one run of a program, over all devices."""

  forward: float
  backward: float = 0.0
  recompute: float = 0.0  # forward work that the backward pass does again

  @property
  def total(self) -> float:
    """All of it."""
    return self.forward + self.backward + self.recompute


def layer_flops(config: qwen3.Config) -> float:
  """Forward FLOPs of all layers' matrices, for one token."""
  D, H = config.hidden_size, config.head_dim
  attention = (
    D * H * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
  )
  return (
    2.0
    * config.num_hidden_layers
    * (attention + 3 * D * config.intermediate_size)
  )


def attention_flops(config: qwen3.Config, pairs: float) -> float:
  """Forward FLOPs of all layers' scores and sums over visible pairs."""
  return (
    4.0
    * config.num_hidden_layers
    * config.num_attention_heads
    * config.head_dim
    * pairs
  )


def head_flops(config: qwen3.Config) -> float:
  """Forward FLOPs of the output head, for one token."""
  return 2.0 * config.hidden_size * config.vocab_size


def causal_pairs(T: int) -> float:
  """(query, key) pairs of one causal row."""
  return T * (T + 1) / 2


def update(
  config: qwen3.Config, B: int, T: int, S: int = 0, G: int = 0
) -> Flops:
  """Forward and backward over B rows of T tokens.

  Where S is not 0, a row's T tokens are a prompt without targets, and S
  completions of G tokens go on from it.

  The backward pass of every product is two products. Beside what
  `config.remat` repeats, the head's logits and attention's scores are formed
  again, because neither is ever kept.
  """
  pairs = causal_pairs(T) + S * (G * T + causal_pairs(G))
  layers = B * (T + S * G) * layer_flops(config)
  attention = attention_flops(config, B * pairs)
  head = B * (S * G if S else T) * head_flops(config)
  again_layers, again_attention = _RECOMPUTED[config.remat]
  forward = layers + attention + head
  return Flops(
    forward,
    2 * forward,
    again_layers * layers + again_attention * attention + attention / 2 + head,
  )


def score(config: qwen3.Config, B: int, T: int, S: int, G: int) -> Flops:
  """Forward over B prefixes with S continuations each, forked at their ends."""
  tokens = B * (T + S * G)
  pairs = B * (causal_pairs(T) + S * (G * T + causal_pairs(G)))
  return Flops(
    tokens * (layer_flops(config) + head_flops(config))
    + attention_flops(config, pairs)
  )


def prefill(config: qwen3.Config, B: int, T: int) -> Flops:
  """Forward over B prompts; their last tokens alone meet the head."""
  return Flops(
    B * T * layer_flops(config)
    + attention_flops(config, B * causal_pairs(T))
    + B * head_flops(config)
  )


def decode(config: qwen3.Config, rows: int, prefix: int, steps: int) -> Flops:
  """`steps` tokens of each of `rows` samples after prefixes of `prefix`."""
  pairs = rows * (steps * prefix + causal_pairs(steps))
  return Flops(
    rows * steps * (layer_flops(config) + head_flops(config))
    + attention_flops(config, pairs)
  )
