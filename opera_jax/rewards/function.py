"""A user's own reward, named by its import path.

    config.reward.parts = "verifiable + 0.5*my_package.my_module:my_reward"

    def my_reward(prompts, completions, **columns) -> list[float]

Every argument is a list with one entry a sample: the prompt's text, the
completion's text, and the columns of the data set (with `id`, `task` and
`reference` among them).

A run of several processes calls it in each, with the samples of that process's
own prompts: groups are whole, and no sample is asked about twice.
"""

import dataclasses
import importlib
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing import pool
from typing import Any

import numpy as np

from opera_jax import structs


@dataclasses.dataclass(frozen=True)
class Reward:
  """Calls the function once a step.

  Attributes:
    path: "package.module:function".
    timeout: seconds that a call may take.
  """

  path: str
  timeout: float = 60.0

  def questions(self, rollouts: structs.Rollouts) -> structs.Questions:
    """Nothing is priced."""
    return structs.Questions()

  def rewards(
    self, rollouts: structs.Rollouts, answers: structs.Answers
  ) -> dict[str, np.ndarray]:
    """What the function says, float32 [B, N]; see `ask` for what it raises."""
    tasks = [
      rollouts.prompts[rollouts.owner(r)]
      for r in range(len(rollouts.completions))
    ]
    values_R = ask(self.path, tasks, rollouts.texts, self.timeout)
    shape = (len(rollouts.prompts), rollouts.samples)
    return {"total": values_R.reshape(shape)}


def ask(
  path: str,
  tasks: Sequence[structs.Prompt],
  texts: Sequence[str],
  timeout: float,
) -> np.ndarray:
  """What the function says of completions, float32 [R].

  Args:
    path: "package.module:function".
    tasks: the prompt of each completion.
    texts: the completions.
    timeout: seconds that the call may take.

  Raises:
    ValueError: it cannot be imported, or its answer is not one finite number
      a completion.
    TimeoutError: it took too long.
  """
  function = load(path)
  columns: dict[str, list[Any]] = {
    "id": [t.id for t in tasks],
    "task": [t.task for t in tasks],
    "reference": [t.reference for t in tasks],
  }
  for name in sorted({n for t in tasks for n in t.columns} - set(columns)):
    columns[name] = [t.columns.get(name) for t in tasks]
  numbers = _in_time(
    lambda: function([t.prompt for t in tasks], list(texts), **columns),
    path,
    timeout,
  )
  values_R = np.asarray(numbers, np.float32)
  if values_R.shape != (len(tasks),) or not np.isfinite(values_R).all():
    raise ValueError(
      f"Reward {path} must return {len(tasks)} finite numbers, one a "
      f"completion; got shape {values_R.shape}: {values_R[:8]}."
    )
  return values_R


def load(path: str) -> Callable[..., Any]:
  """The function at "package.module:function".

  Raises:
    ValueError: no such module or function.
  """
  module, _, name = path.partition(":")
  try:
    found = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f"The function {path!r} cannot be imported: {error}. Write "
      '"package.module:function", with the package on PYTHONPATH.'
    ) from error
  return found


def _in_time(call: Callable[[], Any], path: str, timeout: float) -> Any:
  """Runs `call` in a daemon thread; its own error is raised here."""
  with pool.ThreadPool(1) as threads:
    try:
      return threads.apply_async(call).get(timeout)
    except multiprocessing.TimeoutError:
      pass
  raise TimeoutError(
    f"Reward {path} took longer than {timeout} s for one step. Make it "
    "faster, or raise config.reward.timeout."
  )
