"""Packs prefixes and their continuations into few static shapes.

A continuation of G tokens enters the model as `[prefix[fork - 1],
tokens[:-1]]`: the last token of its context is run again, so that every scored
token has a hidden state of its own continuation before it, and the prefix needs
no gather.

Shape key: B rows of a microbatch, T prefix tokens, S continuations, G tokens.
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
  input_BSG: np.ndarray  # int32 continuation inputs
  target_BSG: np.ndarray  # int32 tokens to score
  prefix_length_BS: (
    np.ndarray
  )  # int32 prefix tokens that a continuation sees, fork - 1
  prefix_of: list[int]  # prefix index of each real row
  continuation_of: list[tuple[int, int, int]]  # (row, slot, continuation index)


def bucket(size: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `size`; past the last, its multiples."""
  for b in buckets:
    if size <= b:
      return b
  last = buckets[-1]
  return -(-size // last) * last


def check(
  prefixes: Sequence[np.ndarray],
  continuations: Sequence[structs.Continuation],
  vocab_size: int,
) -> None:
  """Raises on anything that would be scored wrongly in silence.

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
  """Groups prefixes of like length and number of continuations into
  microbatches.

  A prefix with more continuations than the largest slot bucket comes again in a
  further row; no continuation is dropped.

  Args:
    prefixes: int32 tokens [T_i] each.
    continuations: what to score after which prefix.
    batch_size: B, rows of every microbatch.
    prefix_buckets: allowed T, ascending.
    slot_buckets: allowed S, ascending; a prefix without continuations takes the
      smallest.
    continuation_buckets: allowed G, ascending.

  Returns:
    Microbatches, shapes grouped so that equal shapes follow each other.
  """
  most = slot_buckets[-1]
  by_prefix: list[list[int]] = [[] for _ in prefixes]
  for index, continuation in enumerate(continuations):
    by_prefix[continuation.prefix].append(index)
  entries = []  # (T, S, G, prefix, continuation indices)
  for prefix, mine in enumerate(by_prefix):
    for start in range(0, max(len(mine), 1), most):
      part = mine[start : start + most]
      longest = max((len(continuations[i].tokens) for i in part), default=1)
      entries.append(
        (
          bucket(len(prefixes[prefix]), prefix_buckets),
          bucket(len(part), slot_buckets),
          bucket(longest, continuation_buckets),
          prefix,
          part,
        )
      )
  entries.sort(key=lambda e: (e[2], e[1], e[0], e[3]))
  batches = []
  for start in range(0, len(entries), batch_size):
    group = entries[start : start + batch_size]
    shape = tuple(max(e[i] for e in group) for i in range(3))
    batches.append(_fill(group, shape, prefixes, continuations, batch_size))
  return batches


def _fill(group, shape, prefixes, continuations, batch_size) -> MicroBatch:
  T, S, G = shape
  token_BT = np.zeros((batch_size, T), np.int32)
  length_B = np.zeros(batch_size, np.int32)
  input_BSG = np.zeros((batch_size, S, G), np.int32)
  target_BSG = np.zeros((batch_size, S, G), np.int32)
  prefix_length_BS = np.zeros((batch_size, S), np.int32)
  prefix_of, continuation_of = [], []
  for row, (_, _, _, prefix, part) in enumerate(group):
    tokens = prefixes[prefix]
    token_BT[row, : len(tokens)] = tokens
    length_B[row] = len(tokens)
    prefix_of.append(prefix)
    for slot, index in enumerate(part):
      continuation = continuations[index]
      size = len(continuation.tokens)
      input_BSG[row, slot, 0] = tokens[continuation.fork - 1]
      input_BSG[row, slot, 1:size] = continuation.tokens[:-1]
      target_BSG[row, slot, :size] = continuation.tokens
      prefix_length_BS[row, slot] = continuation.fork - 1
      continuation_of.append((row, slot, index))
  return MicroBatch(
    token_BT,
    length_B,
    input_BSG,
    target_BSG,
    prefix_length_BS,
    prefix_of,
    continuation_of,
  )
