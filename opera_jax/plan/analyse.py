"""Compiles a program for devices that may be absent, and reports its costs."""

import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from opera_jax.plan import hardware, hbm_traffic, hlo
from opera_jax.plan import programs as programs_lib

_NEEDED = re.compile(r"\(([\d.]+)([KMGT]?)\)")
_UNIT = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of one call of a program; bytes and seconds are per device."""

  name: str
  shape: str
  calls: int  # per RL step
  work: float  # of those calls, in calls at the largest shape
  useful: float | None  # share of the calls' FLOPs; None where all may be
  tokens: int  # that one call decodes or trains on
  fits: bool
  total_bytes: int  # sum of the five sizes below
  argument_bytes: int | None  # None if compilation failed
  temporary_bytes: int | None
  output_bytes: int | None  # without outputs that reuse argument buffers
  code_bytes: int | None
  beside_bytes: int
  forward_flops: float  # over all devices
  backward_flops: float
  recompute_flops: float
  flops_seconds: float | None  # at the stated peak, None where that is unknown
  stream_seconds: float | None  # memory reads at the stated bandwidth
  moved_bytes: float | None  # through HBM, by the compiled program
  moved_seconds: float | None  # at the stated bandwidth
  read_once: tuple[str, ...]  # Pallas kernels whose operands count once
  collective_bytes: dict[str, float] | None  # None without HLO text
  collective_seconds: float | None  # over the links in use
  seconds: float | None  # the largest of the floors; a lower bound
  serial_seconds: float | None  # FLOPs, HBM and collectives in turn
  compile_seconds: float | None  # None for an estimate
  remedies: tuple[str, ...]  # settings to lower if it does not fit


def analyse(
  program: programs_lib.Program,
  mesh: jax.sharding.Mesh,
  chip: hardware.Chip,
) -> Cost:
  """Compiles one program on the mesh's devices.

  Args:
    program: what to compile.
    mesh: on which its arguments are sharded.
    chip: kind of the mesh's devices.

  Returns:
    Its costs. If the compiler runs out of memory, `fits` is False and the size
    is the one that the compiler requested.
  """
  began = time.monotonic()
  with jax.set_mesh(mesh):
    lowered = program.jitted.lower(*program.arguments, **program.static)
  memory, text, needed = _compile(lowered)
  seconds = time.monotonic() - began
  collectives = moved = links = None
  if text is not None:
    collectives = hlo.collective_bytes(text)
    links = _collective_seconds(hlo.collectives(text), mesh, chip)
    moved = hbm_traffic.count(text, program.reads)
  parts: dict[str, Any] = dict.fromkeys(
    ("argument_bytes", "temporary_bytes", "output_bytes", "code_bytes")
  )
  total = program.beside + needed
  if memory is not None:
    parts = {
      "argument_bytes": memory.argument_size_in_bytes,
      "temporary_bytes": memory.temp_size_in_bytes,
      "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
      "code_bytes": memory.generated_code_size_in_bytes,
    }
    total = program.beside + sum(parts.values())
  floors: dict[str, Any] = {
    "flops_seconds": program.flops.total / (mesh.size * chip.flops),
    "stream_seconds": program.streamed / chip.hbm_bandwidth,
    "collective_seconds": links,
  }
  streamed = floors["stream_seconds"]
  if moved is not None:
    streamed = moved.bytes / chip.hbm_bandwidth
  return Cost(
    name=program.name,
    shape=program.shape,
    calls=program.calls,
    work=program.work,
    useful=program.useful,
    tokens=program.tokens,
    fits=memory is not None and total <= chip.hbm_bytes,
    total_bytes=total,
    **parts,
    beside_bytes=program.beside,
    forward_flops=program.flops.forward,
    backward_flops=program.flops.backward,
    recompute_flops=program.flops.recompute,
    **floors,
    moved_bytes=None if moved is None else moved.bytes,
    moved_seconds=None if moved is None else streamed,
    read_once=() if moved is None else moved.read_once,
    collective_bytes=collectives,
    seconds=max(x for x in floors.values() if x is not None),
    serial_seconds=floors["flops_seconds"] + streamed + (links or 0.0),
    compile_seconds=seconds,
    remedies=program.remedies,
  )


def _collective_seconds(
  collectives: list[hlo.Collective],
  mesh: jax.sharding.Mesh,
  chip: hardware.Chip,
) -> float:
  """Seconds of all collectives, one after the other.

  What a device sends, over links times the bandwidth of one direction of one of
  them, see `Chip.links_used`. A permutation has one link, however far it goes;
  latency does not count.
  """
  places = [tuple(device.coords) for device in mesh.devices.flat]
  bounds = [max(side) + 1 for side in zip(*places, strict=True)]
  seconds = 0.0
  for collective in collectives:
    links = 1.0
    if collective.kind != "collective-permute":
      group = [places[device] for device in collective.group]
      links = chip.links_used(group, bounds)
    seconds += collective.sent / (links * chip.link_bandwidth)
  return seconds


def _compile(lowered: Any) -> tuple[Any, str | None, int]:
  """(memory analysis, optimised HLO, bytes that did not fit).

  The HLO comes from the compiler's dump, since reading it from the compiled
  program fails for some TPU7x programs.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      memory = lowered.compile(compiler_options=options).memory_analysis()
      needed = 0
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      memory, needed = None, _needed_bytes(str(error))
    written = [
      *pathlib.Path(folder).glob("*jit_*.after_optimizations.txt"),
      *pathlib.Path(folder).glob(
        "*jit_*.after_optimizations_before_buffer_assignment.txt"
      ),
    ]
    text = written[0].read_text() if written else None
  return memory, text, needed


def _needed_bytes(message: str) -> int:
  """The largest size in brackets of an out-of-memory message."""
  sizes = [float(n) * _UNIT[unit] for n, unit in _NEEDED.findall(message)]
  return int(max(sizes, default=0))
