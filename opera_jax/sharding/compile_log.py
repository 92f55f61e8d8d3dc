"""Logs every program that the process compiles: its name, and when.

JAX reports three phases of a program: "trace" (Python to a jaxpr), "lower" (to
StableHLO) and "compile" (XLA, or reading the persistent cache). Threads may
compile concurrently, so wall seconds are those of the union of the spans, not
their sum.
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
  """Returns the list of all spans since the first call, which registers a
  listener; the list keeps growing."""
  found: list[Span] = []

  def listen(
    event: str, start_time: float, end_time: float, **kwargs: str | int
  ) -> None:
    phase = PHASES.get(event)
    if phase is not None:
      name = str(kwargs.get("fun_name", ""))
      found.append(Span(_plain(name), phase, start_time, end_time))

  jax.monitoring.register_event_time_span_listener(listen)
  return found


def compiling() -> str:
  """The program that is being compiled now; "" if none is.

  That is the one that was lowered last, as long as no program has been compiled
  since.
  """
  for span in reversed(spans()):
    if span.phase == "compile":
      return ""
    if span.phase == "lower":
      return span.program
  return ""


def programs(logged: Iterable[Span]) -> int:
  """Number of programs that were compiled, or read from the persistent
  cache."""
  return sum(span.phase == "compile" for span in logged)


def wall_seconds(logged: Iterable[Span]) -> float:
  """Seconds during which at least one span was active."""
  total, until = 0.0, float("-inf")
  for span in sorted(logged, key=lambda span: span.start):
    total += max(0.0, span.end - max(span.start, until))
    until = max(until, span.end)
  return total


def by_program(logged: Iterable[Span]) -> list[tuple[str, int, float]]:
  """(name, times compiled, seconds of all phases), the slowest first."""
  count: dict[str, int] = {}
  seconds: dict[str, float] = {}
  for span in logged:
    seconds[span.program] = seconds.get(span.program, 0.0) + span.seconds
    count[span.program] = count.get(span.program, 0) + (span.phase == "compile")
  names = sorted(seconds, key=lambda name: -seconds[name])
  return [(name, count[name], seconds[name]) for name in names]


def between(logged: Sequence[Span], start: float, end: float) -> list[Span]:
  """The spans that began in [start, end)."""
  return [span for span in logged if start <= span.start < end]


def _plain(name: str) -> str:
  """Strips `jit(...)`: `jit(update)` becomes `update`."""
  inside = name.removeprefix("jit(")
  return inside.removesuffix(")") if inside != name else name
