"""Clusters of embedded prompts, and a sample that keeps their shares.

Shape key: N prompts, D dimensions, K clusters.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from sklearn import cluster as sk_cluster
from sklearn import manifold, metrics

_STARTS = 3  # k-means runs, the best of which counts
_PROJECTED = 50  # dimensions that the picture's neighbours are sought in


@dataclasses.dataclass(frozen=True)
class Clusters:
  """k-means of unit vectors, the largest cluster first."""

  label: np.ndarray  # [N] int
  distance: np.ndarray  # [N] float32, to the own centre
  silhouette: dict[int, float]  # of each k that was tried, if any was

  def sizes(self) -> np.ndarray:
    """Prompts of each cluster: [K] int, descending."""
    return np.bincount(self.label)

  def nearest(self, index: int, count: int) -> np.ndarray:
    """Places of the prompts nearest to a centre, the nearest first."""
    mine = np.flatnonzero(self.label == index)
    return mine[np.argsort(self.distance[mine], kind="stable")][:count]


def fit(
  vector_ND: np.ndarray,
  *,
  clusters: int,
  choices: Sequence[int],
  sample: int,
  seed: int,
) -> Clusters:
  """Clusters unit vectors.

  Args:
    vector_ND: embeddings of length 1, float32.
    clusters: K, or 0 for the choice of highest mean silhouette.
    choices: numbers of clusters tried on a sample where `clusters` is 0;
      those of more than half the sample are passed over.
    sample: vectors that the choice is made on.
    seed: of k-means and the sample.

  Raises:
    ValueError: more clusters than vectors, no choice that fits.
  """
  count = len(vector_ND)
  tried: dict[int, float] = {}
  if not clusters:
    rng = np.random.default_rng(seed)
    some = vector_ND[np.sort(rng.permutation(count)[:sample])]
    for k in choices:
      if 2 <= k <= len(some) // 2:
        label = _means(some, k, seed).labels_
        tried[k] = float(metrics.silhouette_score(some, label))
    if not tried:
      raise ValueError(
        f"config.pool.cluster_choices={tuple(choices)} has no number of "
        f"clusters between 2 and half of the {len(some)} prompts it is tried "
        "on. Name config.pool.clusters, add smaller choices, or more prompts."
      )
    clusters = max(tried, key=tried.__getitem__)
  if not 1 <= clusters <= count:
    raise ValueError(
      f"config.pool.clusters is {clusters} and {count} prompts are left; there "
      "must be at least 1 cluster, and no more than prompts. Lower it."
    )
  means = _means(vector_ND, clusters, seed)
  order = np.argsort(-np.bincount(means.labels_, minlength=clusters))
  rank = np.argsort(order)
  label = rank[means.labels_]
  apart = vector_ND - means.cluster_centers_[means.labels_]
  distance = np.sqrt(np.einsum("nd,nd->n", apart, apart))
  return Clusters(label, distance, tried)


def _means(vector_ND: np.ndarray, clusters: int, seed: int):
  return sk_cluster.KMeans(clusters, n_init=_STARTS, random_state=seed).fit(
    vector_ND
  )


def quotas(
  sizes: Sequence[int] | np.ndarray, total: int, minimum: int
) -> np.ndarray:
  """How many to take of each cluster.

  Proportional to size, rounded by largest remainders, where that is no less
  than the minimum; a cluster smaller than the minimum gives all it has.

  Args:
    sizes: prompts of each cluster.
    total: how many to take.
    minimum: fewest of a cluster.

  Returns:
    [K] int that add up to `total`, none above its size.

  Raises:
    ValueError: more asked for than there is, or minima beyond the total.
  """
  size_K = np.asarray(sizes)
  floor_K = np.minimum(size_K, minimum)
  if total > size_K.sum():
    raise ValueError(
      f"config.pool.size asks for {total:,} prompts and {size_K.sum():,} are "
      "left. Lower it (0 takes all), add prompts, or loosen the filters of "
      "config.pool."
    )
  if floor_K.sum() > total:
    raise ValueError(
      f"{len(size_K)} clusters of at least config.pool.minimum={minimum} "
      f"prompts are {floor_K.sum():,}, more than config.pool.size={total:,}. "
      "Lower the minimum or the number of clusters, or raise the size."
    )
  bound_K = np.zeros(len(size_K), bool)
  while True:
    # What is left after the minima goes to the rest by size.
    free = total - floor_K[bound_K].sum()
    share_K = free * size_K / max(size_K[~bound_K].sum(), 1)
    share_K = np.where(bound_K, floor_K, share_K)
    below_K = share_K < floor_K
    if not below_K.any():
      break
    bound_K |= below_K
  take_K = np.floor(share_K + 1e-9).astype(int)
  order_K = np.argsort(take_K - share_K, kind="stable")
  take_K[order_K[: total - take_K.sum()]] += 1
  return take_K


def draw(label_N: np.ndarray, take_K: np.ndarray, seed: int) -> np.ndarray:
  """Places of a sample of each cluster, uniform within it, ascending."""
  rng = np.random.default_rng(seed)
  places = [
    rng.choice(np.flatnonzero(label_N == k), take, replace=False)
    for k, take in enumerate(take_K)
  ]
  return np.sort(np.concatenate(places))


def project(vector_ND: np.ndarray, seed: int) -> np.ndarray:
  """A picture of the vectors: t-SNE to [N, 2], each axis within [-1, 1].

  Neighbours stay neighbours; distances between groups mean little.
  """
  count = len(vector_ND)
  if count < 4:
    return np.zeros((count, 2))
  centred = vector_ND - vector_ND.mean(axis=0)
  _, _, axes = np.linalg.svd(centred, full_matrices=False)
  place = manifold.TSNE(
    perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=seed
  ).fit_transform(centred @ axes[:_PROJECTED].T)
  place = place - (place.max(axis=0) + place.min(axis=0)) / 2
  return place / np.maximum(np.abs(place).max(axis=0), 1e-12)
