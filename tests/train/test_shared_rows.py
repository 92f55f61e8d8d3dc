"""Samples behind one copy of their prompt: the update of a row a sample."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.data import rl as rl_data
from opera_jax.models import decoder
from opera_jax.rl import learner
from opera_jax.scoring import heads, packed_rows
from opera_jax.sharding import layout, rules
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.stages import training_loop
from opera_jax.train import optimizer
from opera_jax.train import state as train_state

CONFIG = decoder.Config(
  vocab_size=304,
  hidden_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=12,
  intermediate_size=80,
)
PROMPTS, SAMPLES = 4, 4
SETTINGS = {
  "loss": "clipped", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0,
  "kl_coef": 0.1, "kl_estimator": "k3", "entropy_coef": 0.01,
  "value_coef": 0.0, "value_clip": 0.2, "divergence_coef": 0.0,
  "teacher_top_k": 3,
  "ema": 0.0, "beta": 0.1, "reduction": "sequence_mean", "constant": 0.0,
  "micro_batches": 1, "temperature": 0.9,
}  # fmt: skip


def _batches(completions_per_row):
  """The same ragged samples: a row each, and `completions_per_row` of a prompt
  in a row."""
  draw = np.random.default_rng(0)
  prompts = [draw.integers(0, 304, draw.integers(1, 9)) for _ in range(PROMPTS)]
  sizes = draw.integers(1, 15, PROMPTS * SAMPLES)
  prefixes = [
    np.concatenate([prompts[i // SAMPLES], draw.integers(0, 304, n)])
    for i, n in enumerate(sizes)
  ]
  rest = [
    [draw.normal(-3, 1, n).astype(np.float32) for n in sizes] for _ in range(3)
  ]
  begins = [len(t) - n for t, n in zip(prefixes, sizes)]
  places = (
    rl_data.one_per_row(begins, sizes, (24,)),
    rl_data.several_per_row(sizes, completions_per_row, 12, (16,)),
  )
  advantages, old, ref = rest
  return places, [
    rl_data.with_advantages(
      rl_data.build_batch(place, prefixes, old, ref), place, advantages
    )
    for place in places
  ]


def _own(places, arrays):
  """What stands at the samples' tokens, in one order."""
  return [
    np.concatenate(place.gather(np.asarray(array)))
    for place, array in zip(places, arrays)
  ]


@pytest.mark.parametrize(
  "completions_per_row", [2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_scores_and_heads(completions_per_row):
  graphdef, params = decoder.create(CONFIG, 0)
  places, batches = _batches(completions_per_row)
  critic = {
    "kernel": jnp.asarray(np.random.default_rng(1).normal(size=48)),
    "bias": jnp.float32(0.5),
  }
  fn = jax.jit(heads.logprob_and_heads_fn(graphdef, temperature=0.9))
  tops = jax.jit(heads.top_tokens_fn(graphdef, 3, temperature=0.9))
  got = []
  for place, batch in zip(places, batches):
    ids, top_logprob = tops(params, batch)
    batch = batch.replace(extra={"top_ids": ids})
    logprob, entropy, more = fn({"policy": params, "value": critic}, batch)
    got.append((logprob, entropy, more["value"], top_logprob, ids))
    named, found = _own([place] * 2, (more["top_logprob"], top_logprob))
    np.testing.assert_allclose(named, found, rtol=1e-5, atol=1e-5)
  for pair in zip(*got):
    one, other = _own(places, pair)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def _updated(batch, mesh, **changes):
  graphdef, params = decoder.create(CONFIG, 0)
  params = layout.move(params, decoder.logical_axes(params), mesh, rules.TRAIN)
  learn = learner.build(
    graphdef, optimizer.adamw(1e-3, b1=0.9), **SETTINGS | changes
  )
  state = training_loop.place(
    train_state.create(params, learn.optimizer, jax.random.key(0)), mesh
  )
  with jax.set_mesh(mesh):
    batch = jax.device_put(batch, layout.batch_sharding(mesh))
    state, metrics = learn.update(state, batch)
  # After one update the first moment is a tenth of the gradient.
  shape = jax.tree.structure(state.params)
  found = []

  def visit(node):
    if jax.tree.structure(node) == shape:
      found.append(node)
    return jax.tree.structure(node) == shape

  jax.tree.leaves(state.opt_state, is_leaf=visit)
  return jax.device_get((found[0], metrics))


def _assert_same(ours, theirs):
  for one, other in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0])):
    scale = np.abs(other).max()
    assert scale > 0
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)
  for name, value in theirs[1].items():
    assert ours[1][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(
  "changes",
  [
    {},
    pytest.param({"loss": "gspo", "clip_low": 2e-1}, marks=pytest.mark.slow),
    pytest.param(
      {"reduction": "token_mean", "micro_batches": 2}, marks=pytest.mark.slow
    ),
  ],
  ids=["grpo", "gspo", "in_parts"],
)
def test_gradients(one_device, changes):
  _, (plain, shared) = _batches(2)
  _assert_same(
    _updated(shared, one_device, **changes),
    _updated(plain, one_device, **changes),
  )


@pytest.mark.parametrize(
  "shape",
  [
    pytest.param(
      {"fsdp": 2, "sequence": 2, "tensor": 2}, marks=pytest.mark.slow
    ),
    pytest.param({"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
  ],
)
def test_gradients_over_a_mesh(one_device, shape):
  _, (plain, shared) = _batches(2)
  _assert_same(
    _updated(shared, mesh_lib.create(shape)), _updated(plain, one_device)
  )


def test_a_sample_sees_its_prompt_and_itself():
  """Gradients say who is read: of one token's log-probability, by embedding
  row."""
  prompt, samples = [1, 2], [[10, 11, 12], [20, 21, 22]]
  prefixes = [np.asarray(prompt + own, np.int32) for own in samples]
  zeros = [np.zeros(3, np.float32)] * 2
  place = rl_data.several_per_row([3, 3], 2, 4, (3,))
  batch = rl_data.build_batch(place, prefixes, zeros, zeros)
  # Untied, so that only what is read shows.
  untied = dataclasses.replace(CONFIG, tie_word_embeddings=False)
  graphdef, params = decoder.create(untied, 0)
  fn = packed_rows.logprob_fn(graphdef)

  def second_of_second(params):
    return place.gather(fn(params, batch)[0])[1][1]

  grads = jax.jit(jax.grad(second_of_second))(params)
  read = np.flatnonzero(np.abs(np.asarray(grads["embed"][...])).sum(1))
  np.testing.assert_array_equal(read, [1, 2, 20])
