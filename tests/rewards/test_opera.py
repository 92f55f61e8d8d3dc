"""OPERA as a reward of a run: open-ended prompts only."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.rewards import opera


def test_without_the_keyword_condition_every_step_counts(rollouts):
  thoughts = structs.Thoughts(
    closed=np.asarray([True, False]),
    start=np.asarray([1, 0]),
    end=np.asarray([9, 0]),
    count=np.asarray([2, 0]),
    step_end=np.asarray([[5, 9], [0, 0]]),
    reflective=np.zeros((2, 2), bool),
  )
  tasks = [structs.Prompt("a", "open_ended", "q", "ref")]
  case = dataclasses.replace(
    rollouts([["x" * 30, "y" * 30]], tasks), thoughts=thoughts
  )
  plain = opera.Reward().logprob_request(case)
  every = opera.Reward(every_step=True).logprob_request(case)
  assert [b.fork for b in plain.continuations] == [31, 31]
  assert [b.fork for b in every.continuations] == [2, 6, 10, 31, 31]
  logprob = [np.full(3, v) for v in (-3.0, -2.0, -1.0, -1.0, -2.0)]
  result = structs.LogprobResult(
    [], [], continuation_logprob=logprob, aux=every.aux
  )
  got = opera.Reward(every_step=True).rewards(case, result)
  np.testing.assert_array_equal(got["count"], [[2, 0]])


def test_maths_prompts_ask_nothing_and_get_zero(rollouts):
  case = rollouts([["4", "5"]])
  asked = opera.Reward().logprob_request(case)
  assert not asked.continuations
  got = opera.Reward().rewards(case, structs.LogprobResult([], []))
  np.testing.assert_array_equal(got["total"], [[0, 0]])
