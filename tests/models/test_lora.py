"""LoRA against full training, merged, switched off, and on several devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opera_jax import structs
from opera_jax.models import attention, decoder, lora
from opera_jax.rollout import engine, sampling
from opera_jax.rollout import slots as slots_lib
from opera_jax.scoring import logprob_scorer, packed_rows
from opera_jax.sharding import layout, rules
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.stages import training_loop
from opera_jax.train import optimizer, step
from opera_jax.train import state as train_state

SETTINGS = lora.Settings(rank=3, alpha=12.0, base_dtype="float32")
PART = {name: "attention" for name in "qkvo"} | dict.fromkeys(
  ("gate", "up", "down"), "mlp"
)


def _random_like(tree, seed, size=0.1):
  leaves, shape = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(
    shape,
    [
      size * jax.random.normal(key, x.shape, x.dtype)
      for key, x in zip(keys, leaves)
    ],
  )


def _with_adapter(tiny_model, settings=SETTINGS, seed=5):
  """Config, graphdef and parameters of the tiny model with a used adapter."""
  config, _, base = tiny_model
  config = dataclasses.replace(config, lora=settings)
  graphdef, params = decoder.create(config, seed=3)
  adapter = _random_like(lora.split(params)[0], seed)
  return config, graphdef, lora.combine(adapter, base)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graphdef, params, token_BT):
  model = nnx.merge(graphdef, params)
  position_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1]), token_BT.shape)
  attend = attention.causal(jnp.ones_like(token_BT))
  return model(token_BT, position_BT, attend)[0]


def _tokens(seed=0, shape=(2, 9)):
  draw = np.random.default_rng(seed)
  return jnp.asarray(draw.integers(0, 300, shape).astype(np.int32))


def _leaf(tree, target, suffix=""):
  return np.asarray(tree["layers"][PART[target]][f"{target}{suffix}"][...])


def test_a_new_adapter_changes_no_bit(tiny_model):
  config, graphdef, base = tiny_model
  new = dataclasses.replace(config, lora=SETTINGS)
  new_graphdef, params = decoder.create(new, seed=3)
  # The model's own weights are those without LoRA.
  plain = decoder.create(config, seed=3)[1]
  adapter, rest = lora.split(params)
  assert jax.tree.structure(rest) == jax.tree.structure(plain)
  for ours, theirs in zip(jax.tree.leaves(rest), jax.tree.leaves(plain)):
    np.testing.assert_array_equal(ours, theirs)
  want = _hidden(graphdef, base, _tokens())
  got = _hidden(new_graphdef, lora.combine(adapter, base), _tokens())
  np.testing.assert_array_equal(got, want)
  # Nor does a trained one that is switched off.
  trained = _random_like(adapter, 1)
  on = _hidden(new_graphdef, lora.combine(trained, base), _tokens())
  off = lora.combine(lora.switched_off(trained), base)
  assert np.abs(on - want).max() > 0.1
  np.testing.assert_array_equal(_hidden(new_graphdef, off, _tokens()), want)


def test_gradients_are_those_of_full_training_times_the_other_factor(
  tiny_model,
):
  config, graphdef, params = _with_adapter(tiny_model)
  plain_graphdef = tiny_model[1]
  adapter, base = lora.split(params)
  cotangent = jax.random.normal(jax.random.key(9), (2, 9, 48))

  def loss(graphdef, params):
    return jnp.sum(_hidden(graphdef, params, _tokens()) * cotangent)

  full = jax.jit(jax.grad(lambda p: loss(plain_graphdef, p)))(
    lora.merge(params, SETTINGS, "float32")
  )
  got = jax.jit(jax.grad(lambda a: loss(graphdef, lora.combine(a, base))))(
    adapter
  )
  scale = 12.0 / 3
  L, r = config.num_hidden_layers, 3
  for target in lora.TARGETS:
    inputs = 4 * 16 if target == "o" else 64 if target == "down" else 48
    grad_W = _leaf(full, target).reshape(L, inputs, -1)
    a = _leaf(adapter, target, "_lora_a").reshape(L, inputs, r)
    b = _leaf(adapter, target, "_lora_b").reshape(L, r, -1)
    for suffix, want in (
      ("_lora_a", scale * grad_W @ b.transpose(0, 2, 1)),
      ("_lora_b", scale * a.transpose(0, 2, 1) @ grad_W),
    ):
      found = _leaf(got, target, suffix).reshape(want.shape)
      np.testing.assert_allclose(
        found, want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=target
      )


def _batch(seed=0, rows=8):
  draw = np.random.default_rng(seed)
  shape = (rows, 16)
  zeros = np.zeros(shape, np.float32)
  return structs.Batch(
    tokens=draw.integers(0, 300, shape).astype(np.int32),
    positions=np.broadcast_to(np.arange(16, dtype=np.int32), shape),
    segments=np.ones(shape, np.int32),
    loss_mask=np.ones(shape, np.float32),
    advantage=zeros,
    old_logprob=zeros,
    ref_logprob=zeros,
  )


@pytest.mark.slow
def test_a_step_with_the_identity_for_a_is_a_step_of_full_training():
  """W + I B, with B = 0 at the start: what SGD does to B it does to W."""
  config = decoder.Config(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=16,
  )
  settings = lora.Settings(rank=16, alpha=16.0, base_dtype="float32")
  graphdef, params = decoder.create(config, seed=1)
  params = jax.tree.map(lambda x: x * 1.5, params)
  lora_graphdef, created = decoder.create(
    dataclasses.replace(config, lora=settings), seed=1
  )
  adapter = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      jnp.broadcast_to(jnp.eye(16).reshape(x.shape[1:]), x.shape)
      if decoder.path_name(path).endswith("_lora_a")
      else x
    ),
    lora.split(created)[0],
  )
  sgd = optax.sgd(0.5)
  full = step.make_sft_update(packed_rows.logprob_fn(graphdef), sgd)
  low = step.make_sft_update(
    packed_rows.logprob_fn(lora_graphdef), sgd, join=lora.combine
  )
  start, identity = jax.tree.map(np.asarray, (params, adapter))
  low_state, _ = low(
    train_state.create(adapter, sgd, jax.random.key(0)), _batch(), params
  )
  merged = lora.merge(
    lora.combine(low_state.params, params), settings, "float32"
  )
  full_state, _ = full(
    train_state.create(params, sgd, jax.random.key(0)), _batch()
  )
  for target in lora.TARGETS:
    want = _leaf(full_state.params, target) - _leaf(start, target)
    got = _leaf(merged, target) - _leaf(start, target)
    np.testing.assert_allclose(
      got, want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=target
    )
    assert np.abs(want).max() > 1e-3
    np.testing.assert_array_equal(
      _leaf(low_state.params, target, "_lora_a"),
      _leaf(identity, target, "_lora_a"),
    )
  np.testing.assert_array_equal(merged["embed"][...], start["embed"][...])


def test_only_targets_have_adapters_and_only_adapters_have_moments(tiny_model):
  settings = dataclasses.replace(
    SETTINGS, targets=("q", "down"), base_dtype="bfloat16"
  )
  _, graphdef, params = _with_adapter(tiny_model, settings)
  adapter, base = lora.split(params)
  names = {
    decoder.path_name(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(adapter)
  }
  assert names == {
    f"layers/{module}_lora_{which}"
    for module in ("attention/q", "mlp/down")
    for which in ("a", "b")
  }
  base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
  before = jax.tree.map(np.asarray, (adapter, base))
  adamw = optimizer.adamw(1e-2)
  state = train_state.create(adapter, adamw, jax.random.key(0))
  count = decoder.parameter_count
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert count(moments) == 2 * count(adapter)
  update = step.make_sft_update(
    packed_rows.logprob_fn(graphdef), adamw, join=lora.combine
  )
  state, metrics = update(state, _batch(), base)
  assert np.isfinite(metrics["sft/loss"])
  for ours, old in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(before[0])
  ):
    assert ours.dtype == jnp.float32
    assert np.abs(ours - old).max() > 1e-3
  for ours, old in zip(jax.tree.leaves(base), jax.tree.leaves(before[1])):
    np.testing.assert_array_equal(ours, old)


@pytest.mark.slow
def test_micro_batches_add_up(tiny_model):
  _, graphdef, params = _with_adapter(tiny_model)
  sgd = optax.sgd(0.1)
  outs = []
  for micro_batches in (1, 4):
    adapter, base = lora.split(params)
    update = step.make_sft_update(
      packed_rows.logprob_fn(graphdef),
      sgd,
      micro_batches=micro_batches,
      join=lora.combine,
    )
    adapter = jax.tree.map(jnp.copy, adapter)
    state = train_state.create(adapter, sgd, jax.random.key(0))
    outs.append(update(state, _batch(), base)[0].params)
  for one, four in zip(*map(jax.tree.leaves, outs)):
    np.testing.assert_allclose(one, four, atol=1e-6)


def test_merged_it_scores_the_same_and_is_a_plain_model(tiny_model, one_device):
  config, graphdef, params = _with_adapter(tiny_model)
  merged = lora.merge(params, SETTINGS, "float32")
  plain = decoder.abstract(tiny_model[0])[1]
  assert jax.tree.structure(merged) == jax.tree.structure(plain)
  draw = np.random.default_rng(2)
  rows = [draw.integers(0, 300, n).astype(np.int32) for n in (5, 20, 33)]

  def logprobs(graphdef, params):
    scorer = logprob_scorer.LogprobScorer(
      graphdef,
      vocab_size=300,
      mesh=one_device,
      batch_size=4,
      prefix_buckets=(64,),
      slot_buckets=(1,),
      continuation_buckets=(16,),
    )
    return scorer.score(params, rows).prefix_logprob

  for ours, theirs in zip(
    logprobs(graphdef, params), logprobs(tiny_model[1], merged)
  ):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def _sample(graphdef, config, params, mesh):
  sampler = engine.Engine(
    graphdef, config, mesh=mesh, prompt_slots=8, prompt_buckets=(8, 16)
  )
  draw = np.random.default_rng(0)
  prompts = [draw.integers(8, 300, n).astype(np.int32) for n in (3, 8, 1, 11)]
  groups = sampler.sample(
    params,
    prompts,
    sampling.Sampling(max_new_tokens=12, stop_ids=(7,)),
    jax.random.key(0),
    samples=2,
  )
  return [sample for group in groups for sample in group]


def test_samples_are_those_of_the_merged_weights(
  tiny_model, one_device, monkeypatch
):
  config, graphdef, params = _with_adapter(tiny_model)
  merged = lora.merge(params, SETTINGS, "float32")
  ours = _sample(tiny_model[1], tiny_model[0], merged, one_device)
  with pytest.raises(ValueError, match="Merge them first"):
    _sample(graphdef, config, params, one_device)
  # Elsewhere than on a CPU the stacked layers decode, adapter and all.
  monkeypatch.setattr(slots_lib, "unstacks_layers", lambda: False)
  theirs = _sample(graphdef, config, params, one_device)
  for merged_sample, unmerged_sample in zip(ours, theirs):
    np.testing.assert_array_equal(merged_sample.tokens, unmerged_sample.tokens)
    np.testing.assert_allclose(
      merged_sample.logprob, unmerged_sample.logprob, rtol=0, atol=1e-5
    )


def _trained(mesh):
  """Two updates on a mesh: adapters, metrics, and how the adapters lie."""
  config, graphdef, params = _with_adapter(
    (SHARDED, None, decoder.create(SHARDED, seed=3)[1])
  )
  params = layout.move(params, decoder.logical_axes(params), mesh, rules.TRAIN)
  adapter, base = lora.split(params)
  sgd = optax.sgd(0.1)
  update = step.make_sft_update(
    packed_rows.logprob_fn(graphdef), sgd, join=lora.combine
  )
  rows = layout.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    state = training_loop.place(
      train_state.create(adapter, sgd, jax.random.key(0)), mesh
    )
    for seed in range(2):
      batch = jax.device_put(_batch(seed), rows)
      state, metrics = update(state, batch, base)
  for leaf, place in zip(
    jax.tree.leaves(state.params),
    jax.tree.leaves(
      rules.shardings(decoder.logical_axes(state.params), mesh, rules.TRAIN)
    ),
  ):
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
  merged = lora.merge(lora.combine(state.params, base), SETTINGS, "float32")
  return layout.to_host((state.params, merged, metrics))


SHARDED = decoder.Config(
  vocab_size=304,
  hidden_size=48,
  num_hidden_layers=2,
  num_attention_heads=16,
  num_key_value_heads=8,
  head_dim=6,
  intermediate_size=80,
  tie_word_embeddings=False,
)


@pytest.mark.parametrize(
  "shape",
  [
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 1, "tensor": 8}, marks=pytest.mark.slow),
  ],
)
@pytest.mark.slow
def test_eight_devices_compute_what_one_does(one_device, shape):
  alone = _trained(one_device)
  together = _trained(mesh_lib.create(shape))
  for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
    np.testing.assert_allclose(
      ours, theirs, rtol=0, atol=1e-5 * max(np.abs(theirs).max(), 1)
    )


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"rank": -1}, "rank of at least 1, got rank=-1"),
    ({"targets": ()}, "rank 3 has no targets"),
    ({"targets": ("q_proj", "v")}, "'q_proj' .did you mean 'q'"),
    ({"targets": ("upp",)}, "'upp' .did you mean 'up'"),
    ({"targets": ("experts",)}, "'experts'. The projections are q, k, v, o"),
    ({"targets": ("q", "q")}, "twice"),
    ({"alpha": 0.0}, "alpha=0"),
    ({"base_dtype": "int8"}, "'bfloat16'"),
  ],
)
def test_wrong_settings_name_the_value_and_the_remedy(changes, message):
  given = {"rank": 3, "alpha": 1.0, "targets": ("q",), "base_dtype": "float32"}
  with pytest.raises(ValueError, match=message):
    lora.settings(**given | changes)


def test_rank_zero_is_off():
  assert lora.settings(0, 16.0, ("q",), "bfloat16") is None
