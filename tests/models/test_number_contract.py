"""Sampler and trainer put the same number on a token, in bfloat16 too."""

import dataclasses

import jax
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.models import decoder
from opera_jax.rollout import engine, sampling
from opera_jax.scoring import packed_rows

NEW = 40


@pytest.mark.parametrize(
  ("compute", "stored", "cache", "most"),
  [
    ("float32", "float32", "float32", 1e-5),
    pytest.param(
      *("bfloat16", "float32", "bfloat16", 0.02), marks=pytest.mark.slow
    ),
    pytest.param(
      *("bfloat16", "bfloat16", "bfloat16", 0.02), marks=pytest.mark.slow
    ),
  ],
)
def test_sampled_tokens_are_scored_alike(
  tiny_model, one_device, compute, stored, cache, most
):
  config, _, params = tiny_model
  # As at initialisation: logits of unit variance.
  params = jax.tree.map(lambda x: x / 1.5, params)
  config = dataclasses.replace(config, dtype=compute)
  graphdef, _ = decoder.abstract(config)
  params = jax.tree.map(lambda x: x.astype(stored), params)
  draw = np.random.default_rng(0)
  prompts = [
    draw.integers(0, config.vocab_size, n).astype(np.int32)
    for n in (3, 9, 16, 5)
  ]
  sampler = engine.Engine(
    graphdef,
    config,
    mesh=one_device,
    prompt_slots=4,
    prompt_buckets=(16,),
    cache_dtype=cache,
  )
  samples = sampler.sample(
    params,
    prompts,
    sampling.Sampling(max_new_tokens=NEW),
    jax.random.key(1),
    samples=2,
  )
  T = 16 + NEW
  rows = [
    (prompt, sample)
    for prompt, group in zip(prompts, samples)
    for sample in group
  ]
  tokens = np.zeros((len(rows), T), np.int32)
  segments = np.zeros((len(rows), T), np.int32)
  for row, (prompt, sample) in enumerate(rows):
    size = len(prompt) + NEW
    tokens[row, :size] = np.concatenate([prompt, sample.tokens])
    segments[row, :size] = 1
  zeros = np.zeros(tokens.shape, np.float32)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
  batch = structs.Batch(tokens, positions, segments, zeros, zeros, zeros, zeros)
  logprob_RT, entropy_RT = jax.jit(packed_rows.logprob_fn(graphdef))(
    params, batch
  )
  assert logprob_RT.dtype == entropy_RT.dtype == np.float32
  delta = [
    np.asarray(logprob_RT)[row, len(prompt) : len(prompt) + NEW]
    - sample.logprob
    for row, (prompt, sample) in enumerate(rows)
  ]
  assert np.abs(delta).mean() < most
