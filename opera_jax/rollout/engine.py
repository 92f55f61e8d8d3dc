"""Samples completions: prefill once a prompt, decode on the device, refill.

A prompt is computed once, into a row; its samples share the row's keys and
values, not copies of them. Decoding is a jitted loop of a few dozen steps; in
between, slots whose sample has ended take the next one, so that no batch waits
for its longest member. A sample draws from its own random key, folded from
(call key, prompt id, sample) and its position, and its numbers depend on
neither its slot nor its neighbours.

Shape key: B rows, S slots a row, R prompts of one admission, P padded prompt
tokens, T trunk capacity, C slot capacity.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opera_jax import structs
from opera_jax.models import on_mesh, qwen3
from opera_jax.rollout import sampling as sampling_lib
from opera_jax.rollout import schedule as schedule_lib
from opera_jax.rollout import slots as slots_lib
from opera_jax.scoring import trunks as trunks_lib
from opera_jax.sharding import layout
from opera_jax.text import automaton

REASONS = {0: "length", slots_lib.STOPPED: "stop", slots_lib.LOOPED: "loop"}
TOGETHER = 512  # prompt tokens that a device computes at once, at least
_NEVER = np.int32(2**31 - 1)

OnTokens = Callable[[int, int, np.ndarray], None]


@dataclasses.dataclass
class _Growing:
  """A sample under way."""

  tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
  logprob: list[np.ndarray] = dataclasses.field(default_factory=list)


class Engine:
  """Samples from a policy whose parameters come with every call."""

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    config: qwen3.Config,
    *,
    mesh: jax.sharding.Mesh,
    rows: int = 16,
    slots: int = 8,
    prompt_buckets: Sequence[int] = (64, 128, 256, 512),
    cache_buckets: Sequence[int] = (256, 1024, 4096),
    steps: int = 64,
    cache_dtype: str = "float32",
  ):
    """Compiles nothing yet; programs are one a (bucket, settings).

    Args:
      graphdef: of the model.
      config: its sizes.
      mesh: rows are split over its data axes.
      rows: prompts in flight, a multiple of the mesh's data axes.
      slots: samples of one prompt in flight; further ones wait for a slot.
      prompt_buckets: allowed padded prompt lengths, ascending.
      cache_buckets: lengths that a sample's cache grows through, ascending;
        past the last, its multiples. All are rounded up to whole blocks.
      steps: tokens a slot draws between two looks of the host.
      cache_dtype: of keys and values.

    Raises:
      ValueError: rows do not divide over the mesh, no slot, no step.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows < 1 or rows % ways:
      raise ValueError(
        f"A call samples {rows} prompts over {ways} data shards, which does "
        "not divide. Make config.engine.rows a multiple."
      )
    if slots < 1 or steps < 1:
      raise ValueError(
        f"Sampling needs at least 1 slot and 1 step, got slots={slots}, "
        f"steps={steps}. Raise config.engine.slots or config.engine.steps."
      )
    self._config, self._mesh = config, mesh
    self._rows, self._slots, self._steps = rows, slots, steps
    self._ways = ways
    self._prompt_buckets = tuple(prompt_buckets)
    self._cache_buckets = tuple(whole_blocks(c) for c in cache_buckets)
    self._dtype = cache_dtype
    self._programs = slots_lib.programs(graphdef)

  def sample(
    self,
    params: Any,
    prompts: Sequence[np.ndarray],
    settings: sampling_lib.Sampling,
    key: jax.Array,
    *,
    samples: int = 1,
    ids: Sequence[str] | None = None,
    seeds: Sequence[Sequence[int]] | None = None,
    stops: automaton.Automaton | None = None,
    advance: Callable[[int], None] | None = None,
    on_tokens: OnTokens | None = None,
  ) -> list[list[structs.Sample]]:
    """Draws `samples` completions of each prompt.

    Args:
      params: parameters, in the ROLLOUT layout.
      prompts: int32 tokens [P_i] each, at least one token.
      settings: temperature, truncation, length, stop ids.
      key: random key of this call (one a step).
      samples: completions a prompt.
      ids: names of the prompts; a sample's randomness is folded from its
        prompt's name, so it does not depend on the order. Default: places.
      seeds: for each prompt a seed a sample, in place of `key` and `ids`.
      stops: automaton of stop strings; a sample ends with the token that
        completes one.
      advance: called with the tokens of each sample when it ends.
      on_tokens: called with (prompt, sample, new tokens) as they come.

    Returns:
      For each prompt its samples, in order.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, a prompt
        beyond the largest bucket, seeds that do not match.
      FloatingPointError: NaN logits.
    """
    self.check(prompts, settings)
    names = [str(i) for i in range(len(prompts))] if ids is None else ids
    if not prompts:
      return []
    keys = self._keys(key, names, samples, seeds)
    order = sorted(
      range(len(prompts)),
      key=lambda i: (self._bucket(prompts[i]), i),
    )
    width = min(self._slots, samples)
    with jax.set_mesh(self._mesh):
      slots = self.empty(width, settings)
      _, out = self.draw(
        params,
        slots,
        schedule_lib.Schedule(self._rows, width, order, samples),
        prompts,
        names,
        keys,
        settings,
        samples=samples,
        stops=stops,
        advance=advance,
        on_tokens=on_tokens,
      )
    return out

  def check(
    self,
    prompts: Sequence[np.ndarray],
    settings: sampling_lib.Sampling,
  ) -> None:
    """Refuses what could not be sampled; see `sample` for what it raises."""
    vocab = self._config.vocab_size
    settings.check(vocab)
    for i, prompt in enumerate(prompts):
      if len(prompt) == 0:
        raise ValueError(f"Prompt {i} has no tokens; give it at least one.")
      if len(prompt) > self._prompt_buckets[-1]:
        raise ValueError(
          f"Prompt {i} has {len(prompt)} tokens, the largest prompt bucket "
          f"is {self._prompt_buckets[-1]}. Raise config.engine.prompt_buckets "
          "or drop the prompt (config.max_prompt_tokens)."
        )
      if prompt.min() < 0 or prompt.max() >= vocab:
        raise ValueError(
          f"Prompt {i} holds a token id outside [0, {vocab}). Check that "
          "tokenizer and model agree."
        )

  def programs(self) -> int:
    """How many programs one setting of sampling can need."""
    # A prefill a bucket; empty and assign; decode a cache size, grow between.
    return len(self._prompt_buckets) + 2 + 2 * len(self._cache_buckets) - 1

  def empty(
    self, width: int, settings: sampling_lib.Sampling
  ) -> slots_lib.Slots:
    """Fresh slots, laid out over the mesh in force."""
    return self._programs["empty"](
      self._config,
      self._rows,
      width,
      whole_blocks(self._prompt_buckets[-1]),
      self._capacity(min(self._steps, settings.max_new_tokens)),
      recent=settings.loop_tokens if settings.loop_period else 0,
      dtype=self._dtype,
    )

  def draw(
    self,
    params: Any,
    slots: slots_lib.Slots,
    schedule: schedule_lib.Schedule,
    prompts: Sequence[np.ndarray],
    names: Sequence[str],
    keys: np.ndarray,
    settings: sampling_lib.Sampling,
    *,
    samples: int,
    stops: automaton.Automaton | None,
    advance: Callable[[int], None] | None = None,
    on_tokens: OnTokens | None = None,
  ) -> tuple[slots_lib.Slots, list[list[structs.Sample]]]:
    """Runs a schedule to its end, under the mesh in force."""
    out: list[list[Any]] = [[None] * samples for _ in prompts]
    growing: dict[tuple[int, int], _Growing] = {}
    depth = np.zeros(slots.depth.shape, np.int64)
    steps = min(self._steps, settings.max_new_tokens)
    while True:
      slots = self._admit(params, slots, schedule.admit(), prompts)
      fresh = schedule.assign()
      slots = self._assign(slots, fresh, prompts, keys, settings)
      for row, slot, prompt, sample in fresh:
        growing[prompt, sample] = _Growing()
        depth[row, slot] = 0
      sitting = schedule.sitting()
      if not sitting:
        return slots, out
      need = max(int(depth[r, s]) for r, s, *_ in sitting) + steps
      need = min(need, settings.max_new_tokens)
      if need > slots.cache.k.shape[3]:
        slots = self._programs["grow"](slots, capacity=self._capacity(need))
      # With nothing waiting, only the end of all is worth a stop.
      free = max(1, len(sitting) // 8) if schedule.waiting() else _NEVER
      slots, drawn = self._programs["decode"](
        params, slots, stops, np.int32(free), settings=settings, steps=steps
      )
      drawn = layout.to_host(drawn)
      for row, slot, prompt, sample in sitting:
        count = int(drawn.count[row, slot])
        depth[row, slot] += count
        mine = growing[prompt, sample]
        mine.tokens.append(drawn.token[row, slot, :count])
        mine.logprob.append(drawn.logprob[row, slot, :count])
        if not np.isfinite(mine.logprob[-1]).all():
          raise FloatingPointError(
            f"Sampling prompt {names[prompt]!r} met logits that are not "
            "finite. The parameters have diverged; lower the learning rate "
            "or resume from an earlier checkpoint."
          )
        if on_tokens is not None and count:
          on_tokens(prompt, sample, mine.tokens[-1])
        if not drawn.live[row, slot]:
          ended = int(drawn.ended[row, slot])
          out[prompt][sample] = structs.Sample(
            tokens=np.concatenate(mine.tokens),
            logprob=np.concatenate(mine.logprob),
            finished=ended == slots_lib.STOPPED,
            reason=REASONS[ended],
          )
          del growing[prompt, sample]
          schedule.release(row, slot)
          if advance is not None:
            advance(len(out[prompt][sample].tokens))

  def _admit(self, params, slots, admitted, prompts):
    """Computes prompts, a few of like length at a time."""
    if not admitted:
      return slots
    by_bucket: dict[int, list[tuple[int, int]]] = {}
    for row, prompt in admitted:
      by_bucket.setdefault(self._bucket(prompts[prompt]), []).append(
        (row, prompt)
      )
    for P, pairs in sorted(by_bucket.items()):
      # The number at once goes by the bucket alone: what a prompt computes
      # must not depend on who came with it.
      R = self._ways * prompts_at_once(P)
      for start in range(0, len(pairs), R):
        token_RP = np.zeros((R, P), np.int32)
        length_R = np.ones(R, np.int32)
        row_R = np.full(R, self._rows, np.int32)
        for place, (row, prompt) in enumerate(pairs[start : start + R]):
          size = len(prompts[prompt])
          token_RP[place, :size] = prompts[prompt]
          length_R[place], row_R[place] = size, row
        arrays = layout.to_devices(
          (token_RP, length_R), layout.rows(self._mesh)
        )
        trunk, limit = self._programs["admit"](
          params, slots.trunk, slots.limit, *arrays, self._everywhere(row_R)
        )
        slots = slots.replace(trunk=trunk, limit=limit)
    return slots

  def _assign(self, slots, fresh, prompts, keys, settings):
    if not fresh:
      return slots
    shape = slots.depth.shape
    fresh_BS = np.zeros(shape, bool)
    token_BS = np.zeros(shape, np.int32)
    key_BS = np.zeros((*shape, keys.shape[-1]), keys.dtype)
    for row, slot, prompt, sample in fresh:
      fresh_BS[row, slot] = True
      token_BS[row, slot] = prompts[prompt][-1]
      key_BS[row, slot] = keys[prompt, sample]
    arrays = layout.to_devices(
      (fresh_BS, token_BS, np.full(shape, settings.max_new_tokens, np.int32)),
      layout.rows(self._mesh),
    )
    # The caches stay out of it, so that one program serves all their sizes.
    rest = slots.replace(trunk=None, cache=None)
    rest = self._programs["assign"](rest, *arrays, self._everywhere(key_BS))
    return rest.replace(trunk=slots.trunk, cache=slots.cache)

  def _everywhere(self, array):
    return layout.to_devices(array, layout.replicated(self._mesh))

  def _keys(self, key, names, samples, seeds) -> np.ndarray:
    """Key data of every sample, [prompts, samples, words]."""
    if seeds is not None:
      seeds = np.asarray(seeds, np.uint32)
      if seeds.shape != (len(names), samples):
        raise ValueError(
          f"Seeds are one a sample, [{len(names)}, {samples}], got "
          f"{seeds.shape}."
        )
      return np.asarray(_seeded(seeds))
    crc = np.asarray([zlib.crc32(n.encode()) for n in names], np.uint32)
    return np.asarray(_folded(key, crc, samples))

  def _bucket(self, prompt: np.ndarray) -> int:
    return trunks_lib.bucket(len(prompt), self._prompt_buckets)

  def _capacity(self, tokens: int) -> int:
    return trunks_lib.bucket(tokens, self._cache_buckets)


def prompts_at_once(P: int) -> int:
  """How many prompts of a bucket one device computes together."""
  return max(1, TOGETHER // P)


def whole_blocks(tokens: int) -> int:
  """A cache length that holds `tokens`."""
  return -(-tokens // on_mesh.DECODE_BLOCK) * on_mesh.DECODE_BLOCK


@functools.partial(jax.jit, static_argnums=2)
def _folded(key, name_n, samples):
  def fold(name, sample):
    one = jax.random.fold_in(jax.random.fold_in(key, name), sample)
    return jax.random.key_data(one)

  both = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))
  return both(name_n, jnp.arange(samples))


@jax.jit
def _seeded(seed_nS):
  make = jax.vmap(jax.vmap(lambda s: jax.random.key_data(jax.random.key(s))))
  return make(seed_nS)
