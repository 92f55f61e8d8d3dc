"""The OPERA training pipeline, top to bottom (arXiv 2606.25757).

  python -m experiments.opera_rl --config=configs/tiny.py --workdir=runs/tiny

prompts -> base model -> trace synthesis -> selection -> SFT -> RL -> evaluation
-> report. Every stage saves its result in the workdir and runs once; after a
kill, the same command resumes the run. The config names rewards, advantage
estimators and loss; `configs/methods/` has recipes of related methods.

Shape key: B prompts per step, N samples per prompt.
"""

import time

from absl import app, flags, logging
from etils import epy

from opera_jax import config_flag
from opera_jax.sharding import clock  # starts the run's clock

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  import jax

  from opera_jax import structs
  from opera_jax.data import batching
  from opera_jax.data import rl as rl_data
  from opera_jax.models import lora
  from opera_jax.plan import memory_floor
  from opera_jax.rewards import smoothing
  from opera_jax.rl import (
    advantages,
    learner,
    rollouts,
    sampler_trainer,
    score,
    step_metrics,
  )
  from opera_jax.run import model_config, setup, sizes, workdir
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
    stage_times,
    supervised,
    training_loop,
  )
  from opera_jax.synthesis import filters, rl_filter
  from opera_jax.train import checkpoint, metrics, optimizer
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
  if runtime.is_main_process():
    print(
      f"opera_rl: base,{config.stages} in {_WORKDIR.value}, on "
      f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      flush=True,
    )
  opera(config, _WORKDIR.value)


def opera(config, folder: str) -> None:
  """Runs the whole method in the run's folder; SIGTERM saves and exits."""
  with checkpoint.Preemption() as preemption:
    run_stages(config, folder, preemption)


def run_stages(config, folder: str, preemption) -> None:
  """Runs the method's stages in order."""
  times = stage_times.StageTimes(clock.began())
  stages = workdir.parse_stages(config.stages, STAGES)
  config_check.check(config.to_dict(), stages, folder)
  config = sizes.derive(config)
  search = cold_start.Search(**config.synthesis)
  select = config.select.to_dict()
  rl_rules = rl_filter.Rules(**select.pop("rl"))
  rules = filters.Rules(**select)
  with preemption.exit_at_once():
    run = setup.setup(
      folder,
      temperature=config.rollout.temperature,
      needs=least_tasks(config, stages),
      **{name: config[name] for name in setup.SECTIONS},
    )
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
      moment_dtype=config.rl.moment_dtype,
      adapter=lora.settings(**config.rl.lora) if "rl" in stages else None,
    ),
    memory_floor.device_limit(run.mesh),
  )
  if "rl" in stages:
    check_enough_prompts(config, len(run.tasks.rl))
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
  times.enter("base")
  supervised.base(
    run,
    supervised.Recipe(**config.base),
    preemption,
    path=config.checkpoint,
  )
  # 2. Cold start: fork the thought at reflection words and keep the
  # continuation of lowest perplexity; then filter the traces.
  if "synthesize" in stages:
    times.enter("synthesize")
    cold_start.synthesize(
      run,
      search,
      dataset_card.Card(**config.card),
      preemption,
    )
  if "select" in stages:
    times.enter("select")
    cold_start.select(
      run,
      rules,
      config.reward.keywords,
      dataset_card.Card(**config.card),
      preemption,
    )
  # 3. SFT on the selected traces.
  if "sft" in stages:
    times.enter("sft")
    supervised.sft(run, supervised.Recipe(**config.sft.to_dict()), preemption)
  # 4. RL: reward reflections that raise the log-probability of the reference,
  # on prompts that the SFT model neither always solves nor always fails.
  if "rl" in stages:
    times.enter("rl")
    selected = rl_select.select(
      run,
      rl_rules,
      run.sampling(**config.rollout.to_dict()),
      preemption,
    )
    check_enough_prompts(config, len(selected.tasks.rl))
    reinforce(selected, config.rl, config.rollout, preemption)
  # 5. Evaluation: all three models on held-out prompts, also by a measure that
  # no reward uses.
  if "evaluate" in stages:
    times.enter("evaluate")
    evaluate.evaluate(
      run,
      evaluate.Settings(
        max_new_tokens=config.rollout.max_new_tokens, **config.evaluate
      ),
      preemption,
    )
  if "report" in stages:
    times.enter("report")
    reporting.write(run, config.to_dict(), preemption)
  workdir.redone(folder)
  times.finish(folder)


def least_tasks(config, stages) -> dict[str, int]:
  """The least tasks that the stages of this run work with."""
  least = {
    "synthesize": ("synthesis", 1),
    "rl": ("rl", config.rl.prompts),
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


def check_enough_prompts(config, num_prompts: int) -> None:
  """Refuses RL with fewer prompts than one step needs.

  Raises:
    ValueError: `num_prompts` is below config.rl.prompts.
  """
  if num_prompts < config.rl.prompts:
    raise ValueError(
      f"config.rl.prompts is {config.rl.prompts} prompts per step and only "
      f"{num_prompts} tasks are left for RL. Lower it, or raise "
      "config.data.rl, add tasks, raise the length limits, or loosen "
      "config.select.rl."
    )


def reinforce(run: "setup.Run", rl, rollout, preemption) -> None:
  """RL with the rewards, advantage estimators and loss of the config.

  OPERA uses GRPO on R = alpha R_ppl + (1 - alpha) R_self (0/1 for maths).
  """
  stage = run.stage(
    "rl",
    tasks=("rl",),
    models=(rl.init or "sft", *filter(None, [rl.teacher])),
    rl=rl.to_dict(),
    rollout=rollout.to_dict(),
    reward=run.reward,
  )
  with stage.locked(preemption):
    if not stage.finished():
      stage.finish(train(run, stage, rl, rollout, preemption))


def train(run: "setup.Run", stage: "workdir.Stage", rl, rollout, preemption):
  """Runs the RL steps; returns the stage's result."""
  # One model, mostly the SFT model, initialises the policy and is the reference
  # of KL. With LoRA, policy and reference share its frozen weights; an adapter
  # that is switched off makes the reference.
  run = run.with_lora(lora.settings(**rl.lora))
  reference = run.load(rl.init or "sft")
  teacher = run.load(rl.teacher) if rl.teacher else reference
  seed = run.seed if rl.seed < 0 else rl.seed
  prompts = [p for p in run.tasks.rl if p.task in rl.tasks]
  prompt_ids = run.prompt_ids(prompts)
  batches = 1 + rl.max_resamples  # maximum prompt batches per step
  epochs = -(-rl.steps * batches * rl.prompts // max(len(prompts), 1))
  order = batching.batch_order(len(prompts), rl.prompts, epochs, seed)
  updates_per_step = rl.prompts // rl.mini_batch
  schedule = optimizer.schedule(
    rl.learning_rate, rl.steps * updates_per_step, warmup_fraction=rl.warmup
  )
  adamw = optimizer.adamw(
    schedule,
    weight_decay=rl.weight_decay,
    max_grad_norm=rl.max_grad_norm,
    moment_dtype=rl.moment_dtype,
  )
  learn = learner.build(
    run.graphdef,
    adamw,
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
  restored = saves.restore(state)
  if restored is not None:
    step, state, host = restored
    ema, total_tokens = host["reward_ema"], host["sampled_tokens"]
    print(f"rl: resuming after step {step}", flush=True)
  log = metrics.Metrics(
    stage.path, "metrics", last_step=None if restored is None else step
  )
  update_programs = learner.programs(
    rl.row_buckets, rl.completions_per_row, run.engine.prompt_lengths()
  )
  print(
    f"rl: compiles at most {run.engine.programs()} programs to sample, "
    f"{run.logprob_scorer.programs()} to score, {update_programs} to update",
    flush=True,
  )

  with (
    jax.set_mesh(run.mesh),
    metrics.Progress(rl.steps, "rl", done=step) as progress,
  ):
    while step < rl.steps and not 0 < rl.token_budget <= total_tokens:
      seconds = {"time/start": time.monotonic()}
      policy = learn.policy(state.params, frozen)

      # Rollout: N samples per prompt. Reward: one scoring pass returns the
      # log-probabilities of the completions' tokens, and of the reference after
      # each reflective step, after the step before it, and after the whole
      # completion.
      batch_indices = [order[step * batches + at] for at in range(batches)]
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
        )
      except SystemExit:  # SIGTERM: this step is sampled again after resuming
        if step:
          saves.save(step, state, host_state(ema, total_tokens))
        raise
      scored = sampled.scored
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
      old = ref = scored.logprobs
      tokens = scored.rollouts.tokens()
      if run.policy_logprob_scorer is not run.logprob_scorer:
        old = run.policy_logprob_scorer.score_completions(policy, *tokens)
      if rl.kl_coef or learn.pairs:
        ref = run.policy_logprob_scorer.score_completions(reference, *tokens)
      seconds["time/reference"] = time.monotonic()

      # Advantages: one per token, packed with the tokens into rows.
      rows, advantage_metrics = packed_rows(
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

      # Update: one epoch over the completions, in mini-batches of prompts.
      updates = []
      for mini_batch in rl_data.mini_batches(rows, updates_per_step):
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
        | {"time/programs": runtime.compiled()}
      )
      log.write(step, line)
      watch.check(line["sampler_trainer/logprob_diff"], step)
      progress.update(tokens=sampled.sampled_tokens)
      stop = preemption.requested()
      if stop or step % rl.checkpoint_every == 0 or step == rl.steps:
        saves.save(step, state, host_state(ema, total_tokens))
      if stop:
        raise SystemExit(preemption.EXIT_CODE)
  log.close()
  saves.close()
  model = run.save("rl", learn.policy(state.params, frozen))
  return {"steps": step, "dropped": run.dropped, "model": model}


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
) -> "tuple[structs.Batch, dict[str, float]]":
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
    The packed rows, and metrics of the advantages.
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
  # Truncated importance weights correct for the sampler's distribution.
  weighted = advantages.importance_weighted(
    estimate.advantage,
    old=old_R,
    completions=completions,
    cap=rl.importance_cap,
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
  if learn.pairs:
    rows = rl_data.pairs(rows, scored.rollouts.samples, mini_batches)
  return rows, {k: float(v) for k, v in estimate.metrics.items()}


def host_state(ema: float | None, sampled: int) -> dict:
  """The host state that an RL checkpoint stores beside the arrays."""
  return {"reward_ema": ema, "sampled_tokens": sampled}


if __name__ == "__main__":
  app.run(main)
