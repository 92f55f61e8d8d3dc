"""A pytest plugin: what each file of tests has compiled, worker by worker.

  python -m pytest -p benchmarks.compile_plugin ...

Every process that runs tests leaves a JSON file in the folder of the variable
OPERA_COMPILE_REPORT: by file of tests the seconds in which it compiled, and
how many programs. `benchmarks.time_to_first --tests` adds them up.
"""

import json
import os
import pathlib
from collections.abc import Iterator

import pytest

FOLDER = "OPERA_COMPILE_REPORT"
_files: dict[str, list[float]] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
  """Counts a test with its fixtures."""
  # JAX reads variables when it is imported; the tests' conftest sets them.
  from opera_jax.sharding import compile_log

  spans = compile_log.spans()
  before = len(spans)
  yield
  mine = spans[before:]
  file = _files.setdefault(item.nodeid.partition("::")[0], [0.0, 0])
  file[0] += compile_log.wall_seconds(mine)
  file[1] += compile_log.programs(mine)


def pytest_sessionfinish(session: pytest.Session) -> None:
  """Leaves the report of this process."""
  del session
  if _files:
    path = pathlib.Path(os.environ[FOLDER]) / f"{os.getpid()}.json"
    path.write_text(json.dumps(_files))
