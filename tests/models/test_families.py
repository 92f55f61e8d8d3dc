"""What every family must do in every layout; test_parity.py has their numbers.

Shape key: B rows, T prefix tokens, S continuations, G tokens of each, D hidden.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from opera_jax.models import (
  attention,
  decode_model,
  decoder,
  hf_checkpoint,
  hf_config,
  rope,
)
from opera_jax.models.families import table
from opera_jax.rollout import engine, sampling
from opera_jax.sharding import layout, rules
from opera_jax.sharding import mesh as mesh_lib

_LONG = rope.Scaling(
  "longrope",
  original_max_position_embeddings=64,
  short_factor=(1.0, 1.25, 1.5, 2.0),
  long_factor=(1.0, 2.0, 4.0, 8.0),
)
OWN = {
  "qwen3": {},
  "qwen2": {},
  "llama": {
    "rope_scaling": rope.Scaling(
      "llama3", factor=8.0, original_max_position_embeddings=64
    )
  },
  "phi3": {
    "rope_scaling": _LONG,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
  },
  "gemma3_text": {
    "hidden_act": "gelu_pytorch_tanh",
    "query_scale": 0.25,
    "sliding_window": 4,
    "sliding_window_pattern": 3,
    "rope_local_theta": 100.0,
    "rope_scaling": rope.Scaling("linear", factor=2.0),
  },
}


# The others run with the slow tests; these differ most.
FAST = ("llama", "gemma3_text")
FAMILIES = [
  pytest.param(family, marks=[] if family in FAST else [pytest.mark.slow])
  for family in OWN
]


def make(family):
  """A small model of a family: config, graphdef, params whose norms differ."""
  config = decoder.Config(
    **{
      "vocab_size": 128,
      "hidden_size": 32,
      "num_hidden_layers": 4,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "head_dim": 8,
      "intermediate_size": 64,
      "family": family,
      **table.FAMILIES[family].fields,
      **OWN[family],
    }
  )
  graphdef, params = decoder.create(config, seed=1)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  leaves = [
    x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)
  ]
  return config, graphdef, jax.tree.unflatten(tree, leaves)


def test_every_family_is_tested_here():
  assert OWN.keys() == table.FAMILIES.keys()


def test_the_table_of_families_says_what_they_change():
  lines = [x for x in table.__doc__.splitlines() if x.startswith("| ")]
  rows = {
    cells[0]: dict(zip(table.FAMILIES, cells[1:]))
    for cells in ([c.strip() for c in x.split("|")[1:-1]] for x in lines)
  }
  defaults = {f.name: f.default for f in dataclasses.fields(decoder.Config)}
  for name, family in table.FAMILIES.items():
    for field in ("qkv_bias", "norm_offset", "output_norms", "embedding_scale"):
      value = family.fields.get(field, defaults[field])
      assert (rows[field][name] == "yes") == value, (name, field)
    assert (rows["qk_norm"][name] == "yes") == family.fields["qk_norm"]
    fused = any(len(parts) > 1 for parts in family.layer.values())
    assert bool(rows["fused in a checkpoint"][name]) == fused


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_with_continuations_is_separate_rows(family):
  config, graphdef, params = make(family)
  T, G, forks = 11, 7, (11, 3, 6)
  draw = np.random.default_rng(0)
  prefix_T = draw.integers(0, 128, T)
  own_SG = draw.integers(0, 128, (len(forks), G))
  token_BT = jnp.asarray([[*prefix_T, *own_SG.ravel()]])
  position_BT = jnp.asarray(
    [[*range(T), *(fork + g for fork in forks for g in range(G))]]
  )

  def run(params, token_BT, position_BT, attend):
    return nnx.merge(graphdef, params)(token_BT, position_BT, attend)[0]

  run = jax.jit(run, static_argnums=3)
  together = run(
    params,
    token_BT,
    position_BT,
    attention.prefix_and_continuations(
      np.ones((1, T), np.int32), np.asarray([forks], np.int32), G
    ),
  )[0, T:].reshape(len(forks), G, -1)
  for s, fork in enumerate(forks):
    row = jnp.asarray([[*prefix_T[:fork], *own_SG[s]]])
    alone = run(
      params,
      row,
      jnp.arange(row.shape[1])[None],
      attention.causal(np.ones(row.shape, np.int32)),
    )[0, fork:]
    scale = float(jnp.abs(alone).max())
    np.testing.assert_allclose(together[s], alone, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_unstacked_layers_are_the_model(family):
  config, graphdef, params = make(family)
  token_BT = jnp.asarray(np.random.default_rng(1).integers(0, 128, (2, 9)))
  position_BT = jnp.broadcast_to(jnp.arange(9), token_BT.shape)
  attend = attention.causal(np.ones((2, 9), np.int32))

  @jax.jit
  def both(params):
    model = nnx.merge(graphdef, params)
    want, _ = model(token_BT, position_BT, attend)
    layers = decode_model.unstack_layers(model)
    got, _ = decode_model.hidden_states(
      model, layers, token_BT, position_BT, attend, None
    )
    return want, got

  want, got = both(params)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", OWN)
def test_saved_and_loaded_it_is_the_same(family, tmp_path):
  config, _, params = make(family)
  hf_checkpoint.save(tmp_path, params, config)
  assert hf_config.read(tmp_path) == config
  mesh = mesh_lib.create({"fsdp": 4, "tensor": 2})
  loaded = hf_checkpoint.load(tmp_path, config, mesh, rules.TRAIN)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.slow
@pytest.mark.parametrize("family", OWN)
def test_transformers_loads_what_was_saved(family, tmp_path):
  import torch
  import transformers

  config, graphdef, params = make(family)
  hf_checkpoint.save(tmp_path, params, config)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  token_BT = np.random.default_rng(1).integers(0, 128, (2, 20))
  with torch.no_grad():
    theirs = model(torch.from_numpy(token_BT)).logits.numpy()

  @jax.jit
  def logits(params):
    model = nnx.merge(graphdef, params)
    hidden, _ = model(
      jnp.asarray(token_BT),
      jnp.broadcast_to(jnp.arange(20), (2, 20)),
      attention.causal(jnp.ones((2, 20), jnp.int32)),
    )
    head, transposed = model.head_matrix()
    return hidden @ (head.T if transposed else head)

  scale = np.abs(theirs).max()
  np.testing.assert_allclose(logits(params), theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("family", OWN)
def test_one_device_equals_eight(family):
  config, graphdef, params = make(family)
  token_BT = jnp.asarray(np.random.default_rng(1).integers(0, 128, (4, 24)))
  position_BT = jnp.broadcast_to(jnp.arange(24), token_BT.shape)
  segment_BT = jnp.ones((4, 24), jnp.int32)

  def loss(params):
    model = nnx.merge(graphdef, params)
    hidden, _ = model(token_BT, position_BT, attention.causal(segment_BT))
    weight = jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)
    return jnp.sum(weight * hidden)

  want, want_grad = jax.jit(jax.value_and_grad(loss))(params)
  for shape in (
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"fsdp": 4, "data": 2},
  ):
    mesh = mesh_lib.create(shape)
    with jax.set_mesh(mesh):
      placed = layout.move(
        params, decoder.logical_axes(params), mesh, rules.TRAIN
      )
      got, grad = jax.jit(jax.value_and_grad(loss))(placed)
    # A sum of so many terms of about 1, which cancel.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * 3_072**0.5)
    for x, y in zip(jax.tree.leaves(grad), jax.tree.leaves(want_grad)):
      y = np.asarray(y)
      np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3_text"])
def test_greedy_tokens_over_a_mesh(family, one_device):
  """Stacked layers, as accelerators decode, against a CPU's unstacked ones."""
  config, graphdef, params = make(family)
  draw = np.random.default_rng(3)
  prompts = [draw.integers(0, 128, n).astype(np.int32) for n in (5, 13, 9, 21)]
  settings = sampling.Sampling(max_new_tokens=24, temperature=0)

  def sample(mesh):
    sampler = engine.Engine(
      graphdef, config, mesh=mesh, prompt_slots=4, slots=1, prompt_buckets=(32,)
    )
    placed = layout.move(
      params, decoder.logical_axes(params), mesh, rules.ROLLOUT
    )
    groups = sampler.sample(placed, prompts, settings, jax.random.key(0))
    return [group[0].tokens.tolist() for group in groups]

  want = sample(one_device)
  assert max(len(set(tokens)) for tokens in want) > 2
  assert sample(mesh_lib.create({"fsdp": 4, "tensor": 2})) == want


def test_a_gemma_of_an_irregular_pattern_is_refused(tmp_path):
  config, _, params = make("gemma3_text")
  raw = hf_config.contents(config, "float32")
  raw["layer_types"] = ["full_attention", "sliding_attention"] * 2
  (tmp_path / "config.json").write_text(json.dumps(raw))
  with pytest.raises(ValueError, match="no regular pattern"):
    hf_config.read(tmp_path)


def test_what_a_config_of_gemma_leaves_out_is_transformers_default(tmp_path):
  raw = hf_config.contents(make("gemma3_text")[0], "float32")
  for name in ("hidden_act", "hidden_activation", "sliding_window"):
    del raw[name]
  (tmp_path / "config.json").write_text(json.dumps(raw))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  ours = hf_config.read(tmp_path)
  assert ours.hidden_act == theirs.hidden_activation
  assert ours.sliding_window == theirs.sliding_window


def test_factors_of_another_head_are_refused():
  config = make("phi3")[0]
  with pytest.raises(ValueError, match="16 of them, got 4 short factors"):
    rope.frequencies(32, 1e4, config.rope_scaling)
