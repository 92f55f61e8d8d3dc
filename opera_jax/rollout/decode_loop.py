"""The programs that act on rows of slots.

Every program takes the slots' buffers for itself and gives them back changed.
All take and give whole arrays, so that on a mesh each process calls them with
the same host arrays.

Shape key: L layers, B rows, S slots a row, T prefix capacity, C slot capacity,
R prompts of one admission, P their padded length, U steps of one call, W recent
tokens, D hidden, V vocabulary, M active slots.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opera_jax.kernels import target
from opera_jax.models import attention, kv_cache, small_batch_matmul
from opera_jax.models import compaction as compaction
from opera_jax.rollout import sampling
from opera_jax.rollout import slots as slots_lib
from opera_jax.sharding import rules
from opera_jax.text import automaton

# Prompt tokens that a device computes at once, at least. A CPU is busy with
# few, and an admission of one prompt costs as much as one of all.
TOGETHER = {"cpu": 256, "gpu": 512, "tpu": 512}


def admit(
  graphdef: nnx.GraphDef,
  params: Any,
  prefix: kv_cache.PrefixCache,
  prefix_length_B: jax.Array,
  token_RP: jax.Array,
  length_R: jax.Array,
  row_R: jax.Array,
) -> tuple[kv_cache.PrefixCache, jax.Array]:
  """Computes prompts and puts them into rows whose slots are all free.

  Args:
    graphdef: of the model.
    params: parameters.
    prefix: of the slots, to be changed.
    prefix_length_B: of the slots, to be changed.
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
    kv_cache.empty_prefix(
      config.num_hidden_layers,
      R,
      P,
      config.num_key_value_heads,
      config.head_dim,
      jax.tree.leaves(prefix.k)[0].dtype,
    ),
  )
  if isinstance(prefix.k, tuple):
    piece = kv_cache.apart(piece)
  prefix = jax.tree.map(
    lambda whole, part: whole.at[..., row_R, :, :P, :].set(part, mode="drop"),
    prefix,
    piece,
  )
  prefix_length_B = prefix_length_B.at[row_R].set(length_R - 1, mode="drop")
  return slots_lib.laid_out_prefix(prefix), rules.constrain(
    prefix_length_B, ("batch",)
  )


def assign(
  slots: slots_lib.Slots,
  fresh_BS: jax.Array,
  token_BS: jax.Array,
  budget_BS: jax.Array,
  key_BS: jax.Array,
  state_BS: jax.Array,
) -> slots_lib.Slots:
  """Begins a sample in each slot of `fresh`; the others go on.

  Args:
    slots: to be changed; prefix and cache may be None.
    fresh_BS: bool.
    token_BS: int32, the last token of the slot's context.
    budget_BS: int32, tokens that may be drawn.
    key_BS: random key data of the samples.
    state_BS: int32, of the stop strings' automaton, at their start.
  """

  def pick(new, old):
    where = fresh_BS.reshape(fresh_BS.shape + (1,) * (old.ndim - 2))
    return jnp.where(where, new, old)

  slots = slots.replace(
    token=pick(token_BS, slots.token),
    num_generated=pick(0, slots.num_generated),
    budget=pick(budget_BS, slots.budget),
    key=pick(key_BS, slots.key),
    state=pick(state_BS, slots.state),
    recent=pick(-1, slots.recent),
    live=slots.live | fresh_BS,
    ended=pick(0, slots.ended),
  )
  return slots_lib.laid_out(slots)


def keep(
  slots: slots_lib.Slots, slot_B: jax.Array, count_B: jax.Array, tokens: int
) -> slots_lib.Slots:
  """Makes the first tokens of a slot part of its row's prefix.

  Args:
    slots: to be changed.
    slot_B: int32, the slot of each row.
    count_B: int32 at most `tokens`, how many of its tokens to keep; 0 changes
      nothing.
    tokens: static bound of the counts.
  """
  B = slot_B.shape[0]
  n = jnp.arange(tokens, dtype=jnp.int32)[None]
  T = slots.prefix.length
  # Key j of a slot is that of its context's last token, then of its own.
  place_Bn = jnp.where(
    n < count_B[:, None], slots.prefix_length[:, None] + n, T
  )
  row_B1 = jnp.arange(B)[:, None]

  def move(prefix, cache):
    part_LBKnH = cache[..., jnp.arange(B), slot_B, :, :tokens, :]
    part_BnLKH = jnp.moveaxis(part_LBKnH, (-4, -2), (0, 1))
    return prefix.at[..., row_B1, :, place_Bn, :].set(part_BnLKH, mode="drop")

  prefix = kv_cache.PrefixCache(
    k=jax.tree.map(move, slots.prefix.k, slots.cache.k),
    v=jax.tree.map(move, slots.prefix.v, slots.cache.v),
  )
  return slots_lib.laid_out(
    slots.replace(prefix=prefix, prefix_length=slots.prefix_length + count_B)
  )


def gather(slots: slots_lib.Slots, row_B: jax.Array) -> slots_lib.Slots:
  """Some of the rows, in the order of `row_B`; their layers are apart."""
  return jax.tree.map(lambda x: x[row_B], slots)


def grow(slots: slots_lib.Slots, capacity: int) -> slots_lib.Slots:
  """Lengthens every slot's cache to `capacity` tokens."""
  more = capacity - slots.cache.capacity
  cache = jax.tree.map(lambda x: _padded(x, more), slots.cache)
  return slots_lib.laid_out(slots.replace(cache=cache))


def grow_prefix(slots: slots_lib.Slots, capacity: int) -> slots_lib.Slots:
  """Lengthens every row's prefix to `capacity` tokens."""
  more = capacity - slots.prefix.length
  prefix = jax.tree.map(lambda x: _padded(x, more), slots.prefix)
  return slots_lib.laid_out(slots.replace(prefix=prefix))


def _padded(x: jax.Array, more: int) -> jax.Array:
  """`more` further tokens, which lie on the last axis but one."""
  return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, more), (0, 0)))


def decode(
  graphdef: nnx.GraphDef,
  params: Any,
  slots: slots_lib.Slots,
  stops: automaton.Automaton | None,
  free: jax.Array,
  layers: Sequence[Any] | None = None,
  slot_M: jax.Array | None = None,
  *,
  settings: sampling.Sampling,
  steps: int,
  whole_rows: bool = False,
  with_model_logprob: bool = False,
) -> tuple[slots_lib.Slots, slots_lib.Drawn]:
  """Draws up to `steps` tokens in every live slot.

  Args:
    graphdef: of the model.
    params: parameters.
    slots: to be changed; each live slot's capacity is at least its depth plus
      `steps`.
    stops: automaton of stop strings, or None.
    free: int32 scalar; leaves early when so many slots have ended in this
      call, to let new samples in.
    layers: what `apart` gave, where the caches' layers are apart.
    slot_M: int32, the slots to compute, all live ones among them, each once
      as row * S + slot, then B * S; None computes all.
    settings: how to draw.
    steps: U.
    whole_rows: `free` counts rows of which every slot has ended.
    with_model_logprob: also returns log-probabilities at temperature 1.
  """
  model = nnx.merge(graphdef, params)
  head, transposed = model.head_matrix()
  head_DV = head.T if transposed else head
  # An untied head lies the other way, and would be turned at every step.
  multiply = (
    small_batch_matmul.small_batch_matmul if transposed else jnp.tensordot
  )
  B, S = slots.token.shape
  prefix, whole = slots.prefix, slots.replace(prefix=None, cache=None)
  active_slots, at = (
    None,
    whole.replace(
      prefix_length=jnp.broadcast_to(slots.prefix_length[:, None], (B, S))
    ),
  )
  if slot_M is not None:
    active_slots = compaction.create(slot_M, B, S)
    at = jax.tree.map(active_slots.gather, at)
    at = at.replace(live=at.live & (slot_M < B * S)[:, None])
  start = at
  lead, R = at.token.shape, at.token.size

  def scatter(x, others):
    return x if active_slots is None else active_slots.scatter(x, others)

  def cond(carry):
    step, at, _, _ = carry
    if whole_rows:
      live_BS, started_BS = (scatter(x.live, False) for x in (at, start))
      ended = jnp.sum(jnp.any(started_BS, 1) & ~jnp.any(live_BS, 1))
    else:
      ended = jnp.sum(start.live & ~at.live)
    return (step < steps) & jnp.any(at.live) & (ended < free)

  def body(carry):
    step, at, cache, drawn = carry
    hidden, cache = model(
      at.token,
      at.prefix_length + at.num_generated,
      attention.decode(
        prefix, slots.prefix_length, at.num_generated, at.live, active_slots
      ),
      cache,
      layers,
    )
    logit_RV = multiply(
      hidden.reshape(R, -1),
      head_DV.astype(hidden.dtype),
      axes=1,
      preferred_element_type=jnp.float32,
    )
    key_R = jax.random.wrap_key_data(at.key.reshape(R, -1))
    token_R, logprob_R, truncated_R = sampling.sample(
      logit_RV, key_R, settings, at.num_generated.reshape(R)
    )
    new = [token_R, logprob_R]
    if with_model_logprob:
      new.append(sampling.logprob(logit_RV, token_R))
    if settings.reshapes():
      new.append(truncated_R)
    new = [x.reshape(lead) for x in new]
    at = _after(at, new[0], stops, settings)
    drawn = [
      jax.lax.dynamic_update_slice(every, x[..., None], (0, 0, step))
      for every, x in zip(drawn, new, strict=True)
    ]
    return step + 1, at, cache, drawn

  truncated = settings.reshapes()
  dtypes = [jnp.int32] + [jnp.float32] * (1 + with_model_logprob + truncated)
  nothing = [jnp.zeros((*lead, steps), dtype) for dtype in dtypes]
  _, at, cache, drawn = jax.lax.while_loop(
    cond, body, (jnp.int32(0), at, slots.cache, nothing)
  )
  count = jnp.where(start.live, at.num_generated - start.num_generated, 0)
  # A row's prefix length is no slot's own, and nothing here changes it.
  own = jax.tree.map(
    scatter, at.replace(prefix_length=None), whole.replace(prefix_length=None)
  )
  after = own.replace(
    prefix=prefix, cache=cache, prefix_length=slots.prefix_length
  )
  drawn = [scatter(x, 0) for x in drawn]
  return slots_lib.laid_out(after), slots_lib.Drawn(
    token=drawn[0],
    logprob=drawn[1],
    model_logprob=drawn[2] if with_model_logprob else None,
    truncated=drawn[-1] if truncated else None,
    count=scatter(count, 0),
    live=after.live,
    ended=after.ended,
  )


def _after(
  slots: slots_lib.Slots,
  token_BS: jax.Array,
  stops: automaton.Automaton | None,
  settings: sampling.Sampling,
) -> slots_lib.Slots:
  """The slots once `token_BS` has been drawn in those that are live."""
  live_BS = slots.live
  num_generated_BS = slots.num_generated + live_BS
  stop_BS = jnp.zeros_like(live_BS)
  for stop_id in settings.stop_ids:
    stop_BS |= token_BS == stop_id
  state_BS = slots.state
  if stops is not None:
    state_BS, event_BS = automaton.step(stops, state_BS, token_BS)
    late_BS = num_generated_BS >= settings.min_new_tokens
    stop_BS |= (event_BS > 0) & late_BS
  ended_BS = jnp.where(stop_BS, slots_lib.STOPPED, 0)
  recent_BSW = slots.recent
  if settings.loop_period:
    recent_BSW = jnp.concatenate(
      [recent_BSW[..., 1:], token_BS[..., None]], axis=-1
    )
    flat_RW = recent_BSW.reshape(-1, recent_BSW.shape[-1])
    loop_R = sampling.loops(flat_RW, settings.loop_period)
    loop_BS = loop_R.reshape(token_BS.shape)
    ended_BS = jnp.where(loop_BS & ~stop_BS, slots_lib.LOOPED, ended_BS)
  ended_BS = jnp.where(live_BS, ended_BS, slots.ended)
  return slots.replace(
    token=token_BS,
    num_generated=num_generated_BS,
    state=state_BS,
    recent=recent_BSW,
    live=live_BS & (ended_BS == 0) & (num_generated_BS < slots.budget),
    ended=ended_BS,
  )


def apart(graphdef: nnx.GraphDef, params: Any) -> list[Any]:
  """The layers' parameters, each layer's on its own; see `Qwen3.apart`."""
  return nnx.merge(graphdef, params).apart()


def prompts_at_once(P: int) -> int:
  """How many prompts of a bucket a device of the mesh in force computes."""
  return max(1, TOGETHER[target.platform()] // P)


def programs(graphdef: nnx.GraphDef) -> dict[str, Any]:
  """The jitted programs by name; each takes the slots' buffers for itself."""
  return {
    "empty": jax.jit(
      slots_lib.empty,
      static_argnums=(0, 1, 2, 3, 4),
      static_argnames=("recent", "dtype"),
    ),
    "apart": jax.jit(functools.partial(apart, graphdef)),
    "admit": jax.jit(functools.partial(admit, graphdef), donate_argnums=(1, 2)),
    "assign": jax.jit(assign, donate_argnums=0),
    "keep": jax.jit(keep, donate_argnums=0, static_argnames="tokens"),
    "gather": jax.jit(gather),
    "grow": jax.jit(grow, static_argnames="capacity"),
    "grow_prefix": jax.jit(grow_prefix, static_argnames="capacity"),
    "decode": jax.jit(
      functools.partial(decode, graphdef),
      donate_argnums=1,
      static_argnames=("settings", "steps", "whole_rows", "with_model_logprob"),
    ),
  }
