"""Says which stage of how many a run is at, one line each."""

import pathlib
from collections.abc import Sequence

from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import runtime


class StageLines:
  """The lines of a run; process 0 prints them."""

  def __init__(self, workdir: pathlib.Path, stages: Sequence[str]):
    """Prints nothing yet.

    Args:
      workdir: folder of the run.
      stages: that will run, in order.
    """
    self._workdir, self._stages = workdir, list(stages)

  def begin(
    self, every: Sequence[str], *, devices: str, dtype: str, page: bool
  ) -> None:
    """Prints where the run is and what it computes on, and what it skips.

    Args:
      every: the stages that a run may have, in order.
      devices: such as "1 x cpu".
      dtype: of activations.
      page: whether the report will be written.
    """
    where = f"; the page will be {self._workdir / 'report.html'}"
    _say(f"run: {self._workdir}, on {devices}, {dtype}{where if page else ''}")
    skipped = [name for name in every if name not in self._stages]
    if skipped:
      _say(f"not in this run: {', '.join(skipped)}")

  def enter(self, name: str) -> None:
    """Prints that a stage starts, or that it was finished before."""
    number = self._stages.index(name) + 1
    done = workdir_lib.result(self._workdir, name)
    before = ", done before" if done else ""
    _say(f"stage {number} of {len(self._stages)}: {name}{before}")


def _say(line: str) -> None:
  if runtime.is_main_process():
    print(line, flush=True)
