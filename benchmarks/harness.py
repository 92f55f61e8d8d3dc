"""What every benchmark shares: the clock, the ceilings, the section it owns.

A script measures its candidates and its baseline in one process, then
replaces its own section of RESULTS.md; other sections stay as they are.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

RESULTS = pathlib.Path(__file__).resolve().parent / "RESULTS.md"


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """What this machine reaches on the two things that everything is made of."""

  flops: float  # FLOP/s of a large matmul, in the dtype asked for
  bandwidth: float  # bytes/s read and written by a large elementwise sum

  def floor(self, flops: float, nbytes: float) -> float:
    """The least seconds that the arithmetic and the traffic can take."""
    return max(flops / self.flops, nbytes / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Wall seconds of repeated calls: the middle one, and the fastest."""

  median: float
  best: float


def seconds(
  function: Callable[..., Any],
  *arguments: Any,
  repeats: int = 7,
  least: float = 0.5,
) -> Seconds:
  """Times a warm call, its result waited for, at least `least` seconds long."""
  jax.block_until_ready(function(*arguments))
  taken = []
  while len(taken) < repeats or sum(taken) < least:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    taken.append(time.perf_counter() - start)
  return Seconds(statistics.median(taken), min(taken))


def ceilings(dtype: jnp.dtype) -> Ceilings:
  """Measures matmul and bandwidth ceilings of the default device."""
  large = jax.default_backend() != "cpu"
  size, length = (8192, 1 << 28) if large else (1536, 1 << 25)
  x = jnp.ones((size, size), dtype)
  y = jnp.ones(length, jnp.float32)
  matmul = seconds(jax.jit(jnp.matmul), x, x)
  add = seconds(jax.jit(lambda y: y + 1.0), y)
  return Ceilings(2 * size**3 / matmul.best, 2 * y.nbytes / add.best)


def peak_mib() -> float:
  """The most memory this process has held, MiB; the device's where it tells."""
  stats = jax.devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"] / 2**20
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def hardware() -> str:
  """One line: the machine, the software, and how busy others keep it."""
  device = jax.devices()[0]
  return (
    f"{jax.device_count()} x {device.device_kind} ({device.platform}), "
    f"{os.cpu_count()} CPU cores, jax {jax.__version__}, jaxlib "
    f"{importlib.metadata.version('jaxlib')}, load {os.getloadavg()[0]:.1f}"
  )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A Markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(
    "| " + " | ".join(str(cell) for cell in line) + " |" for line in lines
  )


def write_section(name: str, body: str, path: pathlib.Path = RESULTS) -> None:
  """Replaces the section of that name, or appends it."""
  start, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
  section = f"{start}\n## {name}\n\n{body.strip()}\n{end}"
  text = path.read_text() if path.exists() else "# Measured\n"
  if start in text:
    before, rest = text.split(start, 1)
    text = before + section + rest.split(end, 1)[1]
  else:
    text = f"{text.rstrip()}\n\n{section}\n"
  path.write_text(text)
