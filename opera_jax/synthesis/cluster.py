"""Clusters embedded prompts and samples them in proportion to cluster size.

Shape key: N prompts, D dimensions, K clusters.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from sklearn import cluster as sk_cluster
from sklearn import manifold, metrics

_INITS = 3  # k-means runs; the best is used
_PCA_DIMENSIONS = 50  # before t-SNE


@dataclasses.dataclass(frozen=True)
class Clusters:
  """k-means of unit vectors, the largest cluster first."""

  label: np.ndarray  # [N] int
  distance: np.ndarray  # [N] float32, to the centre of the own cluster
  silhouette: dict[int, float]  # mean silhouette of each k that was tried

  def sizes(self) -> np.ndarray:
    """Number of prompts of each cluster: [K] int, descending."""
    return np.bincount(self.label)

  def nearest(self, index: int, count: int) -> np.ndarray:
    """Indices of the `count` prompts nearest to a centre, nearest first."""
    members = np.flatnonzero(self.label == index)
    return members[np.argsort(self.distance[members], kind="stable")][:count]


def fit(
  vector_ND: np.ndarray,
  *,
  clusters: int,
  choices: Sequence[int],
  sample: int,
  seed: int,
) -> Clusters:
  """Clusters unit vectors by k-means.

  Args:
    vector_ND: embeddings of length 1, float32.
    clusters: K; 0 chooses it by the highest mean silhouette.
    choices: values of K to try if `clusters` is 0; values above half the sample
      are skipped.
    sample: number of vectors on which K is chosen.
    seed: of k-means and of the sample.

  Raises:
    ValueError: more clusters than vectors, or no choice within the limits.
  """
  count = len(vector_ND)
  tried: dict[int, float] = {}
  if not clusters:
    rng = np.random.default_rng(seed)
    subset = vector_ND[np.sort(rng.permutation(count)[:sample])]
    for k in choices:
      if 2 <= k <= len(subset) // 2:
        label = _k_means(subset, k, seed).labels_
        tried[k] = float(metrics.silhouette_score(subset, label))
    if not tried:
      raise ValueError(
        f"config.pool.cluster_choices={tuple(choices)} has no number of "
        f"clusters between 2 and half of the {len(subset)} prompts it is tried "
        "on. Name config.pool.clusters, add smaller choices, or more prompts."
      )
    clusters = max(tried, key=tried.__getitem__)
  if not 1 <= clusters <= count:
    raise ValueError(
      f"config.pool.clusters is {clusters} and {count} prompts are left; there "
      "must be at least 1 cluster, and no more than prompts. Lower it."
    )
  means = _k_means(vector_ND, clusters, seed)
  order = np.argsort(-np.bincount(means.labels_, minlength=clusters))
  rank = np.argsort(order)
  offset_ND = vector_ND - means.cluster_centers_[means.labels_]
  return Clusters(
    label=rank[means.labels_],
    distance=np.sqrt(np.einsum("nd,nd->n", offset_ND, offset_ND)),
    silhouette=tried,
  )


def _k_means(
  vector_ND: np.ndarray, clusters: int, seed: int
) -> sk_cluster.KMeans:
  return sk_cluster.KMeans(clusters, n_init=_INITS, random_state=seed).fit(
    vector_ND
  )


def quotas(
  sizes: Sequence[int] | np.ndarray, total: int, minimum: int
) -> np.ndarray:
  """How many prompts to sample from each cluster.

  Quotas are proportional to size, rounded by largest remainders, but at least
  `minimum`. A cluster smaller than the minimum contributes all its prompts.

  Args:
    sizes: number of prompts of each cluster.
    total: number of prompts to sample.
    minimum: smallest quota.

  Returns:
    [K] int that add up to `total`, none above the cluster's size.

  Raises:
    ValueError: `total` exceeds the number of prompts, or the minima exceed
      `total`.
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
  at_floor_K = np.zeros(len(size_K), bool)
  while True:
    # Divide what the clusters at their minimum leave among the others by size.
    free = total - floor_K[at_floor_K].sum()
    share_K = free * size_K / max(size_K[~at_floor_K].sum(), 1)
    share_K = np.where(at_floor_K, floor_K, share_K)
    below_K = share_K < floor_K
    if not below_K.any():
      break
    at_floor_K |= below_K
  take_K = np.floor(share_K + 1e-9).astype(int)
  order_K = np.argsort(take_K - share_K, kind="stable")
  take_K[order_K[: total - take_K.sum()]] += 1
  return take_K


def sample(label_N: np.ndarray, take_K: np.ndarray, seed: int) -> np.ndarray:
  """Samples prompts uniformly within each cluster; returns sorted indices.

  Args:
    label_N: cluster of each prompt.
    take_K: number of prompts to sample from each cluster.
    seed: of the sample.
  """
  rng = np.random.default_rng(seed)
  chosen = [
    rng.choice(np.flatnonzero(label_N == k), take, replace=False)
    for k, take in enumerate(take_K)
  ]
  return np.sort(np.concatenate(chosen))


def project(vector_ND: np.ndarray, seed: int) -> np.ndarray:
  """Projects vectors to [N, 2] by t-SNE for a figure, axes within [-1, 1].

  Neighbours stay neighbours; distances between groups are not meaningful.
  """
  count = len(vector_ND)
  if count < 4:
    return np.zeros((count, 2))
  centred = vector_ND - vector_ND.mean(axis=0)
  _, _, axes = np.linalg.svd(centred, full_matrices=False)
  point_N2 = manifold.TSNE(
    perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=seed
  ).fit_transform(centred @ axes[:_PCA_DIMENSIONS].T)
  point_N2 = point_N2 - (point_N2.max(axis=0) + point_N2.min(axis=0)) / 2
  return point_N2 / np.maximum(np.abs(point_N2).max(axis=0), 1e-12)
