"""OPERA, top to bottom (arXiv 2606.25757).

  python -m experiments.opera_rl --config=configs/tiny.py --workdir=runs/tiny

prompts -> base model -> trace synthesis -> selection -> SFT -> RL ->
evaluation -> report. Every stage leaves its outcome in the workdir and is not
repeated; a killed run goes on where it was when the same command is given
again. Left out on purpose: a learned reward, a critic, a judge.

Shape key: B prompts a step, N samples a prompt.
"""

import time

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from opera_jax.credit import group
from opera_jax.data import batching
from opera_jax.data import rl as rl_data
from opera_jax.rewards import opera as opera_reward
from opera_jax.rollout import engine
from opera_jax.scoring import price
from opera_jax.sharding import layout, mesh
from opera_jax.stages import (
  cold_start,
  evaluate,
  fit,
  reporting,
  setup,
  summary,
  supervised,
  workdir,
)
from opera_jax.train import checkpoint, metrics, optimizer
from opera_jax.train import state as train_state
from opera_jax.train import step as train_step

_CONFIG = config_flags.DEFINE_config_file("config", "configs/tiny.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
STAGES = ("synthesize", "select", "sft", "rl", "evaluate", "report")


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # orbax narrates every file
  opera(_CONFIG.value, _WORKDIR.value)


def opera(config, folder: str) -> None:
  """The whole method, in the folder of the run."""
  stages = workdir.parse_stages(config.stages, STAGES)
  run = setup.setup(
    folder,
    temperature=config.rollout.temperature,
    **{name: config[name] for name in setup.SECTIONS},
  )
  check(config, mesh.data_ways(run.mesh))
  if "rl" in stages and len(run.tasks.rl) < config.rl.prompts:
    raise ValueError(
      f"config.rl.prompts asks for {config.rl.prompts} prompts a step and "
      f"{len(run.tasks.rl)} tasks are left for RL. Lower it, or raise "
      "config.data.rl, add tasks, or raise the length limits."
    )
  with checkpoint.Preemption() as preemption:
    # 1. A base model that thinks, badly.
    supervised.base(
      run,
      supervised.Recipe(**config.base),
      preemption,
      path=config.checkpoint,
    )
    # 2. Cold start: brake at reflection words, branch, keep what the policy
    #    finds least perplexing.
    if "synthesize" in stages:
      cold_start.synthesize(run, cold_start.Search(**config.synthesis))
    if "select" in stages:
      cold_start.select(
        run, cold_start.Select(**config.select), config.reward.keywords
      )
    # 3. SFT on what was selected.
    if "sft" in stages:
      supervised.sft(run, supervised.Recipe(**config.sft), preemption)
    # 4. RL: reflections that make the reference likelier are rewarded.
    if "rl" in stages:
      reinforce(run, config.rl, config.rollout, preemption)
    # 5. Was it real? Held-out prompts, all three models, an outside measure.
    if "evaluate" in stages:
      evaluate.evaluate(
        run,
        evaluate.Settings(
          max_new_tokens=config.rollout.max_new_tokens, **config.evaluate
        ),
      )
    if "report" in stages:
      reporting.write(run, config.to_dict())


def check(config, ways: int) -> None:
  """Refuses what would only fail hours later.

  Raises:
    ValueError: sizes that do not divide, or groups too small to rank.
  """
  rl = config.rl
  for name, samples in (
    ("rl", rl.samples),
    ("evaluate", config.evaluate.samples),
  ):
    if samples < 2:
      raise ValueError(
        f"R_ppl ranks a group of at least 2 samples, got {samples}. Raise "
        f"config.{name}.samples."
      )
  if rl.prompts % rl.mini_batch:
    raise ValueError(
      f"A step's {rl.prompts} prompts do not divide into mini-batches of "
      f"{rl.mini_batch}. Change config.rl.prompts or config.rl.mini_batch."
    )
  for name, rows in (
    ("config.rl.mini_batch x config.rl.samples", rl.mini_batch * rl.samples),
    ("config.base.batch_size", config.base.batch_size),
    ("config.sft.batch_size", config.sft.batch_size),
  ):
    if rows % ways:
      raise ValueError(
        f"{name} gives {rows} rows an update, which do not divide over "
        f"{ways} data shards. Change it, or config.mesh."
      )


def reinforce(run: setup.Run, rl, rollout, preemption) -> None:
  """GRPO on R = alpha R_ppl + (1 - alpha) R_self (0/1 for maths)."""
  stage = run.stage(
    "rl", rl=rl.to_dict(), rollout=rollout.to_dict(), reward=run.reward
  )
  if stage.finished():
    return

  # The SFT model is where the policy starts, and what KL holds it to.
  reference = run.load("sft")
  prompts, prompt_ids = run.tasks.rl, run.prompt_ids(run.tasks.rl)
  epochs = -(-rl.steps * rl.prompts // max(len(prompts), 1))
  order = batching.batch_order(len(prompts), rl.prompts, epochs, run.seed)
  updates_a_step = rl.prompts // rl.mini_batch
  adamw = optimizer.adamw(
    optimizer.schedule(
      rl.learning_rate,
      rl.steps * updates_a_step,
      warmup_fraction=rl.warmup,
    ),
    weight_decay=rl.weight_decay,
    max_grad_norm=rl.max_grad_norm,
  )
  update = train_step.make_policy_update(
    price.row_logprob(run.graphdef, temperature=rollout.temperature),
    adamw,
    clip_low=rl.clip_low,
    clip_high=rl.clip_high,
    dual_clip=rl.dual_clip,
    kl_coef=rl.kl_coef,
    kl_estimator=rl.kl_estimator,
    reduction=rl.reduction,
    micro_batches=rl.micro_batches,
  )
  settings = engine.Sampling(
    max_new_tokens=rollout.max_new_tokens,
    temperature=rollout.temperature,
    top_k=rollout.top_k,
    top_p=rollout.top_p,
    stop_ids=(run.tokenizer.end_id,),
  )

  # One checkpoint: parameters, optimizer, key, step, and the reward's state.
  state = fit.place(
    train_state.create(run.load("sft"), adamw, jax.random.key(run.seed + 2)),
    run.mesh,
  )
  saves = checkpoint.Checkpoints(stage.path / "checkpoints")
  start, ema = 0, None
  restored = saves.restore(state)
  if restored is not None:
    start, state, host = restored
    ema = host["reward_ema"]
    print(f"rl: goes on after step {start}", flush=True)
  log = metrics.Metrics(
    stage.path, "metrics", last_step=None if restored is None else start
  )

  with (
    jax.set_mesh(run.mesh),
    metrics.Progress(rl.steps, "rl", done=start) as progress,
  ):
    for step in range(start, rl.steps):
      seconds = {"time/start": time.monotonic()}
      chosen = order[step]
      batch = [prompts[i] for i in chosen]
      ids = [prompt_ids[i] for i in chosen]

      # Rollout: N samples of each prompt.
      samples = run.engine.sample(
        run.for_rollout(state.params),
        ids,
        settings,
        jax.random.fold_in(state.key, step),
        samples=rl.samples,
        ids=[p.id for p in batch],
      )
      seconds["time/rollout"] = time.monotonic()

      # Reward: one pass over every completion gives its tokens' prices, and
      # those of the reference after each reflective step, after the step
      # before it, and after the whole.
      scored = run.scorer.score(state.params, batch, ids, samples)
      if scored.opened_B.any():
        ema = opera_reward.update_ema(
          ema, scored.parts["score"][scored.opened_B]
        )
      seconds["time/reward"] = time.monotonic()

      # Credit: how much better than its group.
      advantage_BN = np.asarray(
        group.grpo(scored.total_BN, scale_by_std=rl.scale_by_std)
      )

      # The policy that the updates start from, and the one KL holds it to.
      old = scored.prices
      if run.policy_pricer is not run.pricer:
        old = run.policy_pricer.price(state.params, scored.trunks)
      ref = run.policy_pricer.price(reference, scored.trunks)
      seconds["time/reference"] = time.monotonic()

      # Update: one epoch over the samples, in mini-batches of prompts.
      rows = rl_data.rows(
        scored.trunks,
        [len(i) for i in ids for _ in range(rl.samples)],
        advantage_BN.reshape(-1),
        old.trunk_logprob,
        ref.trunk_logprob,
        buckets=rl.row_buckets,
      )
      updates = []
      for part in rl_data.mini_batches(rows, updates_a_step):
        state, values = update(
          state, jax.device_put(part, layout.rows(run.mesh))
        )
        updates.append(values)
      updates = jax.device_get(updates)
      for values in updates:
        train_step.check_finite(values, step + 1)
      seconds["time/update"] = time.monotonic()

      # One line of metrics, one checkpoint.
      log.write(
        step + 1,
        summary.rl_step(scored, samples, old, ema, updates, seconds),
      )
      progress.update(tokens=sum(len(s.tokens) for g in samples for s in g))
      leave = preemption.requested()
      if leave or (step + 1) % rl.checkpoint_every == 0 or step + 1 == rl.steps:
        saves.save(step + 1, state, {"reward_ema": ema})
      if leave:
        raise SystemExit(preemption.EXIT_CODE)
  log.close()
  saves.close()
  run.save("rl", state.params)
  stage.finish({"steps": rl.steps, "dropped": run.dropped})


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir"])
  app.run(main)
