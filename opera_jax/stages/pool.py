"""Builds the prompt pool from which the cold start is synthesised."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax import atomic_file, structs
from opera_jax.data import prompts as prompts_lib
from opera_jax.report import clusters as page
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import runtime
from opera_jax.synthesis import cluster, embedding, screening
from opera_jax.train import checkpoint
from opera_jax.train import progress as progress_lib

_NEAREST = 4  # prompts of a cluster that the page shows
_POINTS = 2_000  # prompts of the picture
_SHOWN = 5  # rejected prompts of a reason that the page shows


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the pool is made; see `synthesis.screening` and `synthesis.cluster`."""

  size: int  # prompts of the pool; 0 keeps all that pass the filters
  min_chars: int
  max_chars: int
  max_reference_chars: int
  languages: tuple[str, ...]
  certainty: float
  near_duplicate: float
  ngram: int
  embedder: str  # hub id or directory of sentence-transformers, or "policy"
  batch: int  # prompts per embedding batch; each batch is saved
  clusters: int
  cluster_choices: tuple[int, ...]
  cluster_sample: int
  minimum: int  # minimum prompts of a cluster


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
    prompts: from all sources, with distinct ids.
    settings: of filters, embeddings and clusters.
    seed: of clustering, sampling and the plot.
    embedder: creates the embedder; called only if a batch must be embedded.
    preemption: checked after every embedded batch; finished batches are saved.

  Raises:
    ValueError: fewer prompts pass than config.pool.size, or a setting is
      invalid.
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
  with stage.locked(preemption):
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
  preemption.exit_if_requested()
  size = settings.size or len(kept)
  if not kept or size > len(kept):
    raise ValueError(
      f"config.pool.size asks for {max(size, 1):,} prompts and {len(kept):,} "
      f"of {len(prompts):,} pass the filters "
      f"({screening.counts(rejected)}). Lower it (0 keeps all), add prompts to "
      "config.data, or loosen the filters of config.pool."
    )
  stage.begin()
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
  preemption.exit_if_requested()
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
      _view(
        kept=kept,
        rejected=rejected,
        vector_ND=vector_ND,
        found=found,
        take_K=take_K,
        taken=taken,
        counts=counts,
        settings=settings,
        seed=seed,
      ),
    )
  print(f"pool: {counts}", flush=True)
  stage.finish(counts)


def _embedded(
  folder: pathlib.Path,
  prompts: Sequence[structs.Prompt],
  batch: int,
  embedder: Callable[[], embedding.Embed],
  preemption: checkpoint.Preemption,
) -> np.ndarray:
  """Embeds the prompts; a killed run resumes with the next batch."""
  parts, embed = [], None
  folder.mkdir(exist_ok=True)
  with progress_lib.Progress(len(prompts), "embed", unit="prompt") as progress:
    for start in range(0, len(prompts), batch):
      preemption.exit_if_requested()
      path = folder / f"{start:08d}.npy"
      texts = [p.prompt for p in prompts[start : start + batch]]
      vectors = _saved(path, len(texts))
      if vectors is None:
        embed = embed or embedder()
        vectors = embed(texts)
        if runtime.is_main_process():
          with atomic_file.replacing(path, "wb") as file:
            np.save(file, vectors)
      parts.append(vectors)
      progress.update(len(texts))
  return np.concatenate(parts)


def _saved(path: pathlib.Path, count: int) -> np.ndarray | None:
  """Reads a saved batch of embeddings; None if it is missing or damaged."""
  if not os.path.lexists(path):
    return None
  try:
    if path.is_symlink():
      raise ValueError("it is a link")
    vectors = np.load(path, allow_pickle=False)
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2:
      raise ValueError("it is not a 2-D array")
    if len(vectors) != count or not np.isfinite(vectors).all():
      raise ValueError(f"it does not hold {count} finite vectors")
    return vectors
  except (ValueError, OSError, EOFError, TypeError) as error:
    warnings.warn(
      f"Ignoring {path} ({error}); it is embedded again.",
      RuntimeWarning,
      stacklevel=3,
    )
    return None


def _view(
  kept: Sequence[structs.Prompt],
  rejected: Sequence[screening.Rejection],
  vector_ND: np.ndarray,
  found: cluster.Clusters,
  take_K: np.ndarray,
  taken: Any,
  counts: Mapping[str, int],
  settings: Settings,
  seed: int,
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
          kept[int(i)].task for i in np.flatnonzero(found.label == index)
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
