"""The OPERA training pipeline, top to bottom (arXiv 2606.25757).

  python -m experiments.opera_rl --config=configs/tiny.py --workdir=runs/tiny

prompts -> base model -> trace synthesis -> selection -> SFT -> RL -> evaluation
-> report. Every stage saves its result in the workdir and runs once; after a
kill, the same command resumes the run. The config names rewards, advantage
estimators and loss; `configs/methods/` has recipes of related methods.

Shape key: B prompts per step, N samples per prompt.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags, logging
from etils import epy

from opera_jax import commands, config_flag
from opera_jax.sharding import clock  # starts the run's clock

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  import jax
  import numpy as np

  from opera_jax import structs
  from opera_jax.data import mixture
  from opera_jax.data import rl as rl_data
  from opera_jax.models import decoder, lora
  from opera_jax.plan import memory_floor, utilisation
  from opera_jax.rewards import smoothing
  from opera_jax.rl import (
    advantages,
    learner,
    prompt_sampling,
    rollout_files,
    rollouts,
    sampler_trainer,
    score,
    step_metrics,
    validation,
  )
  from opera_jax.run import (
    initial_model,
    model_config,
    record,
    setup,
    sizes,
    workdir,
  )
  from opera_jax.run import tasks as tasks_lib
  from opera_jax.sharding import layout, mesh, runtime
  from opera_jax.stages import (
    cold_start,
    config_check,
    dataset_card,
    evaluate,
    first_sample,
    preflight,
    reporting,
    rl_select,
    stage_lines,
    stage_times,
    supervised,
    training_loop,
  )
  from opera_jax.synthesis import filters, rl_filter
  from opera_jax.train import checkpoint, metrics, optimizer
  from opera_jax.train import progress as progress_lib
  from opera_jax.train import state as train_state
  from opera_jax.train import step as train_step

_CONFIG = config_flag.define("configs/tiny.py")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)
STAGES = ("base", "synthesize", "select", "sft", "rl", "evaluate", "report")


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # orbax logs every file
  config = _CONFIG.value
  runtime.start(**config.runtime, folder=_WORKDIR.value)
  opera(config, _WORKDIR.value)


def opera(config, folder: str) -> None:
  """Runs the method in the run's folder; SIGTERM and Ctrl-C save and exit."""
  with checkpoint.Preemption() as preemption:
    run_stages(config, folder, preemption)


def run_stages(config, folder: str, preemption) -> None:
  """Runs the method's stages in order."""
  times = stage_times.StageTimes(clock.began())
  stages = workdir.parse_stages(config.stages, STAGES)
  config_check.check(config.to_dict(), stages, folder)
  given = config  # what the workdir records; sizes are derived from it
  config = sizes.derive(given)
  if initial_model.reads_base(config, stages):
    stages.add("base")
  search = cold_start.Search(**config.synthesis)
  select = config.select.to_dict()
  rl_rules = rl_filter.Rules(**select.pop("rl"))
  rules = filters.Rules(**select)
  with preemption.exit_at_once():
    run = record.begin(folder, given, stages, needs=least_tasks(config, stages))
  lines = stage_lines.StageLines(
    run.workdir, [name for name in STAGES if name in stages]
  )
  lines.begin(
    STAGES,
    devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    dtype=config.model.dtype,
    page="report" in stages,
  )

  def enter(name: str) -> None:
    times.enter(name)
    lines.enter(name)

  check_batches_divide(config, mesh.num_data_shards(run.mesh))
  model_config.check_context(
    run.model, config.max_prompt_tokens + config.rollout.max_new_tokens
  )
  memory_floor.check(
    memory_floor.floor(
      run.model,
      run.mesh,
      prompts=config.engine.prompt_slots,
      samples=min(config.engine.slots, config.rl.samples),
      prompt_tokens=max(config.engine.prompt_buckets),
      new_tokens=config.rollout.max_new_tokens,
      cache_dtype=config.engine.cache_dtype,
      optimizer=config.rl.optimizer,
      moment_dtype=config.rl.moment_dtype,
      adapter=lora.settings(**config.rl.lora) if "rl" in stages else None,
    ),
    memory_floor.device_limit(run.mesh),
  )
  if "rl" in stages:
    check_enough_prompts(config, run.tasks)
    preflight.rl(run, rl_rules)
    truncated = run.sampling(**config.rollout.to_dict()).truncates()
    if truncated and not config.rl.importance_cap:
      print(
        "rl: warning: config.rollout truncates (top_k, top_p or min_p), so the "
        "sampler's probabilities exceed the policy's, and the update treats "
        "the samples as on-policy. config.rl.importance_cap=2.0 corrects this; "
        "the metric sampler_trainer/truncation_diff shows the difference.",
        flush=True,
      )
  if "synthesize" in stages:
    preflight.synthesis(run, search)
  # 1. Base model: load a checkpoint, or pretrain a small model.
  if "base" in stages:
    enter("base")
    supervised.base(
      run,
      supervised.Recipe(**config.base),
      preemption,
      path=config.checkpoint,
    )
  # 2. Cold start: fork the thought at reflection words and keep the
  # continuation of lowest perplexity; then filter the traces.
  if "synthesize" in stages:
    enter("synthesize")
    cold_start.synthesize(
      run,
      search,
      dataset_card.Card(**config.card),
      preemption,
    )
  if "select" in stages:
    enter("select")
    cold_start.select(
      run,
      rules,
      config.reward.keywords,
      dataset_card.Card(**config.card),
      preemption,
    )
  # 3. SFT on the selected traces.
  if "sft" in stages:
    enter("sft")
    supervised.sft(run, supervised.Recipe(**config.sft.to_dict()), preemption)
  # 4. RL: reward reflections that raise the log-probability of the reference,
  # on prompts that the model it starts from neither always solves nor always
  # fails.
  if "rl" in stages:
    enter("rl")
    selected = rl_select.select(
      run,
      rl_rules,
      run.sampling(**config.rollout.to_dict()),
      preemption,
      init=config.rl.init or "sft",
    )
    check_enough_prompts(config, selected.tasks)
    reinforce(selected, config.rl, config.rollout, preemption)
  # 5. Evaluation: all models on held-out prompts, also by a measure that no
  # reward uses.
  if "evaluate" in stages:
    enter("evaluate")
    evaluate.evaluate(
      run,
      evaluate.Settings(
        max_new_tokens=config.rollout.max_new_tokens, **config.evaluate
      ),
      preemption,
      lineage=initial_model.lineage(config),
    )
  if "report" in stages:
    enter("report")
    whole = record.of_run(folder, given, stages)
    reporting.write(run, sizes.derive(whole).to_dict(), preemption)
  workdir.redone(folder)
  if runtime.is_main_process():
    record.end(folder, given, stages)
  times.finish(folder)


def least_tasks(config, stages) -> dict[str, int]:
  """The least tasks that the stages of this run work with."""
  checks = config.rl.validation
  held = checks.prompts if checks.every else 0
  least = {
    "synthesize": ("synthesis", 1),
    "rl": ("rl", config.rl.prompts + held),
    "evaluate": ("held_out", 1),
  }
  return dict(least[stage] for stage in stages if stage in least)


def check_batches_divide(config, num_data_shards: int) -> None:
  """Refuses batches that do not divide over the data shards of the mesh.

  Raises:
    ValueError: names the batch and its number of rows.
  """
  rl = config.rl
  rows_per_group = (
    2 if rl.loss == "dpo" else rl.samples // rl.completions_per_row
  )
  for name, rows in (
    ("config.rl.mini_batch x rows of a group", rl.mini_batch * rows_per_group),
    ("config.base.batch_size", config.base.batch_size),
    ("config.sft.batch_size", config.sft.batch_size),
  ):
    if rows % num_data_shards:
      raise ValueError(
        f"{name} gives {rows} rows per update, which do not divide over "
        f"{num_data_shards} data shards. Change it, or config.mesh."
      )


def check_enough_prompts(config, tasks: "tasks_lib.Tasks") -> None:
  """Refuses RL with fewer prompts than one step needs.

  Raises:
    ValueError: the tasks, less those of validation, are fewer than
      config.rl.prompts, or those of a data set fewer than its share.
  """
  checks = config.rl.validation
  held = checks.prompts if checks.every else 0
  num_prompts = len(tasks.rl)
  if num_prompts - held < config.rl.prompts:
    less = f" beside {held} of config.rl.validation.prompts" if held else ""
    raise ValueError(
      f"config.rl.prompts is {config.rl.prompts} prompts per step and only "
      f"{max(num_prompts - held, 0)} tasks are left for RL{less}. Lower it, or "
      "raise config.data.rl, add tasks, raise the length limits, or loosen "
      "config.select.rl."
    )
  prompts, _ = rl_prompts(tasks, config.rl)
  if tasks.weights:
    mixture.batch_sets(
      [prompt.set for prompt in prompts],
      tasks.weights,
      config.rl.prompts,
      config.rl.steps * (1 + config.rl.max_resamples),
    )


def rl_prompts(tasks: "tasks_lib.Tasks", rl):
  """The prompts that RL trains on, and those that it validates on."""
  checks = validation.Settings(**rl.validation)
  return checks.split([p for p in tasks.rl if p.task in rl.tasks])


def reinforce(run: "setup.Run", rl, rollout, preemption) -> None:
  """RL with the rewards, advantage estimators and loss of the config.

  OPERA uses GRPO on R = alpha R_ppl + (1 - alpha) R_self (0/1 for maths).
  """
  settings = rl.to_dict()
  init = settings.pop("init") or "sft"  # an input: its digest counts
  stage = run.stage(
    "rl",
    tasks=("rl",),
    models=(init, *filter(None, [rl.teacher])),
    rl=settings,
    rollout=rollout.to_dict(),
    reward=run.reward,
  )
  with stage.locked(preemption):
    if not stage.finished():
      stage.finish(train(run, stage, rl, rollout, preemption))


def train(run: "setup.Run", stage: "workdir.Stage", rl, rollout, preemption):
  """Runs the RL steps; returns the stage's result."""
  # One model initialises the policy and is the reference of KL. With LoRA,
  # policy and reference share its frozen weights; an adapter that is switched
  # off makes the reference.
  run = run.with_lora(lora.settings(**rl.lora))
  reference = run.load(rl.init or "sft")
  teacher = run.load(rl.teacher) if rl.teacher else reference
  seed = run.seed if rl.seed < 0 else rl.seed
  checks = validation.Settings(**rl.validation)
  prompts, held = rl_prompts(run.tasks, rl)
  prompt_ids = run.prompt_ids(prompts)
  batches = 1 + rl.max_resamples  # maximum prompt batches per step
  updates_per_step = rl.prompts // rl.mini_batch
  schedule = optimizer.schedule(
    rl.learning_rate,
    rl.steps * updates_per_step * rl.epochs_per_batch,
    warmup_fraction=rl.warmup,
    decay=rl.decay,
  )
  learn = learner.build(
    run.graphdef,
    optimizer.build(
      rl.optimizer,
      schedule,
      weight_decay=rl.weight_decay,
      max_grad_norm=rl.max_grad_norm,
      moment_dtype=rl.moment_dtype,
      matrices=decoder.matrix_axes,
    ),
    schedule=schedule,
    temperature=rollout.temperature,
    kl_coef=rl.kl_coef if rl.kl_in == "loss" else 0.0,
    join=lora.combine if run.model.lora else None,
    **{name: rl[name] for name in learner.SETTINGS},
  )
  if run.model.lora:
    initial, (_, frozen) = run.new_adapter(seed), lora.split(reference)
  else:
    initial, frozen = run.load(rl.init or "sft"), None
  estimators = advantages.WeightedEstimators(
    rl.advantage, rl.advantage_options.to_dict(), run.policy_logprob_scorer
  )
  settings = run.sampling(**rollout.to_dict())
  best_folder, held_ids = stage.path / "best", run.prompt_ids(held)
  watch = sampler_trainer.Watch(rl.max_logprob_diff, rl.max_logprob_diff_steps)

  # One checkpoint holds trained parameters, optimizer, key, step and the reward
  # state.
  state = training_loop.place(
    train_state.create(
      learn.initial(initial, run.model.hidden_size),
      learn.optimizer,
      jax.random.key(seed + 2),
    ),
    run.mesh,
  )
  saves = checkpoint.Checkpoints(stage.path / "checkpoints")
  step, ema, total_tokens, shown = 0, None, 0, False
  host: dict[str, Any] = {}
  found = validation.Progress()
  restored = saves.restore(state)
  if restored is not None:
    step, state, host = restored
    ema, total_tokens = host["reward_ema"], host["sampled_tokens"]
    found = validation.Progress(**host.get("validation", {}))
    print(f"rl: resuming after step {step}", flush=True)
  sampler = prompt_sampling.build(
    rl.sampling,
    prompts,
    run.tasks.weights,
    batch_size=rl.prompts,
    batches=rl.steps * batches,
    seed=seed,
    floor=rl.sampling_floor,
    seen=host.get("variances", {}),
  )
  log = metrics.Metrics(
    stage.path,
    "metrics",
    last_step=None if restored is None else step,
    log=run.log,
  )
  update_programs = learner.programs(
    rl.row_buckets, rl.completions_per_row, run.engine.prompt_lengths()
  )
  kept = rollout_files.RolloutLog(
    stage.path / "rollouts", megabytes=rl.keep_rollouts, last_step=step
  )
  print(
    f"rl: compiles at most {run.engine.programs()} programs to sample, "
    f"{run.logprob_scorer.programs()} to score, {update_programs} to update",
    flush=True,
  )

  with (
    jax.set_mesh(run.mesh),
    progress_lib.Progress(rl.steps, "rl", done=step) as progress,
  ):
    while (
      step < rl.steps
      and not 0 < rl.token_budget <= total_tokens
      and not 0 < checks.patience <= found.misses
    ):
      seconds = {"time/start": time.monotonic()}
      policy = learn.policy(state.params, frozen)

      # Rollout: N samples per prompt. Reward: one scoring pass returns the
      # log-probabilities of the completions' tokens, and of the reference after
      # each reflective step, after the step before it, and after the whole
      # completion.
      batch_indices = [
        sampler.batch(step * batches + at) for at in range(batches)
      ]
      try:
        sampled = rollouts.collect(
          run.engine,
          run.reward_scorer,
          [
            ([prompts[i] for i in batch], [prompt_ids[i] for i in batch])
            for batch in batch_indices
          ],
          params=policy,
          rollout_params=run.for_rollout(policy),
          settings=settings,
          key=jax.random.fold_in(state.key, step),
          samples=rl.samples,
          filter_reward=rl.filter_reward,
          advance=lambda _: preemption.exit_if_requested(),
          phase=progress.phase,
        )
      except SystemExit:  # SIGTERM: this step is sampled again after resuming
        if step:
          stage.begin()
          saves.save(step, state, host_state(ema, total_tokens, found, sampler))
        raise
      scored = sampled.scored
      for groups in (*sampled.unused, scored):
        sampler.observe(groups)
      total_tokens += sampled.sampled_tokens
      if not shown:
        shown = True
        first_sample.show(
          "rl",
          f"the policy after {step} steps",
          scored.rollouts.prompts[0].prompt,
          scored.rollouts.texts[0],
        )
      if scored.open_ended_B.any() and "score" in scored.terms:
        ema = smoothing.update_ema(
          ema, scored.terms["score"][scored.open_ended_B]
        )
      seconds["time/rollout"] = seconds["time/start"] + sampled.rollout_seconds
      seconds["time/reward"] = seconds["time/rollout"] + sampled.reward_seconds

      # Log-probabilities under the policy before the updates, and under the
      # reference policy of KL.
      progress.phase("scoring the reference policy")
      old = ref = scored.logprobs
      tokens = scored.rollouts.tokens()
      if run.policy_logprob_scorer is not run.logprob_scorer:
        old = run.policy_logprob_scorer.score_completions(policy, *tokens)
      if rl.kl_coef or learn.pairs:
        ref = run.policy_logprob_scorer.score_completions(reference, *tokens)
      seconds["time/reference"] = time.monotonic()

      # Advantages: one per token, packed with the tokens into rows.
      rows, advantages_R, advantage_metrics = packed_rows(
        run,
        rl,
        scored,
        learn=learn,
        estimators=estimators,
        old=old,
        ref=ref,
        params=learn.whole(state.params, frozen),
        models={
          "policy": policy,
          "teacher": teacher,
          "ema": learn.mean(state.opt_state, frozen),
        },
      )
      seconds["time/advantages"] = time.monotonic()

      # Update: passes over the completions, in mini-batches of prompts.
      progress.phase("updating")
      updates = []
      length_BN = scored.rollouts.lengths()
      for arranged in rl_data.passes(
        rows,
        length_BN.sum(axis=1).tolist(),
        updates_per_step,
        epochs=rl.epochs_per_batch,
        balance=rl.balance_tokens,
        seed=(seed, step),
      ):
        if learn.pairs:
          arranged = rl_data.pairs(arranged, rl.samples, updates_per_step)
        for mini_batch in rl_data.mini_batches(arranged, updates_per_step):
          state, values = learn.update(
            state,
            layout.to_devices(mini_batch, layout.batch_sharding(run.mesh)),
            frozen,
          )
          updates.append(values)
      updates = layout.to_host(updates)
      for values in updates:
        train_step.check_finite(values, step + 1)
      seconds["time/update"] = time.monotonic()

      # One line of metrics, one checkpoint.
      step += 1
      line = (
        step_metrics.rl_step(
          scored,
          sampled.samples,
          old=old,
          ema=ema,
          updates=updates,
          clock=seconds,
        )
        | advantage_metrics
        | sampled.metrics()
        | utilisation.metrics(
          run.model,
          rows,
          passes=rl.epochs_per_batch,
          seconds=seconds["time/update"] - seconds["time/advantages"],
        )
        | {"rollout/total_tokens": total_tokens}
        | {"time/programs": runtime.compiled()}
      )
      # Validation: a new best model is saved before the checkpoint names it.
      due = checks.due(step, rl.steps)
      if due:
        progress.phase("validating")
        found, validated = validation.validate(
          checks,
          found,
          best_folder,
          run.engine,
          run.reward_scorer,
          held,
          held_ids,
          step=step,
          trained=state.params,
          params=learn.policy(state.params, frozen),
          for_rollout=run.for_rollout,
          settings=settings,
          key=jax.random.fold_in(jax.random.key(seed), rl.steps),
          advance=lambda _: preemption.exit_if_requested(),
        )
        line |= validated
      log.write(
        step,
        line,
        histograms=step_metrics.histograms(
          scored, rows.advantage[rows.loss_mask > 0]
        ),
        texts=step_metrics.texts(scored),
      )
      kept.write(step, rollout_records(run, sampled, step, advantages_R))
      watch.check(line["sampler_trainer/logprob_diff"], step)
      progress.show(step_metrics.shown(line))
      progress.update(tokens=sampled.sampled_tokens)
      stop = preemption.requested()
      if stop or due or step % rl.checkpoint_every == 0 or step == rl.steps:
        stage.begin()
        saves.save(step, state, host_state(ema, total_tokens, found, sampler))
        validation.clean(best_folder)
      if stop:
        raise SystemExit(preemption.exit_code())
  log.close()
  saves.close()
  if kept.summary():
    print(f"rl: {kept.summary()}", flush=True)
  params = state.params
  if checks.keep_best and found.best is not None:
    params = validation.load_best(best_folder, found.best_step, params)
  model = run.save("rl", learn.policy(params, frozen))
  result = {"steps": step, "dropped": run.dropped, "model": model}
  if checks.every:
    result["validation"] = dataclasses.asdict(found)
  return result


def packed_rows(
  run: "setup.Run",
  rl,
  scored: "score.Scored",
  *,
  learn: "learner.Learner",
  estimators: "advantages.WeightedEstimators",
  old: "structs.Logprobs",
  ref: "structs.Logprobs",
  params,
  models,
) -> "tuple[structs.Batch, Sequence[np.ndarray], dict[str, float]]":
  """Packs a step's completions into rows, with their advantages.

  Args:
    run: the run; its engine and mesh are used.
    rl: `config.rl`.
    scored: the completions with their rewards.
    learn: the update, with its critic and teacher if it has them.
    estimators: advantage estimators.
    old: log-probabilities of prompt + completion under the policy before the
      updates.
    ref: the same under the reference policy.
    params: of `learn.whole`, including a critic's.
    models: parameters of "policy", "teacher" and "ema".

  Returns:
    The packed rows, the advantage of each token of each completion, and metrics
    of the advantages.
  """
  completions = scored.rollouts.completions
  mini_batches = rl.prompts // rl.mini_batch
  old_R, ref_R = scored.of_completions(old), scored.of_completions(ref)
  # The position of each completion's tokens in the packed rows.
  sizes = scored.completion_sizes()
  placement = rl_data.place(
    [len(prefix) - size for prefix, size in zip(scored.prefixes, sizes)],
    sizes,
    rl.row_buckets,
    completions_per_row=rl.completions_per_row,
    padded_prompt=max(map(run.engine.bucket, scored.rollouts.prompt_ids)),
  )
  rows = rl_data.build_batch(placement, scored.prefixes, old_R, ref_R)
  # Advantages of every token from rewards, KL and a critic's values.
  value = learn.critic_values(
    params, rows, placement, mesh=run.mesh, mini_batches=mini_batches
  )
  estimate = estimators.estimate(
    models,
    scored,
    old_R,
    penalty=advantages.kl_penalties(
      old_R,
      ref_R,
      coef=rl.kl_coef if rl.kl_in == "reward" else 0.0,
      estimator=rl.kl_estimator,
    ),
    value=value,
  )
  # Importance weights correct for the sampler's distribution.
  weighted, weight_metrics = advantages.importance_weighted(
    estimate.advantage,
    old=old_R,
    completions=completions,
    cap=rl.importance_cap,
    level=rl.importance_level,
    mode=rl.importance_mode,
    floor=rl.importance_floor,
  )
  extra = learn.extra_targets(
    placement,
    scored.rollouts,
    value=value,
    returns=estimate.returns,
    requests=estimate.requests,
    models=models,
    buckets=rl.row_buckets,
    mesh=run.mesh,
    mini_batches=mini_batches,
  )
  rows = rl_data.with_advantages(rows, placement, weighted, extra)
  if rl.mask_truncated:
    # Its reward is in its group's baseline, its tokens are not in the loss.
    rows = rl_data.without(
      rows, placement, [not s.finished for s in completions]
    )
  found = {
    **{k: float(v) for k, v in estimate.metrics.items()},
    **weight_metrics,
    **advantages.spread(estimate.advantage),
  }
  return rows, estimate.advantage, found


def rollout_records(
  run: "setup.Run",
  sampled: "rollouts.Collected",
  step: int,
  advantages_R: "Sequence[np.ndarray]",
) -> "Iterator[dict[str, Any]]":
  """Records of a step's completions, those of dropped groups at the end."""
  decode = run.tokenizer.decode
  yield from rollout_files.records(
    sampled.scored, decode, step=step, advantages=advantages_R
  )
  for scored in sampled.unused:
    yield from rollout_files.records(scored, decode, step=step)


def host_state(
  ema: float | None,
  sampled: int,
  found: "validation.Progress",
  sampler: "prompt_sampling.PromptSampler",
) -> dict:
  """The host state that an RL checkpoint stores beside the arrays."""
  return {
    "reward_ema": ema,
    "sampled_tokens": sampled,
    "validation": dataclasses.asdict(found),
    "variances": sampler.variances,
  }


if __name__ == "__main__":
  commands.run(main)
