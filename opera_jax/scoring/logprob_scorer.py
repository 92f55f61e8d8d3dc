"""Scores tokens of prefixes and continuations in static shapes.

Shape key: B prefixes of a call, T tokens of a prefix, S continuations of a
prefix, G tokens of a continuation.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from opera_jax import structs
from opera_jax.scoring import packing as packing_lib
from opera_jax.scoring import prefix_continuations
from opera_jax.sharding import layout


class LogprobScorer:
  """Computes log-probabilities and entropies of prefixes and continuations.

  A prefix and its continuations share one forward pass, so that the prefix is
  computed once.
  """

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    *,
    vocab_size: int,
    mesh: jax.sharding.Mesh,
    batch_size: int = 16,
    prefix_buckets: Sequence[int] = (128, 256, 512, 1024),
    slot_buckets: Sequence[int] = (1, 2, 4, 8, 16, 32),
    continuation_buckets: Sequence[int] = (32, 64, 128, 256, 512),
    temperature: float = 1.0,
  ):
    """Compiles nothing yet; each shape is compiled on first use.

    Args:
      graphdef: of the model; parameters are passed at every call.
      vocab_size: rows of the head; ids at or above it are refused.
      mesh: prefixes are sharded over its data axes.
      batch_size: prefixes per forward pass; a multiple of the data shards.
      prefix_buckets: allowed padded prefix lengths.
      slot_buckets: allowed numbers of continuations per prefix.
      continuation_buckets: allowed padded continuation lengths.
      temperature: divides the logits.

    Raises:
      ValueError: `batch_size` does not divide over the mesh's data shards.
    """
    num_data_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % num_data_shards:
      raise ValueError(
        f"A call scores {batch_size} prefixes over {num_data_shards} data "
        "shards, which does not divide. Make config.scoring.batch_size a "
        "multiple."
      )
    self._vocab_size = vocab_size
    self._mesh = mesh
    self._pack: dict[str, Any] = {
      "batch_size": batch_size,
      "prefix_buckets": tuple(prefix_buckets),
      "slot_buckets": tuple(slot_buckets),
      "continuation_buckets": tuple(continuation_buckets),
    }

    self._run = jax.jit(
      prefix_continuations.logprob_fn(graphdef, temperature=temperature)
    )

  def programs(self) -> int:
    """The number of shapes, each of which is one compiled program."""
    names = ("prefix_buckets", "slot_buckets", "continuation_buckets")
    return math.prod(len(self._pack[name]) for name in names)

  def bucket(self, prefix: np.ndarray) -> int:
    """The length that a prefix is padded to if it is scored alone."""
    return packing_lib.bucket(len(prefix), self._pack["prefix_buckets"])

  def score(
    self,
    params: Any,
    prefixes: Sequence[np.ndarray],
    continuations: Sequence[structs.Continuation] = (),
    *,
    advance: Callable[[int], None] | None = None,
  ) -> structs.Logprobs:
    """Scores every token of every prefix and continuation.

    Args:
      params: the policy's parameters.
      prefixes: int32 tokens [T_i] each, T_i >= 1.
      continuations: what to score, and after how much of which prefix.
      advance: called with the number of tokens done after each microbatch.

    Returns:
      Log-probabilities and entropies in the order given.

    Raises:
      ValueError: see `packing.check`.
      FloatingPointError: a log-probability that is not finite.
    """
    packing_lib.check(prefixes, continuations, self._vocab_size)
    # Duplicates are scored once. This saves work, and two completions with the
    # same tokens get the same bits, so that their rewards tie.
    prefix_index, distinct_prefixes = _distinct(
      prefixes, [prefix.tobytes() for prefix in prefixes]
    )
    reindexed = [
      dataclasses.replace(c, prefix=prefix_index[c.prefix])
      for c in continuations
    ]
    continuation_index, distinct_continuations = _distinct(
      reindexed,
      [(c.prefix, c.fork, c.tokens.tobytes(), c.skip) for c in reindexed],
    )
    scored = self._score_distinct(
      params, distinct_prefixes, distinct_continuations, advance=advance
    )
    for name, values in zip(
      ("prefix", "prefix", "continuation", "continuation"), scored
    ):
      for index, value in enumerate(values):
        if not np.isfinite(value).all():
          raise FloatingPointError(
            f"The log-probability of {name} {index} is not finite. The "
            "parameters have diverged; lower the learning rate or resume "
            "from an earlier checkpoint."
          )
    (
      prefix_logprob,
      prefix_entropy,
      continuation_logprob,
      continuation_entropy,
    ) = scored
    return structs.Logprobs(
      prefix_logprob=[prefix_logprob[i] for i in prefix_index],
      prefix_entropy=[prefix_entropy[i] for i in prefix_index],
      continuation_logprob=[
        continuation_logprob[i] for i in continuation_index
      ],
      continuation_entropy=[
        continuation_entropy[i] for i in continuation_index
      ],
      prefix_tokens=sum(len(prefix) for prefix in distinct_prefixes),
      continuation_tokens=sum(len(c.tokens) for c in distinct_continuations),
    )

  def score_completions(
    self,
    params: Any,
    prompts: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
    prefixes: Sequence[np.ndarray] = (),
    *,
    advance: Callable[[int], None] | None = None,
  ) -> structs.Logprobs:
    """Scores completions from which nothing forks, and further prefixes.

    If the buckets are large enough, the completions of a prompt are scored as
    its continuations, so that the prompt is computed once. Otherwise every
    prompt + completion is scored as a prefix.

    Args:
      params: the policy's parameters.
      prompts: int32 tokens of each prompt.
      completions: int32 tokens, prompt-major, equally many per prompt.
      prefixes: further prefixes to score.
      advance: see `score`.

    Returns:
      What `score` returns for the prefixes prompt + completion of all
      completions, followed by `prefixes`.

    Raises:
      ValueError: see `score`.
    """
    samples = len(completions) // len(prompts)
    indexed = [(i // samples, tokens) for i, tokens in enumerate(completions)]
    if (
      max(map(len, completions)) > self._pack["continuation_buckets"][-1]
      or samples > self._pack["slot_buckets"][-1]
    ):
      joined = [np.concatenate([prompts[b], tokens]) for b, tokens in indexed]
      return self.score(params, [*joined, *prefixes], advance=advance)
    logprobs = self.score(
      params,
      [*prompts, *prefixes],
      [
        structs.Continuation(prefix=b, fork=len(prompts[b]), tokens=tokens)
        for b, tokens in indexed
      ],
      advance=advance,
    )

    def join(
      of_prefixes: list[np.ndarray], of_continuations: list[np.ndarray]
    ) -> list[np.ndarray]:
      of_completions = [
        np.concatenate([of_prefixes[b], of_continuation])
        for (b, _), of_continuation in zip(indexed, of_continuations)
      ]
      return of_completions + of_prefixes[len(prompts) :]

    return dataclasses.replace(
      logprobs,
      prefix_logprob=join(
        logprobs.prefix_logprob, logprobs.continuation_logprob
      ),
      prefix_entropy=join(
        logprobs.prefix_entropy, logprobs.continuation_entropy
      ),
      continuation_logprob=[],
      continuation_entropy=[],
    )

  def _score_distinct(
    self,
    params: Any,
    prefixes: Sequence[np.ndarray],
    continuations: Sequence[structs.Continuation],
    *,
    advance: Callable[[int], None] | None,
  ) -> tuple[list[np.ndarray], ...]:
    """Runs all microbatches; the device computes one while the host reads the
    results of the one before."""
    prefix_logprob: list[Any] = [None] * len(prefixes)
    prefix_entropy: list[Any] = [None] * len(prefixes)
    continuation_logprob: list[Any] = [None] * len(continuations)
    continuation_entropy: list[Any] = [None] * len(continuations)
    sharding = layout.batch_sharding(self._mesh)

    def store(batch: packing_lib.MicroBatch, results: Any) -> None:
      logprob_BT, entropy_BT, logprob_BSG, entropy_BSG = layout.to_host(results)
      for row, prefix in enumerate(batch.prefix_of):
        size = len(prefixes[prefix])
        prefix_logprob[prefix] = logprob_BT[row, :size]
        prefix_entropy[prefix] = entropy_BT[row, :size]
      for row, slot, index in batch.continuation_of:
        continuation = continuations[index]
        real = slice(continuation.skip, len(continuation.tokens))
        continuation_logprob[index] = logprob_BSG[row, slot, real]
        continuation_entropy[index] = entropy_BSG[row, slot, real]
      if advance is not None:
        advance(int(batch.length_B.sum()))

    in_flight = None
    with jax.set_mesh(self._mesh):
      for batch in packing_lib.pack(prefixes, continuations, **self._pack):
        arrays = layout.to_devices(
          (
            batch.token_BT,
            batch.length_B,
            batch.input_BSG,
            batch.target_BSG,
            batch.prefix_length_BS,
          ),
          sharding,
        )
        results = self._run(params, *arrays)
        if in_flight is not None:
          store(*in_flight)
        in_flight = (batch, results)
    if in_flight is not None:
      store(*in_flight)
    return (
      prefix_logprob,
      prefix_entropy,
      continuation_logprob,
      continuation_entropy,
    )


def _distinct(
  items: Sequence[Any], keys: Sequence[Hashable]
) -> tuple[list[int], list[Any]]:
  """Removes duplicates.

  Args:
    items: in any order.
    keys: one per item; items of equal keys are duplicates.

  Returns:
    For each item its index among the distinct ones, and the distinct items in
    order of first appearance.
  """
  index_of: dict[Hashable, int] = {}
  indices: list[int] = []
  distinct: list[Any] = []
  for item, key in zip(items, keys):
    if key not in index_of:
      index_of[key] = len(distinct)
      distinct.append(item)
    indices.append(index_of[key])
  return indices, distinct
