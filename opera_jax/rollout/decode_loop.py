"""The compiled programs of the sampler: prefill, decode, and moving slots.

Where shapes stay the same, programs that change slots donate and return them,
so that buffers are updated in place. All of them take and return global arrays:
on a mesh every process calls them with equal host arrays.

Shape key: L layers, B prompt slots, S slots of each, T prefix capacity, C slot
capacity, R prompts of one prefill, P their padded length, U steps of one decode
call, W recent tokens, D hidden, V vocabulary, M compacted active slots,
X computed slots (B * S, or M).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from opera_jax.kernels import target
from opera_jax.models import attention, compaction, decode_model, kv_cache
from opera_jax.rollout import sampling
from opera_jax.rollout import slots as slots_lib
from opera_jax.sharding import rules
from opera_jax.text import automaton

# Prompt tokens that one device prefills at once, at least. Few tokens saturate
# a CPU; padding a single prompt to more would only cost time there.
MIN_PREFILL_TOKENS = {"cpu": 256, "gpu": 512, "tpu": 512}


def prefill(
  graphdef: nnx.GraphDef,
  params: Any,
  prefix: kv_cache.PrefixCache,
  prefix_length_B: jax.Array,
  token_RP: jax.Array,
  length_R: jax.Array,
  prompt_slot_R: jax.Array,
) -> tuple[kv_cache.PrefixCache, jax.Array]:
  """Computes prompts and stores them in prompt slots without live samples.

  Args:
    graphdef: of the model.
    params: parameters.
    prefix: of the slots; donated.
    prefix_length_B: of the slots; donated.
    token_RP: int32 prompts, right-padded, P <= T.
    length_R: int32, at least 1.
    prompt_slot_R: int32, where each prompt is stored; B or more for padding.

  Returns:
    The new prefix and prefix lengths. The length leaves out the last token,
    which the samples feed themselves.
  """
  model = nnx.merge(graphdef, params)
  R, P = token_RP.shape
  position_P = jnp.arange(P, dtype=jnp.int32)
  config = model.config
  _, computed = model(
    token_RP,
    jnp.broadcast_to(position_P[None], (R, P)),
    attention.prefill(
      (position_P[None] < length_R[:, None]).astype(jnp.int32),
      implementation=config.attention or None,
    ),
    kv_cache.empty_prefix_cache(
      layers=config.num_hidden_layers,
      prompt_slots=R,
      length=P,
      kv_heads=config.num_key_value_heads,
      head_dim=config.head_dim,
      dtype=jax.tree.leaves(prefix.k)[0].dtype,
    ),
  )
  if isinstance(prefix.k, tuple):
    computed = kv_cache.unstack_layers(computed)
  prefix = jax.tree.map(
    lambda old, new: old.at[..., prompt_slot_R, :, :P, :].set(new, mode="drop"),
    prefix,
    computed,
  )
  prefix_length_B = prefix_length_B.at[prompt_slot_R].set(
    length_R - 1, mode="drop"
  )
  return slots_lib.constrain_prefix(prefix), rules.constrain(
    prefix_length_B, ("batch",)
  )


def start_samples(
  slots: slots_lib.Slots,
  starts_BS: jax.Array,
  token_BS: jax.Array,
  budget_BS: jax.Array,
  key_BS: jax.Array,
  state_BS: jax.Array,
) -> slots_lib.Slots:
  """Starts a sample in some slots; the other slots keep theirs.

  Args:
    slots: donated; prefix and cache may be None.
    starts_BS: bool, where a sample starts.
    token_BS: int32, the last token of the slot's context.
    budget_BS: int32, most tokens to sample.
    key_BS: random key data of the samples.
    state_BS: int32, where the stop strings' automaton starts.
  """

  def pick(new: jax.Array | int, old: jax.Array) -> jax.Array:
    where = starts_BS.reshape(starts_BS.shape + (1,) * (old.ndim - 2))
    return jnp.where(where, new, old)

  slots = slots.replace(
    token=pick(token_BS, slots.token),
    num_generated=pick(0, slots.num_generated),
    budget=pick(budget_BS, slots.budget),
    key=pick(key_BS, slots.key),
    state=pick(state_BS, slots.state),
    recent=pick(-1, slots.recent),
    live=slots.live | starts_BS,
    ended=pick(0, slots.ended),
  )
  return slots_lib.constrain(slots)


def extend_prefix(
  slots: slots_lib.Slots, slot_B: jax.Array, count_B: jax.Array, tokens: int
) -> slots_lib.Slots:
  """Appends the first tokens of one slot to its prompt slot's prefix.

  Args:
    slots: donated.
    slot_B: int32, the slot of each prompt slot.
    count_B: int32 at most `tokens`, how many of its tokens to append; 0 changes
      nothing.
    tokens: static bound of the counts.
  """
  B = slot_B.shape[0]
  offset_1n = jnp.arange(tokens, dtype=jnp.int32)[None]
  T = slots.prefix.length
  # A slot's first key is that of its context's last token, so it belongs at
  # position `prefix_length`. A position T drops what is not to be appended.
  position_Bn = jnp.where(
    offset_1n < count_B[:, None], slots.prefix_length[:, None] + offset_1n, T
  )
  prompt_slot_B1 = jnp.arange(B)[:, None]

  def append(prefix: jax.Array, cache: jax.Array) -> jax.Array:
    new_LBKnH = cache[..., jnp.arange(B), slot_B, :, :tokens, :]
    new_BnLKH = jnp.moveaxis(new_LBKnH, (-4, -2), (0, 1))
    where = (..., prompt_slot_B1, slice(None), position_Bn, slice(None))
    return prefix.at[where].set(new_BnLKH, mode="drop")

  prefix = kv_cache.PrefixCache(
    k=jax.tree.map(append, slots.prefix.k, slots.cache.k),
    v=jax.tree.map(append, slots.prefix.v, slots.cache.v),
  )
  return slots_lib.constrain(
    slots.replace(prefix=prefix, prefix_length=slots.prefix_length + count_B)
  )


def gather(slots: slots_lib.Slots, prompt_slot_B: jax.Array) -> slots_lib.Slots:
  """Some of the prompt slots, in the given order; layers must be unstacked."""
  return jax.tree.map(lambda x: x[prompt_slot_B], slots)


def grow(slots: slots_lib.Slots, capacity: int) -> slots_lib.Slots:
  """Pads every slot's cache to `capacity` tokens."""
  more = capacity - slots.cache.capacity
  cache = jax.tree.map(lambda x: _pad_tokens(x, more), slots.cache)
  return slots_lib.constrain(slots.replace(cache=cache))


def grow_prefix(slots: slots_lib.Slots, capacity: int) -> slots_lib.Slots:
  """Pads every prefix to `capacity` tokens."""
  more = capacity - slots.prefix.length
  prefix = jax.tree.map(lambda x: _pad_tokens(x, more), slots.prefix)
  return slots_lib.constrain(slots.replace(prefix=prefix))


def _pad_tokens(x: jax.Array, more: int) -> jax.Array:
  """Pads the token axis, the last but one, by `more`."""
  return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, more), (0, 0)))


class _Carry(NamedTuple):
  """What the decode loop carries from step to step."""

  step: jax.Array  # int32 scalar
  slots: slots_lib.Slots  # of the computed slots, without caches
  cache: kv_cache.SampleCache
  outputs: list[jax.Array]  # [..., U] each, see `SampledTokens`


def decode(
  graphdef: nnx.GraphDef,
  params: Any,
  slots: slots_lib.Slots,
  stops: automaton.Automaton | None,
  stop_after: jax.Array,
  layers: list[decode_model.Layer] | None = None,
  slot_M: jax.Array | None = None,
  *,
  settings: sampling.Sampling,
  steps: int,
  per_prompt_slot: bool = False,
  with_model_logprob: bool = False,
) -> tuple[slots_lib.Slots, slots_lib.SampledTokens]:
  """Samples up to `steps` tokens in every live slot.

  Args:
    graphdef: of the model.
    params: parameters.
    slots: donated; each live slot's capacity is at least its number of
      generated tokens plus `steps`.
    stops: automaton of stop strings, or None.
    stop_after: int32 scalar; the loop returns early once so many slots have
      ended in this call, so that new samples can start.
    layers: the unstacked layers; None if the caches have stacked ones.
    slot_M: int32, the slots to compute, all live ones among them, each once
      as prompt slot * S + slot, padded with B * S; None computes all.
    settings: how to sample.
    steps: U.
    per_prompt_slot: `stop_after` counts prompt slots whose samples have all
      ended, not slots.
    with_model_logprob: also returns log-probabilities at temperature 1.

  Returns:
    The slots, and the tokens sampled in this call.
  """
  model = nnx.merge(graphdef, params)
  head, tied = model.head_matrix()
  head_DV = head.T if tied else head
  B, S = slots.token.shape
  prefix = slots.prefix
  before = slots.replace(prefix=None, cache=None)
  computed = before.replace(
    prefix_length=jnp.broadcast_to(slots.prefix_length[:, None], (B, S))
  )
  active_slots = None
  if slot_M is not None:
    active_slots = compaction.create(slot_M, B, S)
    computed = jax.tree.map(active_slots.gather, computed)
    computed = computed.replace(live=computed.live & (slot_M < B * S)[:, None])
  start = computed
  shape, X = computed.token.shape, computed.token.size

  def scatter(x: jax.Array, inactive: jax.Array | int) -> jax.Array:
    return x if active_slots is None else active_slots.scatter(x, inactive)

  def goes_on(carry: _Carry) -> jax.Array:
    live = carry.slots.live
    if per_prompt_slot:
      started_B = jnp.any(scatter(start.live, False), 1)
      ended = jnp.sum(started_B & ~jnp.any(scatter(live, False), 1))
    else:
      ended = jnp.sum(start.live & ~live)
    return (carry.step < steps) & jnp.any(live) & (ended < stop_after)

  def step(carry: _Carry) -> _Carry:
    now = carry.slots
    attend = attention.decode(
      prefix,
      prefix_length_B=slots.prefix_length,
      num_generated_BS=now.num_generated,
      live_BS=now.live,
      active_slots=active_slots,
    )
    position = now.prefix_length + now.num_generated
    if layers is None:
      hidden, cache = model(now.token, position, attend, carry.cache)
    else:
      hidden, cache = decode_model.hidden_states(
        model,
        layers,
        token_BS=now.token,
        position_BS=position,
        attend=attend,
        cache=carry.cache,
      )
    logit_XV = decode_model.logits(hidden.reshape(X, -1), head_DV, tied=tied)
    key_X = jax.random.wrap_key_data(now.key.reshape(X, -1))
    token_X, logprob_X, truncated_X = sampling.sample(
      logit_XV,
      key_X,
      settings,
      num_sampled_R=now.num_generated.reshape(X),
    )
    new = [token_X, logprob_X]
    if with_model_logprob:
      new.append(sampling.logprob(logit_XV, token_X))
    if settings.reshapes():
      new.append(truncated_X)
    new = [x.reshape(shape) for x in new]
    return _Carry(
      step=carry.step + 1,
      slots=_update_slots(now, new[0], stops=stops, settings=settings),
      cache=cache,
      outputs=[
        jax.lax.dynamic_update_slice(old, x[..., None], (0, 0, carry.step))
        for old, x in zip(carry.outputs, new, strict=True)
      ],
    )

  truncated = settings.reshapes()
  dtypes = [jnp.int32] + [jnp.float32] * (1 + with_model_logprob + truncated)
  end = jax.lax.while_loop(
    goes_on,
    step,
    _Carry(
      step=jnp.int32(0),
      slots=computed,
      cache=slots.cache,
      outputs=[jnp.zeros((*shape, steps), dtype) for dtype in dtypes],
    ),
  )
  count = jnp.where(
    start.live, end.slots.num_generated - start.num_generated, 0
  )
  # The prefix length belongs to the prompt slot and does not change here.
  after = jax.tree.map(
    scatter,
    end.slots.replace(prefix_length=None),
    before.replace(prefix_length=None),
  ).replace(prefix=prefix, cache=end.cache, prefix_length=slots.prefix_length)
  outputs = [scatter(x, 0) for x in end.outputs]
  return slots_lib.constrain(after), slots_lib.SampledTokens(
    token=outputs[0],
    logprob=outputs[1],
    model_logprob=outputs[2] if with_model_logprob else None,
    truncated=outputs[-1] if truncated else None,
    count=scatter(count, 0),
    live=after.live,
    ended=after.ended,
  )


def _update_slots(
  slots: slots_lib.Slots,
  token_BS: jax.Array,
  *,
  stops: automaton.Automaton | None,
  settings: sampling.Sampling,
) -> slots_lib.Slots:
  """The slots after `token_BS` was sampled in the live ones."""
  live_BS = slots.live
  num_generated_BS = slots.num_generated + live_BS
  stop_BS = jnp.zeros_like(live_BS)
  for stop_id in settings.stop_ids:
    stop_BS |= token_BS == stop_id
  state_BS = slots.state
  if stops is not None:
    state_BS, event_BS = automaton.step(stops, state_BS, token_BS)
    may_stop_BS = num_generated_BS >= settings.min_new_tokens
    stop_BS |= (event_BS > 0) & may_stop_BS
  ended_BS = jnp.where(stop_BS, slots_lib.STOPPED, 0)
  recent_BSW = slots.recent
  if settings.loop_period:
    recent_BSW = jnp.concatenate(
      [recent_BSW[..., 1:], token_BS[..., None]], axis=-1
    )
    recent_XW = recent_BSW.reshape(-1, recent_BSW.shape[-1])
    loop_X = sampling.loops(recent_XW, settings.loop_period)
    loop_BS = loop_X.reshape(token_BS.shape)
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


def unstack_layers(
  graphdef: nnx.GraphDef, params: Any
) -> list[decode_model.Layer]:
  """The layers' weights for `decode`; see `decode_model.unstack_layers`."""
  return decode_model.unstack_layers(nnx.merge(graphdef, params))


def prefill_batch_size(P: int) -> int:
  """Prompts of padded length P that one device of the mesh prefills at once."""
  return max(1, MIN_PREFILL_TOKENS[target.platform()] // P)


def programs(graphdef: nnx.GraphDef) -> dict[str, Any]:
  """The jitted programs by name, with the buffers that they donate."""
  return {
    "empty": jax.jit(
      slots_lib.empty,
      static_argnums=(0, 1, 2, 3, 4),
      static_argnames=("recent", "dtype"),
    ),
    "unstack_layers": jax.jit(functools.partial(unstack_layers, graphdef)),
    "prefill": jax.jit(
      functools.partial(prefill, graphdef), donate_argnums=(1, 2)
    ),
    "start_samples": jax.jit(start_samples, donate_argnums=0),
    "extend_prefix": jax.jit(
      extend_prefix, donate_argnums=0, static_argnames="tokens"
    ),
    "gather": jax.jit(gather),
    "grow": jax.jit(grow, static_argnames="capacity"),
    "grow_prefix": jax.jit(grow_prefix, static_argnames="capacity"),
    "decode": jax.jit(
      functools.partial(decode, graphdef),
      donate_argnums=1,
      static_argnames=(
        "settings",
        "steps",
        "per_prompt_slot",
        "with_model_logprob",
      ),
    ),
  }
