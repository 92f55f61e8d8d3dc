"""Log-probabilities and entropies: of rows, and of prefixes with continuations.

Shape key: R or B rows, T tokens of a row, S continuations, G tokens of a
continuation, D hidden.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opera_jax import structs
from opera_jax.models import attention, qwen3, sharded_ops
from opera_jax.scoring import packing as packing_lib
from opera_jax.sharding import layout


def token_logprobs(
  model: qwen3.Qwen3,
  hidden_BTD: jax.Array,
  target_BT: jax.Array,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability [B, T] of targets and entropy [B, T], float32, in nats."""
  head, transposed = model.head_matrix()
  return sharded_ops.token_logprob(
    hidden_BTD,
    head.astype(hidden_BTD.dtype),
    target_BT,
    temperature=temperature,
    transposed=transposed,
  )


def shifted(x_BT: jax.Array) -> jax.Array:
  """What is said before token t, [B, T, ...], put at t; token 0 has none."""
  rest = ((0, 0),) * (x_BT.ndim - 2)
  return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0), *rest))


@dataclasses.dataclass(frozen=True)
class RowStates:
  """Final hidden states of an update's rows, each before the token it says.

  Shape key: R rows, T tokens of a row, X states of a row.
  """

  hidden_RXD: jax.Array
  prefix: int  # leading places without a state, where completions share them

  def said(self, x_RT: jax.Array) -> jax.Array:
    """[R, X, ...]: of what stands at every token, that after each state."""
    if self.prefix:
      return x_RT[:, self.prefix :]
    return jnp.roll(x_RT, -1, axis=1)

  def placed(self, x_RX: jax.Array) -> jax.Array:
    """[R, T, ...]: what a state gives, at the token it says; 0 at others."""
    if self.prefix:
      rest = ((0, 0),) * (x_RX.ndim - 2)
      return jnp.pad(x_RX, ((0, 0), (self.prefix, 0), *rest))
    return shifted(x_RX)


def row_states(model: qwen3.Qwen3, batch: structs.Batch) -> RowStates:
  """Runs an update's rows; a prompt that completions share is run once."""
  implementation = model.config.attention or None
  if not batch.continuations:
    attend = attention.causal(batch.segments, implementation=implementation)
    hidden_RTD, _ = model(batch.tokens, batch.positions, attend)
    return RowStates(hidden_RTD, 0)
  P, S = batch.prefix, batch.continuations
  R, T = batch.tokens.shape
  G = (T - P) // S
  segment_RP = (batch.segments[:, :P] == 1).astype(jnp.int32)
  limit_RS = batch.positions[:, P::G]  # a completion begins behind its prompt
  attend = attention.prefix_and_continuations(
    segment_RP, limit_RS, G, implementation=implementation
  )
  hidden_RTD, _ = model(batch.tokens, batch.positions, attend)
  last_RS1 = jnp.maximum(limit_RS - 1, 0)[..., None]
  first_RSD = jnp.take_along_axis(hidden_RTD[:, :P], last_RS1, axis=1)
  own_RSGD = hidden_RTD[:, P:].reshape(R, S, G, -1)
  before_RSGD = jnp.concatenate(
    [first_RSD[:, :, None], own_RSGD[:, :, :-1]], axis=2
  )
  return RowStates(before_RSGD.reshape(R, S * G, -1), P)


def row_logprob(
  graphdef: nnx.GraphDef, *, temperature: float = 1.0
) -> Callable[[Any, structs.Batch], tuple[jax.Array, jax.Array]]:
  """The update's view of the model.

  Returns:
    `f(params, batch) -> (logprob_RT, entropy_RT)`, float32: entry t is the
    log-probability of token t after the tokens before it in its segment
    (entry 0 is 0, and every entry of a prompt that completions share), and the
    entropy of the distribution it was drawn from.
  """

  def fn(params, batch: structs.Batch):
    model = nnx.merge(graphdef, params)
    states = row_states(model, batch)
    logprob_RX, entropy_RX = token_logprobs(
      model, states.hidden_RXD, states.said(batch.tokens), temperature
    )
    return states.placed(logprob_RX), states.placed(entropy_RX)

  return fn


def prefixes_and_continuations(
  graphdef: nnx.GraphDef, *, temperature: float = 1.0
) -> Callable[..., tuple[jax.Array, ...]]:
  """The reward's view of the model: one pass over prefixes and their
  continuations.

  Returns:
    `f(params, token_BT, length_B, input_BSG, target_BSG, prefix_length_BS)`,
    the arrays of a `packing.MicroBatch`, to be jitted. It gives log-probability
    and entropy of the prefix's tokens [B, T] (entry t for token t after those
    before it, entry 0 is 0) and of the continuations' targets [B, S, G],
    float32.
  """

  def fn(params, token_BT, length_B, input_BSG, target_BSG, prefix_length_BS):
    model = nnx.merge(graphdef, params)
    B, T = token_BT.shape
    S, G = input_BSG.shape[1:]
    position_T = jnp.arange(T, dtype=jnp.int32)
    segment_BT = (position_T[None] < length_B[:, None]).astype(jnp.int32)
    position_BSG = (
      prefix_length_BS[:, :, None] + jnp.arange(G, dtype=jnp.int32)[None, None]
    )
    flat = (B, S * G)
    hidden_BXD, _ = model(
      jnp.concatenate([token_BT, input_BSG.reshape(flat)], axis=1),
      jnp.concatenate(
        [
          jnp.broadcast_to(position_T[None], (B, T)),
          position_BSG.reshape(flat),
        ],
        axis=1,
      ),
      attention.prefix_and_continuations(
        segment_BT,
        prefix_length_BS,
        G,
        implementation=model.config.attention or None,
      ),
    )
    target_BX = jnp.concatenate(
      [jnp.roll(token_BT, -1, axis=1), target_BSG.reshape(flat)], axis=1
    )
    logprob_BX, entropy_BX = token_logprobs(
      model, hidden_BXD, target_BX, temperature
    )
    return (
      shifted(logprob_BX[:, :T]),
      shifted(entropy_BX[:, :T]),
      logprob_BX[:, T:].reshape(B, S, G),
      entropy_BX[:, T:].reshape(B, S, G),
    )

  return fn


class LogprobScorer:
  """Log-probabilities prefixes and continuations: one pass over each prefix and
  its continuations."""

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
    """Compiles nothing yet; one program a shape is compiled on first use.

    Args:
      graphdef: of the model; parameters come with every call.
      vocab_size: rows of the head; ids at or above it are refused.
      mesh: rows are split over its data axes.
      batch_size: prefixes a call; a multiple of the mesh's data axes.
      prefix_buckets: allowed padded prefix lengths.
      slot_buckets: allowed numbers of continuations a prefix.
      continuation_buckets: allowed padded continuation lengths.
      temperature: divides the logits.

    Raises:
      ValueError: rows do not divide over the mesh.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % ways:
      raise ValueError(
        f"A call scores {batch_size} prefixes over {ways} data shards, which "
        "does not divide. Make config.scoring.batch_size a multiple."
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
      prefixes_and_continuations(graphdef, temperature=temperature)
    )

  def programs(self) -> int:
    """How many programs scoring can need: one a shape."""
    names = ("prefix_buckets", "slot_buckets", "continuation_buckets")
    return math.prod(len(self._pack[name]) for name in names)

  def bucket(self, prefix: np.ndarray) -> int:
    """The length that a prefix is padded to where it is scored alone."""
    return packing_lib.bucket(len(prefix), self._pack["prefix_buckets"])

  def score(
    self,
    params: Any,
    prefixes: Sequence[np.ndarray],
    continuations: Sequence[structs.Continuation] = (),
    *,
    advance: Callable[[int], None] | None = None,
  ) -> structs.Logprobs:
    """Log-probabilities every token of every prefix and continuation.

    Args:
      params: the policy's parameters.
      prefixes: int32 tokens [T_i] each, T_i >= 1.
      continuations: continuations of prefixes of prefixes.
      advance: called with the tokens done after each microbatch.

    Returns:
      Log-probabilities in the order given.

    Raises:
      ValueError: see `packing.check`; a log-probability that is not finite.
    """
    packing_lib.check(prefixes, continuations, self._vocab_size)
    # Equal work is done once: it costs nothing twice, and two samples that
    # are the same tokens get the same bits, so that they tie.
    prefix_place, own_prefixes = _distinct(
      prefixes, [t.tobytes() for t in prefixes]
    )
    moved = [
      dataclasses.replace(b, prefix=prefix_place[b.prefix])
      for b in continuations
    ]
    continuation_place, own_continuations = _distinct(
      moved, [(b.prefix, b.fork, b.tokens.tobytes(), b.skip) for b in moved]
    )
    scored = self._run_all(params, own_prefixes, own_continuations, advance)
    for name, logprobs in zip(
      ("prefix", "prefix", "continuation", "continuation"), scored
    ):
      for index, score in enumerate(logprobs):
        if not np.isfinite(score).all():
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
      prefix_logprob=[prefix_logprob[i] for i in prefix_place],
      prefix_entropy=[prefix_entropy[i] for i in prefix_place],
      continuation_logprob=[
        continuation_logprob[i] for i in continuation_place
      ],
      continuation_entropy=[
        continuation_entropy[i] for i in continuation_place
      ],
      prefix_tokens=sum(len(t) for t in own_prefixes),
      continuation_tokens=sum(len(b.tokens) for b in own_continuations),
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
    """Log-probabilities completions from which nothing forks, and further
    prefixes.

    Where the buckets hold them, the completions of a prompt are continuations
    of it, so that it is computed once; else each is a prefix of its own.

    Args:
      params: the policy's parameters.
      prompts: int32 tokens of each prompt.
      completions: int32 tokens, prompt-major, equally many a prompt.
      prefixes: further ones.
      advance: see `score`.

    Returns:
      What `score` gives of prompt + completion, one a completion, and of
      `prefixes` behind them.

    Raises:
      ValueError: see `score`.
    """
    samples = len(completions) // len(prompts)
    owned = [(i // samples, tokens) for i, tokens in enumerate(completions)]
    if (
      max(map(len, completions)) > self._pack["continuation_buckets"][-1]
      or samples > self._pack["slot_buckets"][-1]
    ):
      rows = [np.concatenate([prompts[b], tokens]) for b, tokens in owned]
      return self.score(params, [*rows, *prefixes], advance=advance)
    logprobs = self.score(
      params,
      [*prompts, *prefixes],
      [structs.Continuation(b, len(prompts[b]), tokens) for b, tokens in owned],
      advance=advance,
    )

    def whole(of_prefixes, of_continuations):
      own = [
        np.concatenate([of_prefixes[b], continuation])
        for (b, _), continuation in zip(owned, of_continuations)
      ]
      return own + of_prefixes[len(prompts) :]

    return dataclasses.replace(
      logprobs,
      prefix_logprob=whole(
        logprobs.prefix_logprob, logprobs.continuation_logprob
      ),
      prefix_entropy=whole(
        logprobs.prefix_entropy, logprobs.continuation_entropy
      ),
      continuation_logprob=[],
      continuation_entropy=[],
    )

  def _run_all(self, params, prefixes, continuations, advance):
    """Log-probabilities distinct prefixes and continuations, one microbatch in
    flight."""
    prefix_logprob = [None] * len(prefixes)
    prefix_entropy = [None] * len(prefixes)
    continuation_logprob = [None] * len(continuations)
    continuation_entropy = [None] * len(continuations)
    sharding = layout.rows(self._mesh)

    def finish(batch, results):
      logprob_BT, entropy_BT, logprob_BSG, entropy_BSG = layout.to_host(results)
      for row, prefix in enumerate(batch.prefix_of):
        size = len(prefixes[prefix])
        prefix_logprob[prefix] = logprob_BT[row, :size]
        prefix_entropy[prefix] = entropy_BT[row, :size]
      for row, slot, index in batch.continuation_of:
        own = slice(continuations[index].skip, len(continuations[index].tokens))
        continuation_logprob[index] = logprob_BSG[row, slot, own]
        continuation_entropy[index] = entropy_BSG[row, slot, own]
      if advance is not None:
        advance(int(batch.length_B.sum()))

    waiting = None
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
        if waiting is not None:
          finish(*waiting)
        waiting = (batch, results)
    if waiting is not None:
      finish(*waiting)
    return (
      prefix_logprob,
      prefix_entropy,
      continuation_logprob,
      continuation_entropy,
    )


def _distinct(items: Sequence[Any], keys: Sequence[Any]):
  """(place of each item among the distinct ones, the distinct ones)."""
  first: dict[Any, int] = {}
  places: list[int] = []
  kept: list[Any] = []
  for item, key in zip(items, keys):
    if key not in first:
      first[key] = len(kept)
      kept.append(item)
    places.append(first[key])
  return places, kept
