"""Embeds prompts for clustering.

Shape key: N texts, D dimensions.
"""

from collections.abc import Callable, Sequence

import numpy as np

from opera_jax import hub

Embed = Callable[[Sequence[str]], np.ndarray]  # N texts -> [N, D] float32


def unit(vector_ND: np.ndarray, *, centre: bool) -> np.ndarray:
  """Scales vectors to length 1, so that distances measure angles.

  Args:
    vector_ND: embeddings.
    centre: subtract their mean first. Hidden states of a language model share a
      large mean, which dominates the angles otherwise.

  Raises:
    ValueError: an embedding that is not finite.
  """
  if centre:
    vector_ND = vector_ND - vector_ND.mean(axis=0)
  length_N = np.linalg.norm(vector_ND, axis=1)
  if not np.isfinite(length_N).all():
    raise ValueError(
      f"{(~np.isfinite(length_N)).sum()} of {len(vector_ND)} embeddings are "
      "not finite. Name another config.pool.embedder."
    )
  return vector_ND / np.maximum(length_N, 1e-12)[:, None]


def sentence_transformer(name: str) -> Embed:
  """Loads a sentence-transformers model for embedding.

  Args:
    name: hub id, see `hub.split`, or directory; the model truncates texts at
      its own limit.

  Raises:
    ValueError: the package is not installed, or the model cannot be loaded.
  """
  try:
    import sentence_transformers
  except ImportError as error:
    raise ValueError(
      f"config.pool.embedder={name!r} needs the package sentence-transformers."
      " Install it with pip, or set config.pool.embedder=policy."
    ) from error
  hub_id, revision = hub.split(name)
  try:
    model = sentence_transformers.SentenceTransformer(hub_id, revision=revision)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"config.pool.embedder={name!r} cannot be loaded ({error}). Name a "
      "directory or a hub id that can be reached, or set "
      "config.pool.embedder=policy."
    ) from error

  def embed(texts: Sequence[str]) -> np.ndarray:
    return model.encode(
      list(texts), convert_to_numpy=True, show_progress_bar=False
    ).astype(np.float32)

  return embed
