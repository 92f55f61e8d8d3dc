"""Samples completions with continuous batching.

A prompt is prefilled once, into a prompt slot; its samples share the prompt's
keys and values instead of copying them. Decoding is a jitted loop of a few
dozen steps. Between two calls of the loop, slots whose sample has ended take
the next sample, so that no batch waits for its longest member.

Every sample has a random key of its own, folded from (call key, prompt id,
sample) and the position. Its numbers depend on neither its slot nor its
neighbours.
"""

import collections
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opera_jax import structs
from opera_jax.models import decoder
from opera_jax.rollout import decode_loop as decode_loop_lib
from opera_jax.rollout import prompt_slots as prompt_slots_lib
from opera_jax.rollout import sampling as sampling_lib
from opera_jax.rollout import schedule as schedule_lib
from opera_jax.rollout import slots as slots_lib
from opera_jax.rollout import workers as workers_lib
from opera_jax.scoring import packing as packing_lib
from opera_jax.text import automaton

OnTokens = Callable[[int, int, np.ndarray], None]  # (prompt, sample, tokens)


class Engine:
  """Samples from a policy whose parameters are passed to every call."""

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    config: decoder.Config,
    *,
    mesh: jax.sharding.Mesh,
    prompt_slots: int = 16,
    slots: int = 8,
    prompt_buckets: Sequence[int] = (64, 128, 256, 512),
    cache_buckets: Sequence[int] = (256, 1024, 4096),
    steps: int = 64,
    cache_dtype: str = "float32",
  ):
    """Compiles nothing yet; see `programs` for what will be.

    Args:
      graphdef: of the model.
      config: its sizes.
      mesh: prompt slots are sharded over its data axes.
      prompt_slots: prompts in flight, a multiple of the number of data shards.
      slots: samples of one prompt in flight; further ones wait for a slot.
      prompt_buckets: padded prompt lengths, ascending.
      cache_buckets: lengths of a slot's cache as it grows, ascending; beyond
        the last, its multiples. All are rounded up to whole attention blocks.
      steps: tokens that a slot samples between two looks of the host.
      cache_dtype: of keys and values.

    Raises:
      ValueError: prompt slots that do not divide over the mesh, no slot, no
        step.
    """
    num_data_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if prompt_slots < 1 or prompt_slots % num_data_shards:
      raise ValueError(
        f"The engine has {prompt_slots} prompt slots over {num_data_shards} "
        "data shards, which does not divide. Make config.engine.prompt_slots a "
        "multiple."
      )
    if slots < 1 or steps < 1:
      raise ValueError(
        f"Sampling needs at least 1 slot and 1 step, got slots={slots}, "
        f"steps={steps}. Raise config.engine.slots or config.engine.steps."
      )
    self._config, self._mesh = config, mesh
    self._prompt_slots, self._slots, self._steps = prompt_slots, slots, steps
    self._prompt_buckets = tuple(prompt_buckets)
    with jax.set_mesh(mesh):
      self._prefix_buckets, self._cache_buckets = (
        tuple(sorted({slots_lib.padded_length(x) for x in buckets}))
        for buckets in (prompt_buckets, cache_buckets)
      )
    self._dtype = cache_dtype
    self._programs = decode_loop_lib.programs(graphdef)

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
    """Samples `samples` completions of each prompt.

    Args:
      params: parameters, in the ROLLOUT layout.
      prompts: int32 tokens [P_i] each, at least one token.
      settings: temperature, truncation, length, stop ids.
      key: random key of this call (one per training step).
      samples: completions per prompt.
      ids: names of the prompts, by default their indices. A sample's random key
        is folded from its prompt's name, so it does not depend on the order. A
        name that occurs again gets another key each time.
      seeds: for each prompt one seed per sample, instead of `key` and `ids`.
      stops: automaton of stop strings; a sample ends with the token that
        completes one.
      advance: called with the number of tokens of each sample when it ends.
      on_tokens: called with (prompt, sample, new tokens) as they are sampled;
        like `advance`, in the calling thread.

    Returns:
      For each prompt its samples, in order.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, a prompt
        longer than the largest bucket, seeds of another shape.
      FloatingPointError: NaN logits.
    """
    self.check(prompts, settings)
    names = [str(i) for i in range(len(prompts))] if ids is None else ids
    if not prompts:
      return []
    sample_keys = _sample_keys(key, _unique_names(names), samples, seeds)
    order = sorted(
      range(len(prompts)),
      key=lambda i: (self.bucket(prompts[i]), i),
    )
    slots = min(self._slots, samples)
    schedule = schedule_lib.Schedule(
      prompt_slots=self._prompt_slots,
      slots=slots,
      prompts=order,
      samples=samples,
    )
    out: list[list[Any]] = [[None] * samples for _ in prompts]
    pieces_of: dict[tuple[int, int], list[prompt_slots_lib.Piece]] = {}
    with self.start_workers(
      params, slots, settings, stops, contexts=prompts
    ) as workers:
      prefill_batch = workers.prefill_batch_size(
        self.bucket(prompts[order[-1]])
      )
      while True:
        contexts = [(p, names[i], prompts[i]) for p, i in schedule.admit()]
        forks = [
          prompt_slots_lib.Fork(
            prompt_slot,
            slot,
            key=sample_keys[i, sample],
            budget=settings.max_new_tokens,
          )
          for prompt_slot, slot, i, sample in schedule.assign()
        ]
        running = {(p, s): (i, n) for p, s, i, n in schedule.running()}
        if not running:
          return out
        pieces = workers.step(
          stop_after=functools.partial(
            _stop_after, prefill_batch if schedule.waiting() else 0
          ),
          contexts=contexts,
          finished=schedule.idle(),
          forks=forks,
        )
        for piece in pieces:
          i, sample = running[piece.prompt_slot, piece.slot]
          pieces_of.setdefault((i, sample), []).append(piece)
          if on_tokens is not None and len(piece.tokens):
            on_tokens(i, sample, piece.tokens)
          if not piece.live:
            out[i][sample] = prompt_slots_lib.joined(pieces_of.pop((i, sample)))
            schedule.release(piece.prompt_slot, piece.slot)
            if advance is not None:
              advance(len(out[i][sample].tokens))

  def longest_prompt(self) -> int:
    """The most tokens that a prompt may have."""
    return self._prompt_buckets[-1]

  def padded_vocab_size(self) -> int:
    """Size of the model's head: the vocabulary and its padding."""
    return self._config.vocab_size

  def prompt_lengths(self) -> tuple[int, ...]:
    """The padded lengths of prompts."""
    return self._prompt_buckets

  def check(
    self,
    prompts: Sequence[np.ndarray],
    settings: sampling_lib.Sampling,
  ) -> None:
    """Raises what `sample` would raise for these prompts and settings."""
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
    """At most how many programs one `Sampling` needs compiled."""
    prefixes, caches = self._prefix_buckets, len(self._cache_buckets)
    with jax.set_mesh(self._mesh):
      prompt_slots = self._prompt_slots // workers_lib.num_workers(
        self._prompt_slots, self._slots
      )
      # Numbers of prompt slots, and for all of them, numbers of active slots.
      sizes, active_sizes = [prompt_slots], 1
      unstacks = slots_lib.unstacks_layers()
      if prompt_slots_lib.compacts_active_slots():
        sizes = prompt_slots_lib.prompt_slot_counts(prompt_slots)
        active_sizes = sum(
          len(prompt_slots_lib.active_slot_counts(n, self._slots))
          for n in sizes
        )
    # One prefill for each bucket and each prefix length that holds it. Prefixes
    # and caches grow from any length to any larger one.
    prefill = sum(T >= P for P in self._prompt_buckets for T in prefixes)
    grow = math.comb(len(prefixes), 2) + math.comb(caches, 2)
    start_samples = 1
    per_size = len(sizes) * (prefill + grow + start_samples)
    gather = math.comb(len(sizes), 2) * len(prefixes) * caches
    decode = active_sizes * len(prefixes) * caches
    empty = len(prefixes)
    return empty + unstacks + per_size + gather + decode

  def start_workers(
    self,
    params: Any,
    slots: int,
    settings: sampling_lib.Sampling,
    stops: automaton.Automaton | None,
    *,
    contexts: Sequence[np.ndarray] = (),
    extra_prefix_tokens: int = 0,
    per_prompt_slot: bool = False,
    with_model_logprob: bool = False,
  ) -> workers_lib.Workers:
    """Workers with empty prompt slots, to be driven in a `with` block.

    Args:
      params: parameters, in the ROLLOUT layout.
      slots: of each prompt slot.
      settings: how to sample.
      stops: automaton of stop strings, or None.
      contexts: the prompts to come; the prefix cache holds the longest.
      extra_prefix_tokens: what `PromptSlots.extend_prefix` may append. On a CPU
        the prefix cache holds them from the start, up to the largest bucket: a
        longer prefix costs less than compiling every program for two lengths.
      per_prompt_slot: see `prompt_slots.PromptSlots`.
      with_model_logprob: likewise.
    """
    longest = max(map(len, contexts), default=1)
    steps = min(self._steps, settings.max_new_tokens)
    layers = None
    with jax.set_mesh(self._mesh):
      if prompt_slots_lib.compacts_active_slots():
        extended = min(longest + extra_prefix_tokens, self._prefix_buckets[-1])
        longest = max(longest, extended)
      if slots_lib.unstacks_layers():
        layers = self._programs["unstack_layers"](params)
      num_workers = workers_lib.num_workers(self._prompt_slots, slots)
      empty = [
        self._programs["empty"](
          self._config,
          self._prompt_slots // num_workers,
          slots,
          packing_lib.bucket(longest, self._prefix_buckets),
          packing_lib.bucket(steps, self._cache_buckets),
          recent=settings.loop_tokens if settings.loop_period else 0,
          dtype=self._dtype,
        )
        for _ in range(num_workers)
      ]
    return workers_lib.Workers(
      [
        prompt_slots_lib.PromptSlots(
          self._programs,
          params,
          layers,
          slots=empty_slots,
          settings=settings,
          stops=stops,
          mesh=self._mesh,
          prompt_buckets=self._prompt_buckets,
          prefix_buckets=self._prefix_buckets,
          cache_buckets=self._cache_buckets,
          steps=steps,
          per_prompt_slot=per_prompt_slot,
          with_model_logprob=with_model_logprob,
        )
        for empty_slots in empty
      ]
    )

  def bucket(self, prompt: np.ndarray) -> int:
    """The padded length of a prompt."""
    return packing_lib.bucket(len(prompt), self._prompt_buckets)


def _stop_after(prefill_batch: int, live: int) -> int:
  """How many live slots must end before decoding stops to refill them.

  Args:
    prefill_batch: prompts that are prefilled at once, for the price of one; 0
      if no sample waits: then only halving the number of active slots is worth
      a stop.
    live: live slots.
  """
  if not prefill_batch:
    return max(1, live // 2)
  return max(1, live // 8, min(prefill_batch, live // 4))


def _unique_names(names: Sequence[str]) -> list[str]:
  """The names; one that occurred before gets the number of its occurrence."""
  before: collections.Counter[str] = collections.Counter()
  out = []
  for name in names:
    out.append(f"{name}\0{before[name]}" if before[name] else name)
    before[name] += 1
  return out


def keys(key: jax.Array, names: Sequence[str], samples: int) -> np.ndarray:
  """Key data of every sample, [names, samples, words]; see `Engine.sample`."""
  crc = np.asarray([zlib.crc32(n.encode()) for n in names], np.uint32)
  return np.asarray(_fold_names(key, crc, samples))


def _sample_keys(
  key: jax.Array,
  names: Sequence[str],
  samples: int,
  seeds: Sequence[Sequence[int]] | None,
) -> np.ndarray:
  """Key data of every sample, from the seeds if there are some."""
  if seeds is None:
    return keys(key, names, samples)
  seed_RS = np.asarray(seeds, np.uint32)
  if seed_RS.shape != (len(names), samples):
    raise ValueError(
      f"Seeds are one a sample, [{len(names)}, {samples}], got "
      f"{seed_RS.shape}. Give each prompt as many seeds as samples."
    )
  return np.asarray(_keys_of_seeds(seed_RS))


@functools.partial(jax.jit, static_argnums=2)
def _fold_names(key: jax.Array, name_R: jax.Array, samples: int) -> jax.Array:
  def fold(name: jax.Array, sample: jax.Array) -> jax.Array:
    folded = jax.random.fold_in(jax.random.fold_in(key, name), sample)
    return jax.random.key_data(folded)

  fold_all = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))
  return fold_all(name_R, jnp.arange(samples))


@jax.jit
def _keys_of_seeds(seed_RS: jax.Array) -> jax.Array:
  return jax.vmap(
    jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))
  )(seed_RS)
