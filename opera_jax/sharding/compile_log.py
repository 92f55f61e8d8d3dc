"""Every program that the process compiles: its name, and when.

JAX itself tells of three phases of a program: "trace" (Python to a jaxpr),
"lower" (to StableHLO) and "compile" (XLA, or reading the persistent cache).
Threads may compile at the same time, so wall seconds are those of the union of
the spans, and not their sum.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax

PHASES = {
  "/jax/core/compile/jaxpr_trace_duration": "trace",
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
  "/jax/core/compile/backend_compile_duration": "compile",
}


@dataclasses.dataclass(frozen=True)
class Span:
  """One phase of one program; times are those of `time.time()`."""

  program: str  # name of the jitted function
  phase: str  # a value of PHASES
  start: float
  end: float

  @property
  def seconds(self) -> float:
    """How long it took."""
    return self.end - self.start


@functools.cache
def spans() -> list[Span]:
  """All spans since the first call, which begins to listen; it grows."""
  heard: list[Span] = []

  def listen(
    event: str, start_time: float, end_time: float, **kwargs: str | int
  ) -> None:
    phase = PHASES.get(event)
    if phase is not None:
      name = str(kwargs.get("fun_name", ""))
      heard.append(Span(_plain(name), phase, start_time, end_time))

  jax.monitoring.register_event_time_span_listener(listen)
  return heard


def programs(some: Iterable[Span]) -> int:
  """How many programs were compiled, or read from the persistent cache."""
  return sum(span.phase == "compile" for span in some)


def wall_seconds(some: Iterable[Span]) -> float:
  """Seconds in which at least one span was under way."""
  total, until = 0.0, float("-inf")
  for span in sorted(some, key=lambda span: span.start):
    total += max(0.0, span.end - max(span.start, until))
    until = max(until, span.end)
  return total


def by_program(some: Iterable[Span]) -> list[tuple[str, int, float]]:
  """(name, times compiled, seconds of all phases), the dearest first."""
  count: dict[str, int] = {}
  seconds: dict[str, float] = {}
  for span in some:
    seconds[span.program] = seconds.get(span.program, 0.0) + span.seconds
    count[span.program] = count.get(span.program, 0) + (span.phase == "compile")
  names = sorted(seconds, key=lambda name: -seconds[name])
  return [(name, count[name], seconds[name]) for name in names]


def between(some: Sequence[Span], start: float, end: float) -> list[Span]:
  """The spans that began in [start, end)."""
  return [span for span in some if start <= span.start < end]


def _plain(name: str) -> str:
  """`jit(update)` is `update`."""
  inside = name.removeprefix("jit(")
  return inside.removesuffix(")") if inside != name else name
