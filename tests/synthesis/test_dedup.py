"""Repetitions are found, and nothing else is: against every pair compared."""

import random
import warnings

import growth
import pytest

from opera_jax import structs
from opera_jax.synthesis import dedup

VOCABULARY = [f"word{i}" for i in range(400)]


def _prompts(texts):
  return [
    structs.Prompt(str(i), "open_ended", text, "")
    for i, text in enumerate(texts)
  ]


def _index(a, b, n):
  """The Jaccard index of word n-grams, written again."""
  a, b = a.lower().split(), b.lower().split()
  a = {tuple(a[i : i + n]) for i in range(len(a) - n + 1)}
  b = {tuple(b[i : i + n]) for i in range(len(b) - n + 1)}
  return len(a & b) / len(a | b)


def test_exact_and_near():
  long = (
    "Write a letter to an old friend who has moved away to the sea last year"
  )
  texts = [
    long,
    "Something else altogether",
    long.upper().replace(" ", "  "),
    long + " again",
    "Something else altogether again",
  ]
  found = dedup.repeats(_prompts(texts), threshold=0.8)
  assert found == [None, None, ("exact", "0"), ("near", "0"), None]
  found = dedup.repeats(_prompts(texts), threshold=0.0)
  assert found == [None, None, ("exact", "0"), None, None]


def test_other_numbers_are_no_duplicate():
  text = "Ann has {} apples and gives {} of them to Ben; how many are left?"
  texts = [text.format(i, i // 2) for i in range(4, 40)]
  assert not any(dedup.repeats(_prompts(texts), threshold=0.8))


def test_against_all_pairs():
  rng = random.Random(0)
  texts = []
  for _ in range(60):
    own = rng.choices(VOCABULARY, k=60)
    texts.append(" ".join(own))
    for changes in (1, 2, 3, 5, 9, 20):
      other = list(own)
      for place in rng.sample(range(60), changes):
        other[place] = rng.choice(VOCABULARY)
      texts.append(" ".join(other))
  kept, expected = [], []
  for i, text in enumerate(texts):
    best = max(((_index(text, texts[j], 3), j) for j in kept), default=(0, 0))
    if best[0] >= 0.8:
      expected.append(i)
    else:
      kept.append(i)
  found = dedup.repeats(_prompts(texts), threshold=0.8)
  dropped = [i for i, one in enumerate(found) if one]
  assert len(expected) > 100
  # Hashing may miss pairs near the threshold; it has no false positives.
  for i in dropped:
    assert _index(texts[i], texts[int(found[i][1])], 3) >= 0.8
  assert len(set(expected) - set(dropped)) <= 0.05 * len(expected)


@pytest.mark.parametrize("changes", [{"threshold": 1.5}, {"ngram": 0}])
def test_bad_settings(changes):
  with pytest.raises(ValueError, match="Change config.pool"):
    dedup.repeats([], **({"threshold": 0.8} | changes))


def _template(count):
  """Prompts that share much and are no near duplicates of one another."""
  rng = random.Random(0)
  base = rng.choices(VOCABULARY, k=60)
  texts = []
  for _ in range(count):
    own = list(base)
    for place in rng.sample(range(60), 3):
      own[place] = f"name{rng.randrange(10**6)}"
    texts.append(" ".join(own))
  return _prompts(texts)


def test_similar_prompts_take_linear_time():
  def call(prompts):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      dedup.repeats(prompts, threshold=0.8)

  assert growth.twice_doubled(call, _template, 200) < growth.LINEAR


def test_skipped_comparisons_are_counted():
  with pytest.warns(RuntimeWarning, match=r"\d+ of 400 prompts share much"):
    dedup.repeats(_template(400), threshold=0.8)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    dedup.repeats(_template(40), threshold=0.8)


def test_clusters_are_connected_components():
  """A split by `repeats` would part b from c, which is near to b alone."""
  text = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
  ]

  def prompt(i, words):
    return structs.Prompt(str(i), "open_ended", " ".join(words), "r")

  made = [
    prompt(0, text),
    prompt(1, [*text[2:], "x1", "x2"]),
    prompt(2, [*text[4:], "x1", "x2", "x3", "x4"]),
    prompt(3, [w.upper() for w in text]),
    prompt(
      4,
      [
        "a",
        "story",
        "about",
        "a",
        "cat",
        "and",
        "a",
        "dog",
        "on",
        "a",
        "hill",
        "far",
        "away",
      ],
    ),
  ]
  names = dedup.clusters(made, threshold=0.5)
  assert names[0] == names[1] == names[2] == names[3] != names[4]
  exact = dedup.clusters(made, threshold=0.0)
  assert exact[0] == exact[3] and len(set(exact)) == 4
  with pytest.raises(ValueError, match="config.data.near_duplicate"):
    dedup.clusters(made, threshold=1.5)
