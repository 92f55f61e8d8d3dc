"""TPU chips and slices: memory, and stated peak performance.

Peak FLOP/s and bandwidths are a chip's, from docs.cloud.google.com/tpu/docs
(pages v5e, v5p, v6e and tpu7x, "Peak compute per chip (bf16)", "HBM bandwidth",
"Bidirectional inter-chip interconnect bandwidth"). Memory is per device: the
limit that the out-of-memory message of libtpu's compiler (0.0.51) states.
"""

import dataclasses
import pathlib
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
  chip_ici: float  # bytes/s, both directions together
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
  def ici_bandwidth(self) -> float:
    """Bytes/s between a device and its neighbours."""
    return self.chip_ici / self.devices


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
  *("8x8x8", "8x8x16", "8x16x16"),
)
CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v5e", 1, int(15.75 * GIB), 197e12, 819e9, 400e9, _FLAT),
    Chip("v5p", 1, int(95.73 * GIB), 459e12, 2_765e9, 1_200e9, _CUBES),
    Chip("v6e", 1, int(31.24 * GIB), 918e12, 1_638e9, 800e9, _FLAT),
    Chip("tpu7x", 2, int(94.74 * GIB), 2_307e12, 7_380e9, 1_200e9, _CUBES),
  )
}


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
      f"Unknown TPU topology {topology!r}; a topology is <chip>:<shape> and "
      f"must be one of\n  {listed}"
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
