"""The judge against a server that others wrote: `transformers serve`.

The models are made here. Each says, whatever it is asked, the same tokens one
after the other: its embedding is the identity, its layers add nothing, and the
head maps each token to the next one.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import ROOT

from opera_jax import structs
from opera_jax.rewards import endpoint, judge
from opera_jax.train import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GRADES = dict(zip(judge.DIMENSIONS, (4, 3, 5, 2)))
# What a model says, a token each, and where it goes on after the last.
GRADING = (
  "If {clarity} matters, then {",
  json.dumps(GRADES)[:-1] + ",",
  '"why": "{so}"}',
)
ENDLESS = ("{ and", "so", "on")
TEMPLATE = (
  "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
  "<|reply|>"
)


def _model(folder: pathlib.Path, says, *, ends: bool) -> pathlib.Path:
  """A checkpoint that says `says`, and then ends or begins anew."""
  import tokenizers
  import torch
  import transformers

  words = ["[UNK]", "<|reply|>", "<|end|>", *says]
  vocab = {word: index for index, word in enumerate(words)}
  model = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab, unk_token="[UNK]")
  )
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=model,
    unk_token="[UNK]",
    eos_token="<|end|>",
    pad_token="<|end|>",
    additional_special_tokens=["<|reply|>"],
  )
  tokenizer.chat_template = TEMPLATE
  tokenizer.save_pretrained(folder)
  config = transformers.LlamaConfig(
    vocab_size=len(words),
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=vocab["<|end|>"],
    pad_token_id=vocab["<|end|>"],
  )
  made = transformers.LlamaForCausalLM(config)
  with torch.no_grad():
    for layer in made.model.layers:
      layer.self_attn.o_proj.weight.zero_()
      layer.mlp.down_proj.weight.zero_()
    made.model.embed_tokens.weight.copy_(torch.eye(len(words), 8))
    made.lm_head.weight.zero_()
    chain = ["<|reply|>", *says, "<|end|>" if ends else says[0]]
    for word, following in zip(chain, chain[1:]):
      made.lm_head.weight[vocab[following], vocab[word]] = 10.0
  made.generation_config.max_new_tokens = 4096
  made.save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """Address, and the folders of a model that grades and of one that rambles."""
  pytest.importorskip("fastapi", reason="transformers serve needs fastapi")
  pytest.importorskip("uvicorn", reason="transformers serve needs uvicorn")
  pytest.importorskip("accelerate", reason="transformers serve needs it")
  folder = tmp_path_factory.mktemp("models")
  grading = _model(folder / "grading", GRADING, ends=True)
  endless = _model(folder / "endless", ENDLESS, ends=False)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "transformers.cli.transformers", "serve"),
      *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu"),
    ],
    env=dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
    stdout=(folder / "log").open("w"),
    stderr=subprocess.STDOUT,
  )
  try:
    deadline = time.monotonic() + 120
    while True:
      try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
        break
      except (urllib.error.URLError, OSError):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1", str(grading), str(endless)
  finally:
    process.terminate()
    process.wait(timeout=30)


def test_it_grades(server, rollouts):
  address, grading, _ = server
  reward = judge.Reward(
    address,
    grading,
    key_variable="",
    max_tokens=64,
    timeout=120.0,
    completion_price=1e6,
  )
  reward.probe([structs.Prompt("a", "open_ended", "Tell.", "Once.")])
  probed = reward.client.cost()
  terms = reward.rewards(rollouts([["a", "b"], ["c", "d"]]), None)
  np.testing.assert_allclose(terms["total"], (3.5 - 1) / 4)
  for name, grade in GRADES.items():
    np.testing.assert_array_equal(terms[name], grade)
  assert not terms["judge_failed"].any()
  # Four tokens a reply, the end among them, as the server counts.
  assert probed == 4 and reward.client.cost() == 5 * 4


def test_a_judge_that_rambles_is_cut_and_ends_the_run_at_once(server):
  address, _, endless = server
  reward = judge.Reward(
    address,
    endless,
    key_variable="",
    max_tokens=32,
    retries=2,
    backoff=0.0,
    timeout=120.0,
    completion_price=1e6,
  )
  begin = time.monotonic()
  with pytest.raises(endpoint.EndpointError, match="no JSON object.*so on"):
    reward.probe([structs.Prompt("a", "open_ended", "Tell.", "Once.")])
  assert time.monotonic() - begin < 60
  assert reward.client.cost() == 3 * 32  # tokens of three replies


def _run(folder, server, *flags):
  address, model, _ = server
  return subprocess.run(
    [
      *(sys.executable, "-m", "experiments.opera_rl"),
      "--config=configs/methods/judge.py:smoke",
      f"--workdir={folder}",
      f"--config.reward.options.judge.endpoint={address}",
      f"--config.reward.options.judge.model={model}",
      "--config.reward.options.judge.key_variable=",
      "--config.reward.options.judge.max_tokens=64",
      f"--config.reward.options.judge.cache={folder / 'answers'}",
      *flags,
    ],
    cwd=ROOT,
    env=dict(os.environ, XLA_FLAGS=""),
    capture_output=True,
    text=True,
    timeout=900,
  )


def test_the_whole_method(server, tmp_path):
  done = _run(tmp_path, server)
  assert done.returncode == 0, done.stderr[-3000:]
  lines = metrics.read(tmp_path / "rl" / "metrics.jsonl")
  assert lines
  for line in lines:
    assert line["reward/judge"] == pytest.approx((3.5 - 1) / 4)
    assert line["reward/judge_failed"] == 0
  assert (tmp_path / "report.html").exists()


def test_a_model_that_is_not_there_ends_it_before_training(server, tmp_path):
  done = _run(
    tmp_path,
    server,
    f"--config.reward.options.judge.model={tmp_path / 'nothing'}",
    "--config.reward.options.judge.retries=1",
  )
  assert done.returncode != 0
  assert "HTTP" in done.stderr and "Traceback" not in done.stderr
  assert not (tmp_path / "base").exists()
