"""Clusters that were planted are found; samples keep their shares."""

import numpy as np
import pytest

from opera_jax.synthesis import cluster

SIZES = (90, 60, 40, 10)


@pytest.fixture(scope="module")
def planted():
  """Four tight groups of unit vectors, and the group of each."""
  rng = np.random.default_rng(0)
  centre = np.linalg.qr(rng.normal(size=(16, 16)))[0][: len(SIZES)]
  group = np.repeat(np.arange(len(SIZES)), SIZES)
  vector = centre[group] + 0.05 * rng.normal(size=(sum(SIZES), 16))
  order = rng.permutation(len(group))
  vector = vector / np.linalg.norm(vector, axis=1, keepdims=True)
  return vector[order].astype(np.float32), group[order]


def test_silhouette_finds_the_planted_number(planted):
  vector, group = planted
  found = cluster.fit(
    vector, clusters=0, choices=(2, 3, 4, 6, 12), sample=150, seed=0
  )
  assert max(found.silhouette, key=found.silhouette.get) == 4
  # The largest cluster comes first, so labels are the groups themselves.
  np.testing.assert_array_equal(found.label, group)
  assert tuple(found.sizes()) == SIZES


def test_nearest_are_nearest(planted):
  vector, group = planted
  found = cluster.fit(vector, clusters=4, choices=(), sample=0, seed=0)
  assert not found.silhouette
  mine = vector[group == 1]
  away = np.linalg.norm(mine - mine.mean(axis=0), axis=1)
  expected = np.flatnonzero(group == 1)[np.argsort(away)][:5]
  np.testing.assert_array_equal(found.nearest(1, 5), expected)


@pytest.mark.parametrize(
  "sizes, total, minimum, expected",
  [
    ((90, 60, 40, 10), 100, 0, (45, 30, 20, 5)),
    ((90, 60, 40, 10), 100, 10, (43, 28, 19, 10)),  # 190 share 90
    ((90, 60, 40, 10), 200, 10, (90, 60, 40, 10)),
    ((5, 5, 5), 4, 1, (2, 1, 1)),
    ((7, 2), 8, 4, (6, 2)),  # a cluster of 2 gives both
  ],
)
def test_quotas(sizes, total, minimum, expected):
  assert tuple(cluster.quotas(sizes, total, minimum)) == expected


def test_quotas_always_add_up():
  rng = np.random.default_rng(0)
  for _ in range(500):
    sizes = rng.integers(1, 60, rng.integers(1, 12))
    minimum = int(rng.integers(0, 9))
    floor = np.minimum(sizes, minimum)
    total = int(rng.integers(max(floor.sum(), 1), sizes.sum() + 1))
    take = cluster.quotas(sizes, total, minimum)
    assert take.sum() == total
    assert (take <= sizes).all() and (take >= floor).all()
    # Above the minimum, quotas are within one of proportional.
    free = take > floor
    if free.any():
      ideal = sizes * (take[free].sum() / sizes[free].sum())
      assert (np.abs(take - ideal)[free] <= 1 + 1e-9).all()


def test_bad_quotas():
  with pytest.raises(ValueError, match="asks for 9 prompts and 8 are left"):
    cluster.quotas((5, 3), 9, 0)
  with pytest.raises(ValueError, match="minimum=3 prompts are 6, more than"):
    cluster.quotas((5, 3), 5, 3)


def test_sample(planted):
  _, group = planted
  take = np.array([9, 6, 4, 10])
  places = cluster.sample(group, take, seed=1)
  assert len(set(places.tolist())) == take.sum()
  np.testing.assert_array_equal(np.bincount(group[places]), take)
  np.testing.assert_array_equal(places, cluster.sample(group, take, seed=1))
  assert set(places) != set(cluster.sample(group, take, seed=2))


def test_the_projection_keeps_neighbours(planted):
  vector, group = planted
  place = cluster.project(vector, seed=0)
  assert place.shape == (len(vector), 2) and np.abs(place).max() <= 1
  apart = np.linalg.norm(place[:, None] - place[None], axis=-1)
  np.fill_diagonal(apart, np.inf)
  assert (group[apart.argmin(axis=1)] == group).mean() > 0.98
  assert cluster.project(vector[:3], seed=0).shape == (3, 2)


@pytest.mark.parametrize("changes", [{"clusters": 201}, {"choices": (1, 150)}])
def test_bad_numbers_of_clusters(planted, changes):
  settings = {"clusters": 0, "choices": (2,), "sample": 100, "seed": 0}
  with pytest.raises(ValueError, match=r"config.pool.cluster"):
    cluster.fit(planted[0], **(settings | changes))
