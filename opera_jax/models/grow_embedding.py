"""Rows of an embedding, or of an untied head, for tokens that were added.

A new row is the mean of the rows that the model was trained with. Its logit is
then the mean of the others', so that a new token neither wins nor changes the
log-probabilities of the others by more than one part in their number.

Shape key: V rows, D width, W rows afterwards.
"""

from typing import Any

import numpy as np

_BLOCK_ROWS = 8192  # read at a time
MULTIPLE = 128  # of the rows: what tensor cores and shards divide well


def grown_rows(num_rows: int, new_vocab: int) -> int:
  """W: rows of the grown embedding.

  Args:
    num_rows: V, rows that there are.
    new_vocab: ids of the tokenizer.

  Returns:
    V if that is enough, else the next multiple of 128.
  """
  if new_vocab <= num_rows:
    return num_rows
  return -(-new_vocab // MULTIPLE) * MULTIPLE


class GrownTensor:
  """A checkpoint's tensor of V rows, read as one of W rows.

  Every row from the trained tokens' on is the mean of theirs: those of new
  tokens, and those of no token.
  """

  def __init__(self, tensor: Any, trained_ids: int, num_rows: int):
    """Reads the trained rows once, for their mean.

    Args:
      tensor: a `tensor_files.Tensor` or what is read like it, [V, D].
      trained_ids: ids of the checkpoint's tokenizer; the new ones follow.
      num_rows: W.

    Raises:
      ValueError: fewer rows than trained ids, or fewer rows afterwards.
    """
    rows = tensor.shape[0]
    if not 0 < trained_ids <= rows <= num_rows:
      raise ValueError(
        f"An embedding of {rows} rows for {trained_ids} tokens cannot grow to "
        f"{num_rows} rows: the old tokens must each have a row and stay. Check "
        "that tokenizer and checkpoint belong together."
      )
    self._tensor, self._trained_ids = tensor, trained_ids
    self.file, self.dtype = tensor.file, tensor.dtype
    self.shape = (num_rows, *tensor.shape[1:])
    total = np.zeros(tensor.shape[1:], np.float64)
    for start in range(0, trained_ids, _BLOCK_ROWS):
      stop = min(start + _BLOCK_ROWS, trained_ids)
      total += tensor.rows(start, stop).sum(axis=0, dtype=np.float64)
    self._mean = (total / trained_ids).astype(np.float32)

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads rows [start, stop)."""
    stored = self._tensor.shape[0]
    rows = self._tensor.rows(min(start, stored), min(stop, stored))
    out = np.empty((stop - start, *self.shape[1:]), rows.dtype)
    out[: len(rows)] = rows
    out[max(self._trained_ids - start, 0) :] = self._mean.astype(rows.dtype)
    return out
