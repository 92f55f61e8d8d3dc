"""Packs ragged sequences into few static shapes, and orders the data.

Shape key: R packed rows, T tokens of a row, N sequences.
"""

from collections.abc import Sequence

import numpy as np

from opera_jax import structs


def bucket_sizes(smallest: int, largest: int) -> list[int]:
  """Lengths that grow by a third or a half: 64, 96, 128, 192, 256, 384, ...

  Args:
    smallest: the list begins with the first power of two at or above it.
    largest: the last entry, whether it fits the pattern or not.

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
    ValueError: `length` exceeds the largest bucket.
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
    length: T, or buckets; T is then the smallest that holds all rows.
    pad_id: padding; readers use the lengths to tell it from tokens.

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
  """First-fit decreasing: puts each sequence in the first row with room.

  Args:
    lengths: tokens of each sequence, each at least 1.
    row_length: tokens of a row.

  Returns:
    The sequence indices of each row, in the order the rows were opened.

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
  """Concatenates sequences into packed rows.

  Args:
    rows: sequence indices of each row.
    sequences: int32 tokens of each sequence.
    loss_masks: as long as its sequence, 1 where a token is a target.
    row_length: T.
    pad_id: fills the end of a row.

  Returns:
    A batch of numpy arrays [R, T]: segment ids start at 1 in each row, 0 is
    padding; positions restart with each segment. Advantage and
    log-probabilities are 0.

  Raises:
    ValueError: a row overflows, a mask and its sequence differ in length, or a
      mask makes the first token a target, which has no context.
  """
  shape = (len(rows), row_length)
  tokens_RT = np.full(shape, pad_id, np.int32)
  positions_RT = np.zeros(shape, np.int32)
  segments_RT = np.zeros(shape, np.int32)
  mask_RT = np.zeros(shape, np.float32)
  for row, indices in enumerate(rows):
    begin = 0
    for segment, index in enumerate(indices, start=1):
      size, mask = len(sequences[index]), loss_masks[index]
      if len(mask) != size or not size or mask[0] or begin + size > row_length:
        raise ValueError(
          f"Sequence {index} with {size} tokens and a loss mask of {len(mask)}"
          f" cannot start at {begin} of a row of {row_length}. Both must have"
          " the same length and fit the row; the first token has no context,"
          " so it cannot be a target."
        )
      span = slice(begin, begin + size)
      tokens_RT[row, span] = sequences[index]
      positions_RT[row, span] = np.arange(size)
      segments_RT[row, span] = segment
      mask_RT[row, span] = mask
      begin += size
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
  """Packs sequences by `first_fit` and builds the batch by `assemble`."""
  rows = first_fit([len(tokens) for tokens in sequences], row_length)
  return assemble(
    rows, sequences, loss_masks, row_length=row_length, pad_id=pad_id
  )


def batch_order(
  n: int, batch_size: int, epochs: int, seed: int
) -> Sequence[np.ndarray]:
  """The items of each step's batch, a pure function of (seed, step).

  Every epoch is a new shuffle of all items. A batch may straddle two epochs;
  the second epoch then begins with items that the batch does not contain yet,
  so that no batch contains an item twice. The last batch may be smaller. As the
  order is a pure function, a checkpoint only stores the step.

  Args:
    n: items of the dataset.
    batch_size: items of a batch.
    epochs: passes over the data; they do not affect the order.
    seed: any int.

  Returns:
    For each step the items of its batch, int64; ceil(n * epochs / batch_size)
    steps.

  Raises:
    ValueError: fewer items than a batch, or `epochs` below 1.
  """
  return _Order(n, batch_size, epochs=epochs, seed=seed)


class _Order(Sequence):
  """See `batch_order`; an epoch is shuffled when it is first read."""

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

  # mypy: a Sequence also accepts slices; this one does not.
  def __getitem__(self, step: int) -> np.ndarray:  # type: ignore[override]
    """The items of a step, int64 [batch_size]; the last may be shorter.

    Raises:
      IndexError: step outside [0, len).
    """
    if not 0 <= step < len(self):
      raise IndexError(f"Step {step} is outside the {len(self)} steps.")
    begin = step * self._batch
    indices = range(begin, min(begin + self._batch, self._total))
    return np.asarray(
      [self._epoch(i // self._n)[i % self._n] for i in indices], np.int64
    )

  def _epoch(self, epoch: int) -> np.ndarray:
    """The order of an epoch, which depends on the end of the one before."""
    while len(self._epochs) <= epoch:
      begin = len(self._epochs) * self._n
      order = np.asarray(
        [self._shuffled[i] for i in range(begin, begin + self._n)], np.int64
      )
      carried = begin % self._batch  # items of a batch that straddles epochs
      if carried:
        carried_items = set(self._epochs[-1][self._n - carried :].tolist())
        _move_back(order, carried_items, self._batch - carried)
      self._epochs.append(order)
    return self._epochs[epoch]


def ragged_order(n: int, counts: Sequence[int], seed: int) -> np.ndarray:
  """As `batch_order`, of batches that differ in size; int64 [sum of counts].

  Args:
    n: items of the dataset.
    counts: items of each batch, at most n.
    seed: any int.
  """
  import grain

  shuffled = grain.MapDataset.range(n).seed(seed).shuffle().repeat()
  out: list[int] = []
  waiting: list[int] = []  # the rest of the current epoch
  begin = 0
  for count in counts:
    head, waiting = waiting[:count], waiting[count:]
    if len(head) < count:
      order = np.asarray(
        [shuffled[i] for i in range(begin, begin + n)], np.int64
      )
      begin += n
      _move_back(order, set(head), count - len(head))
      waiting = order.tolist()
      cut = count - len(head)
      head, waiting = head + waiting[:cut], waiting[cut:]
    out += head
  return np.asarray(out, np.int64)


def _move_back(order: np.ndarray, items: set[int], head: int) -> None:
  """Swaps `items` out of the first `head` entries of `order`, in place."""
  others = (i for i in range(head, len(order)) if int(order[i]) not in items)
  for i in range(head):
    if int(order[i]) in items:
      j = next(others)
      order[i], order[j] = order[j], order[i]
