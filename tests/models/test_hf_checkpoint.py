"""Weights of Hugging Face: both ways, exact, streamed, refused when wrong."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding

from opera_jax.models import decoder, hf_checkpoint, hf_config, tensor_files
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.sharding import rules


def _config(**changes) -> decoder.Config:
  sizes = {
    "vocab_size": 304,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "intermediate_size": 80,
    "rope_theta": 5_000.0,
    "tie_word_embeddings": False,
  }
  return decoder.Config(**{**sizes, **changes})


def _equal(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  ("tied", "dtype"),
  [
    pytest.param(True, "float32", marks=pytest.mark.slow),
    (False, "bfloat16"),
  ],
)
def test_round_trip_is_bit_exact_on_every_layout(tmp_path, tied, dtype):
  config = _config(tie_word_embeddings=tied)
  params = jax.tree.map(
    lambda x: x.astype(dtype), decoder.create(config, seed=1)[1]
  )
  hf_checkpoint.save(tmp_path / "a", params, config, file_bytes=40_000)
  assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
  mesh = mesh_lib.create({"fsdp": 2, "tensor": 4})
  for table in (rules.TRAIN, rules.ROLLOUT):
    loaded = hf_checkpoint.load(tmp_path / "a", config, mesh, table, dtype)
    _equal(loaded, params)
    shardings = rules.shardings(decoder.logical_axes(params), mesh, table)
    for leaf, sharding in zip(
      jax.tree.leaves(loaded),
      jax.tree.leaves(
        shardings, is_leaf=lambda x: isinstance(x, NamedSharding)
      ),
    ):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
      assert leaf.dtype == dtype
  hf_checkpoint.save(tmp_path / "b", loaded, config)
  one = tmp_path / "b" / tensor_files.SINGLE
  split = tensor_files.find(tmp_path / "a")
  for name, tensor in tensor_files.find(one.parent).items():
    whole = tensor.rows(0, tensor.shape[0])
    np.testing.assert_array_equal(
      whole, split[name].rows(0, tensor.shape[0]), err_msg=name
    )


def test_bfloat16_weights_widen_exactly_and_float32_round_once(tmp_path):
  config = _config()
  params = decoder.create(config, seed=1)[1]
  mesh = mesh_lib.create({"fsdp": 8})
  hf_checkpoint.save(tmp_path / "half", params, config, dtype="bfloat16")
  rounded = jax.tree.map(
    lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32),
    params,
  )
  wide = hf_checkpoint.load(tmp_path / "half", config, mesh, rules.TRAIN)
  _equal(wide, rounded)
  hf_checkpoint.save(tmp_path / "whole", params, config)
  half = hf_checkpoint.load(
    tmp_path / "whole", config, mesh, rules.TRAIN, "bfloat16"
  )
  _equal(jax.tree.map(lambda x: np.asarray(x, np.float32), half), rounded)


def test_blocks_of_rows_make_no_difference(tmp_path, monkeypatch):
  config = _config()
  params = decoder.create(config, seed=2)[1]
  hf_checkpoint.save(tmp_path, params, config)
  monkeypatch.setattr(hf_checkpoint, "_BLOCK_BYTES", 3_000)
  mesh = mesh_lib.create({"data": 2, "fsdp": 2, "tensor": 2})
  _equal(hf_checkpoint.load(tmp_path, config, mesh, rules.TRAIN), params)


def test_a_tensor_is_read_once(tmp_path, monkeypatch):
  config = _config()
  hf_checkpoint.save(tmp_path, decoder.create(config, seed=2)[1], config)
  read = []
  rows = tensor_files.Tensor.rows

  def spy(self, start, stop):
    block = rows(self, start, stop)
    read.append(block.nbytes)
    return block

  monkeypatch.setattr(tensor_files.Tensor, "rows", spy)
  mesh = mesh_lib.create({"fsdp": 2, "tensor": 4})
  params = hf_checkpoint.load(tmp_path, config, mesh, rules.TRAIN)
  assert sum(read) == 4 * decoder.parameter_count(params)
  assert max(read) == 4 * 304 * 48  # the embedding; never a stack of layers


@pytest.mark.parametrize(
  ("tied", "dtype"),
  [
    pytest.param(True, "float32", marks=pytest.mark.slow),
    (False, "bfloat16"),
  ],
)
def test_transformers_loads_what_was_saved(tmp_path, tied, dtype):
  import torch
  import transformers

  config = _config(tie_word_embeddings=tied, rms_norm_eps=1e-5)
  params = decoder.create(config, seed=1)[1]
  # Sharper than at initialisation, with norms that all differ.
  keys = iter(jax.random.split(jax.random.key(0), 100))
  params = jax.tree.map(
    lambda x: x + 0.3 * jax.random.uniform(next(keys), x.shape), params
  )
  params = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
  hf_checkpoint.save(tmp_path, params, config, dtype=dtype)
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, attn_implementation="eager", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  assert str(model.dtype) == f"torch.{dtype}"
  names = dict(model.named_parameters())
  exported = dict(hf_checkpoint.export_tensors(params, config))
  assert names.keys() == exported.keys()
  for name, value in exported.items():
    np.testing.assert_array_equal(
      names[name].detach().float().numpy(), value, err_msg=name
    )

  tokens = np.arange(3, 40, dtype=np.int32)[None]
  with torch.no_grad():
    theirs = model.float()(torch.from_numpy(tokens).long()).logits.numpy()
  np.testing.assert_allclose(_logits(config, params, tokens), theirs, atol=1e-4)


def _logits(config, params, tokens):
  from flax import nnx

  from opera_jax.models import attention

  model = nnx.merge(decoder.abstract(config)[0], params)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = model(tokens, positions, attention.causal(jnp.ones_like(tokens)))
  head, transposed = model.head_matrix()
  return np.asarray(hidden @ (head.T if transposed else head))


def test_tokenizer_and_end_of_turn_are_written(tmp_path):
  import transformers

  from opera_jax.text import tokenizer

  words = tokenizer.Tokenizer.train_bpe(["one two three"] * 4, 270)
  config = _config()
  params = decoder.create(config, seed=1)[1]
  hf_checkpoint.save(tmp_path, params, config, words)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs("one two").input_ids == words.encode("one two").tolist()
  settings = transformers.GenerationConfig.from_pretrained(tmp_path)
  assert settings.eos_token_id == theirs.eos_token_id == words.end_id


def test_a_tied_checkpoint_may_store_its_head(tmp_path):
  config = _config(tie_word_embeddings=True)
  params = decoder.create(config, seed=1)[1]
  exported = dict(hf_checkpoint.export_tensors(params, config))
  exported["lm_head.weight"] = exported["model.embed_tokens.weight"]
  plan = [(name, value.shape) for name, value in exported.items()]
  writer = tensor_files.Writer(tmp_path, plan, np.dtype(np.float32), 10**9)
  writer.write(exported.values())
  mesh = mesh_lib.create()
  _equal(hf_checkpoint.load(tmp_path, config, mesh, rules.TRAIN), params)


@pytest.mark.parametrize("rows", [2, 64])
def test_a_tied_model_with_a_head_of_its_own_is_refused(
  tmp_path, monkeypatch, rows
):
  monkeypatch.setattr(hf_checkpoint, "_BLOCK_BYTES", rows * 4 * 48)
  config = _config(tie_word_embeddings=True)
  params = decoder.create(config, seed=1)[1]
  exported = dict(hf_checkpoint.export_tensors(params, config))
  head = exported["model.embed_tokens.weight"].copy()
  head[150, 3] += 1e-3
  exported["lm_head.weight"] = head
  plan = [(name, value.shape) for name, value in exported.items()]
  writer = tensor_files.Writer(tmp_path, plan, np.dtype(np.float32), 10**9)
  writer.write(exported.values())
  with pytest.raises(ValueError, match="the model is not tied"):
    hf_checkpoint.load(tmp_path, config, mesh_lib.create(), rules.TRAIN)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
  "name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"]
)
def test_weights_that_are_not_finite_are_refused(tmp_path, name, bad):
  config = _config()
  params = decoder.create(config, seed=1)[1]
  exported = dict(hf_checkpoint.export_tensors(params, config))
  exported[name] = exported[name].copy()
  exported[name].reshape(-1)[-1] = bad
  plan = [(key, value.shape) for key, value in exported.items()]
  writer = tensor_files.Writer(tmp_path, plan, np.dtype(np.float32), 10**9)
  writer.write(exported.values())
  with pytest.raises(ValueError, match=f"{name} holds a weight that is not f"):
    hf_checkpoint.load(tmp_path, config, mesh_lib.create(), rules.TRAIN)


def _with_header(file, change):
  """Rewrites the header of a safetensors file, its bytes staying."""
  raw = file.read_bytes()
  length = int.from_bytes(raw[:8], "little")
  header = json.loads(raw[8 : 8 + length])
  change(header)
  text = json.dumps(header).encode()
  text += b" " * (length - len(text))
  file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _overlap(header):
  names = [n for n in header if n.endswith("norm.weight")][:2]
  header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


def _short(header):
  header["model.norm.weight"]["data_offsets"][1] -= 4


def _beyond(header):
  header["model.norm.weight"]["data_offsets"] = [10**9, 10**9 + 4 * 48]


def _negative(header):
  header["model.norm.weight"]["data_offsets"] = [-192, 0]


def _no_shape(header):
  del header["model.norm.weight"]["shape"]


def _bare(header):
  header["model.norm.weight"] = 3


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (_overlap, "overlap|takes"),
    (_short, "takes 188 bytes"),
    (_beyond, "ends at byte"),
    (_negative, "is described as"),
    (_no_shape, "KeyError"),
    (_bare, "TypeError"),
  ],
)
def test_headers_that_lie_are_refused(tmp_path, change, said):
  config = _config()
  hf_checkpoint.save(tmp_path, decoder.create(config, seed=1)[1], config)
  _with_header(tmp_path / tensor_files.SINGLE, change)
  with pytest.raises(ValueError, match=said) as error:
    hf_checkpoint.load(tmp_path, config, mesh_lib.create(), rules.TRAIN)
  assert tensor_files.SINGLE in str(error.value)


@pytest.mark.parametrize(
  "name", ["/etc/x.safetensors", "../x.safetensors", ".."]
)
def test_an_index_stays_in_its_folder(tmp_path, name):
  (tmp_path / tensor_files.INDEX).write_text(
    json.dumps({"weight_map": {"model.norm.weight": name}})
  )
  with pytest.raises(ValueError, match="nothing outside of it"):
    tensor_files.find(tmp_path)
  (tmp_path / tensor_files.INDEX).write_text("[1, 2")
  with pytest.raises(ValueError, match="is no index"):
    tensor_files.find(tmp_path)


def test_all_mismatches_come_in_one_error(tmp_path):
  config = _config()
  hf_checkpoint.save(tmp_path, decoder.create(config, seed=1)[1], config)
  other = dataclasses.replace(
    config,
    num_hidden_layers=2,
    intermediate_size=88,
    tie_word_embeddings=True,
    rope_theta=7.0,
  )
  with pytest.raises(ValueError) as error:
    hf_checkpoint.load(tmp_path, other, mesh_lib.create(), rules.TRAIN)
  text = str(error.value)
  for line in (
    "rope_theta: 5000.0 in config.json, 7.0 given",
    "layers: 3 in config.json, 2 given",
    "shape: model.layers.0.mlp.gate_proj.weight is [80, 48], must be [88, 48]",
    "shape: model.layers.1.mlp.down_proj.weight is [48, 80], must be [48, 88]",
    "unexpected: model.layers.2.self_attn.q_norm.weight",
  ):
    assert line in text
  deeper = dataclasses.replace(config, num_hidden_layers=4)
  with pytest.raises(ValueError, match="missing: model.layers.3.self_attn.q_p"):
    hf_checkpoint.load(tmp_path, deeper, mesh_lib.create(), rules.TRAIN)


def test_a_mesh_that_does_not_divide_is_refused_before_reading(tmp_path):
  config = _config()
  hf_checkpoint.save(tmp_path, decoder.create(config, seed=1)[1], config)
  with pytest.raises(ValueError, match="kv_heads has 4, mesh axis 'tensor'"):
    mesh = mesh_lib.create({"fsdp": 1, "tensor": 8})
    hf_checkpoint.load(tmp_path, config, mesh, rules.TRAIN)


def test_broken_files_are_named(tmp_path):
  config = _config()
  params = decoder.create(config, seed=1)[1]
  good = tmp_path / "good"
  hf_checkpoint.save(good, params, config, file_bytes=40_000)
  mesh = mesh_lib.create()
  with pytest.raises(FileExistsError, match="already"):
    hf_checkpoint.save(good, params, config)
  with pytest.raises(FileNotFoundError, match="neither"):
    hf_checkpoint.load(tmp_path, config, mesh, rules.TRAIN)
  first, second, *_ = sorted(good.glob("*.safetensors"))
  cut = tmp_path / "cut"
  shutil.copytree(good, cut)
  (cut / first.name).write_bytes(first.read_bytes()[:-1])
  with pytest.raises(ValueError, match=f"{first.name}.*Download it again"):
    hf_checkpoint.load(cut, config, mesh, rules.TRAIN)
  second.unlink()
  with pytest.raises(FileNotFoundError, match=second.name):
    hf_checkpoint.load(good, config, mesh, rules.TRAIN)
  with pytest.raises(ValueError, match="float16"):
    hf_checkpoint.load(good, config, mesh, rules.TRAIN, "float16")


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
  import huggingface_hub

  config = _config()
  params = decoder.create(config, seed=1)[1]
  hf_checkpoint.save(tmp_path, params, config)
  asked = []

  def download(name, allow_patterns, revision):
    asked.append((name, tuple(allow_patterns)))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert hf_checkpoint.config_from_hf("Qwen/Qwen3-0.6B") == config
  mesh = mesh_lib.create()
  _equal(
    hf_checkpoint.load("Qwen/Qwen3-0.6B", config, mesh, rules.TRAIN), params
  )
  assert asked == [
    ("Qwen/Qwen3-0.6B", ("config.json",)),
    ("Qwen/Qwen3-0.6B", ("*.safetensors", "*.json")),
  ]


def test_a_name_that_is_no_model_is_explained():
  with pytest.raises(
    FileNotFoundError, match="no directory, no GGUF file and no"
  ):
    hf_checkpoint.config_from_hf("runs/no/such/folder")


LOAD = """
import sys
import jax
import jax.numpy as jnp
from opera_jax.models import hf_checkpoint
from opera_jax.sharding import mesh, rules


def peak():
  status = open("/proc/self/status").read()
  return int(status.split("VmHWM:")[1].split()[0]) << 10


config = hf_checkpoint.config_from_hf(sys.argv[1])
devices = mesh.create({"fsdp": 2, "tensor": 4})
jax.jit(jnp.zeros, static_argnums=0)(8).block_until_ready()
before = peak()
params = hf_checkpoint.load(sys.argv[1], config, devices, rules.TRAIN)
held = sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(params)))
print(held, peak() - before - held)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_host_holds_one_tensor_beside_the_parameters(tmp_path):
  """In 2.4 GB, of which the largest stack has 512 MiB and a tensor 16."""
  config = _config(
    vocab_size=1024,
    hidden_size=1024,
    num_hidden_layers=32,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=4096,
  )
  shapes = {
    name: value.shape
    for name, value in hf_checkpoint.export_tensors(
      decoder.create(dataclasses.replace(config, num_hidden_layers=1), seed=0)[
        1
      ],
      dataclasses.replace(config, num_hidden_layers=1),
    )
  }
  plan = [(n, s) for n, s in shapes.items() if ".layers." not in n]
  plan += [
    (name.replace(".0.", f".{i}."), shape)
    for i in range(config.num_hidden_layers)
    for name, shape in shapes.items()
    if ".layers." in name
  ]
  writer = tensor_files.Writer(tmp_path, plan, np.dtype(np.float32), 10**9)
  writer.write(np.ones(shape, np.float32) for _, shape in plan)
  contents = hf_config.contents(config, "float32")
  (tmp_path / "config.json").write_text(json.dumps(contents))
  done = subprocess.run(
    [sys.executable, "-c", LOAD, str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  held, more = map(int, done.stdout.split())
  print(f"{held >> 20} MiB of parameters, {more >> 20} MiB more")
  assert held > 2200 << 20
  assert more < 176 << 20  # a stack would be more
