"""Which metrics depend on the clock, and so differ between equal runs.

Without these, a killed and resumed run writes the very lines of a straight
one.
"""

NAMES = ("step_time", "tokens_per_second")
_GROUPS = ("time/", "perf/")


def depends_on_clock(name: str) -> bool:
  """Whether a metric of this name measures time, speed or memory."""
  return name in NAMES or name.startswith(_GROUPS)
