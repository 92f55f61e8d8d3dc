"""OPERA's rewards from log-probabilities, against a direct implementation of
the definition."""

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.rewards import opera_requests, opera_reward, smoothing
from opera_jax.sharding import compile_log

LENGTH = 40
TOKENS = 6


def _case(seed, rows=8, steps=6):
  """Random thoughts, one in four truncated, and a table of log-probabilities.

  Entry [r, p] of the table stands for the log-probabilities of the reference
  after p tokens of completion r.
  """
  generator = np.random.default_rng(seed)
  closed = np.arange(rows) % 4 != 3
  count = np.where(closed, generator.integers(1, steps + 1, rows), 0)
  step_end = np.zeros((rows, steps), np.int32)
  for r in range(rows):
    ends = generator.choice(np.arange(3, LENGTH), count[r], replace=False)
    step_end[r, : count[r]] = np.sort(ends)
  real = np.arange(steps) < count[:, None]
  thoughts = structs.Thoughts(
    closed=closed,
    start=np.where(closed, 2, 0),
    end=step_end.max(1),
    count=count,
    step_end=step_end,
    reflective=real & (generator.random((rows, steps)) < 0.6),
  )
  table = -generator.uniform(0.1, 3, (rows, LENGTH + 1, TOKENS))
  return thoughts, table.astype(np.float32)


def _scored(thoughts, table, **settings):
  rows = len(table)
  continuations, index = opera_requests.plan(
    thoughts,
    np.full(rows, 5),
    np.full(rows, LENGTH),
    [np.arange(TOKENS)] * rows,
    **settings,
  )
  return [table[b.prefix, b.fork - 5] for b in continuations], index


def _slow(thoughts, table, samples, alpha=0.3, tau=2.0):
  logprob = table.mean(-1, dtype=np.float64)
  counts = []
  for r in range(len(table)):
    ends = [2, *thoughts.step_end[r, : thoughts.count[r]]]
    counts.append(
      sum(
        bool(thoughts.reflective[r, j - 1])
        and logprob[r, ends[j]] > logprob[r, ends[j - 1]]
        for j in range(1, len(ends))
      )
    )
  counts = np.reshape(counts, (-1, samples))
  last = logprob[:, LENGTH].reshape(-1, samples)
  rank = np.zeros(last.shape)
  for b, i in np.ndindex(last.shape):
    others = np.delete(last[b], i)
    rank[b, i] = np.sum(others < last[b, i]) / (samples - 1)
  r_self = np.tanh(counts / tau)
  return {
    "count": counts,
    "score": last,
    "r_self": r_self,
    "r_ppl": rank,
    "total": alpha * rank + (1 - alpha) * r_self,
  }


@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rewards_are_the_definition(seed, all_steps):
  thoughts, table = _case(seed)
  logprobs, index = _scored(thoughts, table, all_steps=all_steps)
  terms = opera_reward.rewards(logprobs, index, samples=4)
  want = _slow(thoughts, table, 4)
  assert terms.keys() == want.keys()
  for name, value in terms.items():
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, want[name], atol=1e-5, err_msg=name)


def test_alpha_tau_and_modes():
  thoughts, table = _case(0)
  logprobs, index = _scored(thoughts, table)

  def total(**settings):
    return opera_reward.rewards(logprobs, index, samples=4, **settings)

  want = _slow(thoughts, table, 4, alpha=0.8, tau=0.5)
  got = total(alpha=0.8, tau=0.5)
  np.testing.assert_allclose(got["total"], want["total"], atol=1e-5)
  want = _slow(thoughts, table, 4)
  np.testing.assert_allclose(
    total(mode="r_self")["total"], want["r_self"], atol=1e-6
  )
  np.testing.assert_allclose(
    total(mode="r_ppl")["total"], want["r_ppl"], atol=1e-6
  )
  best = total(mode="one_hot")["r_ppl"]
  np.testing.assert_array_equal(
    best, want["score"] == want["score"].max(1, keepdims=True)
  )


def test_the_tanh_table():
  """0, 1, 2, 3, 4 improving reflections at tau = 2."""
  rows = 5
  count = np.full(rows, 4)
  thoughts = structs.Thoughts(
    closed=np.ones(rows, bool),
    start=np.full(rows, 2),
    end=np.full(rows, 10),
    count=count,
    step_end=np.tile([4, 6, 8, 10], (rows, 1)),
    reflective=np.arange(4) < np.arange(rows)[:, None],
  )
  table = np.zeros((rows, LENGTH + 1, TOKENS), np.float32)
  table += np.linspace(-3, -1, LENGTH + 1, dtype=np.float32)[None, :, None]
  terms = opera_reward.rewards(*_scored(thoughts, table), samples=rows)
  np.testing.assert_array_equal(terms["count"], [[0, 1, 2, 3, 4]])
  np.testing.assert_allclose(
    terms["r_self"], [[0, 0.462, 0.762, 0.905, 0.964]], atol=5e-4
  )


def test_no_gain_without_a_rise():
  """Equal log-probabilities do not count: the rise is strict."""
  thoughts, table = _case(1)
  flat = np.zeros_like(table) - 1
  terms = opera_reward.rewards(*_scored(thoughts, flat), samples=4)
  np.testing.assert_array_equal(terms["count"], 0)


def test_ties_share_the_lower_rank():
  thoughts, table = _case(2, rows=4)
  table[:, LENGTH] = np.asarray([-1.0, -2.0, -1.0, -3.0])[:, None]
  terms = opera_reward.rewards(*_scored(thoughts, table), samples=4)
  np.testing.assert_allclose(terms["r_ppl"], [[2 / 3, 1 / 3, 2 / 3, 0]])
  terms = opera_reward.rewards(
    *_scored(thoughts, table), samples=4, mode="one_hot"
  )
  np.testing.assert_array_equal(terms["r_ppl"], 0)


def test_truncated_samples_have_no_r_self():
  thoughts, table = _case(0)
  terms = opera_reward.rewards(*_scored(thoughts, table), samples=4)
  np.testing.assert_array_equal(terms["r_self"][:, 3], 0)
  assert terms["r_self"][:, :3].any()


def test_the_released_smoothing_cannot_change_a_reward():
  thoughts, table = _case(3)
  plain, index = _scored(thoughts, table)
  ema = smoothing.update_ema(-2.0, table.mean(-1)[:, LENGTH])
  assert ema == pytest.approx(-1.8 + 0.1 * table.mean(-1)[:, LENGTH].mean())
  smooth = [smoothing.smoothed(logprob, ema) for logprob in plain]
  want = opera_reward.rewards(plain, index, samples=4)
  got = opera_reward.rewards(smooth, index, samples=4)
  for name in ("total", "r_ppl", "r_self", "count"):
    np.testing.assert_array_equal(got[name], want[name])
  assert smoothing.update_ema(None, np.asarray([-1.0, -3.0])) == -2.0


def test_step_deltas_are_differences_of_neighbours():
  thoughts, table = _case(1)
  logprob = table.mean(-1)
  for all_steps in (False, True):
    delta = opera_reward.step_deltas(
      *_scored(thoughts, table, all_steps=all_steps)
    )
    for r, j in np.ndindex(delta.shape):
      real = j < thoughts.count[r]
      if not real or not (all_steps or thoughts.reflective[r, j]):
        assert np.isnan(delta[r, j])
        continue
      ends = [2, *thoughts.step_end[r]]
      want = logprob[r, ends[j + 1]] - logprob[r, ends[j]]
      np.testing.assert_allclose(delta[r, j], want, atol=1e-6)


def test_bad_input_is_refused():
  thoughts, table = _case(0)
  logprobs, index = _scored(thoughts, table)
  with pytest.raises(ValueError, match="got 8 completions in"):
    opera_reward.rewards(logprobs, index, samples=1)
  with pytest.raises(ValueError, match="Unknown reward mode 'best'"):
    opera_reward.rewards(logprobs, index, samples=4, mode="best")
  with pytest.raises(ValueError, match="0 <= alpha <= 1"):
    opera_reward.rewards(logprobs, index, samples=4, alpha=1.5)
  with pytest.raises(ValueError, match="scores of 1 continuations"):
    opera_reward.rewards(logprobs[:1], index, samples=4)
  logprobs[2] = np.asarray([-1.0, np.nan])
  with pytest.raises(ValueError, match=r"2 \(completion .*\) holds nan"):
    opera_reward.rewards(logprobs, index, samples=4)


def test_the_arithmetic_is_two_programs_of_few_shapes():
  spans = compile_log.spans()

  def compiled(rows, seed):
    continuations, index = _scored(*_case(seed, rows))
    before = len(spans)
    opera_reward.rewards(continuations, index, samples=2, tau=1.75)
    return compile_log.programs(spans[before:])

  assert compiled(40, 0) <= 2
  # More completions, up to the next power of two, compile nothing.
  assert compiled(44, 1) == compiled(64, 2) == 0
