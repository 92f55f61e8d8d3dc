"""Log-probability and entropy of target tokens under an output head.

  l = hidden @ head / temperature           float32, never materialised whole
  logprob_m = l[m, target_m] - logsumexp_v l[m, v]
  entropy_m = -sum_v p[m, v] log p[m, v],   p = softmax(l)

Shape key: M tokens, D features, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.kernels import target
from opera_jax.kernels.token_logprob import pallas_tpu, reference, xla

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")


def token_logprob(
  hidden_MD: jax.Array,
  head: jax.Array,
  target_M: jax.Array,
  *,
  temperature: float = 1.0,
  transposed: bool = False,
  axis_name: str | None = None,
  implementation: str | None = None,
  block_tokens: int = 1024,
  block_vocab: int = 8192,
) -> tuple[jax.Array, jax.Array]:
  """Scores `target_M` after `hidden_MD`; differentiable in hidden and head.

  A target outside of [0, V) has log-probability NaN, because nothing can raise
  inside jit.

  On a mesh, "xla" scores sharded tokens without moving them, also in a plain
  jitted program. Two cases need `jax.shard_map` around the call, with its
  default check_vma=True: a head sharded over the vocabulary (name the mesh axis
  in `axis_name`), and "pallas_tpu" on several devices.

  Args:
    hidden_MD: [M, D] floating, final hidden states.
    head: [D, V] floating, or [V, D] if `transposed` (a tied embedding);
      inside shard_map with `axis_name`, this device's shard of the vocabulary.
    target_M: [M] integer, token ids of the whole vocabulary.
    temperature: divides the logits; above 0.
    transposed: whether the head is [V, D].
    axis_name: mesh axis over which the vocabulary is sharded, or None.
    implementation: "reference", "xla" or "pallas_tpu"; None lets the
      platform choose.
    block_tokens: tokens of one block of "xla".
    block_vocab: columns of one tile of "xla".

  Returns:
    logprob [M] float32 and entropy [M] float32, both in nats.

  Raises:
    ValueError: shapes that do not match, an integer hidden state or head, a
      float target, a temperature or block of 0 or less, an unknown
      implementation.
    NotImplementedError: "pallas_tpu" is named but does not apply.
  """
  _check(hidden_MD, head, target_M, transposed)
  _check_settings(temperature, block_tokens, block_vocab, implementation)
  if implementation == "reference" and axis_name is not None:
    raise ValueError(
      f"The reference holds the whole vocabulary, got axis_name="
      f"{axis_name!r}. Pass implementation='xla' or axis_name=None."
    )
  if implementation is None and target.platform() == "tpu":
    applies = pallas_tpu.unsupported(hidden_MD, head) is None
    implementation = "pallas_tpu" if applies else "xla"
  arrays = (hidden_MD, head, target_M)
  settings: dict[str, Any] = {
    "temperature": float(temperature),
    "transposed": transposed,
  }
  if implementation == "reference":
    logprob_M, entropy_M = reference.token_logprob(*arrays, **settings)
  elif implementation == "pallas_tpu":
    logprob_M, entropy_M = pallas_tpu.token_logprob(
      *arrays, axis_name=axis_name, **settings
    )
  else:
    logprob_M, entropy_M = xla.token_logprob(
      *arrays,
      axis_name=axis_name,
      block_tokens=block_tokens,
      block_vocab=block_vocab,
      **settings,
    )
  shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  V = head.shape[0 if transposed else 1] * shards
  valid_M = (target_M >= 0) & (target_M < V)
  return jnp.where(valid_M, logprob_M, jnp.nan), entropy_M


def _check(
  hidden_MD: jax.Array, head: jax.Array, target_M: jax.Array, transposed: bool
) -> None:
  if hidden_MD.ndim != 2 or head.ndim != 2 or target_M.ndim != 1:
    raise ValueError(
      "Token log-probability takes hidden [M, D], head [D, V] (or [V, D]) and "
      f"target [M], got {hidden_MD.shape}, {head.shape} and {target_M.shape}. "
      "Flatten the leading axes."
    )
  features = head.shape[1 if transposed else 0]
  if hidden_MD.shape[1] != features:
    raise ValueError(
      f"Hidden states have {hidden_MD.shape[1]} features and the head "
      f"{features} (transposed={transposed}); they must be equal. A head of "
      "shape [V, D] takes transposed=True."
    )
  if hidden_MD.shape[0] != target_M.shape[0] or not target_M.shape[0]:
    raise ValueError(
      f"Each of at least 1 hidden states needs one target, got "
      f"{hidden_MD.shape[0]} and {target_M.shape[0]}. Shift the tokens and "
      "the hidden states alike."
    )
  if not jnp.issubdtype(target_M.dtype, jnp.integer):
    raise ValueError(
      f"Targets are token ids, got {target_M.dtype}. Pass an integer array."
    )
  for name, x in (("Hidden states", hidden_MD), ("The head", head)):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f"{name} must be floating, got {x.dtype}. Convert to float32 or "
        "bfloat16."
      )


def _check_settings(
  temperature: float,
  block_tokens: int,
  block_vocab: int,
  implementation: str | None,
) -> None:
  if temperature <= 0:
    raise ValueError(
      f"Temperature divides the logits and must be above 0, got "
      f"{temperature}. Greedy choice needs no log-probability."
    )
  if block_tokens < 1 or block_vocab < 1:
    raise ValueError(
      f"Blocks hold at least 1 token and 1 column, got block_tokens="
      f"{block_tokens} and block_vocab={block_vocab}. Raise them."
    )
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"Token log-probability has the implementations {IMPLEMENTATIONS}, got "
      f"{implementation!r}. Name one of them, or None."
    )
