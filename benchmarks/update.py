"""One policy update: what sharing the prompt and keeping less are worth.

  python -m benchmarks.update

The baseline gives every sample a row of its own and keeps all that the forward
pass made (remat "none"); against it, products and attention alone are kept
("dots"), and the samples of a prompt stand behind one copy of it
(config.rl.completions_per_row). Same random weights, samples, advantages and
AdamW; the methods take turns in one process, and the median of each is kept.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import harness, rl_step
from opera_jax.data import rl as rl_data
from opera_jax.models import decoder
from opera_jax.plan import cost
from opera_jax.scoring import packed_rows
from opera_jax.train import optimizer
from opera_jax.train import state as train_state
from opera_jax.train import step as step_lib

REPEATS = 5
METHODS = (
  ("a row a sample, all kept", "none", False),
  ("a row a sample", "dots", False),
  ("prompts shared", "dots", True),
)


def batch(workload: rl_step.Workload, shared: bool):
  """The update's rows, on the device."""
  w, draw = workload, np.random.default_rng(0)
  vocab, count = rl_step.model_config().vocab_size, w.prompts * w.samples
  prompts = draw.integers(0, vocab, (w.prompts, w.prompt_tokens))
  prefixes = [
    np.concatenate([prompt, draw.integers(0, vocab, w.new_tokens)])
    for prompt in prompts
    for _ in range(w.samples)
  ]
  sizes = [w.new_tokens] * count
  values = [draw.normal(size=n).astype(np.float32) for n in sizes]
  old = [np.full(n, -8.0, np.float32) for n in sizes]
  if shared:
    place = rl_data.several_per_row(
      sizes, w.samples, w.prompt_tokens, (w.new_tokens,)
    )
  else:
    longest = w.prompt_tokens + w.new_tokens
    place = rl_data.one_per_row([w.prompt_tokens] * count, sizes, (longest,))
  rows = rl_data.build_batch(place, prefixes, old, old)
  return jax.device_put(rl_data.with_advantages(rows, place, values))


def flops(config: decoder.Config, workload: rl_step.Workload, shared: bool):
  """Of an update's arithmetic, without what is made anew."""
  w = workload
  if shared:
    sizes = (w.prompts, w.prompt_tokens, w.samples, w.new_tokens)
  else:
    sizes = (w.prompts * w.samples, w.prompt_tokens + w.new_tokens)
  counted = cost.update(config, *sizes)
  return counted.forward + counted.backward


def measure(workload: rl_step.Workload) -> list[tuple]:
  """(method, tokens, seconds, GFLOP, temporary MiB) of each."""
  runs = []
  for name, remat, shared in METHODS:
    config = dataclasses.replace(rl_step.model_config(), remat=remat)
    graphdef, params = decoder.create(config, 0)
    adamw = optimizer.adamw(
      rl_step.RATE, weight_decay=rl_step.DECAY, max_grad_norm=rl_step.CLIP
    )
    update = step_lib.make_policy_update(
      packed_rows.logprob_fn(graphdef), adamw, kl_coef=0.0
    )
    state = train_state.create(params, adamw, jax.random.key(0))
    rows = batch(workload, shared)
    compiled = update.lower(state, rows).compile()
    state, _ = jax.block_until_ready(compiled(state, rows))
    runs.append([name, compiled, state, rows, shared, []])
  for _ in range(REPEATS):
    for run in runs:
      begun = time.perf_counter()
      run[2], _ = jax.block_until_ready(run[1](run[2], run[3]))
      run[5].append(time.perf_counter() - begun)
  return [
    (
      name,
      rows.tokens.size,
      statistics.median(seconds),
      flops(rl_step.model_config(), workload, shared) / 1e9,
      compiled.memory_analysis().temp_size_in_bytes / 2**20,
    )
    for name, compiled, _, rows, shared, seconds in runs
  ]


def main(_) -> None:
  ceiling = harness.ceilings(jnp.float32).flops
  blocks = []
  for name, w in rl_step.WORKLOADS.items():
    rows = measure(w)
    first = rows[0][2]
    blocks.append(
      f"**{name}**: {w.prompts} prompts x {w.samples} samples, prompt "
      f"{w.prompt_tokens}, {w.new_tokens} new.\n\n"
      + harness.table(
        ("rows", "tokens", "s", "faster", "GFLOP", "floor / s", "MiB"),
        [
          (
            method,
            f"{tokens:,}",
            f"{seconds:.2f}",
            f"{first / seconds:.2f}",
            f"{work:,.0f}",
            f"{work * 1e9 / ceiling / seconds:.2f}",
            f"{mib:,.0f}",
          )
          for method, tokens, seconds, work, mib in rows
        ],
      )
    )
  config = rl_step.model_config()
  body = (
    f"`python -m benchmarks.update`; {harness.hardware()}; float32; a Qwen3 of "
    f"{config.num_hidden_layers} layers, width {config.hidden_size}, "
    f"vocabulary {config.vocab_size:,}; AdamW; median of {REPEATS}, warm, in "
    f"turns; large matmul {ceiling / 1e9:.0f} GFLOP/s; MiB are the program's "
    "temporaries."
    "\n\n" + "\n\n".join(blocks)
  )
  harness.write_section("update", body)
  print(body)


if __name__ == "__main__":
  app.run(main)
