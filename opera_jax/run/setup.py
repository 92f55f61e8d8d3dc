"""Sets up what all stages share: mesh, tokenizer, model, tasks, engine."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from opera_jax import gguf_header, structs
from opera_jax.data import digest, mixture, traces
from opera_jax.data import prompts as prompts_lib
from opera_jax.models import decoder, hf_checkpoint, hf_config, lora
from opera_jax.rewards import compose
from opera_jax.rl import score as score_lib
from opera_jax.rollout import engine as engine_lib
from opera_jax.rollout import sampling as sampling_lib
from opera_jax.run import initial_model, model_config
from opera_jax.run import sizes as sizes_lib
from opera_jax.run import tasks as tasks_lib
from opera_jax.run import workdir as workdir_lib
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.sharding import exchange, layout, rules
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.text import tokenizer as tokenizer_lib
from opera_jax.train import checkpoint, trackers
from opera_jax.train import fingerprint as fingerprint_lib

# Arguments of `setup` that are config sections with the same name.
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
  "scoring",
  "reward",
  "redo",
  "log",
)
EVAL_TERMS = "opera + verifiable"
# Files that are read from a model's or a tokenizer's directory.
MODEL_FILES = ("*.safetensors", "*.json", "*.gguf")
TOKENIZER_FILES = ("*.json", "*.jinja", "*.gguf", "*.model")
# Fields of config.data that name files; a file is identified by its digest.
_READ = ("path", "math_path", "responses_path")
# Fields of config.data that affect only these tasks.
_SAVED_TOKENIZER = ("tokenizer*.json", "generation_config.json")
# Settings of a stage that may change while it runs.
_WITHOUT_EFFECT = ("checkpoint_every", "keep_rollouts")
_COUNTS = {
  "documents": ("documents",),
  "synthesis": ("synthesis",),
  "rl": ("rl",),
  "held_out": ("held_out",),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """The objects that all stages share; parameters are passed separately."""

  workdir: pathlib.Path
  seed: int
  mesh: jax.sharding.Mesh
  tokenizer: tokenizer_lib.Tokenizer
  # ids of the checkpoint's tokenizer, if tokens were added to it; else None
  trained_ids: int | None
  model: decoder.Config
  graphdef: nnx.GraphDef
  axes: Any
  tasks: tasks_lib.Tasks
  dropped: dict[str, int]
  engine: engine_lib.Engine
  logprob_scorer: scorer_lib.LogprobScorer  # at temperature 1, for rewards
  # at the policy's temperature; the same object if that is 1
  policy_logprob_scorer: scorer_lib.LogprobScorer
  reward_scorer: score_lib.RewardScorer  # config.reward
  eval_scorer: score_lib.RewardScorer  # OPERA's own terms, for evaluation
  settings: dict[str, Any]  # settings that results depend on, see `stage`
  reward: dict[str, Any]  # config.reward, for stages that compute rewards
  tokenizer_digest: tuple[str, str]  # path and SHA-256 of its files
  log: tuple[str, ...]  # where metrics go, see `trackers.parse`
  redo: tuple[str, ...]  # stages that may be dropped, see `workdir.redo`
  # Builds the engine and the temperature-1 scorer for a mesh.
  build_engine: Callable[
    [jax.sharding.Mesh], tuple[engine_lib.Engine, scorer_lib.LogprobScorer]
  ]
  # Called when a stage has recorded its settings, see `workdir.Stage`.
  recorded: Callable[[], None]
  # Builds the scorers' fields above for a model's graphdef.
  build_scorers: Callable[[nnx.GraphDef], dict[str, Any]]

  def stage(
    self,
    name: str,
    *,
    tasks: Sequence[str] = (),
    models: Sequence[str] = (),
    sets: Sequence[str] = (),
    inputs: Callable[[], workdir_lib.Inputs] | None = None,
    computes: bool = True,
    **settings: Any,
  ) -> workdir_lib.Stage:
    """Opens a stage's folder; `workdir.Stage` lists what it refuses.

    Args:
      name: of the stage.
      tasks: fields of `tasks.Tasks` that the stage reads.
      models: whose models it reads, as `load` takes them.
      sets: stages whose traces it reads.
      inputs: returns further inputs; called on process 0.
      computes: whether it runs the model; then its result depends on seed,
        model sizes and tokenizer.
      **settings: of this stage. Those that results do not depend on are not
        recorded, see `_WITHOUT_EFFECT`.
    """

    def stage_inputs() -> dict[str, list[str] | None]:
      found: dict[str, Any] = dict(inputs()) if inputs is not None else {}
      for model in models:
        found |= self._model_input(model)
      for stage in sets:
        place = self.workdir / stage / "traces"
        value = traces.digest_of(place)
        found[f"{stage}/traces"] = value and (str(place), value)
      return found

    common: dict[str, Any] = {}
    made_from: dict[str, Any] = {}
    hub_ids = [m for m in models if _is_hub_id(m)]
    if hub_ids:
      common[initial_model.OTHER] = hub_ids  # of settings, not of files
    if computes:
      made_from["tokenizer"] = self.tokenizer_digest
      common = {name: self.settings[name] for name in ("seed", "model")}
    if tasks:
      common |= data_settings(self.settings, tasks)
      made_from |= data_inputs(self.tasks, tasks)
    made_from |= exchange.on_main_process(stage_inputs)
    return workdir_lib.Stage(
      self.workdir,
      name,
      common | {k: _with_effect(v) for k, v in settings.items()},
      made_from,
      redo=self.redo,
      recorded=self.recorded,
    )

  def _model_input(self, model: str) -> workdir_lib.Inputs:
    """The input of a stage that reads a model, see `load`."""
    name = f"{initial_model.label(model)}/model"
    if model in initial_model.STAGES:
      return {name: workdir_lib.model(self.workdir, model)}
    other = initial_model.other_run(model)
    if other:
      return {name: workdir_lib.model(*other)}
    if _is_hub_id(model):
      return {}
    return directory_inputs(name, model, MODEL_FILES, finished=True)

  def prompt_ids(self, prompts: Sequence[structs.Prompt]) -> list[np.ndarray]:
    """Tokenizes the chat prompt of each task; each process does its share."""

    def tokens(items: Sequence[structs.Prompt]) -> list[list[int]]:
      return [self.tokenizer.chat_prompt(p.prompt).tolist() for p in items]

    return [
      np.asarray(t, np.int32)
      for t in exchange.map_across_processes(prompts, tokens)
    ]

  def sampling(self, **settings: Any) -> sampling_lib.Sampling:
    """Builds the sampling settings; takes fields of `sampling.Sampling`."""
    return sampling_lib.for_tokenizer(
      sampling_lib.Sampling(**settings), self.tokenizer, self.model.vocab_size
    )

  def for_rollout(self, params: Any) -> Any:
    """Reshards and casts the parameters for decoding, with a LoRA adapter
    merged."""
    if self.model.lora is not None:
      params = lora.merge(params, self.model.lora, self.model.dtype)
    return layout.move(
      params,
      decoder.logical_axes(params),
      self.mesh,
      rules.ROLLOUT,
      dtype=self.model.dtype,
    )

  def with_lora(self, settings: lora.Settings | None) -> "Run":
    """The run of the same model with a LoRA adapter; itself for None.

    Its scorers take the frozen weights and an adapter in one tree. The engine
    still samples with merged weights, see `for_rollout`.
    """
    if settings is None:
      return self
    model = dataclasses.replace(self.model, lora=settings)
    graphdef, shapes = decoder.abstract(model)
    return dataclasses.replace(
      self,
      model=model,
      graphdef=graphdef,
      axes=decoder.logical_axes(shapes),
      **self.build_scorers(graphdef),
    )

  def new_adapter(self, seed: int) -> Any:
    """A LoRA adapter that changes nothing yet, in the TRAIN layout."""
    create = jax.jit(
      lambda: lora.split(decoder.create(self.model, seed)[1])[0],
      out_shardings=rules.shardings(
        lora.split(self.axes)[0], self.mesh, rules.TRAIN
      ),
    )
    return create()

  def on_local_devices(self) -> "Run | None":
    """A copy of the run on this process's devices, independent of other
    processes.

    None if the model is sharded over hosts, see `sharding.mesh.local_mesh`.
    """
    own = mesh_lib.local_mesh(self.mesh)
    if own is None:
      return None
    if own == self.mesh:
      return self
    engine, logprob_scorer = self.build_engine(own)
    return dataclasses.replace(
      self, mesh=own, engine=engine, logprob_scorer=logprob_scorer
    )

  def initial(self) -> Any:
    """Random parameters, created sharded in the TRAIN layout."""
    create = jax.jit(
      lambda: decoder.create(self.model, self.seed)[1],
      out_shardings=rules.shardings(self.axes, self.mesh, rules.TRAIN),
    )
    return create()

  def save(self, stage: str, params: Any) -> str:
    """Saves a stage's final parameters.

    A LoRA adapter is saved by itself and merged into the saved model, which is
    plain and float32.

    Returns:
      The model's fingerprint, which the stage passes to `finish` as "model".
    """
    if self.model.lora is not None:
      self._write(stage, "adapter", lora.split(params)[0])
      params = lora.merge(params, self.model.lora, "float32")
    self._write(stage, "model", params)
    return fingerprint_lib.fingerprint(params)

  def _write(self, stage: str, name: str, params: Any) -> None:
    saves = checkpoint.Checkpoints(self.workdir / stage / name)
    saves.save(0, params, {})
    saves.close()

  def model_digest(self, stage: str) -> str | None:
    """The fingerprint of a finished stage's model, or None."""
    found = workdir_lib.model(self.workdir, stage)
    return found and found[1]

  def load(self, stage: str) -> Any:
    """Loads a model's parameters in the TRAIN layout.

    With LoRA they come in the dtype of frozen weights, and beside them lies an
    adapter that is switched off.

    Args:
      stage: of this run, or what `config.rl.init` may name: the folder of
        another run's stage, or a checkpoint.

    Raises:
      FileNotFoundError: the stage has not finished.
      ValueError: the model is damaged, or not the one that the stage reported.
    """
    settings = self.model.lora
    plain = dataclasses.replace(self.model, lora=None)
    if initial_model.is_checkpoint(stage):
      rows = hf_config.read(stage).vocab_size
      params = hf_checkpoint.load(
        stage,
        plain,
        self.mesh,
        rules.TRAIN,
        # Rows that the checkpoint has may be trained: they stay as they are.
        trained_ids=self.trained_ids if rows < plain.vocab_size else None,
      )
    else:
      params = self._load_model(stage, self._like(decoder.abstract(plain)[1]))
    if settings is None:
      return params
    return lora.combine(
      lora.switched_off(self.new_adapter(self.seed)),
      layout.cast(params, settings.base_dtype),
    )

  def load_adapter(self, stage: str) -> Any:
    """Loads the LoRA adapter that a stage has trained, in the TRAIN layout.

    Raises:
      FileNotFoundError: the stage has saved none.
      MismatchError: it is of other settings than this run's.
    """
    like = self._like(lora.split(decoder.abstract(self.model)[1])[0])
    folder = self.workdir / stage / "adapter"
    saves = checkpoint.Checkpoints(folder, write=False)
    restored = saves.restore(like)
    saves.close()
    if restored is None:
      raise FileNotFoundError(
        f"Stage {stage!r} has saved no LoRA adapter in {folder}. Only a stage "
        f"that ran with config.{stage}.lora.rank above 0 has one."
      )
    return restored[1]

  def _like(self, shapes: Any) -> Any:
    """Shapes with the shardings of the TRAIN layout."""
    axes = decoder.logical_axes(shapes)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      rules.shardings(axes, self.mesh, rules.TRAIN),
    )

  def _load_model(self, stage: str, like: Any) -> Any:
    workdir, stage = initial_model.other_run(stage) or (self.workdir, stage)
    folder = workdir / stage / "model"
    saves = checkpoint.Checkpoints(folder, write=False)
    restored = saves.restore(like)
    faults = saves.faults() if restored is None else []
    saves.close()
    if faults:
      raise ValueError(
        f"The model in {folder} is damaged: {'; '.join(faults)}. Restore the "
        f"folder from a copy; or delete it and "
        f"{workdir / stage / 'DONE.json'} and run the stage: it writes "
        "the model again from its last checkpoint, or loads it again from its "
        "source; everything else is kept."
      )
    if restored is None:
      raise FileNotFoundError(
        f"Stage {stage!r} has saved no model in {workdir / stage}. "
        + (
          f"Run it first: add {stage} to config.stages."
          if workdir == self.workdir
          else "Restore its folder model/ from a copy, or name another model."
        )
      )
    reported = workdir_lib.result(workdir, stage).get("model")
    found = fingerprint_lib.fingerprint(restored[1])
    if reported is not None and reported != found:
      raise ValueError(
        f"{folder} holds another model ({found[:12]}) than stage {stage!r} "
        f"reported ({str(reported)[:12]}). Restore the folder from a copy, use "
        f"a new --workdir, {workdir_lib.remedy(stage)}."
      )
    return restored[1]


def from_config(
  workdir: str | os.PathLike,
  config: Mapping[str, Any],
  recorded: Callable[[], None] = lambda: None,
  needs: Mapping[str, int] | None = None,
) -> Run:
  """`setup` with the values of a config, its empty sizes derived.

  Args:
    workdir: folder of the run.
    config: nested values, as in configs/common.py.
    recorded: called when a stage has recorded its settings.
    needs: the least tasks of the stages that will run, see `tasks.load`.

  Raises:
    ValueError: see `setup`.
  """
  config = sizes_lib.derive(config)
  return setup(
    workdir,
    temperature=config["rollout"]["temperature"],
    init=initial_model.others(config),
    recorded=recorded,
    needs=needs,
    **{name: config[name] for name in SECTIONS},
  )


def setup(
  workdir: str | os.PathLike,
  *,
  seed: int,
  mesh: Mapping[str, int],
  tokenizer: Mapping[str, Any],
  model: Mapping[str, Any],
  data: Mapping[str, Any],
  max_prompt_tokens: int,
  max_reference_tokens: int,
  engine: Mapping[str, Any],
  scoring: Mapping[str, Any],
  reward: Mapping[str, Any],
  temperature: float,
  checkpoint: str = "",
  redo: str = "",
  init: Sequence[str] = (),
  needs: Mapping[str, int] | None = None,
  log: str = "jsonl,tensorboard",
  recorded: Callable[[], None] = lambda: None,
) -> Run:
  """Loads or builds everything that the stages share; trains only the BPE.

  Args:
    workdir: folder of the run.
    seed: random seed of the run.
    mesh: axis sizes, see `sharding.mesh.create`.
    tokenizer: `path`, a directory, GGUF file or hub id, or "" for that of the
      checkpoint or, without one, to train a BPE of `bpe_size` ids on the
      documents; and arguments of `Tokenizer.configured`.
    model: see `model_config.resolve`.
    data: arguments of `tasks.load` except the seed.
    max_prompt_tokens: longer chat prompts are dropped and counted.
    max_reference_tokens: longer references are dropped and counted.
    engine: arguments of `rollout.engine.Engine`.
    scoring: arguments of `scoring.logprob_scorer.LogprobScorer`.
    reward: arguments of `score.RewardScorer`.
    temperature: sampling temperature of the policy, also used in updates.
    checkpoint: directory, GGUF file or hub id of the base model, which also
      has its sizes, its tokenizer and its stop ids; "" if the base model is
      trained.
    redo: stages to drop first, see `workdir.redo`.
    init: models of other runs, and checkpoints, that stages start from; see
      `initial_model`.
    needs: the least tasks of the stages that will run, see `tasks.load`.
    log: where metrics go, see `trackers.parse`.
    recorded: called when a stage has recorded its settings.

  Raises:
    ValueError: settings that contradict one another, or a model of `init` that
      does not fit.
  """
  workdir = workdir_lib.make(workdir)
  device_mesh = mesh_lib.create(dict(mesh))
  if checkpoint:
    data = {**data, "documents": 0}  # for a model that is trained from nothing
    tokenizer = {**tokenizer, "path": tokenizer["path"] or checkpoint}
    # What contradicts the checkpoint is refused before a tokenizer is read.
    model_config.resolve(model, checkpoint)
  tasks = tasks_lib.load(seed=seed, needs=needs, **data)
  settings = {
    "seed": seed,
    "tokenizer": _plain(tokenizer),
    "data": _plain(data),
    "max_prompt_tokens": max_prompt_tokens,
    "max_reference_tokens": max_reference_tokens,
  }
  dropped_stages = workdir_lib.redo(workdir, redo)
  # Without a checkpoint, another run's model brings its tokenizer.
  runs = [
    pathlib.Path(name).resolve().parent
    for name in init
    if not checkpoint and not initial_model.is_checkpoint(name)
  ]
  loaded_tokenizer, tokenizer_digest, trained_ids = _tokenizer(
    workdir,
    tasks,
    checkpoint,
    settings,
    dropped_stages,
    next(iter(runs), None),
    **tokenizer,
  )
  config = model_config.resolve(
    model,
    checkpoint,
    vocab_size=loaded_tokenizer.vocab_size,
    added_tokens=trained_ids is not None,
  )
  for name in init:
    # A model that is gone is missed by the stage that has not read it yet.
    if _is_hub_id(name) or os.path.exists(name):
      initial_model.check(
        name, config, tokenizer_digest[1], added_tokens=trained_ids is not None
      )
  if model_config.two_factor_sets(config):
    print(
      f"model: LongRoPE with its {config.rope_factors} factors for the whole "
      "run (config.model.rope_factors)",
      flush=True,
    )
  settings["model"] = dataclasses.asdict(config)
  kept: dict[str, Any] = {}
  dropped: dict[str, int] = {}
  for name in ("synthesis", "rl", "held_out"):
    every = getattr(tasks, name)
    lengths = exchange.map_across_processes(
      every,
      lambda prompts: prompts_lib.token_lengths(prompts, loaded_tokenizer),
    )
    kept[name], counts = prompts_lib.filter_by_length(
      every,
      lengths,
      max_prompt_tokens,
      max_reference_tokens,
      # The search of the cold start does not read references.
      require_reference=name != "synthesis",
    )
    dropped |= {f"{name}/{key}": count for key, count in counts.items()}
    if counts["kept"] < sum(counts.values()):
      print(
        f"{name}: {counts} (at most {max_prompt_tokens} prompt and "
        f"{max_reference_tokens} reference tokens)",
        flush=True,
      )
  return _build(
    workdir,
    config,
    device_mesh,
    loaded_tokenizer,
    temperature=temperature,
    engine=engine,
    scoring=scoring,
    reward=reward,
    seed=seed,
    tasks=dataclasses.replace(tasks, **kept),
    dropped=dropped,
    trained_ids=trained_ids,
    settings=settings,
    tokenizer_digest=tokenizer_digest,
    log=trackers.parse(log),
    redo=dropped_stages,
    recorded=recorded,
  )


def of_workdir(
  workdir: str | os.PathLike, config: Mapping[str, Any], stage: str
) -> Run:
  """The run of a folder, for its models alone; see `from_config`.

  Model and tokenizer are those that the folder has recorded: data and
  checkpoint may be gone. The run has no tasks, and changes nothing.

  Args:
    workdir: folder of the run.
    config: nested values, as in configs/common.py.
    stage: whose model will be loaded.

  Raises:
    FileNotFoundError: the stage has not begun, or the tokenizer is missing.
  """
  workdir, config = pathlib.Path(workdir), sizes_lib.derive(config)
  found = workdir_lib.nested(workdir_lib.settings(workdir, stage))
  if "model" not in found:
    raise FileNotFoundError(
      f"Stage {stage!r} has not begun in {workdir}. Run it first: add {stage} "
      "to config.stages; or name another stage with --stage."
    )
  return _build(
    workdir,
    model_config.restore(found["model"]),
    mesh_lib.create(dict(config["mesh"])),
    tokenizer_lib.Tokenizer.load(workdir / "tokenizer"),
    temperature=config["rollout"]["temperature"],
    engine=config["engine"],
    scoring=config["scoring"],
    # A reward of the user's own may be gone, too.
    reward=_plain(config["reward"])
    | {"terms": EVAL_TERMS, "options": {}, "by_task": {}},
    seed=config["seed"],
    tasks=tasks_lib.Tasks([], [], [], []),
    dropped={},
    trained_ids=None,
    settings={},
    tokenizer_digest=("", ""),
    log=(),
    redo=(),
    recorded=lambda: None,
  )


def _build(
  workdir: pathlib.Path,
  config: decoder.Config,
  device_mesh: jax.sharding.Mesh,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  temperature: float,
  engine: Mapping[str, Any],
  scoring: Mapping[str, Any],
  reward: Mapping[str, Any],
  **fields: Any,
) -> Run:
  """Builds the engine and the scorers of a run.

  Args:
    workdir: folder of the run.
    config: of the model.
    device_mesh: the mesh.
    tokenizer: of the run.
    temperature: sampling temperature of the policy.
    engine: arguments of `rollout.engine.Engine`.
    scoring: arguments of `scoring.logprob_scorer.LogprobScorer`.
    reward: arguments of `score.RewardScorer`.
    **fields: the other fields of `Run`.
  """
  graphdef, shapes = decoder.abstract(config)
  axes = decoder.logical_axes(shapes)
  layout.check(shapes, axes, device_mesh, rules.TRAIN)
  reward, automata = _plain(reward), str(workdir / "automata")
  sizes = {"vocab_size": config.vocab_size, **scoring}

  def build_engine(
    on: jax.sharding.Mesh,
  ) -> tuple[engine_lib.Engine, scorer_lib.LogprobScorer]:
    return (
      engine_lib.Engine(graphdef, config, mesh=on, **engine),
      scorer_lib.LogprobScorer(graphdef, mesh=on, **sizes),
    )

  # Only OPERA's terms, with their options.
  terms = compose.weights(EVAL_TERMS)
  eval_reward = {
    "terms": EVAL_TERMS,
    "by_task": {},
    "options": {n: o for n, o in reward["options"].items() if n in terms},
  }

  def build_scorers(graphdef: nnx.GraphDef) -> dict[str, Any]:
    logprob_scorer = scorer_lib.LogprobScorer(
      graphdef, mesh=device_mesh, **sizes
    )
    policy_logprob_scorer = logprob_scorer
    if temperature != 1:
      policy_logprob_scorer = scorer_lib.LogprobScorer(
        graphdef, mesh=device_mesh, temperature=temperature, **sizes
      )
    return {
      "logprob_scorer": logprob_scorer,
      "policy_logprob_scorer": policy_logprob_scorer,
      "reward_scorer": score_lib.RewardScorer(
        logprob_scorer, tokenizer, cache_dir=automata, **reward
      ),
      "eval_scorer": score_lib.RewardScorer(
        logprob_scorer,
        tokenizer,
        cache_dir=automata,
        **reward | eval_reward,
      ),
    }

  return Run(
    workdir=workdir,
    mesh=device_mesh,
    tokenizer=tokenizer,
    model=config,
    graphdef=graphdef,
    axes=axes,
    build_engine=build_engine,
    build_scorers=build_scorers,
    engine=engine_lib.Engine(graphdef, config, mesh=device_mesh, **engine),
    reward=reward,
    **build_scorers(graphdef),
    **fields,
  )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
  """Converts nested mappings of a config to plain dicts."""
  return {
    name: _plain(value) if hasattr(value, "items") else value
    for name, value in values.items()
  }


def data_settings(
  settings: Mapping[str, Any], tasks: Sequence[str]
) -> dict[str, Any]:
  """Selects the settings that some fields of `tasks.Tasks` depend on."""
  data = settings["data"]
  counts = {field for name in tasks for field in _COUNTS[name]}
  if data["kind"] == "jsonl":
    # One file is split, and RL samples after the cold start.
    counts |= {"held_out"} | ({"synthesis"} if "rl" in tasks else set())
  others = {field for fields in _COUNTS.values() for field in fields} - counts
  out = {
    "seed": settings["seed"],
    "data": {
      name: value
      for name, value in data.items()
      if name not in others and name not in _READ
    },
  }
  # A set is identified by its digest, as a file is; its weight is RL's.
  out["data"]["mix"] = [
    [one.name, one.weight] if "rl" in tasks else one.name
    for one in mixture.parse(data["mix"])
  ]
  if set(tasks) - {"documents"}:
    for name in ("max_prompt_tokens", "max_reference_tokens"):
      out[name] = settings[name]
  return out


def data_inputs(
  tasks: tasks_lib.Tasks, names: Sequence[str]
) -> dict[str, tuple[str, str]]:
  """Places and digests of the data that some fields of the tasks come from."""
  return {
    field if "/" in field else f"data.{field}": found
    for field, found in tasks.digests.items()
    if field != "responses_path" or "documents" in names
  }


def directory_inputs(
  name: str, path: str, files: tuple[str, ...], finished: bool
) -> workdir_lib.Inputs:
  """Describes an input directory of a stage for `workdir.Stage`.

  Args:
    name: of the config field that names the directory.
    path: the directory or file, or a hub id, which counts as a setting and not
      as an input.
    files: patterns of the files in the digest.
    finished: whether the stage has finished; then the directory may be gone.
  """
  place = pathlib.Path(path)
  if place.is_dir():
    return {name: (path, digest.folder(place, files))}
  if place.is_file():
    return {name: (path, digest.file(place))}
  return {name: None} if finished else {}


def _with_effect(values: Any) -> Any:
  """Drops the settings of a stage that its result does not depend on."""
  if not isinstance(values, dict):
    return values
  return {k: v for k, v in values.items() if k not in _WITHOUT_EFFECT}


def _tokenizer(
  workdir: pathlib.Path,
  tasks: tasks_lib.Tasks,
  checkpoint: str,
  settings: Mapping[str, Any],
  redo: Sequence[str],
  other: pathlib.Path | None,
  path: str,
  bpe_size: int,
  think: Sequence[str] = (),
  chat_template: str = "",
  enable_thinking: str = "",
) -> tuple[tokenizer_lib.Tokenizer, tuple[str, str], int | None]:
  """Loads, copies or trains the run's tokenizer, as a stage.

  Args:
    workdir: folder of the run.
    tasks: whose documents a tokenizer is trained on.
    checkpoint: of the run, with the stop ids.
    settings: of the run.
    redo: stages that may be dropped.
    other: folder of the run whose tokenizer is taken, unless `path` names one.
    path: directory, GGUF file or hub id of a tokenizer, or "".
    bpe_size: ids of a tokenizer that is trained.
    think: of `Tokenizer.configured`, as the two below.
    chat_template: see there.
    enable_thinking: see there.

  Returns:
    The tokenizer; its path and digest; how many ids it had before tokens were
    added to it, or None if none were.
  """
  if path:
    recorded: dict[str, Any] = {"tokenizer": {"path": path}}
    made_from = exchange.on_main_process(
      lambda: directory_inputs(
        "tokenizer.path",
        path,
        TOKENIZER_FILES,
        finished=(workdir / "tokenizer" / "DONE.json").exists(),
      )
    )
  elif other:
    recorded = {"tokenizer": {"of": "another run"}}
    source = other / "tokenizer"
    made_from = exchange.on_main_process(
      lambda: {
        "tokenizer": (str(source), digest.folder(source, _SAVED_TOKENIZER))
        if source.is_dir()
        else None
      }
    )
  else:
    recorded = {"tokenizer": {"bpe_size": bpe_size}}
    recorded |= data_settings(settings, ("documents",))
    made_from = data_inputs(tasks, ("documents",))
  options: dict[str, Any] = {
    "think": think,
    "chat_template": chat_template,
    "enable_thinking": enable_thinking,
  }
  # Only what is set counts, so that older runs go on.
  recorded["tokenizer"] |= {k: v for k, v in options.items() if v}
  if other and not path and (other / "tokenizer").is_dir():
    _check_options(other, recorded["tokenizer"])
  template = pathlib.Path(chat_template)
  if template.is_file():
    made_from["tokenizer.chat_template"] = (
      str(template),
      digest.file(template),
    )
  stop_ids = _checkpoint_stop_ids(checkpoint)
  recorded["ends"] = list(stop_ids)
  later = workdir_lib.ORDER[1:]
  if not any(workdir_lib.begun(workdir, name) for name in later):
    redo = ("tokenizer",)  # nothing has been made with it
  stage = workdir_lib.Stage(
    workdir, "tokenizer", recorded, made_from, redo=redo
  )

  def make() -> str:
    if not stage.finished() and other and not path:
      stage.begin_here()
      for name in _SAVED_TOKENIZER:
        for file in (other / "tokenizer").glob(name):
          shutil.copyfile(file, stage.path / file.name)
      done = workdir_lib.result(other, "tokenizer")
      workdir_lib.write(stage.path / "DONE.json", done)
    elif not stage.finished():
      original = _new_tokenizer(tasks, path, bpe_size)
      tokenizer = original.configured(**options)
      stage.begin_here()
      tokenizer.with_ends(stop_ids).save(stage.path)
      found = digest.folder(stage.path, _SAVED_TOKENIZER)
      added = tokenizer.vocab_size - original.vocab_size
      workdir_lib.write(
        stage.path / "DONE.json",
        {"sha256": found, "ids": original.vocab_size, "added_ids": added},
      )
    found = digest.folder(stage.path, _SAVED_TOKENIZER)
    reported = workdir_lib.result(workdir, "tokenizer").get("sha256")
    if found != reported:
      raise ValueError(
        f"{stage.path} holds another tokenizer ({found[:12]}) than the run "
        f"saved there ({str(reported)[:12]}). Restore its files from a copy, "
        f"use a new --workdir, {workdir_lib.remedy('tokenizer')}."
      )
    return found

  with stage.locked():
    found = exchange.on_main_process(make)
  done = workdir_lib.result(workdir, "tokenizer")
  tokenizer = tokenizer_lib.Tokenizer.load(stage.path)
  trained_ids = done["ids"] if done["added_ids"] and checkpoint else None
  return tokenizer, (str(stage.path), found), trained_ids


def _is_hub_id(name: str) -> bool:
  return initial_model.is_checkpoint(name) and not os.path.exists(name)


def _check_options(other: pathlib.Path, options: Mapping[str, Any]) -> None:
  """Refuses options that the tokenizer of another run was not made with."""
  theirs = workdir_lib.settings(other, "tokenizer")
  theirs = workdir_lib.nested(theirs).get("tokenizer", {})
  wrong = [
    f"config.tokenizer.{name} is {value!r} and {theirs.get(name)!r} there"
    for name, value in options.items()
    if name != "of" and theirs.get(name) != _as_json(value)
  ]
  if wrong:
    raise ValueError(
      f"The tokenizer is that of the model in {other}, and {'; '.join(wrong)}. "
      "Leave these fields unset, or give the values of that run."
    )


def _as_json(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value


def _checkpoint_stop_ids(checkpoint: str) -> tuple[int, ...]:
  """The stop ids of a checkpoint; empty without one."""
  if not checkpoint or gguf_header.is_gguf(pathlib.Path(checkpoint)):
    return ()  # a GGUF file's tokenizer names them itself
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
