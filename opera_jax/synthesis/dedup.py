"""Finds exact and near duplicates among prompts.

Exact duplicates are equal after normalising case, width and spacing. Near
duplicates have sets of word n-grams whose Jaccard index is at least a
threshold. MinHash with locality-sensitive hashing proposes pairs, and the true
Jaccard index of every proposed pair is computed, so there are no false
positives. The hashing is tuned to 0.8 of the threshold: at a threshold of 0.8
it misses 5 of 100 pairs whose index is 0.8, and 1 of 100 whose index is 0.85.

If many prompts are similar without being duplicates (one template with
different names), each prompt is only compared with the `_MAX_COMPARED` most
similar proposals, so that the time stays linear in the number of prompts. A
warning reports how many prompts this affects.
"""

import collections
import functools
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from opera_jax import structs
from opera_jax.text import words

_PERMUTATIONS = 128
_PROPOSED = 0.8  # fraction of the threshold to which the hashing is tuned
_BATCH = 4096
_MAX_COMPARED = 64  # true Jaccard indices computed for one prompt
_CACHED = 1024  # prompts whose n-grams are cached between comparisons
_BUCKET = 128  # prompts stored under one hash


def repeats(
  prompts: Sequence[structs.Prompt],
  *,
  threshold: float,
  ngram: int = 3,
) -> list[tuple[str, str] | None]:
  """Finds prompts that duplicate an earlier prompt that is kept.

  Args:
    prompts: in order of preference; the first of several duplicates is kept.
    threshold: Jaccard index in (0, 1] of near duplicates; 0 finds exact
      duplicates only.
    ngram: words of an n-gram.

  Returns:
    For each prompt None, or ("exact" or "near", id of the earlier prompt).

  Raises:
    ValueError: a threshold outside [0, 1], or `ngram` below 1.
  """
  _check(threshold, ngram)
  found: list[tuple[str, str] | None] = []
  owner: dict[str, str] = {}
  for prompt in prompts:
    first = owner.setdefault(words.normal(prompt.prompt), prompt.id)
    found.append(None if first == prompt.id else ("exact", first))
  if threshold:
    unique = [i for i, duplicate in enumerate(found) if duplicate is None]
    for index, similar in _near(
      prompts, unique, threshold=threshold, ngram=ngram, chains=False
    ):
      found[index] = ("near", prompts[similar[0]].id)
  return found


def clusters(
  prompts: Sequence[structs.Prompt], *, threshold: float, ngram: int = 3
) -> list[str]:
  """Groups prompts that a data split must not separate.

  Groups are the connected components of the near-duplicate relation.

  Args:
    prompts: any prompts.
    threshold: see `repeats`; 0 groups exact duplicates only.
    ngram: words of an n-gram.

  Returns:
    For each prompt the name of its group, which is the normalised text of one
    of its members.

  Raises:
    ValueError: see `repeats`.
  """
  _check(threshold, ngram)
  normal = [words.normal(prompt.prompt) for prompt in prompts]
  first: dict[str, int] = {}
  # Union-find; the root of a group is its first prompt.
  parent = [first.setdefault(text, index) for index, text in enumerate(normal)]

  def find(index: int) -> int:
    while parent[index] != index:
      parent[index] = parent[parent[index]]
      index = parent[index]
    return index

  if threshold:
    unique = list(first.values())
    for index, similar in _near(
      prompts, unique, threshold=threshold, ngram=ngram, chains=True
    ):
      for other in similar:
        low, high = sorted((find(index), find(other)))
        parent[high] = low
  return [normal[find(index)] for index in range(len(prompts))]


def _check(threshold: float, ngram: int) -> None:
  if not 0 <= threshold <= 1 or ngram < 1:
    raise ValueError(
      f"Near duplicates need a threshold in [0, 1] and at least 1 word, got "
      f"near_duplicate={threshold}, ngram={ngram}. Change config.pool or "
      "config.data.near_duplicate."
    )


def _near(
  prompts: Sequence[structs.Prompt],
  indices: Sequence[int],
  *,
  threshold: float,
  ngram: int,
  chains: bool,
) -> Iterator[tuple[int, list[int]]]:
  """Finds prompts that are near duplicates of earlier ones.

  Args:
    prompts: all prompts.
    indices: of the prompts to compare, in this order.
    threshold: Jaccard index.
    ngram: words of an n-gram.
    chains: whether later prompts are also compared with near duplicates.

  Yields:
    The index of a near duplicate, and the indices of the earlier prompts that
    it duplicates, the most similar first.
  """
  import datasketch  # imports scipy

  lsh = _BoundedLsh(_PROPOSED * threshold)

  # Similar prompts are compared with the same earlier ones.
  @functools.lru_cache(maxsize=_CACHED)
  def shingles(prompt: int) -> set[tuple[str, ...]]:
    return _shingles(prompts[prompt], ngram)

  for begin in range(0, len(indices), _BATCH):
    batch = indices[begin : begin + _BATCH]
    hashes = datasketch.MinHash.bulk(
      [
        [" ".join(gram).encode() for gram in _shingles(prompts[i], ngram)]
        for i in batch
      ],
      num_perm=_PERMUTATIONS,
    )
    for prompt, minhash in zip(batch, hashes):
      own = _shingles(prompts[prompt], ngram)
      candidates = lsh.most_similar(minhash.hashvalues)
      jaccard = {i: _jaccard(own, shingles(i)) for i in candidates}
      near = [i for i in candidates if jaccard[i] >= threshold]
      # The sort is stable: equally similar prompts stay in ascending order.
      similar = sorted(near, key=jaccard.__getitem__, reverse=True)
      if similar:
        yield prompt, similar
      if chains or not similar:
        lsh.insert(prompt, minhash.hashvalues)
  if lsh.truncated:
    warnings.warn(
      f"{lsh.truncated:,} of {len(indices):,} prompts share much with more "
      f"than {_MAX_COMPARED} others; each was only compared with "
      f"the {_MAX_COMPARED} most similar ones.",
      RuntimeWarning,
      stacklevel=2,
    )


class _BoundedLsh:
  """Locality-sensitive hashing that returns a bounded number of matches.

  Attributes:
    truncated: number of queries for which matches were dropped.
  """

  def __init__(self, threshold: float):
    import datasketch

    # datasketch chooses the number and width of bands for the threshold.
    bands = datasketch.MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
    self._ranges = bands.hashranges
    self._buckets: list[dict[bytes, list[int]]] = [
      collections.defaultdict(list) for _ in self._ranges
    ]
    self._hashes: dict[int, np.ndarray] = {}
    self.truncated = 0

  def most_similar(self, hashes: np.ndarray) -> list[int]:
    """The stored prompts whose hashes agree most, in ascending order.

    Args:
      hashes: [_PERMUTATIONS] uint64.

    Returns:
      At most `_MAX_COMPARED` indices.
    """
    proposed: set[int] = set()
    full = False
    for (low, high), bucket in zip(self._ranges, self._buckets):
      found = bucket.get(hashes[low:high].tobytes(), ())
      full |= len(found) == _BUCKET
      proposed.update(found)
    indices = sorted(proposed)
    if len(indices) <= _MAX_COMPARED:
      self.truncated += full
      return indices
    self.truncated += 1
    agreeing = [np.count_nonzero(self._hashes[i] == hashes) for i in indices]
    best = np.argsort(-np.asarray(agreeing), kind="stable")[:_MAX_COMPARED]
    return [indices[i] for i in sorted(best)]

  def insert(self, index: int, hashes: np.ndarray) -> None:
    """Stores a prompt under each of its bands, unless that bucket is full."""
    self._hashes[index] = hashes
    for (low, high), bucket in zip(self._ranges, self._buckets):
      found = bucket[hashes[low:high].tobytes()]
      if len(found) < _BUCKET:
        found.append(index)


def _shingles(prompt: structs.Prompt, ngram: int) -> set[tuple[str, ...]]:
  """The word n-grams of a prompt."""
  return set(words.ngrams(words.split(words.normal(prompt.prompt)), ngram))


def _jaccard(a: set, b: set) -> float:
  return len(a & b) / len(a | b) if a or b else 0.0
