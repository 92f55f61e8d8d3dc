"""Dynamic sampling keeps exactly the groups with spread, within its bound."""

import jax
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.rl import rollouts, score


class _Engine:
  """Three tokens a sample."""

  def sample(self, params, prompts, settings, key, *, samples, ids, advance):
    tokens = np.arange(3, dtype=np.int32)
    return [
      [structs.Sample(tokens, np.zeros(3, np.float32), True)] * samples
      for _ in prompts
    ]


class _Scorer:
  """Spread where the prompt's id says so."""

  def score(self, params, prompts, ids, groups, *, advance):
    reward = np.asarray(
      [[0.0, 1.0] if "s" in p.id else [0.5, 0.5] for p in prompts], np.float32
    )
    rows = 2 * len(prompts)
    thoughts = structs.Thoughts(
      *(np.full((rows, *s), rows) for s in ((), (), (), (), (4,), (4,)))
    )
    flat = [s for g in groups for s in g]
    names = [f"{p.id}.{n}" for p in prompts for n in range(2)]
    return score.Scored(
      total_BN=reward,
      terms={
        "r": reward * 2,
        "right": np.asarray(
          [[0.0, 1.0] if "r" in p.id else [0.0, 0.0] for p in prompts],
          np.float32,
        ),
      },
      prefixes=names,
      logprobs=structs.Logprobs(names, names, [], [], 10, 1),
      thoughts=thoughts,
      deltas_RJ=np.zeros((rows, 4)),
      open_ended_B=np.ones(len(prompts), bool),
      separate_tokens=5,
      rollouts=structs.Rollouts(
        prompts=list(prompts),
        samples=2,
        prompt_ids=list(ids),
        completions=flat,
        texts=names,
        thoughts=thoughts,
        encode=None,
        chat_prompt=None,
      ),
    )


def _collect(*batches, **settings):
  prompts = [
    (
      [structs.Prompt(i, "math", i, "1") for i in draw.split()],
      [np.zeros(2, np.int32)] * len(draw.split()),
    )
    for draw in batches
  ]
  return rollouts.collect(
    _Engine(),
    _Scorer(),
    prompts,
    params=None,
    rollout_params=None,
    settings=None,
    key=jax.random.key(0),
    samples=2,
    **settings,
  )


def _names(got):
  return [p.id for p in got.scored.rollouts.prompts]


def test_one_draw_is_taken_as_it_is():
  got = _collect("a s1 b")
  assert _names(got) == ["a", "s1", "b"]
  assert got.batches == 1 and got.sampled_tokens == 18
  assert got.unused == []


def test_groups_without_spread_are_drawn_anew():
  got = _collect("a s1 b", "s2 c s3", "s4 s5 s6")
  assert _names(got) == ["s1", "s2", "s3"]
  assert got.batches == 2 and got.sampled_tokens == 36
  assert (np.ptp(got.scored.total_BN, axis=1) > 0).all()
  # Every record follows its group.
  assert got.scored.prefixes == ["s1.0", "s1.1", "s2.0", "s2.1", "s3.0", "s3.1"]
  assert got.scored.rollouts.texts == got.scored.prefixes
  np.testing.assert_array_equal(got.scored.terms["r"], 2 * got.scored.total_BN)
  assert got.scored.logprobs.prefix_tokens == 20
  assert got.scored.thoughts.step_end.shape == (6, 4)


def test_no_more_than_asked_for_is_kept():
  got = _collect("s1 b c", "s2 s3 s4")
  assert _names(got) == ["s1", "s2", "s3"]
  left = [[p.id for p in one.rollouts.prompts] for one in got.unused]
  assert left == [["b", "c"], ["s4"]]


def test_past_the_bound_the_rest_is_filled():
  got = _collect("a s1 b", "c d e")
  assert _names(got) == ["s1", "a", "b"]
  assert got.batches == 2
  assert len(got.samples) == 3
  left = [[p.id for p in one.rollouts.prompts] for one in got.unused]
  assert left == [["c", "d", "e"]]


@pytest.mark.parametrize("batches", [["s1 s2"], ["s1 s2", "a b"]])
def test_a_full_first_draw_ends_it(batches):
  got = _collect(*batches)
  assert _names(got) == ["s1", "s2"] and got.batches == 1


def test_the_named_reward_decides_and_not_the_shaped_sum():
  """DAPO: overlong shaping spreads a group in which every answer is wrong."""
  assert _names(_collect("s1 s2", "sr3 r4")) == ["s1", "s2"]
  got = _collect("s1 s2", "sr3 r4", filter_reward="right")
  assert _names(got) == ["sr3", "r4"] and got.batches == 2
  with pytest.raises(ValueError, match="filter_reward is 'wrong'.*'right'"):
    _collect("s1 s2", "s3 s4", filter_reward="wrong")


def test_no_prompt_is_taken_twice_unless_there_are_too_few():
  got = _collect("s1 a s2", "s1 s3 s2")
  assert _names(got) == ["s1", "s2", "s3"]
  got = _collect("s1 a b", "s1 s1 s1")
  assert _names(got) == ["s1", "a", "b"]
  got = _collect("s1 s2 a", "s1 s2 s1")
  assert _names(got) == ["s1", "s2", "a"]
