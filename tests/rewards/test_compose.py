"""Each prompt is paid by its own task's reward."""

import numpy as np
import pytest

from opera_jax.rewards import compose

TASKS = ["open_ended", "math", "open_ended"]
OPEN = {
  "total": np.asarray([[0.1, 0.2], [0.3, 0.4]]),
  "r_ppl": np.asarray([[0.0, 1.0], [0.0, 1.0]]),
  "r_self": np.asarray([[0.5, 0.6], [0.7, 0.8]]),
}
CORRECT = np.asarray([[True, False]])


def test_rewards_go_to_their_prompts():
  total, parts = compose.compose(TASKS, open_ended=OPEN, correct_VN=CORRECT)
  assert total.dtype == np.float32
  np.testing.assert_allclose(total, [[0.1, 0.2], [1, 0], [0.3, 0.4]])
  np.testing.assert_allclose(parts["correct"], [[0, 0], [1, 0], [0, 0]])
  np.testing.assert_allclose(parts["r_ppl"], [[0, 1], [0, 0], [0, 1]])
  np.testing.assert_allclose(parts["r_self"][1], 0)
  assert "total" not in parts


def test_one_task_alone():
  total, parts = compose.compose(["math"], correct_VN=CORRECT)
  np.testing.assert_array_equal(total, [[1, 0]])
  assert set(parts) == {"correct"}
  total, parts = compose.compose(["open_ended"] * 2, open_ended=OPEN)
  np.testing.assert_allclose(total, OPEN["total"])
  np.testing.assert_array_equal(parts["correct"], 0)


def test_nan_names_its_sample():
  broken = OPEN | {"r_ppl": np.asarray([[0.0, 1.0], [0.0, np.nan]])}
  with pytest.raises(ValueError, match="'r_ppl' of prompt 2, sample 1 is nan"):
    compose.compose(TASKS, open_ended=broken, correct_VN=CORRECT)


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="Unknown task 'poem' at prompt 1"):
    compose.compose(["math", "poem"], correct_VN=CORRECT)
  with pytest.raises(ValueError, match="1 prompts are maths"):
    compose.compose(TASKS, open_ended=OPEN)
  with pytest.raises(ValueError, match="2 prompts are open-ended"):
    compose.compose(TASKS, correct_VN=CORRECT)
  with pytest.raises(ValueError, match="has shape"):
    compose.compose(TASKS + ["math"], open_ended=OPEN, correct_VN=CORRECT)
