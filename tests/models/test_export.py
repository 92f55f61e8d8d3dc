"""`experiments.export`, from a run's folder to a model in transformers."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from opera_jax.models import attention


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of the smoke sizes whose SFT stage has left a model."""
  from opera_jax.configs import tiny
  from opera_jax.run import setup

  config = tiny.get_config("smoke")
  run = setup.setup(
    tmp_path_factory.mktemp("run"),
    seed=config.seed,
    mesh=config.mesh,
    checkpoint=config.checkpoint,
    tokenizer=config.tokenizer,
    model=config.model,
    data=config.data,
    max_prompt_tokens=config.max_prompt_tokens,
    max_reference_tokens=config.max_reference_tokens,
    engine=config.engine,
    scoring=config.scoring,
    reward=config.reward,
    temperature=config.rollout.temperature,
  )
  params = jax.tree.map(lambda x: x * 1.5, run.initial())
  run.stage("sft").finish({"model": run.save("sft", params)})
  return run


def _export(run, *flags):
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "experiments.export",
      "--config=configs/tiny.py:smoke",
      f"--workdir={run.workdir}",
      *flags,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_transformers_loads_the_exported_run(run, tmp_path):
  import torch
  import transformers

  done = _export(run, "--stage=sft", f"--output={tmp_path}")
  assert done.returncode == 0, done.stderr
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  words = transformers.AutoTokenizer.from_pretrained(tmp_path)
  chat = [{"role": "user", "content": "Tell me about a lighthouse."}]
  tokens = words.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="np"
  )["input_ids"].astype(np.int32)
  expected = run.tokenizer.chat_prompt(chat[0]["content"])
  np.testing.assert_array_equal(tokens[0], expected)

  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
  ours = nnx.merge(run.graphdef, run.load("sft"))
  hidden, _ = ours(
    tokens,
    jnp.arange(tokens.shape[1])[None],
    attention.causal(jnp.ones_like(tokens)),
  )
  head, transposed = ours.head_matrix()
  logits = hidden @ (head.T if transposed else head)
  np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-4)
  assert np.abs(theirs).max() > 1


@pytest.mark.slow
def test_a_stage_without_a_model_is_named(run, tmp_path):
  done = _export(run, "--stage=rl", f"--output={tmp_path}")
  assert done.returncode != 0
  assert "'rl' has not begun" in done.stderr
