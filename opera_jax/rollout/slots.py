"""The device's side of sampling: slots, and the programs that act on them.

A row holds one prompt's keys and values (the trunk); its S slots hold samples
of that prompt. A slot feeds the last token of its context again as its own
first token, so that a sample can begin wherever a trunk ends, and a kept
sample can become more trunk without running anything twice.

Every program takes the slots' buffers for itself and gives them back changed.
All take and give whole arrays, so that on a mesh each process calls them with
the same host arrays.

Shape key: L layers, B rows, S slots a row, T trunk capacity, C slot capacity,
R prompts of one admission, P their padded length, U steps of one call, W recent
tokens, D hidden, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec

from opera_jax.models import attention, kv_cache, qwen3
from opera_jax.rollout import sampling
from opera_jax.sharding import rules
from opera_jax.text import automaton

STOPPED, LOOPED = 1, 2
_TRUNK = (None, "batch", None, "heads", None)
_CACHE = (None, "batch", None, None, "heads", None)


@struct.dataclass
class Slots:
  """What every row and slot is at."""

  trunk: kv_cache.Trunk  # [L, B, T, K, H]
  cache: kv_cache.Samples  # [L, B, S, C, K, H]
  limit: jax.Array  # [B] int32, trunk tokens seen by the slots of a row
  token: jax.Array  # [B, S] int32, the token to feed next
  depth: jax.Array  # [B, S] int32, own tokens fed, which is tokens drawn
  budget: jax.Array  # [B, S] int32, tokens that may be drawn in all
  key: jax.Array  # [B, S, words] uint32, random key data, one a sample
  state: jax.Array  # [B, S] int32, of the stop strings' automaton
  recent: jax.Array  # [B, S, W] int32, last tokens, -1 for none
  live: jax.Array  # [B, S] bool
  ended: jax.Array  # [B, S] int32, 0, STOPPED or LOOPED


@struct.dataclass
class Drawn:
  """What one call drew; a slot's tokens are the first `count`."""

  token: jax.Array  # [B, S, U] int32
  logprob: jax.Array  # [B, S, U] float32
  count: jax.Array  # [B, S] int32
  live: jax.Array  # [B, S] bool, goes on after this call
  ended: jax.Array  # [B, S] int32


def empty(
  config: qwen3.Config,
  rows: int,
  slots: int,
  trunk_capacity: int,
  capacity: int,
  *,
  recent: int,
  dtype: str,
) -> Slots:
  """Slots with nothing in them."""
  sizes = (config.kv_heads, config.head_dim, dtype)
  shape = (rows, slots)

  def zeros():
    return jnp.zeros(shape, jnp.int32)

  slots = Slots(
    trunk=kv_cache.empty_trunk(config.layers, rows, trunk_capacity, *sizes),
    cache=kv_cache.empty_samples(config.layers, rows, slots, capacity, *sizes),
    limit=jnp.zeros(rows, jnp.int32),
    token=zeros(),
    depth=zeros(),
    budget=zeros(),
    key=jnp.zeros(
      (*shape, *jax.random.key_data(jax.random.key(0)).shape), jnp.uint32
    ),
    state=zeros(),
    recent=jnp.full((*shape, recent), -1, jnp.int32),
    live=jnp.zeros(shape, bool),
    ended=zeros(),
  )
  return _laid_out(slots)


def shardings(slots: Slots, mesh: jax.sharding.Mesh) -> Slots:
  """Where the slots lie: rows over the data axes, heads over tensor.

  Args:
    slots: arrays or their shapes; parts may be None.
    mesh: present or absent devices.

  Returns:
    A tree of NamedShardings.
  """
  with jax.set_mesh(mesh):

    def place(x, axes):
      parts = (rules.activation_axis(n, s) for n, s in zip(axes, x.shape))
      return NamedSharding(mesh, PartitionSpec(*parts))

    return _by_axes(place, slots)


def _laid_out(slots: Slots) -> Slots:
  """Pins the slots over the mesh in force."""
  return _by_axes(rules.constrain, slots)


def _by_axes(function, slots: Slots) -> Slots:
  """`function(leaf, logical axes)` of every leaf."""
  rest = jax.tree.map(
    lambda x: function(x, ("batch",) + (None,) * (x.ndim - 1)),
    slots.replace(trunk=None, cache=None),
  )
  return rest.replace(
    trunk=jax.tree.map(lambda x: function(x, _TRUNK), slots.trunk),
    cache=jax.tree.map(lambda x: function(x, _CACHE), slots.cache),
  )


def admit(
  graphdef: nnx.GraphDef,
  params: Any,
  trunk: kv_cache.Trunk,
  limit_B: jax.Array,
  token_RP: jax.Array,
  length_R: jax.Array,
  row_R: jax.Array,
) -> tuple[kv_cache.Trunk, jax.Array]:
  """Computes prompts and puts them into rows whose slots are all free.

  Args:
    graphdef: of the model.
    params: parameters.
    trunk: of the slots, to be changed.
    limit_B: of the slots, to be changed.
    token_RP: int32 prompts, right-padded, P <= T.
    length_R: int32, at least 1.
    row_R: int32, the row of each prompt; B or more for padding.
  """
  model = nnx.merge(graphdef, params)
  R, P = token_RP.shape
  position_P = jnp.arange(P, dtype=jnp.int32)
  config = model.config
  _, piece = model(
    token_RP,
    jnp.broadcast_to(position_P[None], (R, P)),
    attention.prefill(
      (position_P[None] < length_R[:, None]).astype(jnp.int32),
      implementation=config.attention or None,
    ),
    kv_cache.empty_trunk(
      config.layers,
      R,
      P,
      config.kv_heads,
      config.head_dim,
      trunk.k.dtype,
    ),
  )
  trunk = jax.tree.map(
    lambda whole, part: whole.at[:, row_R, :P].set(part, mode="drop"),
    trunk,
    piece,
  )
  limit_B = limit_B.at[row_R].set(length_R - 1, mode="drop")
  trunk = jax.tree.map(lambda x: rules.constrain(x, _TRUNK), trunk)
  return trunk, rules.constrain(limit_B, ("batch",))


def assign(
  slots: Slots,
  fresh_BS: jax.Array,
  token_BS: jax.Array,
  budget_BS: jax.Array,
  key_BS: jax.Array,
) -> Slots:
  """Begins a sample in each slot of `fresh`; the others go on.

  Args:
    slots: to be changed; trunk and cache may be None.
    fresh_BS: bool.
    token_BS: int32, the last token of the slot's context.
    budget_BS: int32, tokens that may be drawn.
    key_BS: random key data of the samples.
  """

  def pick(new, old):
    where = fresh_BS.reshape(fresh_BS.shape + (1,) * (old.ndim - 2))
    return jnp.where(where, new, old)

  slots = slots.replace(
    token=pick(token_BS, slots.token),
    depth=pick(0, slots.depth),
    budget=pick(budget_BS, slots.budget),
    key=pick(key_BS, slots.key),
    state=pick(0, slots.state),
    recent=pick(-1, slots.recent),
    live=slots.live | fresh_BS,
    ended=pick(0, slots.ended),
  )
  return _laid_out(slots)


def keep(
  slots: Slots, slot_B: jax.Array, count_B: jax.Array, tokens: int
) -> Slots:
  """Makes the first tokens of a slot part of its row's trunk.

  Args:
    slots: to be changed.
    slot_B: int32, the slot of each row.
    count_B: int32 at most `tokens`, how many of its tokens to keep; 0 changes
      nothing.
    tokens: static bound of the counts.
  """
  B = slot_B.shape[0]
  n = jnp.arange(tokens, dtype=jnp.int32)[None]
  T = slots.trunk.k.shape[2]
  # Key j of a slot is that of its context's last token, then of its own.
  place_Bn = jnp.where(n < count_B[:, None], slots.limit[:, None] + n, T)
  row_B1 = jnp.arange(B)[:, None]

  def move(trunk, cache):
    part = cache[:, jnp.arange(B), slot_B, :tokens]
    return trunk.at[:, row_B1, place_Bn].set(part, mode="drop")

  trunk = kv_cache.Trunk(
    k=move(slots.trunk.k, slots.cache.k), v=move(slots.trunk.v, slots.cache.v)
  )
  return _laid_out(slots.replace(trunk=trunk, limit=slots.limit + count_B))


def grow(slots: Slots, capacity: int) -> Slots:
  """Lengthens every slot's cache to `capacity` tokens."""
  more = capacity - slots.cache.k.shape[3]
  pad = ((0, 0),) * 3 + ((0, more),) + ((0, 0),) * 2
  cache = jax.tree.map(lambda x: jnp.pad(x, pad), slots.cache)
  return _laid_out(slots.replace(cache=cache))


def decode(
  graphdef: nnx.GraphDef,
  params: Any,
  slots: Slots,
  stops: automaton.Automaton | None,
  free: jax.Array,
  *,
  settings: sampling.Sampling,
  steps: int,
) -> tuple[Slots, Drawn]:
  """Draws up to `steps` tokens in every live slot.

  Args:
    graphdef: of the model.
    params: parameters.
    slots: to be changed; each live slot's capacity is at least its depth plus
      `steps`.
    stops: automaton of stop strings, or None.
    free: int32 scalar; leaves early when so many slots have ended in this
      call, to let new samples in.
    settings: how to draw.
    steps: U.
  """
  model = nnx.merge(graphdef, params)
  head, transposed = model.head_matrix()
  B, S = slots.token.shape
  start_live = slots.live

  def cond(carry):
    step, slots, _, _ = carry
    ended = jnp.sum(start_live & ~slots.live)
    return (step < steps) & jnp.any(slots.live) & (ended < free)

  def body(carry):
    step, slots, token_BSU, logprob_BSU = carry
    hidden_BSD, cache = model(
      slots.token,
      slots.limit[:, None] + slots.depth,
      attention.decode(slots.trunk, slots.limit, slots.depth, slots.live),
      slots.cache,
    )
    logit_RV = jax.lax.dot_general(
      hidden_BSD.reshape(B * S, -1),
      head.astype(hidden_BSD.dtype),
      (((1,), (1 if transposed else 0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    key_R = jax.vmap(jax.random.fold_in)(
      jax.random.wrap_key_data(slots.key.reshape(B * S, -1)),
      slots.depth.reshape(B * S),
    )
    token_BS, logprob_BS = (
      x.reshape(B, S)
      for x in sampling.sample(
        logit_RV, key_R, settings, slots.depth.reshape(B * S)
      )
    )
    slots = _after(slots.replace(cache=cache), token_BS, stops, settings)
    place = (0, 0, step)
    return (
      step + 1,
      slots,
      jax.lax.dynamic_update_slice(token_BSU, token_BS[..., None], place),
      jax.lax.dynamic_update_slice(logprob_BSU, logprob_BS[..., None], place),
    )

  start_depth = slots.depth
  _, slots, token_BSU, logprob_BSU = jax.lax.while_loop(
    cond,
    body,
    (
      jnp.int32(0),
      slots,
      jnp.zeros((B, S, steps), jnp.int32),
      jnp.zeros((B, S, steps), jnp.float32),
    ),
  )
  return _laid_out(slots), Drawn(
    token=token_BSU,
    logprob=logprob_BSU,
    count=jnp.where(start_live, slots.depth - start_depth, 0),
    live=slots.live,
    ended=slots.ended,
  )


def _after(
  slots: Slots,
  token_BS: jax.Array,
  stops: automaton.Automaton | None,
  settings: sampling.Sampling,
) -> Slots:
  """The slots once `token_BS` has been drawn in those that are live."""
  live_BS = slots.live
  depth_BS = slots.depth + live_BS
  stop_BS = jnp.zeros_like(live_BS)
  for stop_id in settings.stop_ids:
    stop_BS |= token_BS == stop_id
  state_BS = slots.state
  if stops is not None:
    state_BS, event_BS = automaton.step(stops, state_BS, token_BS)
    late_BS = depth_BS >= settings.min_new_tokens
    stop_BS |= (event_BS > 0) & late_BS
  ended_BS = jnp.where(stop_BS, STOPPED, 0)
  recent_BSW = slots.recent
  if settings.loop_period:
    recent_BSW = jnp.concatenate(
      [recent_BSW[..., 1:], token_BS[..., None]], axis=-1
    )
    flat_RW = recent_BSW.reshape(-1, recent_BSW.shape[-1])
    loop_R = sampling.loops(flat_RW, settings.loop_period)
    loop_BS = loop_R.reshape(token_BS.shape)
    ended_BS = jnp.where(loop_BS & ~stop_BS, LOOPED, ended_BS)
  ended_BS = jnp.where(live_BS, ended_BS, slots.ended)
  return slots.replace(
    token=token_BS,
    depth=depth_BS,
    state=state_BS,
    recent=recent_BSW,
    live=live_BS & (ended_BS == 0) & (depth_BS < slots.budget),
    ended=ended_BS,
  )


def programs(graphdef: nnx.GraphDef) -> dict[str, Any]:
  """The jitted programs by name; each takes the slots' buffers for itself."""
  return {
    "empty": jax.jit(
      empty, static_argnums=(0, 1, 2, 3, 4), static_argnames=("recent", "dtype")
    ),
    "admit": jax.jit(functools.partial(admit, graphdef), donate_argnums=(1, 2)),
    "assign": jax.jit(assign, donate_argnums=0),
    "keep": jax.jit(keep, donate_argnums=0, static_argnames="tokens"),
    "grow": jax.jit(grow, static_argnames="capacity"),
    "decode": jax.jit(
      functools.partial(decode, graphdef),
      donate_argnums=1,
      static_argnames=("settings", "steps"),
    ),
  }
