"""The prompt pool: what the cold start is synthesised from."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from opera_jax import atomic_file, structs
from opera_jax.data import prompts as prompts_lib
from opera_jax.report import clusters as page
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import runtime
from opera_jax.synthesis import cluster, embedding, screening
from opera_jax.train import checkpoint, metrics

_NEAREST = 4  # prompts of a cluster that the page shows
_POINTS = 2_000  # prompts of the picture
_SHOWN = 5  # rejected prompts of a reason that the page shows


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the pool is made; see `synthesis.screening` and `synthesis.cluster`."""

  size: int  # prompts of the pool; 0 takes all that are left
  min_chars: int
  max_chars: int
  max_reference_chars: int
  languages: tuple[str, ...]
  certainty: float
  near_duplicate: float
  ngram: int
  embedder: str  # hub id or directory of sentence-transformers, or "policy"
  batch: int  # prompts embedded at once; work is kept batch by batch
  clusters: int
  cluster_choices: tuple[int, ...]
  cluster_sample: int
  minimum: int  # fewest prompts of a cluster


def build(
  workdir: str | pathlib.Path,
  prompts: Sequence[structs.Prompt],
  settings: Settings,
  *,
  seed: int,
  embedder: Callable[[], embedding.Embed],
  preemption: checkpoint.Preemption,
) -> None:
  """Writes `pool/prompts.jsonl`, `rejected.jsonl`, `clusters.html`, counts.

  Args:
    workdir: folder of the run.
    prompts: of all sources, with distinct ids.
    settings: how.
    seed: of clusters, sample and picture.
    embedder: makes the embedder, once it is needed.
    preemption: asked after every batch that is embedded, which is kept.

  Raises:
    ValueError: fewer prompts are left than asked for, or whatever of the
      settings does not fit.
  """
  digest = hashlib.sha256()
  for prompt in prompts:
    digest.update(json.dumps([prompt.id, prompt.prompt]).encode())
  stage = workdir_lib.Stage(
    workdir_lib.make(workdir),
    "pool",
    {
      "pool": dataclasses.asdict(settings),
      "seed": seed,
      "prompts": digest.hexdigest(),
    },
  )
  with stage.alone(preemption):
    if not stage.finished():
      _build(stage, prompts, settings, seed, embedder, preemption)


def _build(
  stage: workdir_lib.Stage,
  prompts: Sequence[structs.Prompt],
  settings: Settings,
  seed: int,
  embedder: Callable[[], embedding.Embed],
  preemption: checkpoint.Preemption,
) -> None:
  kept, rejected = screening.screen(
    prompts,
    min_chars=settings.min_chars,
    max_chars=settings.max_chars,
    max_reference_chars=settings.max_reference_chars,
    languages=settings.languages,
    certainty=settings.certainty,
    near_duplicate=settings.near_duplicate,
    ngram=settings.ngram,
  )
  preemption.leave()
  size = settings.size or len(kept)
  if not kept or size > len(kept):
    raise ValueError(
      f"config.pool.size asks for {max(size, 1):,} prompts and {len(kept):,} "
      f"of {len(prompts):,} are left ({screening.counts(rejected)}). Lower it "
      "(0 takes all), add prompts to config.data, or loosen the filters of "
      "config.pool."
    )
  vector_ND = embedding.unit(
    _embedded(
      stage.path / "embeddings", kept, settings.batch, embedder, preemption
    ),
    centre=settings.embedder == "policy",
  )
  found = cluster.fit(
    vector_ND,
    clusters=settings.clusters,
    choices=settings.cluster_choices,
    sample=settings.cluster_sample,
    seed=seed,
  )
  preemption.leave()
  take_K = cluster.quotas(found.sizes(), size, settings.minimum)
  chosen = cluster.sample(found.label, take_K, seed)
  taken = np.zeros(len(kept), bool)
  taken[chosen] = True
  rejected += [
    screening.Rejection(p, "not sampled", f"cluster {label}")
    for p, label, own in zip(kept, found.label, taken)
    if not own
  ]
  counts = {
    "read": len(prompts),
    **screening.counts(rejected),
    "kept": len(chosen),
    "clusters": len(take_K),
  }
  if runtime.is_main_process():
    prompts_lib.write(
      stage.path / "prompts.jsonl",
      (
        prompts_lib.row(kept[place], cluster=int(found.label[place]))
        for place in chosen
      ),
    )
    prompts_lib.write(
      stage.path / "rejected.jsonl",
      (
        prompts_lib.row(r.prompt, reason=r.reason, detail=r.detail)
        for r in rejected
      ),
    )
    page.write(
      stage.path / "clusters.html",
      _view(kept, rejected, vector_ND, found, take_K, taken, counts, settings,
            seed),
    )  # fmt: skip
  print(f"pool: {counts}", flush=True)
  stage.finish(counts)


def _embedded(
  folder: pathlib.Path,
  prompts: Sequence[structs.Prompt],
  batch: int,
  embedder: Callable[[], embedding.Embed],
  preemption: checkpoint.Preemption,
) -> np.ndarray:
  """Embeddings of the prompts; a killed run goes on with the next batch."""
  parts, embed = [], None
  folder.mkdir(exist_ok=True)
  with metrics.Progress(len(prompts), "embed", unit="prompt") as progress:
    for start in range(0, len(prompts), batch):
      preemption.leave()
      path = folder / f"{start:08d}.npy"
      texts = [p.prompt for p in prompts[start : start + batch]]
      vectors = _kept(path, len(texts))
      if vectors is None:
        embed = embed or embedder()
        vectors = embed(texts)
        if runtime.is_main_process():
          with atomic_file.replacing(path, "wb") as file:
            np.save(file, vectors)
      parts.append(vectors)
      progress.update(len(texts))
  return np.concatenate(parts)


def _kept(path: pathlib.Path, count: int) -> np.ndarray | None:
  """A batch of embeddings; None where there is none, or a damaged one."""
  if not os.path.lexists(path):
    return None
  try:
    if path.is_symlink():
      raise ValueError("it is a link")
    vectors = np.load(path, allow_pickle=False)
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2:
      raise ValueError("it holds no table")
    if len(vectors) != count or not np.isfinite(vectors).all():
      raise ValueError(f"it holds no {count} finite vectors")
    return vectors
  except (ValueError, OSError, EOFError, TypeError) as error:
    warnings.warn(
      f"Ignoring {path} ({error}); it is embedded again.",
      RuntimeWarning,
      stacklevel=3,
    )
    return None


def _view(
  kept, rejected, vector_ND, found, take_K, taken, counts, settings, seed
) -> page.View:
  rng = np.random.default_rng(seed)
  some = np.sort(rng.permutation(len(kept))[:_POINTS])
  place_N2 = cluster.project(vector_ND[some], seed)
  by_reason: dict[str, list] = collections.defaultdict(list)
  for one in rejected:
    if len(by_reason[one.reason]) < _SHOWN:
      by_reason[one.reason].append((one.prompt.prompt, one.detail))
  return page.View(
    counts=counts,
    embedder=settings.embedder,
    silhouette=found.silhouette,
    clusters=[
      page.Cluster(
        size=int(size),
        taken=int(take),
        tasks=collections.Counter(
          kept[i].task for i in np.flatnonzero(found.label == index)
        ),
        nearest=[kept[i].prompt for i in found.nearest(index, _NEAREST)],
      )
      for index, (size, take) in enumerate(zip(found.sizes(), take_K))
    ],
    points=[
      page.Point(float(x), float(y), int(found.label[i]), bool(taken[i]))
      for (x, y), i in zip(place_N2, some)
    ],
    rejected={reason: shown for reason, shown in by_reason.items()},
  )
