"""A run ends when sampler and trainer differ for several steps in a row."""

import pytest

from opera_jax.rl import sampler_trainer


def test_only_steps_in_a_row_count():
  watch = sampler_trainer.Watch(0.1, 2)
  for step, delta in enumerate([0.2, 0.05, 0.3, 0.0]):
    watch.check(delta, step)
  watch.check(0.2, 4)
  with pytest.raises(
    FloatingPointError, match="Step 5.*0.3.*max_logprob_diff=0.1"
  ):
    watch.check(0.3, 5)


def test_no_bound_watches_nothing():
  watch = sampler_trainer.Watch(0.0, 1)
  watch.check(1e9, 1)


@pytest.mark.parametrize("bound, steps", [(-0.1, 3), (0.1, 0)])
def test_bad_bounds_are_refused(bound, steps):
  with pytest.raises(ValueError, match="max_logprob_diff"):
    sampler_trainer.Watch(bound, steps)
