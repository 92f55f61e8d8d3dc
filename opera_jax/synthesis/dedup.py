"""Prompts that say again what an earlier one said, found and named.

Exact: equal once case, width and spacing are out of the way. Near: the sets
of word n-grams overlap by at least a threshold (Jaccard index). MinHash with
locality-sensitive hashing proposes pairs; each is decided by the true index,
so no prompt is dropped that is not as near as the threshold says. Pairs are
proposed from 0.8 of the threshold on: at a threshold of 0.8 a pair right on it
is missed in 5 of 100 cases, a pair of index 0.85 in 1 of 100.

Where many prompts share much and are yet no duplicates (a template with other
names), each is compared with the `_MOST` likeliest of those proposed, so that
the time stays linear in the prompts. A warning counts them.
"""

import collections
import functools
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from opera_jax import structs
from opera_jax.text import words

_PERMUTATIONS = 128
_PROPOSED = 0.8  # of the threshold
_BATCH = 4096
_MOST = 64  # true indices taken for one prompt
_KEPT = 1024  # prompts whose n-grams are kept between two comparisons
_BUCKET = 128  # earlier prompts remembered under one hash


def repeats(
  prompts: Sequence[structs.Prompt],
  *,
  threshold: float,
  ngram: int = 3,
) -> list[tuple[str, str] | None]:
  """Which prompts repeat an earlier one that was kept.

  Args:
    prompts: in the order of preference, the first of equals is kept.
    threshold: Jaccard index in (0, 1] from which two are near; 0 looks for
      exact repetitions alone.
    ngram: words of an n-gram.

  Returns:
    For each prompt None, or ("exact" or "near", id of the prompt it repeats).

  Raises:
    ValueError: a threshold outside [0, 1], an n-gram of no word.
  """
  _check(threshold, ngram)
  found: list[tuple[str, str] | None] = []
  owner: dict[str, str] = {}
  for prompt in prompts:
    first = owner.setdefault(words.normal(prompt.prompt), prompt.id)
    found.append(None if first == prompt.id else ("exact", first))
  if threshold:
    left = [i for i, one in enumerate(found) if one is None]
    for place, twins in _near(prompts, left, threshold, ngram, chains=False):
      found[place] = ("near", prompts[twins[0]].id)
  return found


def clusters(
  prompts: Sequence[structs.Prompt], *, threshold: float, ngram: int = 3
) -> list[str]:
  """Names of groups that a split must keep together.

  Two prompts are in one group if they are near, or if a chain of near ones
  leads from one to the other.

  Args:
    prompts: any prompts.
    threshold: see `repeats`; 0 groups exact repetitions alone.
    ngram: words of an n-gram.

  Returns:
    For each prompt the normalised text of one of its group, the same for all
    of the group.

  Raises:
    ValueError: see `repeats`.
  """
  _check(threshold, ngram)
  normal = [words.normal(prompt.prompt) for prompt in prompts]
  first: dict[str, int] = {}
  root = [first.setdefault(text, place) for place, text in enumerate(normal)]

  def find(place: int) -> int:
    while root[place] != place:
      root[place] = root[root[place]]
      place = root[place]
    return place

  if threshold:
    left = list(first.values())
    for place, twins in _near(prompts, left, threshold, ngram, chains=True):
      for twin in twins:
        low, high = sorted((find(place), find(twin)))
        root[high] = low
  return [normal[find(place)] for place in range(len(prompts))]


def _check(threshold: float, ngram: int) -> None:
  if not 0 <= threshold <= 1 or ngram < 1:
    raise ValueError(
      f"Near duplicates need a threshold in [0, 1] and at least 1 word, got "
      f"near_duplicate={threshold}, ngram={ngram}. Change config.pool or "
      "config.data.near_duplicate."
    )


def _near(
  prompts: Sequence[structs.Prompt],
  places: Sequence[int],
  threshold: float,
  ngram: int,
  *,
  chains: bool,
) -> Iterator[tuple[int, list[int]]]:
  """Prompts that are near to earlier ones.

  Args:
    prompts: all of them.
    places: those to look at, in this order.
    threshold: Jaccard index.
    ngram: words of an n-gram.
    chains: whether one that is near to another is compared with later ones.

  Yields:
    The place of each, and those of the earlier ones, the nearest first.
  """
  import datasketch  # imports scipy

  index = _Index(_PROPOSED * threshold)

  # Prompts that are compared with many are compared with the same ones.
  @functools.lru_cache(maxsize=_KEPT)
  def shingles(place: int) -> set[tuple[str, ...]]:
    return _shingles(prompts[place], ngram)

  for begin in range(0, len(places), _BATCH):
    batch = places[begin : begin + _BATCH]
    hashes = datasketch.MinHash.bulk(
      [
        [" ".join(gram).encode() for gram in _shingles(prompts[i], ngram)]
        for i in batch
      ],
      num_perm=_PERMUTATIONS,
    )
    for place, minhash in zip(batch, hashes):
      own = _shingles(prompts[place], ngram)
      likeness = [
        (-_jaccard(own, shingles(twin)), twin)
        for twin in index.likeliest(minhash.hashvalues)
      ]
      twins = [twin for alike, twin in sorted(likeness) if -alike >= threshold]
      if twins:
        yield place, twins
      if chains or not twins:
        index.insert(place, minhash.hashvalues)
  if index.cut:
    warnings.warn(
      f"{index.cut:,} of {len(places):,} prompts share much with more than "
      f"{_MOST} others; each was compared with the {_MOST} likeliest to be its "
      "near duplicates.",
      RuntimeWarning,
      stacklevel=2,
    )


class _Index:
  """Locality-sensitive hashing whose answers are bounded."""

  def __init__(self, threshold: float):
    import datasketch

    # datasketch knows how many bands of how many rows suit a threshold.
    bands = datasketch.MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
    self._ranges = bands.hashranges
    self._buckets: list[dict[bytes, list[int]]] = [
      collections.defaultdict(list) for _ in self._ranges
    ]
    self._hashes: dict[int, np.ndarray] = {}
    self.cut = 0

  def likeliest(self, hashes: np.ndarray) -> list[int]:
    """At most `_MOST` places whose hashes agree most, the earliest first.

    Args:
      hashes: [_PERMUTATIONS] uint64.
    """
    proposed: set[int] = set()
    full = False
    for (low, high), bucket in zip(self._ranges, self._buckets):
      found = bucket.get(hashes[low:high].tobytes(), ())
      full |= len(found) == _BUCKET
      proposed.update(found)
    places = sorted(proposed)
    if len(places) <= _MOST:
      self.cut += full
      return places
    self.cut += 1
    same = [np.count_nonzero(self._hashes[p] == hashes) for p in places]
    best = np.argsort(-np.asarray(same), kind="stable")[:_MOST]
    return [places[i] for i in sorted(best)]

  def insert(self, place: int, hashes: np.ndarray) -> None:
    """Remembers a place under each of its bands that is not yet full."""
    self._hashes[place] = hashes
    for (low, high), bucket in zip(self._ranges, self._buckets):
      found = bucket[hashes[low:high].tobytes()]
      if len(found) < _BUCKET:
        found.append(place)


def _shingles(prompt: structs.Prompt, ngram: int) -> set[tuple[str, ...]]:
  return set(words.ngrams(words.split(words.normal(prompt.prompt)), ngram))


def _jaccard(a: set, b: set) -> float:
  return len(a & b) / len(a | b) if a or b else 0.0
