"""Embeds texts with the policy itself: the mean of its final hidden states.

Shape key: B rows of a call, T tokens, N texts, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opera_jax.models import attention, decoder
from opera_jax.scoring import packing
from opera_jax.sharding import layout


class Embedder:
  """Mean of the normed final hidden states over a text's tokens."""

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    *,
    mesh: jax.sharding.Mesh,
    rows: int,
    length_buckets: Sequence[int],
  ):
    """Compiles nothing yet; each padded length is compiled on first use.

    Args:
      graphdef: of the model.
      mesh: rows are sharded over its data axes.
      rows: texts per call, a multiple of the mesh's data shards.
      length_buckets: allowed padded lengths, ascending; longer texts are
        truncated to the last.
    """
    self._mesh, self._rows = mesh, rows
    self._buckets = tuple(length_buckets)

    def fn(params: Any, token_BT: jax.Array, length_B: jax.Array) -> jax.Array:
      model: decoder.Decoder = nnx.merge(graphdef, params)
      position_T = jnp.arange(token_BT.shape[1], dtype=jnp.int32)
      real_BT = position_T[None] < length_B[:, None]
      hidden_BTD, _ = model(
        token_BT,
        jnp.broadcast_to(position_T[None], token_BT.shape),
        attention.causal(
          real_BT.astype(jnp.int32),
          implementation=model.config.attention or None,
        ),
      )
      hidden_BTD = hidden_BTD.astype(jnp.float32) * real_BT[:, :, None]
      return hidden_BTD.sum(axis=1) / jnp.maximum(length_B, 1)[:, None]

    self._run = jax.jit(fn)

  def embed(self, params: Any, texts: Sequence[np.ndarray]) -> np.ndarray:
    """Embeds texts.

    Args:
      params: the policy, in the TRAIN layout.
      texts: int32 tokens [T_i] each, T_i >= 1.

    Returns:
      [N, D] float32, in the order given, not normalised.
    """
    out: list[Any] = [None] * len(texts)
    truncated = [text[: self._buckets[-1]] for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(truncated[i]))
    for start in range(0, len(order), self._rows):
      group = order[start : start + self._rows]
      size = packing.bucket(len(truncated[group[-1]]), self._buckets)
      token_BT = np.zeros((self._rows, size), np.int32)
      length_B = np.zeros(self._rows, np.int32)
      for row, index in enumerate(group):
        length_B[row] = len(truncated[index])
        token_BT[row, : length_B[row]] = truncated[index]
      with jax.set_mesh(self._mesh):
        hidden_BD = layout.to_host(
          self._run(
            params,
            *layout.to_devices(
              (token_BT, length_B), layout.batch_sharding(self._mesh)
            ),
          )
        )
      for row, index in enumerate(group):
        out[index] = hidden_BD[row]
    return np.stack(out)
