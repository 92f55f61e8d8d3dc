"""SFT batches: the loss covers the completion, not the prompt."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from opera_jax import structs
from opera_jax.data import batching

Pair = tuple[np.ndarray, np.ndarray]  # prompt tokens, completion tokens


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches by step: `batches[step]` depends only on the data and the seed.

  Attributes:
    counts: pairs "kept"; pairs dropped because they are "too_long" for a row;
      "rows" of an epoch; "tokens" and "target_tokens" of the kept pairs.
    batch_size: packed rows of a batch.
  """

  counts: dict[str, int]
  batch_size: int
  _rows: list[list[int]]
  _order: Sequence[np.ndarray]
  _sequences: list[np.ndarray]
  _loss_masks: list[np.ndarray]
  _row_length: int
  _pad_id: int

  def __len__(self) -> int:
    return len(self._order)

  def __getitem__(self, step: int) -> structs.Batch:
    """The host batch [batch_size, row_length] of a step.

    The last batch may be filled up with padding rows, which have no targets.

    Raises:
      IndexError: step outside [0, len).
    """
    return self.part(step, np.arange(self.batch_size))

  def part(self, step: int, rows: np.ndarray) -> structs.Batch:
    """Builds only some rows of a step's batch.

    Args:
      step: of the batch.
      rows: int indices of the rows.

    Raises:
      IndexError: step outside [0, len).
    """
    if not 0 <= step < len(self):
      raise IndexError(f"Step {step} is outside the {len(self)} steps.")
    order = self._order[step]
    return batching.assemble(
      [self._rows[order[row]] if row < len(order) else [] for row in rows],
      self._sequences,
      self._loss_masks,
      row_length=self._row_length,
      pad_id=self._pad_id,
    )

  def start_at(self, step: int) -> Iterator[structs.Batch]:
    """Batches from `step` on; a checkpoint stores that int as its position."""
    for index in range(step, len(self)):
      yield self[index]


def split(
  pairs: Sequence[Pair], share: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
  """Divides pairs at random into those to train and those to validate on.

  Args:
    pairs: all pairs.
    share: of the pairs to hold out, rounded; 0 holds out none.
    seed: of the choice.

  Returns:
    The pairs of training and of validation, each in the order given.

  Raises:
    ValueError: a share above 0 that holds out no pair.
  """
  count = round(share * len(pairs))
  if share and not count:
    raise ValueError(
      f"A validation_share of {share} holds out none of {len(pairs)} pairs. "
      "Raise it, set it to 0, or add data."
    )
  chosen = np.random.default_rng([seed, 1]).permutation(len(pairs))[:count]
  held = set(chosen.tolist())
  return (
    [pair for i, pair in enumerate(pairs) if i not in held],
    [pair for i, pair in enumerate(pairs) if i in held],
  )


def build(
  pairs: Sequence[tuple[np.ndarray, np.ndarray]],
  *,
  row_length: int,
  batch_size: int,
  epochs: int,
  seed: int,
  pad_id: int,
  packed: bool,
) -> Batches:
  """Builds SFT batches from (prompt, completion) pairs.

  Args:
    pairs: int32 ids of prompt and completion, neither empty; the completion
      ends with its stop token.
    row_length: tokens of a row; a longer pair is dropped and counted.
    batch_size: packed rows of a batch; where there are fewer, each batch holds
      all of them and padding rows, which leaves the loss as it is.
    epochs: passes over the rows.
    seed: of the order.
    pad_id: fills rows.
    packed: True puts several pairs in a row, separated by segment ids; False
      puts one pair in a row.

  Raises:
    ValueError: an empty prompt or completion, no pair that fits into a row, or
      `epochs` below 1.
  """
  sequences, masks = [], []
  for index, (prompt, completion) in enumerate(pairs):
    if not len(prompt) or not len(completion):
      raise ValueError(
        f"Pair {index} has {len(prompt)} prompt and {len(completion)}"
        " completion tokens; both need at least 1. Drop the pair."
      )
    if len(prompt) + len(completion) <= row_length:
      tokens = np.concatenate([prompt, completion]).astype(np.int32)
      sequences.append(tokens)
      masks.append(np.arange(len(tokens)) >= len(prompt))
  too_long = len(pairs) - len(sequences)
  lengths = [len(tokens) for tokens in sequences]
  one_per_row = [[index] for index in range(len(sequences))]
  rows = batching.first_fit(lengths, row_length) if packed else one_per_row
  if not rows:
    raise ValueError(
      f"There is nothing to train on: of {len(pairs)} pairs {too_long} are"
      f" longer than a row of {row_length} tokens. Add data, or raise the row"
      " length (row_tokens)."
    )
  counts = {
    "kept": len(sequences),
    "too_long": too_long,
    "rows": len(rows),
    "tokens": sum(lengths),
    "target_tokens": int(sum(mask.sum() for mask in masks)),
  }
  return Batches(
    counts=counts,
    batch_size=batch_size,
    _rows=rows,
    _order=batching.batch_order(
      len(rows), min(batch_size, len(rows)), epochs=epochs, seed=seed
    ),
    _sequences=sequences,
    _loss_masks=masks,
    _row_length=row_length,
    _pad_id=pad_id,
  )
