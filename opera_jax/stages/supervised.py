"""The two supervised stages: the base model, and SFT on selected traces."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.data import sft as sft_data
from opera_jax.data import traces
from opera_jax.models import decoder, hf_checkpoint, lora
from opera_jax.run import setup as setup_lib
from opera_jax.run import workdir as workdir_lib
from opera_jax.scoring import packed_rows
from opera_jax.sharding import layout, rules
from opera_jax.stages import training_loop as training_loop_lib
from opera_jax.train import checkpoint, optimizer
from opera_jax.train import state as train_state
from opera_jax.train import step as step_lib


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Settings of training on (prompt, completion) pairs; loss on completions
  only."""

  epochs: int
  batch_size: int  # rows per update
  row_tokens: int  # length of a row; a longer pair is dropped and counted
  packed: bool  # several pairs per row, separated by segment ids
  learning_rate: float
  warmup: float  # fraction of the updates
  decay: str  # see `optimizer.schedule`
  optimizer: str  # see `optimizer.build`
  b2: float
  weight_decay: float
  max_grad_norm: float
  moment_dtype: str  # of the optimizer's moments
  reduction: str  # see `losses.reduce`
  micro_batches: int
  validation_share: float  # of the pairs, held out; 0 turns validation off
  validation_every: int  # updates
  checkpoint_every: int  # updates
  seed: int = -1  # seed of the row order; below 0 uses the run's
  # Arguments of `lora.settings`; None trains all parameters.
  lora: Mapping[str, Any] | None = None
  # Model to start from, see `initial_model`; "" is the base model, and the base
  # model itself starts from nothing.
  init: str = ""

  def recorded(self) -> dict[str, Any]:
    """What the stage records; the model to start from is one of its inputs."""
    return {k: v for k, v in dataclasses.asdict(self).items() if k != "init"}


def base(
  run: setup_lib.Run,
  recipe: Recipe,
  preemption: checkpoint.Preemption,
  *,
  path: str = "",
) -> None:
  """Loads the base model, or pretrains one on the tasks' documents.

  Args:
    run: the run.
    recipe: how to pretrain; unused if the model is loaded.
    preemption: checked after every update, or every loaded tensor.
    path: directory, GGUF file or hub id of a checkpoint; "" pretrains.
  """
  if path:
    stage = run.stage(
      "base",
      inputs=lambda: setup_lib.directory_inputs(
        "checkpoint",
        path,
        setup_lib.MODEL_FILES,
        finished=bool(workdir_lib.result(run.workdir, "base")),
      ),
      base={"path": path},
    )
  else:
    stage = run.stage("base", tasks=("documents",), base=recipe.recorded())
  with stage.locked(preemption):
    if not stage.finished():
      _base(run, stage, recipe, preemption, path)


def _base(
  run: setup_lib.Run,
  stage: workdir_lib.Stage,
  recipe: Recipe,
  preemption: checkpoint.Preemption,
  path: str,
) -> None:
  count = decoder.parameter_count(decoder.abstract(run.model)[1])
  tokenizer, documents = run.tokenizer, run.tasks.documents
  print(
    f"base: {count:,} parameters, vocabulary {tokenizer.vocab_size:,}, "
    + (f"loaded from {path}" if path else f"{len(documents):,} documents"),
    flush=True,
  )
  if path:
    loaded = hf_checkpoint.load(
      path,
      run.model,
      run.mesh,
      rules.TRAIN,
      advance=preemption.exit_if_requested,
      trained_ids=run.trained_ids,
    )
    stage.begin()
    stage.finish({"path": path, "model": run.save("base", loaded)})
    return
  pairs = [
    (
      tokenizer.chat_prompt(d.prompt),
      tokenizer.completion(d.thought, d.answer, closed=d.closed, after=d.after),
    )
    for d in documents
  ]
  _train(run, stage, run.initial(), pairs, recipe, preemption)


def sft(
  run: setup_lib.Run, recipe: Recipe, preemption: checkpoint.Preemption
) -> None:
  """Fine-tunes the base model, or `recipe.init`, on the selected traces.

  With LoRA it trains an adapter and merges it: the result is a plain model.
  """
  init = recipe.init or "base"
  stage = run.stage(
    "sft", models=(init,), sets=("select",), sft=recipe.recorded()
  )
  with stage.locked(preemption):
    if stage.finished():
      return
    pairs = [
      (run.tokenizer.chat_prompt(t.prompt), t.completion)
      for t in traces.read(run.workdir / "select" / "traces")
    ]
    run = run.with_lora(lora.settings(**recipe.lora) if recipe.lora else None)
    _train(run, stage, run.load(init), pairs, recipe, preemption)


def _train(
  run: setup_lib.Run,
  stage: workdir_lib.Stage,
  params: Any,
  pairs: list[sft_data.Pair],
  recipe: Recipe,
  preemption: checkpoint.Preemption,
) -> None:
  seed = run.seed if recipe.seed < 0 else recipe.seed
  pairs, held = sft_data.split(pairs, recipe.validation_share, seed)
  build = functools.partial(
    sft_data.build,
    batch_size=recipe.batch_size,
    row_length=recipe.row_tokens,
    packed=recipe.packed,
    seed=seed,
    pad_id=run.tokenizer.pad_id,
  )
  data = build(pairs, epochs=recipe.epochs)
  cells = data.counts["rows"] * recipe.row_tokens
  print(
    f"{stage.name}: {data.counts['rows']:,} rows of {recipe.row_tokens:,} "
    f"tokens, {data.counts['tokens'] / cells:.0%} filled",
    flush=True,
  )
  if data.counts["rows"] < recipe.batch_size:
    print(
      f"{stage.name}: warning: {data.counts['kept']} pairs fill "
      f"{data.counts['rows']} of the {recipe.batch_size} rows of a batch; each "
      f"of the {len(data)} updates takes all of them. More data teaches more.",
      flush=True,
    )
  rate = optimizer.schedule(
    recipe.learning_rate,
    len(data),
    warmup_fraction=recipe.warmup,
    decay=recipe.decay,
  )
  transformation = optimizer.build(
    recipe.optimizer,
    rate,
    b2=recipe.b2,
    weight_decay=recipe.weight_decay,
    max_grad_norm=recipe.max_grad_norm,
    moment_dtype=recipe.moment_dtype,
    matrices=decoder.matrix_axes,
  )
  trained, frozen, join = params, None, None
  if run.model.lora is not None:
    trained, join = run.new_adapter(run.seed), lora.combine
    _, frozen = lora.split(params)
  update = step_lib.make_sft_update(
    packed_rows.logprob_fn(run.graphdef),
    transformation,
    name=stage.name,
    reduction=recipe.reduction,
    micro_batches=recipe.micro_batches,
    schedule=rate,
    join=join,
  )
  validate = None
  if held:
    validate = _validation(
      run,
      build(held, epochs=1),
      step_lib.make_validation_loss(
        packed_rows.logprob_fn(run.graphdef), join=join
      ),
      frozen,
    )
  trained = training_loop_lib.fit(
    stage,
    train_state.create(trained, transformation, jax.random.key(run.seed)),
    update,
    data.part,
    mesh=run.mesh,
    batch_size=recipe.batch_size,
    steps=len(data),
    checkpoint_every=recipe.checkpoint_every,
    preemption=preemption,
    frozen=frozen,
    validate=validate,
    log_to=run.log,
    validate_every=recipe.validation_every,
  )
  params = trained if join is None else join(trained, frozen)
  model = run.save(stage.name, params)
  stage.finish({"updates": len(data), **data.counts, "model": model})


def _validation(
  run: setup_lib.Run,
  data: sft_data.Batches,
  loss: Callable[..., tuple[jax.Array, jax.Array]],
  frozen: Any,
) -> Callable[[Any], jax.Array]:
  """From the trained parameters to the mean loss of a held-out token, nats."""
  size = data.batch_size
  mine = layout.local_rows(run.mesh, size)

  def validate(trained: Any) -> jax.Array:
    sums = [
      loss(
        trained,
        layout.from_local_rows(data.part(step, mine), run.mesh, size),
        frozen,
      )
      for step in range(len(data))
    ]
    total, tokens = (jnp.sum(jnp.stack(x)) for x in zip(*sums))
    return total / tokens

  return validate
