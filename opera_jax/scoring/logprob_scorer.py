"""Log-probabilities and entropies: of rows, and of trunks with branches.

Shape key: R or B rows, T tokens of a row, S branches, G tokens of a branch,
D hidden.
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
from opera_jax.models import attention, on_mesh, qwen3
from opera_jax.scoring import trunks as trunks_lib
from opera_jax.sharding import layout


def token_logprobs(
  model: qwen3.Qwen3,
  hidden_BTD: jax.Array,
  target_BT: jax.Array,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability [B, T] of targets and entropy [B, T], float32, in nats."""
  head, transposed = model.head_matrix()
  return on_mesh.token_logprob(
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
  trunk: int  # leading places without a state, where completions share them

  def said(self, x_RT: jax.Array) -> jax.Array:
    """[R, X, ...]: of what stands at every token, that after each state."""
    if self.trunk:
      return x_RT[:, self.trunk :]
    return jnp.roll(x_RT, -1, axis=1)

  def placed(self, x_RX: jax.Array) -> jax.Array:
    """[R, T, ...]: what a state gives, at the token it says; 0 at others."""
    if self.trunk:
      rest = ((0, 0),) * (x_RX.ndim - 2)
      return jnp.pad(x_RX, ((0, 0), (self.trunk, 0), *rest))
    return shifted(x_RX)


def row_states(model: qwen3.Qwen3, batch: structs.Batch) -> RowStates:
  """Runs an update's rows; a prompt that completions share is run once."""
  implementation = model.config.attention or None
  if not batch.branches:
    attend = attention.causal(batch.segments, implementation=implementation)
    hidden_RTD, _ = model(batch.tokens, batch.positions, attend)
    return RowStates(hidden_RTD, 0)
  P, S = batch.trunk, batch.branches
  R, T = batch.tokens.shape
  G = (T - P) // S
  segment_RP = (batch.segments[:, :P] == 1).astype(jnp.int32)
  limit_RS = batch.positions[:, P::G]  # a completion begins behind its prompt
  attend = attention.trunk_and_branches(
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


def trunks_and_branches(
  graphdef: nnx.GraphDef, *, temperature: float = 1.0
) -> Callable[..., tuple[jax.Array, ...]]:
  """The reward's view of the model: one pass over trunks and their branches.

  Returns:
    `f(params, token_BT, length_B, input_BSG, target_BSG, limit_BS)`, the
    arrays of a `trunks.MicroBatch`, to be jitted. It gives log-probability
    and entropy of the trunk's tokens [B, T] (entry t for token t after those
    before it, entry 0 is 0) and of the branches' targets [B, S, G], float32.
  """

  def fn(params, token_BT, length_B, input_BSG, target_BSG, limit_BS):
    model = nnx.merge(graphdef, params)
    B, T = token_BT.shape
    S, G = input_BSG.shape[1:]
    position_T = jnp.arange(T, dtype=jnp.int32)
    segment_BT = (position_T[None] < length_B[:, None]).astype(jnp.int32)
    position_BSG = (
      limit_BS[:, :, None] + jnp.arange(G, dtype=jnp.int32)[None, None]
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
      attention.trunk_and_branches(
        segment_BT,
        limit_BS,
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
  """Log-probabilities trunks and branches: one pass over each trunk and its
  branches."""

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
      batch_size: trunks a call; a multiple of the mesh's data axes.
      prefix_buckets: allowed padded trunk lengths.
      slot_buckets: allowed numbers of branches a trunk.
      continuation_buckets: allowed padded branch lengths.
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
    self._pack = {
      "batch_size": batch_size,
      "prefix_buckets": tuple(prefix_buckets),
      "slot_buckets": tuple(slot_buckets),
      "continuation_buckets": tuple(continuation_buckets),
    }

    self._run = jax.jit(trunks_and_branches(graphdef, temperature=temperature))

  def programs(self) -> int:
    """How many programs scoring can need: one a shape."""
    names = ("prefix_buckets", "slot_buckets", "continuation_buckets")
    return math.prod(len(self._pack[name]) for name in names)

  def bucket(self, trunk: np.ndarray) -> int:
    """The length that a trunk is padded to where it is scored alone."""
    return trunks_lib.bucket(len(trunk), self._pack["prefix_buckets"])

  def score(
    self,
    params: Any,
    trunks: Sequence[np.ndarray],
    branches: Sequence[structs.Branch] = (),
    *,
    advance: Callable[[int], None] | None = None,
  ) -> structs.Logprobs:
    """Log-probabilities every token of every trunk and branch.

    Args:
      params: the policy's parameters.
      trunks: int32 tokens [T_i] each, T_i >= 1.
      branches: continuations of prefixes of trunks.
      advance: called with the tokens done after each microbatch.

    Returns:
      Log-probabilities in the order given.

    Raises:
      ValueError: see `trunks.check`; a log-probability that is not finite.
    """
    trunks_lib.check(trunks, branches, self._vocab_size)
    # Equal work is done once: it costs nothing twice, and two samples that
    # are the same tokens get the same bits, so that they tie.
    trunk_place, own_trunks = _distinct(trunks, [t.tobytes() for t in trunks])
    moved = [
      dataclasses.replace(b, trunk=trunk_place[b.trunk]) for b in branches
    ]
    branch_place, own_branches = _distinct(
      moved, [(b.trunk, b.fork, b.tokens.tobytes(), b.skip) for b in moved]
    )
    scored = self._run_all(params, own_trunks, own_branches, advance)
    for name, logprobs in zip(("trunk", "trunk", "branch", "branch"), scored):
      for index, score in enumerate(logprobs):
        if not np.isfinite(score).all():
          raise FloatingPointError(
            f"The log-probability of {name} {index} is not finite. The "
            "parameters have diverged; lower the learning rate or resume "
            "from an earlier checkpoint."
          )
    trunk_logprob, trunk_entropy, branch_logprob, branch_entropy = scored
    return structs.Logprobs(
      trunk_logprob=[trunk_logprob[i] for i in trunk_place],
      trunk_entropy=[trunk_entropy[i] for i in trunk_place],
      branch_logprob=[branch_logprob[i] for i in branch_place],
      branch_entropy=[branch_entropy[i] for i in branch_place],
      trunk_tokens=sum(len(t) for t in own_trunks),
      branch_tokens=sum(len(b.tokens) for b in own_branches),
    )

  def score_completions(
    self,
    params: Any,
    prompts: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
    trunks: Sequence[np.ndarray] = (),
    *,
    advance: Callable[[int], None] | None = None,
  ) -> structs.Logprobs:
    """Log-probabilities completions from which nothing forks, and further
    trunks.

    Where the buckets hold them, the completions of a prompt are branches of
    it, so that it is computed once; else each is a trunk of its own.

    Args:
      params: the policy's parameters.
      prompts: int32 tokens of each prompt.
      completions: int32 tokens, prompt-major, equally many a prompt.
      trunks: further ones.
      advance: see `score`.

    Returns:
      What `score` gives of prompt + completion, one a completion, and of
      `trunks` behind them.

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
      return self.score(params, [*rows, *trunks], advance=advance)
    logprobs = self.score(
      params,
      [*prompts, *trunks],
      [structs.Branch(b, len(prompts[b]), tokens) for b, tokens in owned],
      advance=advance,
    )

    def whole(of_trunks, of_branches):
      own = [
        np.concatenate([of_trunks[b], branch])
        for (b, _), branch in zip(owned, of_branches)
      ]
      return own + of_trunks[len(prompts) :]

    return dataclasses.replace(
      logprobs,
      trunk_logprob=whole(logprobs.trunk_logprob, logprobs.branch_logprob),
      trunk_entropy=whole(logprobs.trunk_entropy, logprobs.branch_entropy),
      branch_logprob=[],
      branch_entropy=[],
    )

  def _run_all(self, params, trunks, branches, advance):
    """Log-probabilities distinct trunks and branches, one microbatch in
    flight."""
    trunk_logprob = [None] * len(trunks)
    trunk_entropy = [None] * len(trunks)
    branch_logprob = [None] * len(branches)
    branch_entropy = [None] * len(branches)
    sharding = layout.rows(self._mesh)

    def finish(batch, results):
      logprob_BT, entropy_BT, logprob_BSG, entropy_BSG = layout.to_host(results)
      for row, trunk in enumerate(batch.trunk_of):
        size = len(trunks[trunk])
        trunk_logprob[trunk] = logprob_BT[row, :size]
        trunk_entropy[trunk] = entropy_BT[row, :size]
      for row, slot, index in batch.branch_of:
        own = slice(branches[index].skip, len(branches[index].tokens))
        branch_logprob[index] = logprob_BSG[row, slot, own]
        branch_entropy[index] = entropy_BSG[row, slot, own]
      if advance is not None:
        advance(int(batch.length_B.sum()))

    waiting = None
    with jax.set_mesh(self._mesh):
      for batch in trunks_lib.pack(trunks, branches, **self._pack):
        arrays = layout.to_devices(
          (
            batch.token_BT,
            batch.length_B,
            batch.input_BSG,
            batch.target_BSG,
            batch.limit_BS,
          ),
          sharding,
        )
        results = self._run(params, *arrays)
        if waiting is not None:
          finish(*waiting)
        waiting = (batch, results)
    if waiting is not None:
      finish(*waiting)
    return trunk_logprob, trunk_entropy, branch_logprob, branch_entropy


def _distinct(items: Sequence[Any], keys: Sequence[Any]):
  """(place of each item among the distinct ones, the distinct ones)."""
  first: dict[Any, int] = {}
  places, kept = [], []
  for item, key in zip(items, keys):
    if key not in first:
      first[key] = len(kept)
      kept.append(item)
    places.append(first[key])
  return places, kept
