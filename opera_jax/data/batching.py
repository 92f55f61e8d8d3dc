"""Ragged rows to few static shapes, and the order of the data.

Shape key: R rows, T tokens of a row.
"""

from collections.abc import Sequence

import numpy as np

from opera_jax import structs


def bucket_sizes(smallest: int, largest: int) -> list[int]:
  """Lengths that grow by a third to a half: 64, 96, 128, 192, 256, 384, ...

  Args:
    smallest: the first power of two at or above it opens the list.
    largest: closes the list, whatever it is.

  Raises:
    ValueError: not 1 <= smallest <= largest.
  """
  if not 1 <= smallest <= largest:
    raise ValueError(
      f"Buckets from {smallest} to {largest}: need 1 <= smallest <= largest."
    )
  sizes = []
  power = 1 << (smallest - 1).bit_length()
  while power < largest:
    sizes.append(power)
    half_way = power + power // 2
    if power > 1 and half_way < largest:
      sizes.append(half_way)
    power *= 2
  return [*sizes, largest]


def bucket(length: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `length`.

  Raises:
    ValueError: length is beyond the largest bucket.
  """
  fitting = [size for size in buckets if size >= length]
  if not fitting:
    raise ValueError(
      f"Length {length} is beyond the largest bucket of {list(buckets)}. Add a"
      " larger bucket or shorten the rows."
    )
  return min(fitting)


def pad_rows(
  rows: Sequence[np.ndarray], length: int | Sequence[int], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Right-pads rows to one length.

  Args:
    rows: R arrays [t] of int32.
    length: T, or buckets of which the smallest that holds all rows is T.
    pad_id: what fills; readers go by the lengths, never by this id.

  Returns:
    (tokens_RT int32, length_R int32).

  Raises:
    ValueError: a row is longer than T.
  """
  buckets = [length] if isinstance(length, int | np.integer) else length
  length_R = np.asarray([len(row) for row in rows], np.int32)
  width = bucket(int(length_R.max(initial=0)), buckets)
  tokens_RT = np.full((len(rows), width), pad_id, np.int32)
  for tokens_T, row in zip(tokens_RT, rows):
    tokens_T[: len(row)] = row
  return tokens_RT, length_R


def first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
  """Puts sequences in rows, each in the first row with room, longest first.

  Args:
    lengths: tokens of each sequence, each at least 1.
    row_length: tokens of a row.

  Returns:
    The indices of each row's sequences, rows in the order they were opened.

  Raises:
    ValueError: a sequence is empty or longer than a row.
  """
  length_N = np.asarray(lengths, np.int64)
  bad = np.flatnonzero((length_N < 1) | (length_N > row_length))
  if bad.size:
    raise ValueError(
      f"Sequence {bad[0]} has {lengths[bad[0]]} tokens; a row holds 1 to"
      f" {row_length}. Drop it, or raise the row length."
    )
  room = np.full(len(lengths), row_length, np.int64)
  rows: list[list[int]] = []
  for index in np.argsort(-length_N, kind="stable"):
    row = int(np.argmax(room >= lengths[index]))
    if row == len(rows):
      rows.append([])
    rows[row].append(int(index))
    room[row] -= lengths[index]
  return rows


def assemble(
  rows: Sequence[Sequence[int]],
  sequences: Sequence[np.ndarray],
  loss_masks: Sequence[np.ndarray],
  row_length: int,
  pad_id: int,
) -> structs.Batch:
  """Lays sequences side by side in rows.

  Args:
    rows: indices of the sequences of each row.
    sequences: int32 tokens of each sequence.
    loss_masks: [len of it], 1 where a token is a target.
    row_length: T.
    pad_id: fills what is left.

  Returns:
    A batch of numpy arrays [R, T]: segments count from 1 in each row, 0 is
    padding; positions restart with each segment. Advantage and the
    log-probabilities are zeros.

  Raises:
    ValueError: a row overflows, a mask has another length than its sequence,
      or asks for the first token, which nothing predicts.
  """
  shape = (len(rows), row_length)
  tokens_RT = np.full(shape, pad_id, np.int32)
  positions_RT = np.zeros(shape, np.int32)
  segments_RT = np.zeros(shape, np.int32)
  mask_RT = np.zeros(shape, np.float32)
  for row, indices in enumerate(rows):
    at = 0
    for segment, index in enumerate(indices, start=1):
      size, mask = len(sequences[index]), loss_masks[index]
      if len(mask) != size or not size or mask[0] or at + size > row_length:
        raise ValueError(
          f"Sequence {index} with {size} tokens and a loss mask of {len(mask)}"
          f" cannot start at {at} of a row of {row_length}: it must fit, mask"
          " and tokens must be as long, and its first token has no context to"
          " be a target."
        )
      span = slice(at, at + size)
      tokens_RT[row, span] = sequences[index]
      positions_RT[row, span] = np.arange(size)
      segments_RT[row, span] = segment
      mask_RT[row, span] = mask
      at += size
  zeros_RT = np.zeros(shape, np.float32)
  return structs.Batch(
    tokens=tokens_RT,
    positions=positions_RT,
    segments=segments_RT,
    loss_mask=mask_RT,
    advantage=zeros_RT,
    old_logprob=zeros_RT,
    ref_logprob=zeros_RT,
  )


def pack(
  sequences: Sequence[np.ndarray],
  loss_masks: Sequence[np.ndarray],
  row_length: int,
  pad_id: int,
) -> structs.Batch:
  """`assemble` of `first_fit`: as few rows as first fit finds."""
  rows = first_fit([len(tokens) for tokens in sequences], row_length)
  return assemble(rows, sequences, loss_masks, row_length, pad_id)


def batch_order(
  n: int, batch_size: int, epochs: int, seed: int
) -> Sequence[np.ndarray]:
  """Which items make the batch of a step: a pure function of (seed, step).

  Every epoch is a new shuffle of all items. Epochs follow one another without
  a gap, so a batch may straddle two; no batch holds an item twice, for an epoch
  then opens with items that the batch does not hold yet. The last batch holds
  what is left, which may be less than a batch. A checkpoint's data position is
  the step alone.

  Args:
    n: items of the data set.
    batch_size: items of a batch.
    epochs: passes over the data; the order of a step does not depend on it.
    seed: any int.

  Returns:
    By step the items of its batch, int64; ceil(n * epochs / batch_size) steps.

  Raises:
    ValueError: fewer items than a batch, or no epoch.
  """
  return _Order(n, batch_size, epochs, seed)


class _Order(Sequence):
  """See `batch_order`; nothing is shuffled before it is asked for."""

  def __init__(self, n: int, batch_size: int, epochs: int, seed: int):
    if batch_size < 1 or n < batch_size or epochs < 1:
      raise ValueError(
        f"{n} items, batches of {batch_size}, {epochs} epochs: a batch takes"
        " at least 1 item and at most all of them, and there is at least 1"
        " epoch. Lower the batch size or add data."
      )
    import grain

    self._n, self._batch, self._total = n, batch_size, n * epochs
    self._shuffled = grain.MapDataset.range(n).seed(seed).shuffle().repeat()
    self._epochs: list[np.ndarray] = []

  def __len__(self) -> int:
    return -(-self._total // self._batch)

  # mypy: a Sequence takes slices too; nobody asks for one.
  def __getitem__(self, step: int) -> np.ndarray:  # type: ignore[override]
    """The items of a step, int64 [batch_size] or, of the last, fewer.

    Raises:
      IndexError: step outside [0, len).
    """
    if not 0 <= step < len(self):
      raise IndexError(f"Step {step} is outside the {len(self)} steps.")
    begin = step * self._batch
    places = range(begin, min(begin + self._batch, self._total))
    return np.asarray(
      [self._epoch(p // self._n)[p % self._n] for p in places], np.int64
    )

  def _epoch(self, epoch: int) -> np.ndarray:
    """The order of an epoch, which depends on how the last one ended."""
    while len(self._epochs) <= epoch:
      begin = len(self._epochs) * self._n
      order = np.asarray(
        [self._shuffled[i] for i in range(begin, begin + self._n)], np.int64
      )
      held = begin % self._batch  # items of the batch that straddles
      if held:
        held_items = set(self._epochs[-1][self._n - held :].tolist())
        _move_back(order, held_items, self._batch - held)
      self._epochs.append(order)
    return self._epochs[epoch]


def _move_back(order: np.ndarray, items: set[int], head: int) -> None:
  """Swaps `items` out of the first `head` places, in place."""
  others = (i for i in range(head, len(order)) if int(order[i]) not in items)
  for i in range(head):
    if int(order[i]) in items:
      j = next(others)
      order[i], order[j] = order[j], order[i]
