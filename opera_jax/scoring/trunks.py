"""Packs trunks and their branches into few static shapes.

A branch of G tokens enters the model as `[trunk[fork - 1], tokens[:-1]]`: the
last token of its context is run again, so that every scored token has a
hidden state of its own branch before it, and the trunk needs no gather.

Shape key: B rows of a microbatch, T trunk tokens, S branches, G tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opera_jax import structs


@dataclasses.dataclass(frozen=True)
class MicroBatch:
  """Host arrays of one call, and where its results belong."""

  token_BT: np.ndarray  # int32, right-padded
  length_B: np.ndarray  # int32, 0 for a row that only fills the shape
  input_BSG: np.ndarray  # int32 branch inputs
  target_BSG: np.ndarray  # int32 tokens to score
  limit_BS: np.ndarray  # int32 trunk tokens that a branch sees, fork - 1
  trunk_of: list[int]  # trunk index of each real row
  branch_of: list[tuple[int, int, int]]  # (row, slot, branch index)


def bucket(size: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `size`; past the last, its multiples."""
  for b in buckets:
    if size <= b:
      return b
  last = buckets[-1]
  return -(-size // last) * last


def check(
  trunks: Sequence[np.ndarray],
  branches: Sequence[structs.Branch],
  vocab_size: int,
) -> None:
  """Raises on anything that would be scored wrongly in silence.

  Raises:
    ValueError: an empty trunk or branch, a fork outside its trunk, a skip
      outside its branch, a token id outside the vocabulary.
  """
  for i, trunk in enumerate(trunks):
    if len(trunk) == 0:
      raise ValueError(f"Trunk {i} has no tokens; give it at least one.")
    if trunk.min() < 0 or trunk.max() >= vocab_size:
      raise ValueError(
        f"Trunk {i} holds token id {trunk.max()} or {trunk.min()}; ids lie "
        f"in [0, {vocab_size}). Check that tokenizer and model agree."
      )
  for i, branch in enumerate(branches):
    if not 0 <= branch.trunk < len(trunks):
      raise ValueError(
        f"Branch {i} names trunk {branch.trunk} of {len(trunks)}."
      )
    size = len(trunks[branch.trunk])
    if not 1 <= branch.fork <= size:
      raise ValueError(
        f"Branch {i} forks at {branch.fork}, but its trunk has {size} "
        "tokens; a fork lies in [1, length]."
      )
    if not 0 <= branch.skip < len(branch.tokens):
      raise ValueError(
        f"Branch {i} has {len(branch.tokens)} tokens of which the first "
        f"{branch.skip} are context; at least one must be scored."
      )
    if branch.tokens.min() < 0 or branch.tokens.max() >= vocab_size:
      raise ValueError(
        f"Branch {i} holds a token id outside [0, {vocab_size})."
      )


def pack(
  trunks: Sequence[np.ndarray],
  branches: Sequence[structs.Branch],
  *,
  batch_size: int,
  prefix_buckets: Sequence[int],
  slot_buckets: Sequence[int],
  continuation_buckets: Sequence[int],
) -> list[MicroBatch]:
  """Groups trunks of like length and number of branches into microbatches.

  A trunk with more branches than the largest slot bucket comes again in a
  further row; no branch is dropped.

  Args:
    trunks: int32 tokens [T_i] each.
    branches: what to score after which prefix.
    batch_size: B, rows of every microbatch.
    prefix_buckets: allowed T, ascending.
    slot_buckets: allowed S, ascending; a trunk without branches takes the
      smallest.
    continuation_buckets: allowed G, ascending.

  Returns:
    Microbatches, shapes grouped so that equal shapes follow each other.
  """
  most = slot_buckets[-1]
  by_trunk: list[list[int]] = [[] for _ in trunks]
  for index, branch in enumerate(branches):
    by_trunk[branch.trunk].append(index)
  entries = []  # (T, S, G, trunk, branch indices)
  for trunk, mine in enumerate(by_trunk):
    for start in range(0, max(len(mine), 1), most):
      part = mine[start : start + most]
      longest = max((len(branches[i].tokens) for i in part), default=1)
      entries.append(
        (
          bucket(len(trunks[trunk]), prefix_buckets),
          bucket(len(part), slot_buckets),
          bucket(longest, continuation_buckets),
          trunk,
          part,
        )
      )
  entries.sort(key=lambda e: (e[2], e[1], e[0], e[3]))
  batches = []
  for start in range(0, len(entries), batch_size):
    group = entries[start : start + batch_size]
    shape = tuple(max(e[i] for e in group) for i in range(3))
    batches.append(_fill(group, shape, trunks, branches, batch_size))
  return batches


def _fill(group, shape, trunks, branches, batch_size) -> MicroBatch:
  T, S, G = shape
  token_BT = np.zeros((batch_size, T), np.int32)
  length_B = np.zeros(batch_size, np.int32)
  input_BSG = np.zeros((batch_size, S, G), np.int32)
  target_BSG = np.zeros((batch_size, S, G), np.int32)
  limit_BS = np.zeros((batch_size, S), np.int32)
  trunk_of, branch_of = [], []
  for row, (_, _, _, trunk, part) in enumerate(group):
    tokens = trunks[trunk]
    token_BT[row, : len(tokens)] = tokens
    length_B[row] = len(tokens)
    trunk_of.append(trunk)
    for slot, index in enumerate(part):
      branch = branches[index]
      size = len(branch.tokens)
      input_BSG[row, slot, 0] = tokens[branch.fork - 1]
      input_BSG[row, slot, 1:size] = branch.tokens[:-1]
      target_BSG[row, slot, :size] = branch.tokens
      limit_BS[row, slot] = branch.fork - 1
      branch_of.append((row, slot, index))
  return MicroBatch(
    token_BT, length_B, input_BSG, target_BSG, limit_BS, trunk_of, branch_of
  )
