"""Estimates from shapes, without compiling, whether a run fits on one device.

`programs.build` gives the arguments of each program, and what the run holds
beside them: these bytes are exact. The temporary memory is estimated, by
formulas that say what a program keeps at its widest point. Compared with
programs that libtpu compiled (tests/plan/test_estimate.py), the total of a
large program is between 5 % less and a third more. No GPU's compiler was at
hand.

Shape key: t tokens of a call (of a micro-batch, for an update), L layers,
D hidden size, N query heads, K key/value heads, H head dimension, F width of
the MLP, V vocabulary, w bytes of an activation.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.models import decoder, windowed_attention
from opera_jax.plan import analyse, hardware, memory_floor, programs
from opera_jax.sharding import mesh as mesh_lib

# Tile of the streamed logits, see kernels/token_logprob/api.py.
_TILE = 1024 * 8192


def costs(
  card: hardware.Card,
  mesh: Mapping[str, int],
  sections: Mapping[str, Mapping[str, Any]],
  names: tuple[str, ...] = programs.NAMES,
) -> Iterator[analyse.Cost]:
  """Estimates the costs of a run's programs on one device, one by one.

  Args:
    card: the device.
    mesh: of the config; it must be one device.
    sections: config sections by the names in `whole.SECTIONS`.
    names: of the programs, see `programs.NAMES`.

  Raises:
    ValueError: a mesh of several devices, or see `programs.build`.
  """
  one = one_device(mesh)
  for program in programs.build(one, **sections, names=names):
    yield _cost(program, card, sections)


def one_device(mesh: Mapping[str, int]) -> jax.sharding.Mesh:
  """The mesh of a config on one device.

  Raises:
    ValueError: the mesh takes several.
  """
  taken = math.prod(size for size in mesh.values() if size != -1)
  if taken > 1:
    raise ValueError(
      f"config.mesh is {dict(mesh)}, which takes {taken} devices, and GPUs and "
      "CPUs are planned one at a time. Set each axis to 1: "
      + " ".join(f"--config.mesh.{axis}=1" for axis in mesh)
    )
  return mesh_lib.create(dict(mesh), jax.devices()[:1])


def _cost(
  program: programs.Program,
  card: hardware.Card,
  sections: Mapping[str, Mapping[str, Any]],
) -> analyse.Cost:
  config = decoder.Config(**sections["model"])
  argument = memory_floor.shard_bytes(
    [a for a in program.arguments if a is not None]
  )
  temporary, output = _temporary(program, config, sections, argument)
  beside = program.beside
  if card.name == "cpu" and program.name in ("prefill", "decode", "grow"):
    # On a CPU decoding has the weights of each layer apart, beside the stack.
    beside += _weights(config, jnp.dtype(config.dtype).itemsize)
  total = beside + argument + temporary + output
  flops, bandwidth = card.flops(config.dtype), card.bandwidth
  floors = {
    "flops_seconds": program.flops.total / flops if flops else None,
    "stream_seconds": program.streamed / bandwidth if bandwidth else None,
  }
  known = [x for x in floors.values() if x is not None]
  return analyse.Cost(
    name=program.name,
    shape=program.shape,
    calls=program.calls,
    work=program.work,
    useful=program.useful,
    tokens=program.tokens,
    fits=total <= card.memory_bytes,
    total_bytes=total,
    argument_bytes=argument,
    temporary_bytes=temporary,
    output_bytes=output,
    code_bytes=None,
    beside_bytes=beside,
    forward_flops=program.flops.forward,
    backward_flops=program.flops.backward,
    recompute_flops=program.flops.recompute,
    **floors,
    moved_bytes=None,
    moved_seconds=None,
    read_once=(),
    collective_bytes=None,
    collective_seconds=None,
    seconds=max(known, default=None),
    serial_seconds=sum(known) if known else None,
    compile_seconds=None,
    remedies=program.remedies,
  )


def _temporary(
  program: programs.Program,
  config: decoder.Config,
  sections: Mapping[str, Mapping[str, Any]],
  argument: int,
) -> tuple[int, int]:
  """Bytes of temporary arrays, and of outputs that are not arguments again."""
  if program.name in ("sft", "update"):
    section = sections["sft" if program.name == "sft" else "rl"]
    state, batch, frozen = program.arguments
    rows, length = batch.tokens.shape
    rows //= section["micro_batches"]
    return _training(config, rows, length, state.params, frozen, section), 0
  w = jnp.dtype(config.dtype).itemsize
  if program.name in ("score", "reference"):
    B, T = program.arguments[1].shape
    S, G = program.arguments[3].shape[1:]
    t = B * (T + S * G)
    working = t * w * _width(config)
    return working + _logits(config, t) + _scores(config, B, T), 8 * t
  if program.name == "prefill":
    B, T = program.arguments[3].shape
    # Keys and values of all layers, before they lie in the prompt slots.
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads
    kept *= B * T * config.head_dim * w
    working = B * T * w * _width(config) + _scores(config, B, T)
    return kept + working + 4 * B * config.vocab_size, 0
  slots = program.arguments[1 if program.name == "decode" else 0]
  if program.name == "grow":
    old = memory_floor.shard_bytes(slots.cache)
    # The whole state is written anew, with the longer caches.
    return 0, argument + int(program.streamed) - 2 * old
  active = slots.token.size
  logits = 3 * 4 * active * config.vocab_size
  # A compiler keeps keys or values in a second layout.
  return logits + memory_floor.shard_bytes(slots.cache) // 2, 0


def _training(
  config: decoder.Config,
  rows: int,
  length: int,
  trained: Any,
  frozen: Any,
  section: Mapping[str, Any],
) -> int:
  """Bytes of one micro-batch's forward and backward pass."""
  w = jnp.dtype(config.dtype).itemsize
  t, D = rows * length, config.hidden_size
  saved = config.num_hidden_layers * t * w * _saved(config)
  working = 2 * t * w * _width(config) + 2 * 4 * t * D
  # With micro-batches a gradient is added to the sum of those before.
  gradients = memory_floor.shard_bytes(trained)
  gradients *= 2 if section["micro_batches"] > 1 else 1
  held = trained if frozen is None else frozen
  widths = {leaf.dtype.itemsize for leaf in jax.tree.leaves(held)}
  cast = 0 if widths == {w} else _weights(config, w)
  scores = 2 * _scores(config, rows, length)
  return saved + working + gradients + cast + scores + _logits(config, t)


def _saved(config: decoder.Config) -> int:
  """Features of a token that each layer keeps for the backward pass."""
  D, F = config.hidden_size, config.intermediate_size
  N = config.num_attention_heads * config.head_dim
  K = config.num_key_value_heads * config.head_dim
  products = N + 2 * K + D + 2 * F + D  # q, k, v, o, gate, up, down
  return {
    "full": D,
    "attention": D + N,
    "dots": D + N + products,
    "none": D + N + products + 4 * D + N + K + 3 * F,
  }[config.remat]


def _width(config: decoder.Config) -> int:
  """Features of a token at the widest point of a layer's forward pass."""
  return 2 * config.hidden_size + config.head_dim * (
    2 * config.num_attention_heads + 2 * config.num_key_value_heads
  ) + 2 * config.intermediate_size  # fmt: skip


def _scores(config: decoder.Config, rows: int, length: int) -> int:
  """Bytes of attention scores, float32: of one chunk of queries."""
  queries = min(length, windowed_attention.CHUNK)
  return 4 * rows * config.num_attention_heads * queries * length


def _logits(config: decoder.Config, tokens: int) -> int:
  """Bytes of a few tiles of logits, float32."""
  return 3 * 4 * min(_TILE, tokens * config.vocab_size)


def _weights(config: decoder.Config, width: int) -> int:
  """Bytes of all parameters."""
  plain = dataclasses.replace(config, lora=None)
  return width * decoder.parameter_count(decoder.abstract(plain)[1])
