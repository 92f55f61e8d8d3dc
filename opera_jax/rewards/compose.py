"""Builds rewards by name, and sums them with weights.

A reward is one file of this package with a frozen dataclass `Reward`. The
fields are its settings; it has two pure methods:

    logprob_request(rollouts) -> structs.LogprobRequest
    rewards(rollouts, result) -> dict[str, array [B, N]]

The first returns what has to be scored. The second returns the reward as
"total", and further terms that are logged.

`config.reward.terms` names rewards and their weights, as in
"verifiable + 0.2*sar". A name with a colon is the import path of a user's
function, see `rewards.function`.

`config.reward.by_task` has sums of their own for kinds of tasks or data sets:
as in DeepSeek-R1 (arXiv 2501.12948), whose last stage rewards reasoning by
rules and other prompts by reward models.

Shape key: B prompts, N samples of a prompt.
"""

import dataclasses
import importlib
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax import structs, user_errors

# Of a reward: one number, or float32 [B, 1] where prompts have sums of their
# own.
Weight = float | np.ndarray
_TERM = re.compile(
  r"(?:([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*\*\s*)?"
  r"([A-Za-z_][\w.]*(?::\w+)?)"
)


def weights(text: str) -> dict[str, float]:
  """Parses "verifiable + 0.2*sar" to {"verifiable": 1.0, "sar": 0.2}.

  Raises:
    ValueError: a term that is not name, weight*name or weight*path:function;
      a weight that is not finite; a repeated name; or no term.
  """
  out: dict[str, float] = {}
  for term in text.split(" + "):
    match = _TERM.fullmatch(term.strip())
    if match is None or match[2] in out:
      raise ValueError(
        f"{term.strip()!r} in {text!r} is no term of a weighted sum, or comes "
        'twice. Write "name + 0.5*other", with spaces around the plus.'
      )
    weight = float(match[1] or 1)
    if not abs(weight) <= np.finfo(np.float32).max:
      raise ValueError(
        f"{term.strip()!r} in {text!r} has a weight that float32 does not "
        "hold; weights are finite. Lower it."
      )
    out[match[2]] = weight
  return out


@dataclasses.dataclass(frozen=True)
class Sums:
  """The weighted sum of most prompts, and those of some tasks or data sets."""

  default: Mapping[str, float]
  by_task: Mapping[str, Mapping[str, float]]

  @classmethod
  def parse(cls, terms: str, by_task: Mapping[str, str]) -> "Sums":
    """Parses `config.reward.terms` and `config.reward.by_task`.

    Raises:
      ValueError: see `weights`; names the entry of `by_task`.
    """
    parsed = {}
    for task, text in by_task.items():
      try:
        parsed[task] = weights(text)
      except ValueError as error:
        raise ValueError(f"config.reward.by_task.{task}: {error}") from error
    return cls(weights(terms), parsed)

  def names(self) -> list[str]:
    """The rewards of all sums, each once."""
    every = (self.default, *self.by_task.values())
    return list(dict.fromkeys(name for one in every for name in one))

  def of(self, prompt: structs.Prompt) -> Mapping[str, float]:
    """The sum of a prompt: its data set's, else its task's, else the default;
    a reward that it does not name has weight 0."""
    for name in (prompt.set, prompt.task):
      if name in self.by_task:
        return self.by_task[name]
    return self.default

  def weights(self, prompts: Sequence[structs.Prompt]) -> dict[str, Weight]:
    """The weight of every reward, by name."""
    if not self.by_task:
      return dict(self.default)
    sums = [self.of(prompt) for prompt in prompts]
    return {
      name: np.asarray([[one.get(name, 0.0)] for one in sums], np.float32)
      for name in self.names()
    }


def files(package: str, record: str) -> list[str]:
  """The files of a package that define a class called `record`."""
  folder = pathlib.Path(importlib.import_module(package).__path__[0])
  return [
    path.stem
    for path in sorted(folder.glob("*.py"))
    if f"\nclass {record}:" in path.read_text("utf-8")
  ]


def build(
  name: str,
  settings: Mapping[str, Any],
  timeout: float,
  environment: Sequence[str] = (),
) -> Any:
  """Builds a reward: `opera_jax.rewards.NAME`, or a user's function.

  A user's function is loaded immediately, in the subprocess that will run it.

  Args:
    name: a file of this package, or "package.module:function".
    settings: fields of its `Reward`; the others keep their defaults.
    timeout: seconds that a user's function may take.
    environment: variables passed on to it although they look like keys.

  Raises:
    ValueError: no such reward, or a setting that it does not have.
  """
  if ":" in name:
    from opera_jax.rewards import function

    reward = function.Reward(name, timeout, tuple(environment))
    reward.process.start()
    return reward
  try:
    reward_class = importlib.import_module(f"opera_jax.rewards.{name}").Reward
  except (ModuleNotFoundError, AttributeError) as error:
    known = files("opera_jax.rewards", "Reward")
    raise ValueError(
      f"There is no reward {name!r}{user_errors.nearest(name, known)}. Name a "
      "file of opera_jax/rewards that has a Reward, or a function as "
      '"package.module:function".'
    ) from error
  try:
    return reward_class(**settings)
  except TypeError as error:
    raise ValueError(
      f"Reward {name!r} takes the settings "
      f"{sorted(reward_class.__dataclass_fields__)}, got {sorted(settings)}: "
      f"{error}."
    ) from error


def weighted_sum(
  rewards: Mapping[str, Mapping[str, np.ndarray]],
  weight: Mapping[str, Weight],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Computes `sum of weight * total`, and collects all terms by name.

  Args:
    rewards: by reward name its terms, [B, N] each; one of them is `total`.
    weight: by reward name, a number or [B, 1]; a reward with weight 0 is only
      logged.

  Returns:
    The sum, float32 [B, N], and the terms, float32 [B, N] each: a reward's
    total under the reward's name, its other terms under their own.

  Raises:
    ValueError: terms of different shapes, a value that is not finite, or two
      terms with the same name.
  """
  terms: dict[str, np.ndarray] = {}
  total_BN: Any = np.float32(0.0)
  shape = None
  for reward, own_terms in rewards.items():
    for term, value_BN in own_terms.items():
      name = reward if term == "total" else term
      shape = shape or value_BN.shape
      _check(name, value_BN, shape=shape, terms=terms)
      terms[name] = value_BN.astype(np.float32)
    total_BN = total_BN + np.float32(weight[reward]) * terms[reward]
  return total_BN, terms


def _check(
  name: str,
  value_BN: np.ndarray,
  *,
  shape: tuple[int, ...],
  terms: Mapping[str, np.ndarray],
) -> None:
  if name in terms:
    raise ValueError(f"Two rewards have a term {name!r}. Rename one.")
  if value_BN.shape != shape:
    raise ValueError(
      f"Reward term {name!r} has shape {value_BN.shape}, the others {shape}. "
      "Give one number a sample."
    )
  wrong = np.argwhere(~np.isfinite(value_BN))
  if wrong.size:
    prompt, sample = wrong[0]
    raise ValueError(
      f"Reward term {name!r} of prompt {prompt}, sample {sample} is "
      f"{value_BN[prompt, sample]}; rewards must be finite. Look at that "
      "sample's log-probabilities and reference."
    )
