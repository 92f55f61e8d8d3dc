"""Accelerators: memory, and stated peak performance.

Peak FLOP/s and bandwidths are a chip's, from docs.cloud.google.com/tpu/docs
(pages v5e, v5p, v6e and tpu7x, "Peak compute per chip (bf16)", "HBM bandwidth",
"Bidirectional inter-chip interconnect bandwidth per chip"). One direction of
one link carries that over twice the links of a chip, 4 in a plane and 6 in a
cube; the JAX scaling book (jax-ml.github.io/scaling-book/tpus) gives 10 % less.
Memory is per device: the limit that the out-of-memory message of libtpu's
compiler (0.0.51) states.

GPUs are single cards, with the figures of NVIDIA's data sheets (without
sparsity): "NVIDIA T4", "NVIDIA L4", "NVIDIA A100 Tensor Core GPU" and "NVIDIA
H100 Tensor Core GPU" (SXM where there are two). A data sheet's GB is taken as
10^9 bytes, of which a run is given `GPU_FRACTION`: the rest is for the CUDA
context, libraries and fragmentation. JAX itself takes 75 %, unless
XLA_PYTHON_CLIENT_MEM_FRACTION says more.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of TPU chip; JAX sees a TPU7x chip as two devices."""

  name: str
  devices: int  # devices per chip
  hbm_bytes: int  # per device
  chip_flops: float  # stated peak bf16 FLOP/s
  chip_hbm: float  # bytes/s
  chip_ici: float  # bytes/s, both directions of all links together
  links: int  # of a chip
  wraps: int  # sides that are a multiple of it close to a ring
  topologies: tuple[str, ...]

  @property
  def flops(self) -> float:
    """Peak bf16 FLOP/s of a device."""
    return self.chip_flops / self.devices

  @property
  def hbm_bandwidth(self) -> float:
    """Bytes/s between a device and its memory."""
    return self.chip_hbm / self.devices

  @property
  def link_bandwidth(self) -> float:
    """Bytes/s of a device over one direction of one link."""
    return self.chip_ici / (2 * self.links) / self.devices

  def links_used(
    self, places: Sequence[Sequence[int]], bounds: Sequence[int]
  ) -> float:
    """Links over which a device of a group sends in one collective.

    Each side of the torus along which the group extends gives one direction of
    a link, or both where the group is a whole side that closes to a ring. Where
    a group takes only every k-th chip of a side, k groups share its links, so
    that it has a k-th of them. Devices of one chip talk to each other six times
    as fast as over a link (docs.cloud.google.com/tpu/docs/tpu7x).

    Args:
      places: coordinates of the group's chips.
      bounds: of the slice.
    """
    used = 0.0
    for axis, side in enumerate(bounds):
      taken = sorted({place[axis] for place in places})
      if len(taken) == 1:
        continue
      ring = len(taken) == side and side % self.wraps == 0
      stride = min(b - a for a, b in itertools.pairwise(taken))
      used += (2 if ring else 1) / stride
    return used or 6.0


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
  *("8x8x8", "8x8x16", "8x16x16"),
)


def _flat(name: str, memory: int, flops: float, hbm: float, ici: float) -> Chip:
  """A chip with links to the neighbours in a plane, rings from 16 chips on."""
  return Chip(name, 1, memory, flops, hbm, ici, 4, 16, _FLAT)


def _cube(
  name: str, devices: int, memory: int, flops: float, hbm: float, ici: float
) -> Chip:
  """A chip with links to the neighbours in space, rings from 4 chips on."""
  return Chip(name, devices, memory, flops, hbm, ici, 6, 4, _CUBES)


CHIPS = {
  chip.name: chip
  for chip in (
    _flat("v5e", int(15.75 * GIB), 197e12, 819e9, 400e9),
    _flat("v6e", int(31.24 * GIB), 918e12, 1_638e9, 800e9),
    _cube("v5p", 1, int(95.73 * GIB), 459e12, 2_765e9, 1_200e9),
    _cube("tpu7x", 2, int(94.74 * GIB), 2_307e12, 7_380e9, 1_200e9),
  )
}


@dataclasses.dataclass(frozen=True)
class Card:
  """One kind of GPU, or this machine's CPU."""

  name: str
  memory_bytes: int  # that a run may use
  bfloat16_flops: float | None  # stated peak FLOP/s; None where not known
  float32_flops: float | None
  bandwidth: float | None  # bytes/s between the card and its memory

  def flops(self, dtype: str) -> float | None:
    """Peak FLOP/s in the dtype of a run's activations."""
    return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops


GPU_FRACTION = 0.9


def _card(
  name: str, gb: int, bfloat16: float | None, float32: float, bandwidth: float
) -> Card:
  return Card(name, int(gb * 1e9 * GPU_FRACTION), bfloat16, float32, bandwidth)


CARDS = {
  card.name: card
  for card in (
    _card("t4", 16, None, 8.1e12, 320e9),  # Turing has no bfloat16
    _card("l4", 24, 121e12, 30.3e12, 300e9),
    _card("a100-40", 40, 312e12, 19.5e12, 1_555e9),
    _card("a100-80", 80, 312e12, 19.5e12, 2_039e9),
    _card("h100", 80, 989e12, 67e12, 3_350e9),
  )
}


# Start of JAX's device_kind -> stated dense bf16 peak FLOP/s of a device; fp16
# for a T4, which lacks bf16. Those of GPUs are from NVIDIA's data sheets,
# without sparsity, and of SXM boards: PCIe ones are slower.
_PEAKS = (
  ("TPU v5 lite", CHIPS["v5e"].flops),
  ("TPU v5e", CHIPS["v5e"].flops),
  ("TPU v5p", CHIPS["v5p"].flops),
  ("TPU v5", CHIPS["v5p"].flops),
  ("TPU v6 lite", CHIPS["v6e"].flops),
  ("TPU v6e", CHIPS["v6e"].flops),
  ("TPU7x", CHIPS["tpu7x"].flops),
  ("NVIDIA H200", CARDS["h100"].bfloat16_flops),
  ("NVIDIA H100 80GB HBM3", CARDS["h100"].bfloat16_flops),
  ("NVIDIA A100-SXM4", CARDS["a100-40"].bfloat16_flops),
  ("NVIDIA L4", CARDS["l4"].bfloat16_flops),
  ("Tesla T4", 65e12),
)


def peak_flops(device_kind: str) -> float | None:
  """Stated peak FLOP/s of a device by JAX's name of it; None if unknown."""
  for start, flops in _PEAKS:
    if device_kind == start or device_kind.startswith(
      (f"{start} ", f"{start}-")
    ):
      return flops
  return None


_UNITS = {"gib": 1 << 30, "mib": 1 << 20, "gb": 10**9, "mb": 10**6}


def card(topology: str) -> Card | None:
  """The card that a topology names; None where it names none.

  Args:
    topology: a key of CARDS, "a100" (of 40 GB, the smaller), "cpu" for this
      machine's available memory, or "cpu:16GiB" for another's.

  Raises:
    ValueError: a size of memory that cannot be read, or of this machine that
      is not known.
  """
  name, _, size = topology.lower().partition(":")
  if name == "a100" and not size:
    name = "a100-40"
  if name in CARDS and not size:
    return CARDS[name]
  if name != "cpu":
    return None
  found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|mib|gb|mb)", size)
  memory = available_memory()
  if size and not found:
    raise ValueError(
      f"The memory of --topology={topology} cannot be read; write a number and "
      "GiB, MiB, GB or MB, such as cpu:16GiB."
    )
  if found:
    memory = int(float(found[1]) * _UNITS[found[2]])
  if memory is None:
    raise ValueError(
      "This machine does not say how much memory it has available (no "
      "/proc/meminfo). Name it: --topology=cpu:16GiB."
    )
  return Card("cpu", memory, None, None, None)


def available_memory() -> int | None:
  """Bytes that this machine can give to a new process without swapping.

  None where the kernel does not say (no /proc/meminfo).
  """
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
  except OSError:
    return None
  for line in lines:
    name, _, value = line.partition(":")
    if name == "MemAvailable":
      return int(value.split()[0]) << 10  # "12345 kB"
  return None


def parse(topology: str) -> tuple[Chip, int]:
  """Returns the chip of a topology, and the number of devices JAX sees in it.

  Args:
    topology: `<chip>:<shape>`, e.g. "v5p:4x4x4".

  Raises:
    ValueError: an unknown chip or shape; lists the known ones.
  """
  name, _, shape = topology.partition(":")
  chip = CHIPS.get(name)
  if chip is None or shape not in chip.topologies:
    listed = "\n  ".join(
      f"{c.name}: " + " ".join(f"{c.name}:{s}" for s in c.topologies)
      for c in CHIPS.values()
    )
    raise ValueError(
      f"Unknown topology {topology!r}; it is a GPU ({', '.join(CARDS)}), cpu, "
      f"cpu:16GiB, or a TPU's <chip>:<shape>, which must be one of\n  {listed}"
    )
  count = chip.devices
  for side in shape.split("x"):
    count *= int(side)
  return chip, count


def devices(topology: str) -> list[Any]:
  """The devices of a topology that need not exist, for compilation.

  Raises:
    ValueError: see `parse`.
    RuntimeError: libtpu is not installed.
  """
  parse(topology)
  from jax.experimental import topologies

  sides = topology.partition(":")[2].split("x")
  # A host has four chips by default, more than a slice of one chip.
  options = {"chips_per_host_bounds": (1, 1, 1)} if set(sides) == {"1"} else {}
  try:
    described = topologies.get_topology_desc(
      topology, platform="tpu", **options
    )
    return list(described.devices)
  except RuntimeError as error:
    raise RuntimeError(
      f"Cannot describe {topology}: {error}. Compiling for a TPU needs libtpu "
      "(the extra tpu), TPU_SKIP_MDS_QUERY=1 and, next to another process "
      "that has it loaded, ALLOW_MULTIPLE_LIBTPU_LOAD=1."
    ) from error
