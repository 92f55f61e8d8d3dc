"""A whole GRPO step: ours, and tunix's learner, same weights and sizes.

  .venv-bench/bin/python -m benchmarks.rl_step

(benchmarks/requirements.txt says how .venv-bench is made.)

A step samples N completions of each of B prompts, rewards them by a toy
function of their text, and makes one update on all of them: AdamW, clipped
surrogate, no KL. Ours is the stage itself, `experiments.opera_rl.reinforce`,
timed by its own metrics; samples share their prompt, in the update too. It
scores every completion with the policy before the update, for the old
log-probabilities; tunix, told of one iteration a batch, takes those of the
update's own forward pass and skips that.

Random weights and prompts of exact length, temperature 1, float32. Each method
runs in a process of its own; the first WARM steps are left out, and the median
of the others is kept.
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import harness

_METHOD = flags.DEFINE_string("method", None, "Run one method, for the parent.")
_FOLDER = flags.DEFINE_string("folder", None, "The parent's folder.")
_NAME = flags.DEFINE_string("workload", None, "SHORT or LONG.")

METHODS = ("tunix", "ours")
WARM = 1
RATE, DECAY, CLIP = 1e-6, 0.01, 1.0


@dataclasses.dataclass(frozen=True)
class Workload:
  """Sizes of one step."""

  prompts: int
  samples: int
  prompt_tokens: int
  new_tokens: int
  steps: int  # measured


WORKLOADS = {
  "SHORT": Workload(8, 8, 32, 64, 5),
  "LONG": Workload(4, 16, 256, 256, 3),
}


def model_config():
  """The model that both run; an embedding row for every id of the BPE."""
  from opera_jax.models import decoder

  return decoder.Config(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=768,
    tie_word_embeddings=True,
  )


def prompt_ids(workload: Workload) -> np.ndarray:
  """Every step's prompts, [steps * prompts, tokens] int32."""
  rng = np.random.default_rng(0)
  shape = ((WARM + workload.steps) * workload.prompts, workload.prompt_tokens)
  return rng.integers(300, model_config().vocab_size, shape).astype(np.int32)


def main(_) -> None:
  if _METHOD.value:
    _run_one(_METHOD.value, pathlib.Path(_FOLDER.value), _NAME.value)
    return
  from opera_jax.models import decoder, hf_checkpoint

  config, blocks = model_config(), []
  with tempfile.TemporaryDirectory() as folder:
    _, params = decoder.create(config, 0)
    hf_checkpoint.save(f"{folder}/model", params, config)
    for name in WORKLOADS:
      results = {m: _child(folder, name, m) for m in METHODS}
      blocks.append(_block(name, results))
      body = (
        f"`python -m benchmarks.rl_step`; {harness.hardware()}; float32; a "
        f"Qwen3 of {decoder.parameter_count(params):,} parameters "
        f"({config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"vocabulary {config.vocab_size:,}); medians of warm steps.\n\n"
        + "\n\n".join(blocks)
      )
      harness.write_section("rl_step", body)
  print(body)


def _child(folder, name, method) -> dict:
  print(f"{name}: {method} ...", flush=True)
  subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.rl_step"),
      *(f"--method={method}", f"--folder={folder}", f"--workload={name}"),
    ],
    check=True,
  )
  path = pathlib.Path(folder) / f"{method}-{name}.json"
  return json.loads(path.read_text())


def _block(name, results) -> str:
  w, ours = WORKLOADS[name], results["ours"]
  rows = [
    (
      method,
      f"{result['tokens']:,.0f}",
      f"{result['seconds']:.2f}",
      f"{result['tokens'] / result['seconds']:,.0f}",
      f"{result['seconds'] / ours['seconds']:.2f}",
      f"{result['peak_mib']:,.0f}",
    )
    for method, result in results.items()
  ]
  spent = ", ".join(f"{n} {s:.2f} s" for n, s in ours["parts"].items())
  return (
    f"**{name}**: {w.prompts} prompts x {w.samples} samples, prompt "
    f"{w.prompt_tokens}, {w.new_tokens} new; {w.steps} steps.\n\n"
    + harness.table(
      ("method", "tokens sampled", "s a step", "tokens/s", "ours is faster",
       "peak MiB"),
      rows,
    )
    + f"\n\nOf ours: {spent}."
  )  # fmt: skip


def _run_one(method: str, folder: pathlib.Path, name: str) -> None:
  run = {"ours": _ours, "tunix": _tunix}[method]
  result = run(folder, WORKLOADS[name])
  result["peak_mib"] = harness.peak_mib()
  (folder / f"{method}-{name}.json").write_text(json.dumps(result))


def _ours(folder, workload) -> dict:
  """The stage that the driver runs, timed by the metrics it leaves."""
  from opera_jax.configs import tiny
  from opera_jax.experiments import opera_rl
  from opera_jax.models import hf_checkpoint
  from opera_jax.run import setup
  from opera_jax.sharding import rules
  from opera_jax.train import checkpoint, metrics

  w, longest = workload, workload.prompt_tokens + workload.new_tokens
  config = tiny.get_config()
  config.unlock()
  config.data.synthesis = config.data.held_out = 1
  config.data.documents = 200
  config.data.rl = (WARM + w.steps) * w.prompts
  config.model = dataclasses.asdict(model_config())
  config.engine.prompt_slots, config.engine.slots = w.prompts, w.samples
  config.engine.prompt_buckets = (w.prompt_tokens,)
  config.engine.cache_buckets = (w.new_tokens,)
  config.scoring.batch_size = w.prompts
  config.scoring.prefix_buckets = (w.prompt_tokens, longest)
  config.scoring.slot_buckets = (w.samples,)
  config.scoring.continuation_buckets = (w.new_tokens,)
  config.reward.terms = "benchmarks.peers:toy"
  config.rollout.max_new_tokens = w.new_tokens
  config.rl.steps = WARM + w.steps
  config.rl.prompts = config.rl.mini_batch = w.prompts
  config.rl.samples = w.samples
  config.rl.completions_per_row = w.samples
  config.rl.row_buckets = (w.new_tokens,)
  config.rl.learning_rate, config.rl.weight_decay = RATE, DECAY
  config.rl.max_grad_norm, config.rl.kl_coef = CLIP, 0.0
  config.rl.max_logprob_diff = 0.0
  config.rl.checkpoint_every = 1_000
  workdir = folder / f"run-{w.prompt_tokens}"
  run = setup.setup(
    workdir,
    temperature=config.rollout.temperature,
    **{name: config[name] for name in setup.SECTIONS},
  )
  loaded = hf_checkpoint.load(
    str(folder / "model"), run.model, run.mesh, rules.TRAIN
  )
  run.stage("sft").finish({"model": run.save("sft", loaded)})
  every = prompt_ids(workload)

  class Exact(setup.Run):
    """A run whose prompts have exact lengths."""

    def prompt_ids(self, prompts):
      return list(every[: len(prompts)])

  fields = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
  with checkpoint.Preemption() as preemption:
    opera_rl.reinforce(Exact(**fields), config.rl, config.rollout, preemption)
  lines = metrics.read(workdir / "rl" / "metrics.jsonl")[WARM:]

  def median(name):
    return statistics.median(line[name] for line in lines)

  parts = {
    "rollout": "time/rollout",
    "reward and old log-probabilities": "time/reward",
    "advantage": "time/advantages",
    "update": "time/update",
  }
  return {
    "seconds": median("step_time"),
    "tokens": median("rollout/tokens"),
    "parts": {name: median(metric) for name, metric in parts.items()},
  }


def _tunix(folder, workload) -> dict:
  """Their learner with everything on one mesh, as its examples have it."""
  import jax
  from tunix.rl import rl_cluster
  from tunix.rl.grpo import grpo_learner
  from tunix.rl.rollout import base_rollout

  from benchmarks import peers
  from opera_jax.train import optimizer

  w = workload
  device = np.asarray(jax.devices()[:1]).reshape(1, 1)
  mesh = jax.sharding.Mesh(device, ("fsdp", "tp"))
  model = peers.tunix_model(str(folder / "model"), model_config(), mesh)
  roles = rl_cluster.Role
  steps = WARM + w.steps + 1  # the last one's end is not seen
  cluster = rl_cluster.RLCluster(
    actor=model,
    tokenizer=peers.Numbers(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(
        (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), mesh
      ),
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer.adamw(
          RATE, weight_decay=DECAY, max_grad_norm=CLIP
        ),
        eval_every_n_steps=1_000_000,
        max_steps=steps,
        mini_batch_size=w.prompts,
        train_micro_batch_size=w.prompts,
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=w.new_tokens,
        max_prompt_length=w.prompt_tokens,
        kv_cache_size=w.prompt_tokens + w.new_tokens,
        temperature=1.0,
        top_p=1.0,
      ),
    ),
  )
  lengths: list[int] = []

  def reward(prompts, completions, **_):
    lengths.append(sum(len(text.split()) for text in completions))
    return peers.toy(prompts, completions)

  learner = grpo_learner.GRPOLearner(
    rl_cluster=cluster,
    algo_config=grpo_learner.GRPOConfig(
      num_generations=w.samples, num_iterations=1, beta=0.0
    ),
    reward_fns=reward,
  )
  texts = [" ".join(map(str, row)) for row in prompt_ids(workload)]
  texts += texts[: w.prompts]
  begun: list[float] = []

  def batches():
    for step in range(steps):
      begun.append(time.perf_counter())
      some = texts[step * w.prompts : (step + 1) * w.prompts]
      yield {"prompts": np.asarray(some)}

  learner.train(batches())
  return {
    "seconds": statistics.median(np.diff(begun)[WARM:]),
    "tokens": statistics.median(lengths[WARM:]),
  }


if __name__ == "__main__":
  app.run(main)
