"""What every stage of a run shares: mesh, tokenizer, model, tasks, machines."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from opera_jax import structs
from opera_jax.data import prompts as prompts_lib
from opera_jax.models import hf_config, qwen3
from opera_jax.rewards import compose
from opera_jax.rollout import engine as engine_lib
from opera_jax.rollout import sampling as sampling_lib
from opera_jax.scoring import price as price_lib
from opera_jax.sharding import exchange, layout, rules, runtime
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.stages import claims
from opera_jax.stages import score as score_lib
from opera_jax.stages import tasks as tasks_lib
from opera_jax.stages import workdir as workdir_lib
from opera_jax.text import tokenizer as tokenizer_lib
from opera_jax.train import checkpoint

# Arguments of `setup` that a driver takes from its config by the same name.
SECTIONS = (
  "seed",
  "mesh",
  "checkpoint",
  "tokenizer",
  "model",
  "data",
  "max_prompt_tokens",
  "max_reference_tokens",
  "engine",
  "price",
  "reward",
)
MEASURED = "opera + verifiable"


@dataclasses.dataclass(frozen=True)
class Run:
  """The shared parts of a run; parameters are passed beside it."""

  workdir: pathlib.Path
  seed: int
  mesh: jax.sharding.Mesh
  tokenizer: tokenizer_lib.Tokenizer
  model: qwen3.Config
  graphdef: nnx.GraphDef
  axes: Any
  tasks: tasks_lib.Tasks
  dropped: dict[str, int]
  engine: engine_lib.Engine
  pricer: price_lib.Pricer  # at temperature 1, for rewards
  policy_pricer: price_lib.Pricer  # at the policy's; the same where equal
  scorer: score_lib.Scorer  # of the run's rewards
  measurer: score_lib.Scorer  # of OPERA's, for evaluation
  settings: dict[str, Any]  # what the outcome of every stage depends on
  reward: dict[str, Any]  # and of those that reward
  # The engine and the pricer at temperature 1, made for a mesh.
  machines: Callable[
    [jax.sharding.Mesh], tuple[engine_lib.Engine, price_lib.Pricer]
  ]

  def stage(self, name: str, **settings: Any) -> workdir_lib.Stage:
    """Opens a stage's folder; see `workdir.Stage` for what it refuses."""
    return workdir_lib.Stage(self.workdir, name, self.settings | settings)

  def prompt_ids(self, prompts: Sequence[structs.Prompt]) -> list[np.ndarray]:
    """The chat prompt of each task, as tokens; each process makes some."""

    def tokens(share):
      return [self.tokenizer.chat_prompt(p.prompt).tolist() for p in share]

    return [np.asarray(t, np.int32) for t in exchange.each(prompts, tokens)]

  def sampling(self, **settings: Any) -> sampling_lib.Sampling:
    """How to draw from the run's models; fields of `sampling.Sampling`."""
    return sampling_lib.for_tokenizer(
      sampling_lib.Sampling(**settings), self.tokenizer, self.model.vocab_size
    )

  def for_rollout(self, params: Any) -> Any:
    """The parameters in the layout and the dtype that decoding computes in."""
    return layout.move(
      params, self.axes, self.mesh, rules.ROLLOUT, dtype=self.model.dtype
    )

  def on_own_devices(self) -> "Run | None":
    """The run on this process's devices alone, with no other in step.

    None where the model is split over hosts, see `sharding.mesh.own`.
    """
    own = mesh_lib.own(self.mesh)
    if own is None:
      return None
    if own == self.mesh:
      return self
    engine, pricer = self.machines(own)
    return dataclasses.replace(self, mesh=own, engine=engine, pricer=pricer)

  def initial(self) -> Any:
    """Random parameters in the TRAIN layout, whole on no device."""
    create = jax.jit(
      lambda: qwen3.create(self.model, self.seed)[1],
      out_shardings=rules.shardings(self.axes, self.mesh, rules.TRAIN),
    )
    return create()

  def save(self, stage: str, params: Any) -> None:
    """Keeps a stage's final parameters."""
    saves = checkpoint.Checkpoints(self.workdir / stage / "model")
    saves.save(0, params, {})
    saves.close()

  def load(self, stage: str) -> Any:
    """A stage's final parameters, in the TRAIN layout.

    Raises:
      FileNotFoundError: the stage has not finished.
    """
    shapes = qwen3.abstract(self.model)[1]
    shardings = rules.shardings(self.axes, self.mesh, rules.TRAIN)
    like = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      shardings,
    )
    saves = checkpoint.Checkpoints(self.workdir / stage / "model")
    restored = saves.restore(like)
    saves.close()
    if restored is None:
      raise FileNotFoundError(
        f"Stage {stage!r} has left no model in {self.workdir / stage}. Run "
        f"it first: add {stage} to config.stages."
      )
    return restored[1]


def setup(
  workdir: str | os.PathLike,
  *,
  seed: int,
  mesh: Mapping[str, int],
  checkpoint: str,
  tokenizer: Mapping[str, Any],
  model: Mapping[str, Any],
  data: Mapping[str, Any],
  max_prompt_tokens: int,
  max_reference_tokens: int,
  engine: Mapping[str, Any],
  price: Mapping[str, Any],
  reward: Mapping[str, Any],
  temperature: float,
) -> Run:
  """Loads or makes everything that the stages share; trains only the BPE.

  Args:
    workdir: folder of the run.
    seed: of everything random in the run.
    mesh: axis sizes, see `sharding.mesh.create`.
    checkpoint: directory or hub id whose generation_config.json says which
      ids end a completion; "" where the base model is trained.
    tokenizer: `path`, a directory or hub id, or "" to train a BPE of
      `bpe_size` ids on the documents.
    model: fields of `qwen3.Config` but the vocabulary, which is the
      tokenizer's unless `vocab_size` is positive.
    data: arguments of `tasks.load` but the seed.
    max_prompt_tokens: a longer chat prompt is dropped and counted.
    max_reference_tokens: a longer reference is dropped and counted.
    engine: arguments of `rollout.engine.Engine`.
    price: arguments of `scoring.price.Pricer`.
    reward: arguments of `score.Scorer`.
    temperature: at which the policy is sampled and updated.

  Raises:
    ValueError: whatever of this does not fit together.
  """
  workdir = workdir_lib.make(workdir)
  device_mesh = mesh_lib.create(dict(mesh))
  tasks = tasks_lib.load(seed=seed, **data)
  words = _tokenizer(workdir, tasks, checkpoint, **tokenizer)
  sizes = dict(model)
  if sizes["vocab_size"] <= 0:
    sizes["vocab_size"] = words.vocab_size
  if sizes["vocab_size"] < words.vocab_size:
    raise ValueError(
      f"The tokenizer has {words.vocab_size} ids and config.model.vocab_size "
      f"is {sizes['vocab_size']}; every id needs a row. Raise it, or set 0 "
      "to take the tokenizer's."
    )
  config = qwen3.Config(**sizes)
  graphdef, shapes = qwen3.abstract(config)
  axes = qwen3.logical_axes(shapes)
  layout.check(shapes, axes, device_mesh, rules.TRAIN)
  kept, dropped = {}, {}
  for name in ("synthesis", "rl", "held_out"):
    every = getattr(tasks, name)
    lengths = exchange.each(
      every, lambda share: prompts_lib.token_lengths(share, words)
    )
    kept[name], counts = prompts_lib.filter_by_length(
      every,
      lengths,
      max_prompt_tokens,
      max_reference_tokens,
      # The search of the cold start does not look at references.
      require_reference=name != "synthesis",
    )
    dropped |= {f"{name}/{key}": count for key, count in counts.items()}
    if counts["kept"] < sum(counts.values()):
      print(
        f"{name}: {counts} (at most {max_prompt_tokens} prompt and "
        f"{max_reference_tokens} reference tokens)",
        flush=True,
      )
  reward, automata = _plain(reward), str(workdir / "automata")
  sizes = {"vocab_size": config.vocab_size, **price}

  def machines(on: jax.sharding.Mesh):
    return (
      engine_lib.Engine(graphdef, config, mesh=on, **engine),
      price_lib.Pricer(graphdef, mesh=on, **sizes),
    )

  sampler, pricer = machines(device_mesh)
  # OPERA's terms alone, and of the options those of these terms.
  terms = compose.weights(MEASURED)
  measured = {
    "parts": MEASURED,
    "options": {n: o for n, o in reward["options"].items() if n in terms},
  }
  return Run(
    workdir=workdir,
    seed=seed,
    mesh=device_mesh,
    tokenizer=words,
    model=config,
    graphdef=graphdef,
    axes=axes,
    tasks=dataclasses.replace(tasks, **kept),
    dropped=dropped,
    machines=machines,
    engine=sampler,
    pricer=pricer,
    policy_pricer=pricer
    if temperature == 1
    else price_lib.Pricer(
      graphdef, mesh=device_mesh, temperature=temperature, **sizes
    ),
    settings={
      "seed": seed,
      "tokenizer": _plain(tokenizer),
      "model": _plain(model),
      "data": _plain(data),
      "max_prompt_tokens": max_prompt_tokens,
      "max_reference_tokens": max_reference_tokens,
    },
    reward=reward,
    scorer=score_lib.Scorer(pricer, words, cache_dir=automata, **reward),
    measurer=score_lib.Scorer(
      pricer, words, cache_dir=automata, **reward | measured
    ),
  )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
  """Nested mappings (of a config) as plain dicts."""
  return {
    name: _plain(value) if hasattr(value, "items") else value
    for name, value in values.items()
  }


def _tokenizer(
  workdir: pathlib.Path,
  tasks: tasks_lib.Tasks,
  checkpoint: str,
  path: str,
  bpe_size: int,
) -> tokenizer_lib.Tokenizer:
  folder = workdir / "tokenizer"
  if runtime.lead():
    with claims.claim(workdir / "tokenizer.lock", wait=True):
      if not (folder / "tokenizer.json").exists():
        words = _new_tokenizer(tasks, path, bpe_size)
        words.with_ends(_checkpoint_ends(checkpoint)).save(folder)
  runtime.barrier("tokenizer made")
  return tokenizer_lib.Tokenizer.load(folder)


def _checkpoint_ends(checkpoint: str) -> tuple[int, ...]:
  """The ids that a checkpoint ends its completions with; none without one."""
  if not checkpoint:
    return ()
  names = ("generation_config.json", "config.json")
  folder = hf_config.folder(checkpoint, names)
  found = [folder / name for name in names if (folder / name).exists()]
  return tokenizer_lib.end_ids(found[0] if found else None)


def _new_tokenizer(
  tasks: tasks_lib.Tasks, path: str, bpe_size: int
) -> tokenizer_lib.Tokenizer:
  if path:
    return tokenizer_lib.Tokenizer.load(path)
  texts = [
    text
    for d in tasks.documents[:20_000]
    for text in (d.prompt, d.thought, d.answer)
  ]
  return tokenizer_lib.Tokenizer.train_bpe(texts, bpe_size)
