"""peft loads our adapters, and transformers the merged model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opera_jax.models import (
  attention,
  decoder,
  hf_checkpoint,
  lora,
  peft_adapter,
)

pytestmark = pytest.mark.slow  # imports torch, transformers and peft
SETTINGS = lora.Settings(rank=3, alpha=6.0, base_dtype="float32")


def _with_adapter(pair, settings):
  config = dataclasses.replace(pair.config, lora=settings)
  graphdef, created = decoder.create(config, seed=0)
  leaves, shape = jax.tree.flatten(lora.split(created)[0])
  keys = jax.random.split(jax.random.key(1), len(leaves))
  adapter = jax.tree.unflatten(
    shape,
    [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)],
  )
  return graphdef, adapter


def _logits(graphdef, params, tokens):
  model = nnx.merge(graphdef, params)
  hidden, _ = model(
    tokens,
    jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    attention.causal(jnp.ones_like(tokens)),
  )
  head, transposed = model.head_matrix()
  return np.asarray(hidden @ (head.T if transposed else head))


def _theirs(model, tokens):
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("targets", [lora.TARGETS, ("q", "o", "down")])
def test_peft_computes_what_ours_does(pair, tmp_path, targets):
  import peft
  import transformers

  settings = dataclasses.replace(SETTINGS, targets=targets)
  graphdef, adapter = _with_adapter(pair, settings)
  params = lora.combine(adapter, pair.params)
  where = {"family": pair.config.family, "base_model": str(pair.path)}
  if pair.config.family == "phi3" and "q" in targets:
    with pytest.raises(ValueError, match="phi3 fuses q.*Export the merged"):
      peft_adapter.save(tmp_path / "adapter", adapter, settings, **where)
    return
  peft_adapter.save(tmp_path / "adapter", adapter, settings, **where)
  tokens = np.random.default_rng(0).integers(0, 301, (2, 17)).astype(np.int32)
  ours = _logits(graphdef, params, tokens)

  base = transformers.AutoModelForCausalLM.from_pretrained(pair.path).eval()
  plain = _theirs(base, tokens)
  model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
  assert model.peft_config["default"].base_model_name_or_path == str(pair.path)
  np.testing.assert_allclose(_theirs(model, tokens), ours, rtol=0, atol=1e-4)
  assert np.abs(plain - ours).max() > 0.1

  merged = lora.merge(params, settings, "float32")
  hf_checkpoint.save(tmp_path / "merged", merged, pair.config)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "merged"
  ).eval()
  np.testing.assert_allclose(_theirs(model, tokens), ours, rtol=0, atol=1e-4)


def test_an_adapter_is_not_written_over(pair, tmp_path):
  _, adapter = _with_adapter(pair, SETTINGS)
  settings = dataclasses.replace(SETTINGS, targets=("o",))
  family = pair.config.family
  peft_adapter.save(tmp_path, adapter, settings, family=family)
  with pytest.raises(FileExistsError, match="holds an adapter already"):
    peft_adapter.save(tmp_path, adapter, settings, family=family)


def test_a_new_adapter_is_as_large_as_pefts():
  import peft
  from peft.tuners.lora import layer as peft_layer
  from torch import nn

  theirs = peft_layer.Linear(
    nn.Linear(512, 64),
    "default",
    config=peft.LoraConfig(r=64, lora_alpha=1),
    r=64,
    lora_alpha=1,
  ).lora_A["default"]
  theirs = theirs.weight.detach().numpy()
  config = decoder.Config(
    vocab_size=8,
    hidden_size=512,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=4,
    lora=lora.Settings(64, 1.0, ("q",)),
  )
  attention_params = decoder.create(config, seed=0)[1]["layers"]["attention"]
  ours = np.asarray(attention_params["q_lora_a"][...])
  assert ours.std() == pytest.approx(theirs.std(), rel=0.05)
  assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=0.01)
  assert not attention_params["q_lora_b"][...].any()
