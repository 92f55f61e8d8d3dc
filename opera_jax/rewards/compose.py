"""One reward a sample, chosen by the task of its prompt.

Shape key: B prompts, N samples a prompt, O open-ended prompts, V maths
prompts, O + V = B.
"""

from collections.abc import Mapping, Sequence

import numpy as np

OPEN_ENDED, MATH = "open_ended", "math"
TASKS = (OPEN_ENDED, MATH)


def compose(
  tasks: Sequence[str],
  *,
  open_ended: Mapping[str, np.ndarray] | None = None,
  correct_VN: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Open-ended prompts get OPERA's total, maths prompts get 0 or 1.

  Args:
    tasks: "open_ended" or "math" for each of the B prompts.
    open_ended: float32 [O, N] parts of the open-ended prompts in their order,
      `total` among them; None if there are none.
    correct_VN: bool or 0/1, of the maths prompts in their order; None if
      there are none.

  Returns:
    The total, float32 [B, N], and the parts, float32 [B, N] each: those of
    `open_ended` without `total`, 0 for maths prompts, and `correct`, 0 for
    open-ended prompts.

  Raises:
    ValueError: an unknown task, parts whose prompts do not match the tasks,
      or a value that is not finite.
  """
  unknown = sorted(set(tasks) - set(TASKS))
  if unknown:
    raise ValueError(
      f"Unknown task {unknown[0]!r} at prompt "
      f"{list(tasks).index(unknown[0])}. Use one of {TASKS}."
    )
  open_B = np.asarray([task == OPEN_ENDED for task in tasks])
  given = dict(open_ended or {})
  if "total" not in given and open_B.any():
    raise ValueError(
      f"{open_B.sum()} prompts are open-ended and no `total` was given for "
      "them. Pass the parts of rewards.opera."
    )
  if correct_VN is None and not open_B.all():
    raise ValueError(
      f"{(~open_B).sum()} prompts are maths and correct_VN is None. Pass 0 "
      "or 1 for each of their samples."
    )
  samples = (given["total"] if given else correct_VN).shape[1]
  parts = {
    name: _scattered(name, part_ON, open_B, samples)
    for name, part_ON in given.items()
  }
  nothing_VN = np.zeros((0, samples))
  parts["correct"] = _scattered(
    "correct",
    nothing_VN if correct_VN is None else correct_VN,
    ~open_B,
    samples,
  )
  total_BN = parts.pop("total", 0.0) + parts["correct"]
  return total_BN, parts


def _scattered(
  name: str, part_ON: np.ndarray, mine_B: np.ndarray, samples: int
) -> np.ndarray:
  """A part put at its prompts, 0 elsewhere, float32 [B, N]."""
  if part_ON.shape != (mine_B.sum(), samples):
    raise ValueError(
      f"Reward part {name!r} has shape {part_ON.shape}; the tasks name "
      f"{mine_B.sum()} such prompts, with {samples} samples each."
    )
  full_BN = np.zeros((len(mine_B), samples), np.float32)
  full_BN[mine_B] = part_ON
  wrong = np.argwhere(~np.isfinite(full_BN))
  if wrong.size:
    prompt, sample = wrong[0]
    raise ValueError(
      f"Reward part {name!r} of prompt {prompt}, sample {sample} is "
      f"{full_BN[prompt, sample]}; rewards must be finite. Look at that "
      "sample's log-probabilities and reference."
    )
  return full_BN
