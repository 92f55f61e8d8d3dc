"""Rows of an embedding, or of an untied head, for tokens that were added.

A new row is the mean of the rows that the model was trained with. Its logit is
then the mean of the others', so that a new token neither wins nor changes the
log-probabilities of the others by more than one part in their number.

Shape key: V rows, D width, W rows afterwards.
"""

import numpy as np

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


def grow(rows_VD: np.ndarray, old_vocab: int, new_vocab: int) -> np.ndarray:
  """Fills the rows of new tokens, and appends rows where they are too few.

  Args:
    rows_VD: the rows; those from `old_vocab` on belong to no token, and a
      checkpoint may have any number of them.
    old_vocab: ids that the model was trained with, at least 1.
    new_vocab: ids of the tokenizer, the new tokens last.

  Returns:
    [W, D] of the same dtype. The rows of new tokens are the mean of the first
    `old_vocab`, summed in float32, and so are rows that are appended to make W
    a multiple of 128; the rows of no token that there were stay.

  Raises:
    ValueError: fewer rows than old tokens, or fewer new tokens than old.
  """
  num_rows = len(rows_VD)
  if not 0 < old_vocab <= min(num_rows, new_vocab):
    raise ValueError(
      f"An embedding of {num_rows} rows for {old_vocab} tokens cannot grow to"
      f" {new_vocab}: the old tokens must each have a row and stay. Check that"
      " tokenizer and checkpoint belong together."
    )
  grown = grown_rows(num_rows, new_vocab)
  mean_D = rows_VD[:old_vocab].mean(axis=0, dtype=np.float32)
  mean_D = mean_D.astype(rows_VD.dtype)
  extra = np.broadcast_to(mean_D, (grown - num_rows, *rows_VD.shape[1:]))
  out_WD = np.concatenate([rows_VD, extra])
  out_WD[old_vocab:new_vocab] = mean_D
  return out_WD
