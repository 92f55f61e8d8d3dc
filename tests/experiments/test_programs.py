"""Ragged data meets few programs: none is compiled after the warm-up."""

import jax
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.data import rl as rl_data
from opera_jax.rollout import engine, sampling
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.scoring import packed_rows
from opera_jax.sharding import layout, runtime
from opera_jax.stages import training_loop
from opera_jax.train import optimizer, step
from opera_jax.train import state as train_state

PROMPTS, SAMPLES = 4, 2
BUCKETS = {
  "prefix_buckets": (16, 32),
  "slot_buckets": (1, 4),
  "continuation_buckets": (8,),
}
ROWS = (16, 32)


def compiled(sampler):
  return sum(p._cache_size() for p in sampler._programs.values())


@pytest.mark.slow
def test_no_program_is_compiled_after_the_warm_up(tiny_model, one_device):
  config, graphdef, params = tiny_model
  sampler = engine.Engine(
    graphdef,
    config,
    mesh=one_device,
    prompt_slots=PROMPTS,
    prompt_buckets=(8, 16),
    cache_buckets=(128,),
  )
  earlier = compiled(sampler)  # programs without a model serve every engine
  logprob_scorer = scorer_lib.LogprobScorer(
    graphdef,
    vocab_size=config.vocab_size,
    mesh=one_device,
    batch_size=4,
    **BUCKETS,
  )
  adamw = optimizer.adamw(1e-4)
  update = step.make_policy_update(packed_rows.logprob_fn(graphdef), adamw)
  params = jax.tree.map(lambda x: x + 0, params)  # an update takes its buffers
  state = training_loop.place(
    train_state.create(params, adamw, jax.random.key(0)), one_device
  )
  draw = np.random.default_rng(0)

  def tokens(size):
    return draw.integers(0, config.vocab_size, size).astype(np.int32)

  def one_step(state, number, longest):
    prompts = [tokens(draw.integers(1, longest + 1)) for _ in range(PROMPTS)]
    groups = sampler.sample(
      state.params,
      prompts,
      sampling.Sampling(max_new_tokens=12, stop_ids=tuple(range(60))),
      jax.random.fold_in(state.key, number),
      samples=SAMPLES,
    )
    prefixes = [
      np.concatenate([p, s.tokens]) for p, g in zip(prompts, groups) for s in g
    ]
    continuations = [
      structs.Continuation(
        prefix=i, fork=1, tokens=tokens(draw.integers(1, 9)), skip=0
      )
      for i in range(len(prefixes))
      for _ in range(draw.integers(0, 5))
    ]
    logprobs = logprob_scorer.score(state.params, prefixes, continuations)
    begins = [len(p) for p in prompts for _ in range(SAMPLES)]
    sizes = [len(s.tokens) for group in groups for s in group]
    own = [row[b:] for row, b in zip(logprobs.prefix_logprob, begins)]
    placement = rl_data.one_per_row(begins, sizes, ROWS)
    batch = rl_data.with_advantages(
      rl_data.build_batch(placement, prefixes, own, own),
      placement,
      [np.full(size, draw.normal(), np.float32) for size in sizes],
    )
    placed = layout.to_devices(batch, layout.batch_sharding(one_device))
    state, metrics = update(state, placed)
    return state, layout.to_host(metrics)

  runtime.count_compiled()
  lengths = set()
  with jax.set_mesh(one_device):
    # Every shape there is: prompts of 8 and 16, with and without continuations.
    for longest in (1, 8, 16):
      for number in range(3):
        state, _ = one_step(state, number, longest)
    for size in (4, 20):
      for count in (0, 3):
        logprob_scorer.score(
          state.params,
          [tokens(size)],
          [structs.Continuation(0, 1, tokens(3), 0)] * count,
        )
    before = runtime.compiled()
    assert before >= logprob_scorer.programs() + sampler.programs() + len(ROWS)
    for number in range(20):
      longest = int(draw.integers(1, 17))
      lengths.add(longest)
      state, metrics = one_step(state, number, longest)
    assert runtime.compiled() == before
    # The count does see what is compiled.
    jax.jit(lambda x: x * 3.25 + 7)(np.ones(11, np.float32))
    assert runtime.compiled() > before
  assert len(lengths) > 5
  assert np.isfinite(metrics["loss"])
  assert logprob_scorer._run._cache_size() <= logprob_scorer.programs()
  assert compiled(sampler) - earlier <= sampler.programs()
  assert update._cache_size() <= len(ROWS)
