"""One token from logits, against the distribution written out in numpy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from opera_jax.rollout import sampling
from opera_jax.text import tokenizer as tokenizer_lib

LOGITS = np.array([2.0, 1.0, 1.0, 0.0, -1.0, -3.0, 0.5, 1.5], np.float32)
V = len(LOGITS)
DRAWS = 20_000
# 99.9th percentile of chi-squared with 7 degrees of freedom.
BOUND = 24.4


def _sample(draws=DRAWS, sampled=None, logits=LOGITS, **settings):
  return sampling.sample(
    jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits))),
    jax.random.split(jax.random.key(0), draws),
    sampling.Sampling(max_new_tokens=9, **settings),
    None if sampled is None else jnp.full(draws, sampled, jnp.int32),
  )[:2]


@pytest.fixture(scope="module")
def small():
  return tokenizer_lib.Tokenizer.train_bpe(["some text"], 261)


def _softmax(x):
  return np.exp(x - np.logaddexp.reduce(x))


def _agree(tokens, want):
  seen = np.bincount(np.asarray(tokens), minlength=V)
  assert not seen[want == 0].any()
  kept = want > 0
  expected = DRAWS * want[kept]
  assert ((seen[kept] - expected) ** 2 / expected).sum() < BOUND


def test_min_p_keeps_what_is_likely_enough():
  p = _softmax(LOGITS)
  want = np.where(p >= 0.3 * p.max(), p, 0)
  tokens, logprob = _sample(min_p=0.3)
  _agree(tokens, want / want.sum())
  # The log-probability is the untruncated one.
  np.testing.assert_allclose(logprob, np.log(p)[np.asarray(tokens)], atol=1e-5)


def test_bias_and_bans_move_the_draw_and_not_the_score():
  changed = LOGITS.copy()
  changed[3] += 2.0
  changed[0] = -np.inf
  tokens, logprob = _sample(
    banned_ids=(0,), logit_bias=((3, 2.0),), temperature=0.7
  )
  _agree(tokens, _softmax(changed / 0.7))
  p = np.log(_softmax(LOGITS / 0.7))
  np.testing.assert_allclose(logprob, p[np.asarray(tokens)], atol=1e-5)


def test_no_stop_before_the_least_length():
  early, _ = _sample(sampled=1, stop_ids=(0, 7), min_new_tokens=3)
  assert not np.isin(early, [0, 7]).any()
  late, _ = _sample(sampled=2, stop_ids=(0, 7), min_new_tokens=3)
  _agree(late, _softmax(LOGITS))


def test_a_nucleus_keeps_ties_and_all_at_one():
  logits = np.array([1.0, 1.0, 0.0, 0.0], np.float32)
  kept = sampling.truncate(jnp.asarray(logits)[None], top_p=0.2)[0]
  np.testing.assert_array_equal(np.isfinite(kept), [True, True, False, False])
  all_kept = sampling.truncate(jnp.asarray(logits)[None], top_p=1.0)[0]
  np.testing.assert_array_equal(all_kept, logits)


@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_are_those_of_a_sort(ties):
  x = np.random.default_rng(0).normal(size=(5, 90)).astype(np.float32)
  x[3, 4:] = -np.inf
  if ties:
    x[2, 7:11] = x[2].max()
  for rows in (x, x[:3]):
    for count in (1, 7, 64, 70):
      got = sampling._top_k(jnp.asarray(rows), count)
      np.testing.assert_array_equal(got, -np.sort(-rows)[:, :count])


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_cold_is_greedy(temperature):
  tokens, _ = _sample(draws=50, temperature=temperature)
  assert set(np.asarray(tokens)) == {0}


def test_greedy_logprob_is_at_temperature_one():
  _, logprob = _sample(draws=2, temperature=0.0)
  np.testing.assert_allclose(logprob, np.log(_softmax(LOGITS))[0], atol=1e-5)


@pytest.mark.parametrize(
  "recent, period, want",
  [
    ([5, 6, 5, 6, 5, 6], 2, True),
    ([5, 6, 5, 6, 5, 6], 1, False),
    ([5, 5, 5, 5, 5, 5], 1, True),
    ([1, 2, 3, 1, 2, 3], 3, True),
    ([1, 2, 3, 1, 2, 4], 3, False),
    ([-1, -1, -1, -1, -1, -1], 3, False),
    ([-1, 5, 5, 5, 5, 5], 3, False),
  ],
)
def test_loops_are_seen_when_full(recent, period, want):
  assert bool(sampling.loops(jnp.asarray([recent]), period)[0]) == want


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"temperature": -1.0}, "temperature must be"),
    ({"top_k": -1}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"min_p": 1.5}, "min_p"),
    ({"min_new_tokens": 10}, "min_new_tokens"),
    ({"loop_period": 4, "loop_tokens": 7}, "loop_tokens"),
  ],
)
def test_bad_settings_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    sampling.Sampling(**{"max_new_tokens": 9} | changes)


@pytest.mark.parametrize(
  "changes",
  [{"stop_ids": (9,)}, {"banned_ids": (-1,)}, {"logit_bias": ((8, 1),)}],
)
def test_unknown_tokens_are_refused(changes):
  settings = sampling.Sampling(max_new_tokens=9, **changes)
  with pytest.raises(ValueError, match="token ids lie in"):
    settings.check(8)


def test_all_banned_is_refused():
  settings = sampling.Sampling(max_new_tokens=9, banned_ids=(0, 1))
  with pytest.raises(ValueError, match="leave at least one"):
    settings.check(2)


def test_draws_of_keys_places_and_tokens_are_independent():
  """Neither the next token nor the next key repeats or leans on this one."""
  V, keys, places = 64, 200, 40
  logits = jnp.zeros((keys, V))
  key_R = jax.random.split(jax.random.key(3), keys)
  settings = sampling.Sampling(max_new_tokens=places)

  @jax.jit
  def draw(place):
    num_sampled_R = jnp.full(keys, place)
    return sampling.sample(logits, key_R, settings, num_sampled_R)[0]

  sampled = np.stack([draw(place) for place in range(places)])
  for one, two in (
    (sampled[:-1], sampled[1:]),
    (sampled[:, :-1], sampled[:, 1:]),
    (sampled, np.zeros_like(sampled)),
  ):
    # Both halves of a pair, and their difference, are uniform over V.
    counts = np.bincount(((one - two) % V).ravel(), minlength=V)
    expected = one.size / V
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 103.4  # 99.9th percentile, 63 degrees of freedom


def test_rare_tokens_come_as_often_as_they_should():
  """A vocabulary of 100,000: the tail is sampled in proportion, to its end."""
  V, draws = 100_000, 4000
  logits = jnp.where(jnp.arange(V) < 10, 9.0, 0.0)

  @jax.jit
  def draw(keys):  # some at a time: all are gigabytes
    def one(key):
      return sampling.sample(
        logits[None], key[None], sampling.Sampling(max_new_tokens=1)
      )[0][0]

    return jax.lax.map(one, keys, batch_size=50)

  tokens = np.asarray(draw(jax.random.split(jax.random.key(1), draws)))
  share = 10 * np.exp(9.0) / (10 * np.exp(9.0) + V - 10)
  common = (tokens < 10).sum()
  assert abs(common - draws * share) < 4 * (draws * share * (1 - share)) ** 0.5
  tail = tokens[tokens >= 10]
  tenths = np.bincount(tail * 10 // V, minlength=10)
  expected = len(tail) / 10
  assert ((tenths - expected) ** 2 / expected).sum() < 27.9  # 9 degrees


def test_padding_of_the_head_is_never_sampled():
  """However likely: 151,669 to 151,935 of Qwen3's head are such rows."""
  logits = LOGITS.copy()
  logits[6:] = 30.0
  for temperature in (1.0, 0.0):
    tokens, _ = _sample(
      logits=logits, vocab_size=6, temperature=temperature, draws=2000
    )
    assert np.asarray(tokens).max() < 6
  inside = LOGITS.copy()
  inside[6:] = -np.inf
  tokens, _ = _sample(logits=logits, vocab_size=6)
  _agree(tokens, _softmax(inside))


def test_settings_of_a_tokenizer_end_and_ban_what_it_says(small):
  words = small.with_ends([7, 9])
  rows = words.vocab_size + 11
  made = sampling.for_tokenizer(
    sampling.Sampling(max_new_tokens=9, stop_ids=(3,), banned_ids=(5,)),
    words,
    rows,
  )
  assert made.stop_ids == (words.end_id, 7, 9, 3)
  assert made.vocab_size == words.vocab_size
  assert set(made.banned_ids) == {5, *words.unused_ids}
  made.check(rows)
  # A head without padding needs no mask.
  exact = sampling.for_tokenizer(made, words, words.vocab_size)
  assert exact.vocab_size == 0


def test_ids_that_no_token_has_are_unused(small):
  spec = json.loads(small.backend.to_str())
  spec["model"]["vocab"]["Qz"] = small.vocab_size + 2
  words = tokenizer_lib.Tokenizer(
    tokenizers.Tokenizer.from_str(json.dumps(spec))
  )
  assert words.vocab_size == small.vocab_size + 3
  holes = [
    i for i in range(words.vocab_size) if words.backend.id_to_token(i) is None
  ]
  assert len(holes) == 2 and words.unused_ids == tuple(holes)


@pytest.mark.parametrize(
  "settings",
  [
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"banned_ids": (0,)},
    {"logit_bias": ((3, 2.0),)},
    {"vocab_size": 6},
    {"top_k": 5, "top_p": 0.8, "temperature": 0.7},
  ],
)
def test_the_truncated_logprob_is_that_of_the_truncated_distribution(settings):
  """Its probabilities sum to 1 over the tokens that can be sampled."""
  made = sampling.Sampling(max_new_tokens=9, **settings)
  assert made.reshapes()
  tokens, own, sampled = (
    np.asarray(x)
    for x in sampling.sample(
      jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, V)),
      jax.random.split(jax.random.key(0), DRAWS),
      made,
    )
  )
  want = np.zeros(V)
  want[tokens] = np.exp(sampled)
  np.testing.assert_allclose(want.sum(), 1.0, atol=1e-5)
  _agree(tokens, want)
  if not made.logit_bias:  # all that can be sampled got likelier
    assert (sampled > own + 1e-3).all()


def test_without_truncation_there_is_one_score():
  made = sampling.Sampling(max_new_tokens=9, temperature=0.7)
  assert not made.reshapes()
  _, own, sampled = sampling.sample(
    jnp.asarray(LOGITS)[None], jax.random.split(jax.random.key(0), 1), made
  )
  assert own is sampled


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"vocab_size": 9}, "vocabulary has 9 ids"),
    ({"vocab_size": 6, "stop_ids": (6,)}, r"stop_ids holds \[6\]"),
    ({"banned_ids": (8,)}, r"banned_ids holds \[8\]"),
    ({"logit_bias": ((1, float("inf")),)}, "finite number"),
  ],
)
def test_ids_outside_are_refused(settings, said):
  with pytest.raises(ValueError, match=said):
    sampling.Sampling(max_new_tokens=9, **settings).check(8)
