"""Packs prefixes and their continuations into few static shapes.

The model's input for a continuation of G tokens is `[prefix[fork - 1],
tokens[:-1]]`: the last context token is recomputed inside the continuation.
Every scored token is then predicted by a state of its own continuation, and no
state has to be gathered from the prefix.

Shape key: B rows of a microbatch (one prefix each), T tokens of a prefix, S
continuations of a row, G tokens of a continuation.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opera_jax import structs


@dataclasses.dataclass(frozen=True)
class MicroBatch:
  """Host arrays of one forward pass, and where its results belong.

  Attributes:
    token_BT: int32 prefixes, right-padded.
    length_B: int32 tokens of each prefix, 0 for a padding row.
    input_BSG: int32 inputs of the continuations.
    target_BSG: int32 tokens to score.
    prefix_length_BS: int32 prefix tokens that a continuation attends to,
      fork - 1.
    prefix_of: prefix index of each real row.
    continuation_of: (row, slot, continuation index) of each continuation.
  """

  token_BT: np.ndarray
  length_B: np.ndarray
  input_BSG: np.ndarray
  target_BSG: np.ndarray
  prefix_length_BS: np.ndarray
  prefix_of: list[int]
  continuation_of: list[tuple[int, int, int]]


def bucket(size: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `size`.

  A size above the last bucket is rounded up to a multiple of it.
  """
  for length in buckets:
    if size <= length:
      return length
  last = buckets[-1]
  return -(-size // last) * last


def check(
  prefixes: Sequence[np.ndarray],
  continuations: Sequence[structs.Continuation],
  vocab_size: int,
) -> None:
  """Refuses input that would silently be scored wrongly.

  Args:
    prefixes: int32 tokens [T_i] each.
    continuations: of those prefixes.
    vocab_size: token ids lie in [0, vocab_size).

  Raises:
    ValueError: an empty prefix or continuation, a fork outside its prefix, a
      skip outside its continuation, a token id outside the vocabulary.
  """
  for i, prefix in enumerate(prefixes):
    if len(prefix) == 0:
      raise ValueError(f"Prefix {i} has no tokens; give it at least one.")
    if prefix.min() < 0 or prefix.max() >= vocab_size:
      raise ValueError(
        f"Prefix {i} holds token id {prefix.max()} or {prefix.min()}; ids lie "
        f"in [0, {vocab_size}). Check that tokenizer and model agree."
      )
  for i, continuation in enumerate(continuations):
    if not 0 <= continuation.prefix < len(prefixes):
      raise ValueError(
        f"Continuation {i} names prefix {continuation.prefix} of "
        f"{len(prefixes)}."
      )
    size = len(prefixes[continuation.prefix])
    if not 1 <= continuation.fork <= size:
      raise ValueError(
        f"Continuation {i} forks at {continuation.fork}, but its prefix has "
        f"{size} tokens; a fork lies in [1, length]."
      )
    if not 0 <= continuation.skip < len(continuation.tokens):
      raise ValueError(
        f"Continuation {i} has {len(continuation.tokens)} tokens of which the "
        f"first {continuation.skip} are context; at least one must be scored."
      )
    if continuation.tokens.min() < 0 or continuation.tokens.max() >= vocab_size:
      raise ValueError(
        f"Continuation {i} holds a token id outside [0, {vocab_size})."
      )


def pack(
  prefixes: Sequence[np.ndarray],
  continuations: Sequence[structs.Continuation],
  *,
  batch_size: int,
  prefix_buckets: Sequence[int],
  slot_buckets: Sequence[int],
  continuation_buckets: Sequence[int],
) -> list[MicroBatch]:
  """Groups prefixes of similar shape into microbatches.

  A prefix with more continuations than the largest slot bucket is repeated in
  further rows; no continuation is dropped.

  Args:
    prefixes: int32 tokens [T_i] each.
    continuations: what to score after which prefix.
    batch_size: B, rows of every microbatch.
    prefix_buckets: allowed T, ascending.
    slot_buckets: allowed S, ascending; a prefix without continuations gets
      the smallest.
    continuation_buckets: allowed G, ascending.

  Returns:
    Microbatches, ordered so that equal shapes are consecutive.
  """
  max_slots = slot_buckets[-1]
  by_prefix: list[list[int]] = [[] for _ in prefixes]
  for index, continuation in enumerate(continuations):
    by_prefix[continuation.prefix].append(index)
  rows: list[_Row] = []
  for prefix, indices in enumerate(by_prefix):
    for start in range(0, max(len(indices), 1), max_slots):
      chosen = indices[start : start + max_slots]
      longest = max((len(continuations[i].tokens) for i in chosen), default=1)
      rows.append(
        _Row(
          shape=(
            bucket(len(prefixes[prefix]), prefix_buckets),
            bucket(len(chosen), slot_buckets),
            bucket(longest, continuation_buckets),
          ),
          prefix=prefix,
          continuations=chosen,
        )
      )
  # By G, then S, then T: a microbatch takes the largest shape of its rows.
  rows.sort(key=lambda row: (*reversed(row.shape), row.prefix))
  batches = []
  for start in range(0, len(rows), batch_size):
    group = rows[start : start + batch_size]
    T, S, G = (max(row.shape[axis] for row in group) for axis in range(3))
    batches.append(
      _fill(group, prefixes, continuations, shape=(batch_size, T, S, G))
    )
  return batches


@dataclasses.dataclass(frozen=True)
class _Row:
  """One row of a microbatch: a prefix and some of its continuations."""

  shape: tuple[int, int, int]  # (T, S, G), padded
  prefix: int  # index
  continuations: list[int]  # indices


def _fill(
  rows: Sequence[_Row],
  prefixes: Sequence[np.ndarray],
  continuations: Sequence[structs.Continuation],
  *,
  shape: tuple[int, int, int, int],
) -> MicroBatch:
  """Writes rows into padded arrays of shape (B, T, S, G)."""
  B, T, S, G = shape
  batch = MicroBatch(
    token_BT=np.zeros((B, T), np.int32),
    length_B=np.zeros(B, np.int32),
    input_BSG=np.zeros((B, S, G), np.int32),
    target_BSG=np.zeros((B, S, G), np.int32),
    prefix_length_BS=np.zeros((B, S), np.int32),
    prefix_of=[row.prefix for row in rows],
    continuation_of=[],
  )
  for b, row in enumerate(rows):
    tokens = prefixes[row.prefix]
    batch.token_BT[b, : len(tokens)] = tokens
    batch.length_B[b] = len(tokens)
    for slot, index in enumerate(row.continuations):
      continuation = continuations[index]
      size = len(continuation.tokens)
      batch.input_BSG[b, slot, 0] = tokens[continuation.fork - 1]
      batch.input_BSG[b, slot, 1:size] = continuation.tokens[:-1]
      batch.target_BSG[b, slot, :size] = continuation.tokens
      batch.prefix_length_BS[b, slot] = continuation.fork - 1
      batch.continuation_of.append((b, slot, index))
  return batch
