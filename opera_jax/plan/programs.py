"""The jitted programs of a run, with abstract arguments on a mesh. They are the
functions that the run itself calls, at the largest shapes that its config
allows. Nothing is allocated, so the devices need not exist.

Shape key: B rows, T tokens, P prompt tokens, S continuations, G tokens of a
continuation.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.models import decoder, lora, sharded_ops
from opera_jax.plan import (
  abstract,
  cost,
  hbm_traffic,
  memory_floor,
  scoring_calls,
)
from opera_jax.rl import learner
from opera_jax.rollout import decode_loop as decode_loop_lib
from opera_jax.rollout import engine as engine_lib
from opera_jax.rollout import sampling
from opera_jax.rollout import slots as slots_lib
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.scoring import packed_rows, prefix_continuations
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.train import optimizer
from opera_jax.train import step as train_step

NAMES = ("sft", "prefill", "grow", "decode", "score", "reference", "update")
Section = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of a run."""

  name: str
  shape: str  # description of its largest call
  jitted: Any
  arguments: tuple[Any, ...]  # trees of ShapeDtypeStructs with shardings
  static: dict[str, Any]
  flops: cost.Flops  # of one call, over all devices
  streamed: (
    float  # lower bound of the bytes a device reads from HBM in one call
  )
  calls: int  # in one RL step
  work: float  # of those calls, in calls at this shape
  beside: int  # bytes per device that the run holds besides the arguments
  remedies: tuple[str, ...]  # config values to lower if it does not fit
  tokens: int = 0  # that one call decodes or trains on
  useful: float | None = None  # share of the calls' FLOPs, where known
  # share of its operands that a Pallas call reads, where known
  reads: hbm_traffic.Reads = lambda kernel, dims: None


def build(
  mesh: jax.sharding.Mesh,
  *,
  model: Section,
  engine: Section,
  rollout: Section,
  scoring: Section,
  sft: Section,
  rl: Section,
  names: tuple[str, ...] = NAMES,
) -> list[Program]:
  """The programs of a run.

  Args:
    mesh: of present or absent devices.
    model: fields of `decoder.Config`.
    engine: arguments of `rollout.engine.Engine`.
    rollout: sampling settings.
    scoring: arguments of `scoring.logprob_scorer.LogprobScorer`.
    sft: fields of `stages.supervised.Recipe`.
    rl: settings of the updates.
    names: which of NAMES, in any order.

  Raises:
    ValueError: a model without a vocabulary, sizes that the mesh does not
      divide, an unknown name.
  """
  unknown = set(names) - set(NAMES)
  if unknown:
    raise ValueError(
      f"Unknown program {sorted(unknown)}; a run has {', '.join(NAMES)}."
    )
  if model["vocab_size"] < 1:
    raise ValueError(
      f"config.model.vocab_size is {model['vocab_size']}, which means "
      "the tokenizer's size, and a plan reads no tokenizer. Set it to the "
      "number of rows of the embedding."
    )
  config = decoder.Config(**model)
  run = _Run(
    mesh,
    config,
    engine=engine,
    rollout=rollout,
    scoring=scoring,
    sft=sft,
    rl=rl,
  )
  makers: dict[str, Callable[[], Program]] = {
    "sft": run.sft,
    "prefill": run.prefill,
    "grow": run.grow,
    "decode": run.decode,
    "score": run.score,
    "reference": run.reference,
    "update": run.update,
  }
  return [makers[name]() for name in NAMES if name in names]


def most(
  mesh: jax.sharding.Mesh,
  *,
  model: Section,
  engine: Section,
  scoring: Section,
  rl: Section,
) -> dict[str, int]:
  """Upper bounds on the number of programs that an RL run compiles."""
  config = decoder.Config(**model)
  graphdef = decoder.abstract(config)[0]
  logprob_scorer = scorer_lib.LogprobScorer(
    graphdef, vocab_size=config.vocab_size, mesh=mesh, **scoring
  )
  sampler = engine_lib.Engine(graphdef, config, mesh=mesh, **engine)
  return {
    "sample": sampler.programs(),
    "score": logprob_scorer.programs(),
    "update": learner.programs(
      rl["row_buckets"], rl["completions_per_row"], sampler.prompt_lengths()
    ),
  }


def named(function: Callable[..., Any], values: Section) -> dict[str, Any]:
  """The fields of a section that are also parameters of `function`."""
  return {
    name: values[name]
    for name in inspect.signature(function).parameters
    if name in values
  }


def _optimizer(section: Section, updates: int) -> Any:
  """The optimizer that a stage builds from a section."""
  rate = optimizer.schedule(
    section["learning_rate"],
    updates,
    warmup_fraction=section["warmup"],
    decay=section["decay"],
  )
  settings = named(optimizer.build, section) | {
    "name": section["optimizer"],
    "learning_rate": rate,
    "matrices": decoder.matrix_axes,
  }
  return optimizer.build(**settings)


def _with_lora(config: decoder.Config, section: Section) -> decoder.Config:
  """The config of the model that a stage trains."""
  return dataclasses.replace(config, lora=lora.settings(**section["lora"]))


class _Run:
  """The abstract values that the programs of one run share."""

  def __init__(
    self,
    mesh: jax.sharding.Mesh,
    config: decoder.Config,
    *,
    engine: Section,
    rollout: Section,
    scoring: Section,
    sft: Section,
    rl: Section,
  ):
    self._mesh, self._config = mesh, config
    self._engine, self._rollout, self._scoring = engine, rollout, scoring
    self._sft, self._rl = sft, rl
    self._policy = _with_lora(config, rl)
    self._values = abstract.Values(mesh, self._policy)
    self._graphdef = self._values.graphdef
    self._plain_graphdef = decoder.abstract(config)[0]  # samples, merged
    self._params = self._values.params
    # The reference of KL: all parameters again, or with LoRA an adapter that is
    # switched off.
    self._reference = self._values.trained
    self._num_data_shards = mesh_lib.num_data_shards(mesh)

  def sft(self) -> Program:
    recipe = self._sft
    transformation = _optimizer(recipe, 1)
    config = _with_lora(self._config, recipe)
    values = abstract.Values(self._mesh, config)
    update = train_step.make_sft_update(
      packed_rows.logprob_fn(values.graphdef),
      join=lora.combine if config.lora else None,
      **named(train_step.make_sft_update, recipe)
      | {"optimizer": transformation},
    )
    B, T = recipe["batch_size"], recipe["row_tokens"]
    return Program(
      name="sft",
      shape=f"{B} rows x {T:,}, {recipe['micro_batches']} micro-batches",
      jitted=update,
      arguments=(
        values.state(transformation),
        values.batch("sft.batch_size", B, T),
        values.frozen,
      ),
      static={},
      flops=cost.update(config, B, T),
      streamed=0.0,
      calls=0,
      work=0.0,
      tokens=B * T,
      beside=0,
      remedies=self._update_remedies(
        "sft", B, recipe["micro_batches"], "row_tokens"
      ),
    )

  def update(self) -> Program:
    rl = self._rl
    learn = learner.build(
      self._graphdef,
      self._rl_optimizer(),
      temperature=self._rollout["temperature"],
      kl_coef=rl["kl_coef"] if rl["kl_in"] == "loss" else 0.0,
      join=lora.combine if self._policy.lora else None,
      **{name: rl[name] for name in learner.SETTINGS},
    )
    if learn.critic or learn.pairs:
      raise ValueError(
        f"A plan covers policy updates only, got config.rl.loss="
        f"{rl['loss']!r}, value_coef={rl['value_coef']} and divergence_coef="
        f"{rl['divergence_coef']}. Plan without them (a critic's head "
        "needs memory on top), or leave 'update' out of --programs."
      )
    completions_per_row = rl["completions_per_row"]
    longest = max(rl["row_buckets"])
    B, T = rl["mini_batch"] * rl["samples"] // completions_per_row, longest
    shape, shared = f"{T:,}", {}
    sizes: tuple[int, ...] = (T,)
    if completions_per_row > 1:
      P = max(self._engine["prompt_buckets"])
      shape = f"({P:,} + {completions_per_row} x {T:,})"
      sizes = (P, completions_per_row, longest)
      T = P + completions_per_row * longest
      shared = {"prefix_length": P, "num_continuations": completions_per_row}
    return Program(
      name="update",
      shape=f"{B} rows x {shape}, {rl['micro_batches']} micro-batches",
      jitted=learn.update,
      arguments=(
        self._values.state(learn.optimizer),
        self._values.batch(
          "rl.mini_batch x samples / completions_per_row", B, T, **shared
        ),
        self._values.frozen,
      ),
      static={},
      flops=cost.update(self._policy, B, *sizes),
      streamed=0.0,
      calls=self._updates(),
      work=float(self._updates()),
      tokens=B * T,
      beside=memory_floor.shard_bytes(self._reference),
      remedies=self._update_remedies(
        "rl", B, rl["micro_batches"], "row_buckets"
      ),
    )

  def score(self) -> Program:
    """The reward's scoring pass at its largest number and length of
    continuations."""
    opt_state = self._values.state(self._rl_optimizer()).opt_state
    return self._scoring_pass(
      name="score",
      temperature=1.0,
      S=max(self._scoring["slot_buckets"]),
      G=max(self._scoring["continuation_buckets"]),
      passes=1,
      beside=memory_floor.shard_bytes((self._reference, opt_state)),
    )

  def reference(self) -> Program:
    """A scoring pass of prefixes only, at the smallest shape of
    continuations."""
    temperature, scoring = self._rollout["temperature"], self._scoring
    return self._scoring_pass(
      name="reference",
      temperature=temperature,
      S=min(scoring["slot_buckets"]),
      G=min(scoring["continuation_buckets"]),
      passes=int(self._rl["kl_coef"] != 0) + int(temperature != 1),
      beside=memory_floor.shard_bytes(self._values.state(self._rl_optimizer())),
    )

  def prefill(self) -> Program:
    config = self._config
    P = max(self._engine["prompt_buckets"])
    with jax.set_mesh(self._mesh):
      R = self._num_data_shards * decode_loop_lib.prefill_batch_size(P)
    slots = self._slots()
    return Program(
      name="prefill",
      shape=f"{R} prompts x {P:,}",
      jitted=decode_loop_lib.programs(self._plain_graphdef)["prefill"],
      arguments=(
        self._values.rollout_params(),
        slots.prefix,
        slots.prefix_length,
        self._values.rows("config.mesh", (R, P), jnp.int32),
        self._values.rows("config.mesh", (R,), jnp.int32),
        self._values.whole(jax.ShapeDtypeStruct((R,), jnp.int32)),
      ),
      static={},
      flops=cost.Flops(cost.prefill(config, R, P).forward),
      streamed=0.0,
      calls=-(-self._rl["prompts"] // R),
      work=self._rl["prompts"] / R,
      beside=self._beside() + memory_floor.shard_bytes(slots.cache),
      remedies=self._rollout_remedies(),
    )

  def decode(self) -> Program:
    """One call of the decode loop with the largest caches, half full."""
    config = self._config
    B, P = self._engine["prompt_slots"], max(self._engine["prompt_buckets"])
    S, C = self._slots_a_prompt(), self._rollout["max_new_tokens"]
    steps = min(self._engine["steps"], C)
    settings = sampling.Sampling(
      stop_ids=(0,), **named(sampling.Sampling, self._rollout)
    )
    params = self._values.rollout_params()
    fraction = steps / C  # of the longest response
    # Every step reads the weights and the filled part of the caches.
    read = B * (C * P + S * cost.causal_pairs(C))
    weights = memory_floor.shard_bytes(params)
    if not config.tie_word_embeddings:
      # Rows of the embedding are looked up.
      weights -= memory_floor.shard_bytes(params["embed"])
    streamed = C * weights + read * memory_floor.token_bytes(
      config, self._engine["cache_dtype"]
    ) / memory_floor.num_cache_shards(config, self._mesh)
    return Program(
      name="decode",
      shape=f"{B} prompts x {P:,}, {S} slots x {C:,}, {steps} steps",
      jitted=decode_loop_lib.programs(self._plain_graphdef)["decode"],
      arguments=(
        params,
        self._slots(),
        None,
        self._values.whole(jax.ShapeDtypeStruct((), jnp.int32)),
      ),
      static={"settings": settings, "steps": steps},
      flops=cost.Flops(cost.decode(config, B * S, P, C).forward * fraction),
      streamed=streamed * fraction,
      calls=self._waves() * -(-C // steps),
      work=self._waves() * C / steps,
      tokens=B * S * steps,
      reads=self._attention_reads(P, C),
      beside=self._beside(),
      remedies=self._rollout_remedies(),
    )

  def _attention_reads(self, P: int, C: int) -> hbm_traffic.Reads:
    """What attention reads of its caches: one layer, to the end of a sample.

    That end is half of C tokens on the mean, in whole blocks of keys.
    """
    layers = self._config.num_hidden_layers
    prefix, longest = self._padded_length(P), self._padded_length(C)
    half = min((C + sharded_ops.KEY_BLOCK) / 2, longest)
    lengths = {longest: half, prefix: float(prefix)}
    if prefix == longest:
      lengths = {prefix: float(prefix)}  # not to be told apart: all of it

    def reads(kernel: str, dims: tuple[int, ...]) -> float | None:
      if kernel != "limited_attention_forward":
        return None
      if len(dims) == 6 and dims[0] == layers and dims[-2] in lengths:
        return lengths[dims[-2]] / dims[-2] / layers
      return 1.0  # queries, seeds and lengths

    return reads

  def grow(self) -> Program:
    """The last lengthening of the caches: both lengths are held at once."""
    longest = self._padded_length(self._rollout["max_new_tokens"])
    every = map(self._padded_length, self._engine["cache_buckets"])
    shorter = [length for length in every if length < longest]
    old, new = self._slots(max(shorter, default=longest)), self._slots()
    return Program(
      name="grow",
      shape=f"caches of {old.cache.capacity:,} to {longest:,} tokens",
      jitted=decode_loop_lib.programs(self._plain_graphdef)["grow"],
      arguments=(old,),
      static={"capacity": longest},
      flops=cost.Flops(0.0),
      streamed=float(memory_floor.shard_bytes((old.cache, new.cache))),
      calls=self._waves() if shorter else 0,
      work=float(self._waves() if shorter else 0),
      beside=self._beside()
      + memory_floor.shard_bytes(self._values.rollout_params()),
      remedies=(
        f"config.engine.cache_buckets {tuple(self._engine['cache_buckets'])}: "
        "add a bucket shortly before the last",
        *self._rollout_remedies(),
      ),
    )

  def _waves(self) -> int:
    """How many times the slots are filled in one RL step."""
    rows = -(-self._rl["prompts"] // self._engine["prompt_slots"])
    return rows * -(-self._rl["samples"] // self._slots_a_prompt())

  def _beside(self) -> int:
    return memory_floor.shard_bytes(
      (
        self._values.state(self._rl_optimizer()),
        self._reference,
        self._values.frozen,
      )
    )

  def _slots_a_prompt(self) -> int:
    return min(self._engine["slots"], self._rl["samples"])

  def _rollout_remedies(self) -> tuple[str, ...]:
    return (
      f"config.engine.prompt_slots ({self._engine['prompt_slots']}; a multiple "
      f"of {self._num_data_shards}) or config.engine.slots "
      f"({self._engine['slots']})",
      f"config.engine.cache_dtype ({self._engine['cache_dtype']})",
      "config.mesh (a larger tensor axis splits weights and cache)",
    )

  def _slots(self, capacity: int = 0) -> slots_lib.Slots:
    """All slots, with caches of `capacity` tokens; 0 means the longest
    response."""
    return self._values.slots(
      self._engine["prompt_slots"],
      self._slots_a_prompt(),
      self._padded_length(max(self._engine["prompt_buckets"])),
      capacity or self._padded_length(self._rollout["max_new_tokens"]),
      self._engine["cache_dtype"],
    )

  def _padded_length(self, tokens: int) -> int:
    with jax.set_mesh(self._mesh):
      return slots_lib.padded_length(tokens)

  def _scoring_pass(
    self,
    name: str,
    temperature: float,
    S: int,
    G: int,
    passes: int,
    beside: int,
  ) -> Program:
    B, T = self._scoring["batch_size"], max(self._scoring["prefix_buckets"])
    flops = cost.score(self._policy, B, T, S, G)
    calls = scoring_calls.count(
      self._policy,
      self._scoring,
      completions=self._rl["prompts"] * self._rl["samples"],
      longest_prompt=max(self._engine["prompt_buckets"]),
      longest_response=self._rollout["max_new_tokens"],
      largest=flops,
      continued=name == "score",
    )
    continuation = self._values.rows("scoring.batch_size", (B, S, G), jnp.int32)
    return Program(
      name=name,
      shape=f"{B} prefixes x {T:,}, {S} continuations x {G:,}",
      jitted=jax.jit(
        prefix_continuations.logprob_fn(self._graphdef, temperature=temperature)
      ),
      arguments=(
        self._params,
        self._values.rows("scoring.batch_size", (B, T), jnp.int32),
        self._values.rows("scoring.batch_size", (B,), jnp.int32),
        continuation,
        continuation,
        self._values.rows("scoring.batch_size", (B, S), jnp.int32),
      ),
      static={},
      flops=flops,
      streamed=0.0,
      calls=passes * calls.count,
      work=passes * calls.work,
      useful=calls.useful,
      beside=beside,
      remedies=(
        f"config.scoring.batch_size ({B}; a multiple of "
        f"{self._num_data_shards})",
        f"config.scoring.slot_buckets (largest {S})",
        f"config.scoring.continuation_buckets (largest {G})",
        "config.mesh (a larger tensor or sequence axis splits a row)",
      ),
    )

  def _update_remedies(
    self, section: str, B: int, micro_batches: int, lengths: str
  ) -> tuple[str, ...]:
    most = B // self._num_data_shards
    return (
      f"config.{section}.micro_batches ({micro_batches}; at most {most})",
      f"config.model.remat ({self._config.remat}; full keeps least)",
      f"config.{section}.{lengths}",
      "config.mesh (a larger tensor or sequence axis splits a row)",
    )

  def _rl_optimizer(self) -> Any:
    return _optimizer(self._rl, self._rl["steps"] * self._updates())

  def _updates(self) -> int:
    """Updates of one RL step."""
    mini_batches = self._rl["prompts"] // self._rl["mini_batch"]
    return mini_batches * self._rl["epochs_per_batch"]
