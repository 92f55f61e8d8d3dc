"""Two processes draw the samples of one device."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

SAMPLE = """
import json
import sys

import jax
import numpy as np
from opera_jax.models import decoder
from opera_jax.rollout import engine, sampling
from opera_jax.sharding import layout, mesh, rules, runtime

address, shape, path = sys.argv[1:]
runtime.start(distributed=address, heartbeat_seconds=30, compile_cache="")
devices = mesh.create(json.loads(shape))
assert devices.size == len(jax.devices())
config = decoder.Config(
  vocab_size=300, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, head_dim=16, intermediate_size=64, rope_theta=10_000.0,
  tie_word_embeddings=False,
)
graphdef, params = decoder.create(config, seed=3)
axes = decoder.logical_axes(params)
params = layout.to_devices(jax.device_get(params), layout.replicated(devices))
params = layout.move(params, axes, devices, rules.ROLLOUT)
rng = np.random.default_rng(0)
prompts = [
  rng.integers(20, 300, n).astype(np.int32) for n in rng.integers(1, 17, 7)
]
sampler = engine.Engine(
  graphdef, config, mesh=devices, prompt_slots=4, slots=2, prompt_buckets=(8,
  16), steps=8,
)
groups = sampler.sample(
  params,
  prompts,
  sampling.Sampling(max_new_tokens=40, stop_ids=(7, 11, 13, 17)),
  jax.random.key(5),
  samples=5,
)
sampled = [
  [s.tokens.tolist(), s.logprob.tolist(), s.reason]
  for group in groups for s in group
]
with open(f"{path}-{jax.process_index()}", "w") as file:
  json.dump(sampled, file)
"""


def _sampled(path, shape: dict[str, int], processes: int, devices: int) -> list:
  """The samples as each process has them."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  hosts = [
    subprocess.Popen(
      [
        *(sys.executable, "-c", SAMPLE),
        f"localhost:{port},{processes},{i}" if processes > 1 else "",
        *(json.dumps(shape), str(path)),
      ],
      cwd=ROOT,
      env=os.environ
      | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(processes)
  ]
  outputs = [host.communicate(timeout=900)[0] for host in hosts]
  for host, output in zip(hosts, outputs):
    assert host.returncode == 0, output
  return [
    json.loads(path.with_name(f"{path.name}-{i}").read_text())
    for i in range(processes)
  ]


def test_two_processes_draw_what_one_device_does(tmp_path):
  (want,) = _sampled(tmp_path / "one", {"data": 1}, processes=1, devices=1)
  assert len({len(tokens) for tokens, _, _ in want}) > 5
  assert {reason for _, _, reason in want} == {"stop", "length"}
  shape = {"data": 2, "fsdp": 2, "tensor": 2}
  for got in _sampled(tmp_path / "two", shape, processes=2, devices=4):
    for (tokens, logprob, reason), ours in zip(want, got, strict=True):
      assert (tokens, reason) == (ours[0], ours[2])
      np.testing.assert_allclose(ours[1], logprob, rtol=1e-5, atol=1e-5)
