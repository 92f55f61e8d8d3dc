"""Samples completions: prefill once a prompt, decode on the device, refill.

A prompt is computed once, into a row; its samples share the row's keys and
values, not copies of them. Decoding is a jitted loop of a few dozen steps; in
between, slots whose sample has ended take the next one, so that no batch waits
for its longest member. A sample draws from its own random key, folded from
(call key, prompt id, sample) and its position, and its numbers depend on
neither its slot nor its neighbours.
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
from opera_jax.models import qwen3
from opera_jax.rollout import decode_loop as decode_loop_lib
from opera_jax.rollout import prompt_slots as prompt_slots_lib
from opera_jax.rollout import sampling as sampling_lib
from opera_jax.rollout import schedule as schedule_lib
from opera_jax.rollout import slots as slots_lib
from opera_jax.rollout import workers as workers_lib
from opera_jax.scoring import packing as packing_lib
from opera_jax.text import automaton

OnTokens = Callable[[int, int, np.ndarray], None]


class Engine:
  """Samples from a policy whose parameters come with every call."""

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    config: qwen3.Config,
    *,
    mesh: jax.sharding.Mesh,
    prompt_slots: int = 16,
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
      prompt_slots: prompts in flight, a multiple of the mesh's data axes.
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
    if prompt_slots < 1 or prompt_slots % ways:
      raise ValueError(
        f"A call samples {prompt_slots} prompts over {ways} data shards, which "
        "does not divide. Make config.engine.prompt_slots a multiple."
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
        tuple(sorted({slots_lib.whole_blocks(x) for x in buckets}))
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
    """Draws `samples` completions of each prompt.

    Args:
      params: parameters, in the ROLLOUT layout.
      prompts: int32 tokens [P_i] each, at least one token.
      settings: temperature, truncation, length, stop ids.
      key: random key of this call (one a step).
      samples: completions a prompt.
      ids: names of the prompts; a sample's randomness is folded from its
        prompt's name, so it does not depend on the order. Default: places. A
        name that comes again gets randomness of its own each time.
      seeds: for each prompt a seed a sample, in place of `key` and `ids`.
      stops: automaton of stop strings; a sample ends with the token that
        completes one.
      advance: called with the tokens of each sample when it ends.
      on_tokens: called with (prompt, sample, new tokens) as they come; like
        `advance` by the calling thread.

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
    keys = _keys(key, _told_apart(names), samples, seeds)
    order = sorted(
      range(len(prompts)),
      key=lambda i: (self.bucket(prompts[i]), i),
    )
    width = min(self._slots, samples)
    schedule = schedule_lib.Schedule(self._prompt_slots, width, order, samples)
    out: list[list[Any]] = [[None] * samples for _ in prompts]
    growing: dict[tuple[int, int], list[prompt_slots_lib.Piece]] = {}
    with self.rows(params, width, settings, stops, contexts=prompts) as rows:
      together = rows.together(self.bucket(prompts[order[-1]]))
      while True:
        contexts = [(r, names[i], prompts[i]) for r, i in schedule.admit()]
        forks = [
          prompt_slots_lib.Fork(
            row, slot, keys[i, sample], settings.max_new_tokens
          )
          for row, slot, i, sample in schedule.assign()
        ]
        sitting = {(r, s): (i, n) for r, s, i, n in schedule.sitting()}
        if not sitting:
          return out
        pieces = rows.step(
          free=functools.partial(
            _worth_a_stop, together if schedule.waiting() else 0
          ),
          contexts=contexts,
          finished=schedule.idle(),
          forks=forks,
        )
        for piece in pieces:
          i, sample = sitting[piece.row, piece.slot]
          growing.setdefault((i, sample), []).append(piece)
          if on_tokens is not None and len(piece.tokens):
            on_tokens(i, sample, piece.tokens)
          if not piece.live:
            out[i][sample] = prompt_slots_lib.joined(growing.pop((i, sample)))
            schedule.release(piece.row, piece.slot)
            if advance is not None:
              advance(len(out[i][sample].tokens))

  def longest_prompt(self) -> int:
    """Tokens that a prompt may have."""
    return self._prompt_buckets[-1]

  def head_rows(self) -> int:
    """Rows of the model's head: its vocabulary, and what pads it."""
    return self._config.vocab_size

  def prompt_lengths(self) -> tuple[int, ...]:
    """Lengths that prompts are padded to."""
    return self._prompt_buckets

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
    prefixes, caches = self._prefix_buckets, len(self._cache_buckets)
    with jax.set_mesh(self._mesh):
      rows = self._prompt_slots // workers_lib.count(
        self._prompt_slots, self._slots
      )
      sizes, active_slots = [rows], 1
      apart = slots_lib.layers_apart()
      if prompt_slots_lib.packs():
        sizes = prompt_slots_lib.row_counts(rows)
        active_slots = sum(
          len(prompt_slots_lib.active_slot_counts(n, self._slots))
          for n in sizes
        )
    # A prefill a bucket and a prefix that holds it; prefixes and caches grow
    # from any size to any larger one.
    prefill = sum(T >= P for P in self._prompt_buckets for T in prefixes)
    grow = math.comb(len(prefixes), 2) + math.comb(caches, 2)
    # Empty, one for each prefix to begin with; on a CPU, weights by layer;
    # assign.
    rest = len(prefixes) + apart + len(sizes) * (prefill + grow + 1)
    fewer = math.comb(len(sizes), 2) * len(prefixes) * caches
    return rest + fewer + active_slots * len(prefixes) * caches

  def rows(
    self,
    params: Any,
    width: int,
    settings: sampling_lib.Sampling,
    stops: automaton.Automaton | None,
    *,
    contexts: Sequence[np.ndarray] = (),
    more: int = 0,
    whole_rows: bool = False,
    with_model_logprob: bool = False,
  ) -> workers_lib.Workers:
    """Empty rows of `width` slots each, to be driven in a `with` block.

    Room is made at once for the `contexts` to come; on a CPU also for `more`
    tokens that `PromptSlots.keep` may add, up to the largest bucket: there a
    longer prefix costs less than compiling every program for two lengths. See
    `prompt_slots.PromptSlots` for the other arguments.
    """
    longest = max(map(len, contexts), default=1)
    with jax.set_mesh(self._mesh):
      if prompt_slots_lib.packs():
        longest = max(longest, min(longest + more, self._prefix_buckets[-1]))
    steps = min(self._steps, settings.max_new_tokens)
    layers = None
    with jax.set_mesh(self._mesh):
      if slots_lib.layers_apart():
        layers = self._programs["apart"](params)
      num_workers = workers_lib.count(self._prompt_slots, width)
      slots = [
        self._programs["empty"](
          self._config,
          self._prompt_slots // num_workers,
          width,
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
          *(self._programs, params, layers, part, settings, stops),
          mesh=self._mesh,
          prompt_buckets=self._prompt_buckets,
          prefix_buckets=self._prefix_buckets,
          cache_buckets=self._cache_buckets,
          steps=steps,
          whole_rows=whole_rows,
          with_model_logprob=with_model_logprob,
        )
        for part in slots
      ]
    )

  def bucket(self, prompt: np.ndarray) -> int:
    """The length that a prompt is padded to."""
    return packing_lib.bucket(len(prompt), self._prompt_buckets)


def _worth_a_stop(together: int, live: int) -> int:
  """How many of the live slots must end for new samples to be let in.

  Args:
    together: prompts that are computed at once, at the cost of one; 0 if
      nothing waits, and only work for half as many is worth a stop.
    live: slots.
  """
  if not together:
    return max(1, live // 2)
  return max(1, live // 8, min(together, live // 4))


def _told_apart(names: Sequence[str]) -> list[str]:
  """The names, each one that has come before marked by how often it has."""
  before: collections.Counter[str] = collections.Counter()
  out = []
  for name in names:
    out.append(f"{name}\0{before[name]}" if before[name] else name)
    before[name] += 1
  return out


def keys(key: jax.Array, names: Sequence[str], samples: int) -> np.ndarray:
  """Key data of every sample, [names, samples, words]; see `Engine.sample`."""
  crc = np.asarray([zlib.crc32(n.encode()) for n in names], np.uint32)
  return np.asarray(_folded(key, crc, samples))


def _keys(key, names, samples, seeds) -> np.ndarray:
  if seeds is None:
    return keys(key, names, samples)
  seeds = np.asarray(seeds, np.uint32)
  if seeds.shape != (len(names), samples):
    raise ValueError(
      f"Seeds are one a sample, [{len(names)}, {samples}], got {seeds.shape}."
    )
  return np.asarray(_seeded(seeds))


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
