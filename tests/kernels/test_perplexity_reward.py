"""The reward is the count of references made likelier, and a strict rank.

Shape key: R rows, M tokens of a row, S slots, B prompts, N samples a prompt.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from opera_jax.kernels.perplexity_reward import api, pallas_tpu, xla

IMPLEMENTATIONS = ["reference", "xla"]


def _inputs(R=5, M=37, S=7):
  rng = np.random.default_rng(0)
  logprob_RM = -rng.exponential(size=(R, M)).astype(np.float32)
  continuation_RM = rng.integers(-1, S - 1, size=(R, M)).astype(np.int32)
  continuation_RM[0] = -1
  previous_RS = rng.integers(-1, S + 1, size=(R, S)).astype(np.int32)
  return logprob_RM, continuation_RM, previous_RS


def _by_hand(logprob_RM, continuation_RM, previous_RS, tau):
  """The definition in Python floats, one token at a time."""
  R, S = previous_RS.shape
  mean_RS, gain_RS, count_R = np.zeros((R, S)), np.zeros((R, S)), np.zeros(R)
  for r in range(R):
    slots = [
      [float(x) for x, b in zip(logprob_RM[r], continuation_RM[r]) if b == s]
      for s in range(S)
    ]
    mean_RS[r] = [math.fsum(x) / len(x) if x else 0.0 for x in slots]
    for s, p in enumerate(previous_RS[r]):
      if 0 <= p < S and slots[s] and slots[p]:
        gain_RS[r, s] = mean_RS[r, s] - mean_RS[r, p]
    count_R[r] = sum(gain_RS[r] > 0)
  return mean_RS, gain_RS, count_R, np.tanh(count_R / tau)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reward_is_the_definition_token_by_token(implementation):
  arrays = _inputs()
  run = functools.partial(
    api.perplexity_reward, tau=1.5, implementation=implementation
  )
  got = jax.jit(run)(*arrays)
  want = _by_hand(*arrays, tau=1.5)
  assert want[2].max() > 1 and not got.mean_RS[0].any()
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  assert got.count_R.dtype == jnp.int32


def test_both_ways_to_add_up_agree():
  logprob_RM, continuation_RM, _ = map(jnp.asarray, _inputs(M=301))
  np.testing.assert_allclose(
    xla._scatter(logprob_RM, continuation_RM, 5),
    xla._reduce(logprob_RM, continuation_RM, 5),
    rtol=1e-6,
  )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_equal_or_empty_predecessor_is_no_gain(implementation):
  continuation_RM = jnp.asarray([[0, 0, 1, 1, 2, 3, -1, -1]])
  logprob_RM = jnp.asarray([[-1, -3, -2, -2, -1, -1.5, 9.0, 9.0]])
  previous_RS = jnp.asarray([[-1, 0, 1, 4, 2]])
  got = api.perplexity_reward(
    logprob_RM, continuation_RM, previous_RS, implementation=implementation
  )
  np.testing.assert_allclose(got.mean_RS, [[-2, -2, -1, -1.5, 0]])
  np.testing.assert_allclose(got.gain_RS, [[0, 0, 1, 0, 0]])
  np.testing.assert_allclose(got.r_self_R, [0.4621172], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_share_the_lower_rank(implementation):
  score_BN = jnp.asarray(
    [[3.0, 1.0, 3.0, 2.0, -jnp.inf], [0.0, 1.0, jnp.nan, 1.0, 1.0]]
  )
  got = api.group_rank(score_BN, implementation=implementation)
  np.testing.assert_allclose(
    got, [[0.75, 0.25, 0.75, 0.5, 0.0], [0.0, 0.25, 0.0, 0.25, 0.25]]
  )


def test_ranks_count_the_beaten():
  score_BN = np.random.default_rng(0).integers(9, size=(6, 16)) / 7.0
  want = (score_BN[:, None] < score_BN[:, :, None]).sum(-1) / 15
  got = jax.jit(api.group_rank)(jnp.asarray(score_BN, jnp.float32))
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_tpu_kernels_equal_the_definition(interpreted, monkeypatch):
  monkeypatch.setattr(pallas_tpu, "BLOCK_TOKENS", 16)
  monkeypatch.setattr(pallas_tpu, "BLOCK_ROWS", 4)
  arrays = _inputs()
  want = _by_hand(*arrays, tau=1.5)
  for beyond_the_end in ("nan", "zero"):  # zero is a slot
    params = pltpu.InterpretParams(uninitialized_memory=beyond_the_end)
    with pltpu.force_tpu_interpret_mode(params):
      got = api.perplexity_reward(
        *map(jnp.asarray, arrays), tau=1.5, implementation="pallas_tpu"
      )
    for x, y in zip(got, want, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  score_BN = jnp.asarray(
    [[3.0, 1.0, 3.0, 2.0, -jnp.inf], [0, 1, jnp.nan, 1, 1]]
  )
  rank_BN = api.group_rank(score_BN, implementation="pallas_tpu")
  np.testing.assert_array_equal(rank_BN, api.group_rank(score_BN))


def test_no_gradient_passes():
  logprob_RM, continuation_RM, previous_RS = _inputs()

  def total(logprob_RM):
    reward = api.perplexity_reward(logprob_RM, continuation_RM, previous_RS)
    ranks = api.group_rank(reward.mean_RS)
    return jnp.sum(reward.mean_RS) + jnp.sum(reward.r_self_R) + jnp.sum(ranks)

  assert not jax.grad(total)(jnp.asarray(logprob_RM)).any()


@pytest.mark.parametrize(
  "change,message",
  [
    ({"tau": 0.0}, "above 0, got 0.0"),
    ({"continuation_RM": jnp.zeros((5, 37))}, "continuation of float32"),
    ({"continuation_RM": jnp.zeros((5, 36), jnp.int32)}, r"\(5, 36\)"),
    ({"previous_RS": jnp.zeros((4, 7), jnp.int32)}, r"5 rows, got \(4, 7\)"),
    ({"implementation": "numpy"}, "got 'numpy'"),
  ],
)
def test_bad_input_names_the_value(change, message):
  names = ("logprob_RM", "continuation_RM", "previous_RS")
  given = dict(zip(names, map(jnp.asarray, _inputs())))
  with pytest.raises(ValueError, match=message):
    api.perplexity_reward(**(given | change))


def test_a_group_of_one_has_no_rank():
  with pytest.raises(ValueError, match="at least 2 samples a prompt, got 1"):
    api.group_rank(jnp.zeros((3, 1)))
