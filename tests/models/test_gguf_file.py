"""GGUF files against transformers' reading and against gguf's dequantisation.

Small files are written by gguf's writer, as llama.cpp's converter would.
"""

import functools
import os
import re
import struct
import sys
import time
import tracemalloc

import gguf
import gguf_files
import numpy as np
import pytest
from gguf_files import Q
from hypothesis import given, settings
from hypothesis import strategies as st

from opera_jax import gguf_header
from opera_jax.models import gguf_file

SIZES = {
  "vocab_size": 96,
  "hidden_size": 256,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 512,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 512,
  "pad_token_id": None,
}
LONGROPE = {
  "rope_type": "longrope",
  "rope_theta": 10_000.0,
  "original_max_position_embeddings": 128,
  "short_factor": [1.0 + 0.125 * i for i in range(32)],
  "long_factor": [1.5 + 0.25 * i for i in range(32)],
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500_000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
# Class of transformers' config, and what differs from SIZES.
CASES = {
  "llama": ("LlamaConfig", {"head_dim": 48}),
  "llama_tied": (
    "LlamaConfig",
    {"tie_word_embeddings": True, "num_key_value_heads": 4},
  ),
  "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
  "qwen3": ("Qwen3Config", {"head_dim": 48, "tie_word_embeddings": False}),
  "phi3": ("Phi3Config", {"sliding_window": None}),
  "phi3_longrope": (
    "Phi3Config",
    {
      "rope_parameters": LONGROPE,
      "original_max_position_embeddings": 128,
      "sliding_window": None,
    },
  ),
  "gemma3": (
    "Gemma3TextConfig",
    {
      "head_dim": 48,
      "query_pre_attn_scalar": 48,
      "num_hidden_layers": 7,
      "sliding_window": 8,
    },
  ),
}
# What transformers itself reads from a GGUF file.
READ_BY_TRANSFORMERS = ("llama", "llama_tied", "qwen2", "qwen3", "gemma3")


@functools.cache
def torch_model(case):
  """A float32 model of a case, its norms and biases all different."""
  import torch
  import transformers

  torch.manual_seed(0)
  torch.set_num_threads(1)
  name, changes = CASES[case]
  config = getattr(transformers, name)(**{**SIZES, **changes})
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.uniform_(-0.4, 0.6)
      else:
        parameter.normal_(std=0.1)
  return model


def file_of(case, folder, kind=Q.F32, changes=None):
  """A case's GGUF file; `changes` edits its (metadata, tensors)."""
  model = torch_model(case)
  metadata = gguf_files.metadata_of(model.config)
  tensors = gguf_files.tensors_of(model, kind)
  if case == "phi3_longrope":
    for name in ("long", "short"):
      values = np.array(LONGROPE[f"{name}_factor"], np.float32)
      tensors[f"rope_factors_{name}.weight"] = (values, Q.F32)
  if changes is not None:
    changes(metadata, tensors)
  arch = gguf_files.ARCHITECTURES[model.config.model_type]
  return gguf_files.write(folder / "model.gguf", arch, metadata, tensors)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  return file_of("llama", tmp_path_factory.mktemp("llama"), Q.Q8_0)


def whole(tensor):
  return tensor.rows(0, tensor.shape[0])


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, marks=[] if case == "gemma3" else [pytest.mark.slow])
    for case in CASES
  ],
)
def test_the_model_that_comes_back_gives_the_same_logits(case, tmp_path):
  """Config and tensors, put into transformers, are the stored model."""
  import torch
  import transformers

  model = torch_model(case)
  checkpoint = gguf_file.read(file_of(case, tmp_path))
  # The small files have no tokenizer, and Phi-3's default pad id is large.
  config = transformers.AutoConfig.for_model(
    pad_token_id=None, **checkpoint.config
  )
  config._attn_implementation = "eager"
  read = transformers.AutoModelForCausalLM.from_config(config).eval()
  state = {
    name: torch.from_numpy(whole(tensor))
    for name, tensor in checkpoint.tensors.items()
  }
  if checkpoint.config["tie_word_embeddings"]:
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
  read.load_state_dict(state)
  tokens = torch.arange(40)[None] % SIZES["vocab_size"]
  with torch.no_grad():
    np.testing.assert_allclose(
      read(tokens).logits, model(tokens).logits, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("case", READ_BY_TRANSFORMERS)
def test_tensors_are_those_that_transformers_reads(case, tmp_path):
  import transformers

  file = file_of(case, tmp_path, Q.Q8_0)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file=file.name, dtype="float32"
  ).state_dict()
  checkpoint = gguf_file.read(tmp_path)
  if checkpoint.config["tie_word_embeddings"]:
    theirs.pop("lm_head.weight")
  assert checkpoint.tensors.keys() == theirs.keys()
  for name, tensor in checkpoint.tensors.items():
    assert tensor.shape == tuple(theirs[name].shape)
    np.testing.assert_array_equal(whole(tensor), theirs[name].numpy(), name)


def test_phi3_keeps_its_fused_tensors(tmp_path):
  model = torch_model("phi3")
  checkpoint = gguf_file.read(file_of("phi3", tmp_path))
  state = model.state_dict()
  assert checkpoint.tensors.keys() == state.keys()
  for name, tensor in checkpoint.tensors.items():
    np.testing.assert_array_equal(whole(tensor), state[name].numpy(), name)


def test_longrope_comes_from_tensors_and_metadata(tmp_path):
  config = gguf_file.read(file_of("phi3_longrope", tmp_path)).config
  assert config["rope_theta"] == 10_000.0
  assert config["original_max_position_embeddings"] == 128
  scaling = config["rope_scaling"]
  assert scaling["rope_type"] == "longrope"
  assert scaling["short_factor"] == LONGROPE["short_factor"]
  assert scaling["long_factor"] == LONGROPE["long_factor"]
  # transformers computes the same factor from the two lengths.
  rotary = torch_model("phi3_longrope").model.rotary_emb
  assert scaling["attention_factor"] == pytest.approx(
    rotary.attention_scaling, rel=1e-6
  )


def test_llama3_scaling_comes_as_divisors(tmp_path):
  """theta's frequencies over the factors are those that transformers uses."""
  import transformers

  config = transformers.LlamaConfig(
    **SIZES, head_dim=48, rope_parameters=LLAMA3
  )
  rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
  plain = LLAMA3["rope_theta"] ** (-np.arange(0, 48, 2) / 48)
  wanted = rotary.inv_freq.numpy()
  stored = (plain / wanted).astype(np.float32)
  assert stored.max() == pytest.approx(8) and stored.min() == pytest.approx(1)

  def changes(metadata, tensors):
    metadata["llama.rope.freq_base"] = LLAMA3["rope_theta"]
    tensors["rope_freqs.weight"] = (stored, Q.F32)

  checkpoint = gguf_file.read(file_of("llama", tmp_path, changes=changes))
  scaling = checkpoint.config["rope_scaling"]
  assert scaling["rope_type"] == "factors"
  theta = checkpoint.config["rope_theta"]
  ours = theta ** (-np.arange(0, 48, 2) / 48) / np.array(scaling["factors"])
  np.testing.assert_allclose(ours, wanted, rtol=1e-6)
  assert not any("rope" in name for name in checkpoint.tensors)


def test_gemmas_pattern_can_be_stored(tmp_path):
  def changes(metadata, tensors):
    metadata["gemma3.attention.sliding_window_pattern"] = 3
    metadata["gemma3.rope.freq_base_swa"] = 5_000.0

  config = gguf_file.read(file_of("gemma3", tmp_path, changes=changes)).config
  full = [kind == "full_attention" for kind in config["layer_types"]]
  assert full == [False, False, True, False, False, True, False]
  assert config["rope_local_base_freq"] == 5_000.0


def test_only_the_27b_scales_queries_otherwise(tmp_path):
  """27B, of 62 layers: hidden / heads instead of head_dim (168, not 128)."""

  def changes(metadata, tensors):
    metadata["gemma3.block_count"] = 62
    layer = [name for name in tensors if name.startswith("blk.0.")]
    for i in range(7, 62):
      for name in layer:
        tensors[name.replace("blk.0.", f"blk.{i}.")] = tensors[name]

  config = gguf_file.read(file_of("gemma3", tmp_path, changes=changes)).config
  assert config["query_pre_attn_scalar"] == 256 // 4
  config = gguf_file.read(file_of("gemma3", tmp_path)).config
  assert config["query_pre_attn_scalar"] == 48


def test_ends_start_and_scaling_reach_the_config(tmp_path):
  def changes(metadata, tensors):
    metadata["tokenizer.ggml.tokens"] = ["a", "<s>", "<x>", "<|im_end|>", "b"]
    metadata["tokenizer.ggml.token_type"] = np.array([1, 3, 3, 3, 1], np.int32)
    metadata["tokenizer.ggml.bos_token_id"] = 1
    metadata["tokenizer.ggml.eos_token_id"] = 2
    metadata["llama.rope.scaling.type"] = "yarn"
    metadata["llama.rope.scaling.factor"] = 4.0
    metadata["llama.rope.scaling.original_context_length"] = 128
    metadata["llama.rope.dimension_count"] = 24

  config = gguf_file.read(file_of("llama", tmp_path, changes=changes)).config
  assert config["eos_token_id"] == [2, 3] and config["bos_token_id"] == 1
  assert config["partial_rotary_factor"] == 0.5
  assert config["rms_norm_eps"] == 1e-5  # not the float32 beside it
  assert config["rope_scaling"] == {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
  }


def random_blocks(kind, shape, seed=0):
  """Raw blocks of random bits with scales that are small and finite."""
  block, size = gguf.GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(seed)
  count = int(np.prod(shape)) // block
  raw = rng.integers(0, 256, (count, size), np.uint8)
  scales = rng.uniform(-0.02, 0.02, (count, 2)).astype(np.float16)
  if kind == Q.Q6_K:  # its scale stands last
    raw[:, -2:] = scales[:, :1].view(np.uint8)
  else:
    raw[:, :4] = scales.view(np.uint8)
  return raw.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("name", gguf_file.TYPES)
def test_rows_of_every_type(name, tmp_path):
  """Any rows of q (permuted), of down and of the embedding, of each type."""
  kind = Q[name]
  reference = {}

  def changes(metadata, tensors):
    for key in ("blk.1.attn_q", "blk.0.ffn_down", "token_embd"):
      values, _ = tensors[f"{key}.weight"]
      if name in ("Q4_K", "Q5_K", "Q6_K"):
        raw = random_blocks(kind, values.shape)
      else:
        raw = gguf.quantize(values, kind)
      reference[key] = gguf.dequantize(raw, kind)
      raw = np.ascontiguousarray(raw)
      tensors[f"{key}.weight"] = (
        raw.view(np.uint8) if raw.dtype != np.uint8 else raw,
        kind,
      )

  file = file_of("llama", tmp_path, changes=changes)
  tensors = gguf_file.read(file).tensors
  for key, ours in (
    ("token_embd", "model.embed_tokens.weight"),
    ("blk.0.ffn_down", "model.layers.0.mlp.down_proj.weight"),
    ("blk.1.attn_q", "model.layers.1.self_attn.q_proj.weight"),
  ):
    tensor, wanted = tensors[ours], reference[key]
    if key == "blk.1.attn_q":  # 4 heads of 48: pairs back into halves
      wanted = wanted.reshape(4, 24, 2, -1).swapaxes(1, 2).reshape(192, -1)
    assert tensor.dtype == name and tensor.shape == wanted.shape
    read = whole(tensor)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, wanted)
    for start, stop in ((0, 1), (5, 6), (7, 61), (47, 49), (95, 96), (90, 96)):
      np.testing.assert_array_equal(
        tensor.rows(start, stop), wanted[start:stop]
      )


def test_rows_read_no_more_than_asked(llama, monkeypatch):
  """One row of the embedding costs its own bytes, one of q those of a head."""
  tensors = gguf_file.read(llama).tensors
  taken = []
  real = np.fromfile

  def counted(*args, count, **kwargs):
    taken.append(count)
    return real(*args, count=count, **kwargs)

  monkeypatch.setattr(np, "fromfile", counted)
  row = 256 // 32 * 34  # Q8_0
  tensors["model.embed_tokens.weight"].rows(17, 18)
  tensors["model.layers.0.self_attn.q_proj.weight"].rows(50, 51)
  assert taken == [row, 48 * row]
  assert tensors["model.embed_tokens.weight"].bytes() == 96 * row


def test_a_file_that_shrinks_after_its_header(llama, tmp_path):
  file = tmp_path / "model.gguf"
  file.write_bytes(llama.read_bytes())
  tensor = max(gguf_file.read(file).tensors.values(), key=lambda t: t.offset)
  with open(file, "r+b") as stream:
    stream.truncate(tensor.offset + 8)
  with pytest.raises(ValueError, match=r"ended while it was read.*Download"):
    whole(tensor)


# Damaged and hostile files ---------------------------------------------------


def header(keys=(), tensors=(), version=3, counts=None, magic=b"GGUF"):
  """The bytes of a header; keys and tensors come as bytes."""
  counts = (len(tensors), len(keys)) if counts is None else counts
  return b"".join(
    [magic, struct.pack("<IQQ", version, *counts), *keys, *tensors]
  )


def text(value):
  raw = value if isinstance(value, bytes) else value.encode()
  return struct.pack("<Q", len(raw)) + raw


def key(name, kind, value):
  return text(name) + struct.pack("<I", kind) + value


def tensor(name, shape, kind=0, offset=0):
  return (
    text(name)
    + struct.pack("<I", len(shape))
    + struct.pack(f"<{len(shape)}Q", *shape)
    + struct.pack("<IQ", kind, offset)
  )


def u32(value):
  return struct.pack("<I", value)


ARCH = key("general.architecture", 8, text("llama"))
DAMAGED = {
  "empty": (b"", r"no GGUF file"),
  "wrong_magic": (header(magic=b"GGML"), r"GGUF.*no GGUF file"),
  "only_the_magic": (b"GGUF", r"the version would take at least 4 bytes"),
  "version_1": (header(version=1), r"version 1, and versions 2 and 3"),
  "big_endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"big-endian"),
  "absurd_counts": (header(counts=(2**63, 2**62)), r"so many keys and tensors"),
  "more_keys_than_there_are": (
    header([ARCH], counts=(0, 3)) + b"\0" * 60,
    r"unknown type|stands twice|key",
  ),
  "key_without_end": (
    header([struct.pack("<QI", 2**40, 8) + b"\0"]),
    r"metadata key has",
  ),
  "string_without_end": (
    header([key("a", 8, struct.pack("<Q", 2**62))]) + b"\0" * 64,
    r"a would take at least \d+ bytes",
  ),
  "key_is_no_utf8": (header([key(b"\xff\xfe", 4, u32(1))]), r"no UTF-8"),
  "key_twice": (header([ARCH, ARCH]), r"'general.architecture' stands twice"),
  "unknown_value_type": (header([key("a", 77, u32(1))]), r"unknown type 77"),
  "array_of_arrays": (
    header([key("a", 9, struct.pack("<IQ", 9, 1))]) + b"\0" * 32,
    r"array of the unsupported type 9",
  ),
  "array_without_end": (
    header([key("a", 9, struct.pack("<IQ", 4, 2**61))]) + b"\0" * 64,
    r"a would take at least \d+ bytes",
  ),
  "strings_without_end": (
    header([key("a", 9, struct.pack("<IQ", 8, 2**60))]) + b"\0" * 64,
    r"strings of a would take",
  ),
  "bad_alignment": (
    header([ARCH, key("general.alignment", 4, u32(48))]),
    r"general.alignment is 48, must be a power of two",
  ),
  "no_axes": (
    header([ARCH], [tensor("t", ())]),
    r"t has 0 axes, must have 1 to 4",
  ),
  "many_axes": (
    header([ARCH], [text("t") + u32(2**31)]) + b"\0" * 64,
    r"axes, must have 1 to 4",
  ),
  "empty_shape": (
    header([ARCH], [tensor("t", (4, 0))]),
    r"t has an empty shape",
  ),
  "shape_overflows": (
    header([ARCH], [tensor("t", (2**62, 2**62, 16))]),
    r"but t \(F32\[.*\]\) ends at byte",
  ),
  "offset_beyond": (
    header([ARCH], [tensor("t", (4,), offset=2**40)]),
    r"but t \(F32\[4\]\) ends at byte",
  ),
  "row_is_no_block": (
    header([ARCH], [tensor("t", (33, 2), kind=8)]) + b"\0" * 256,
    r"rows of t have 33 numbers, and Q8_0 takes them in blocks of 32",
  ),
  "tensor_twice": (
    header([ARCH], [tensor("t", (4,))] * 2) + b"\0" * 256,
    r"the tensor 't' stands twice",
  ),
  "tensors_overlap": (
    header([ARCH], [tensor("s", (8,)), tensor("t", (8,), offset=16)])
    + b"\0" * 256,
    r"the bytes of t overlap those of s",
  ),
  "split": (
    header([ARCH, key("split.count", 2, struct.pack("<H", 3))]),
    r"split GGUF.*llama-gguf-split --merge",
  ),
  "split_count_is_an_array": (
    header([ARCH, key("split.count", 9, struct.pack("<IQII", 4, 2, 1, 1))]),
    r"split GGUF",
  ),
  "no_architecture": (header(), r"lacks general.architecture"),
  "architecture_is_a_number": (
    header([key("general.architecture", 4, u32(7))]),
    r"general.architecture is '7' \(int\), must be of type str",
  ),
  "other_architecture": (
    header([key("general.architecture", 8, text("mamba"))]),
    r"architecture 'mamba', and llama, qwen2, qwen3, phi3, gemma3 are read",
  ),
  "mixture_of_experts": (
    header([key("general.architecture", 8, text("qwen3moe"))]),
    r"mixture of experts \('qwen3moe'\).*dense",
  ),
  "experts_of_llama": (
    header([ARCH, key("llama.expert_count", 4, u32(8))]),
    r"mixture of experts",
  ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name, tmp_path):
  raw, message = DAMAGED[name]
  file = tmp_path / "model.gguf"
  file.write_bytes(raw)
  with pytest.raises(ValueError, match=message) as error:
    gguf_file.read(file)
  assert str(file) in str(error.value)
  assert re.search(
    r"[Dd]ownload|[Cc]onvert|[Cc]hoose|Merge|Name", str(error.value)
  )


@pytest.mark.parametrize("part", [0.2, 0.6, 0.99])
def test_a_truncated_file_is_refused(llama, part, tmp_path):
  raw = llama.read_bytes()
  file = tmp_path / "model.gguf"
  file.write_bytes(raw[: int(len(raw) * part)])
  with pytest.raises(ValueError, match=r"is damaged: .*Download"):
    gguf_file.read(file)


def test_all_mismatches_come_in_one_error(tmp_path):
  def changes(metadata, tensors):
    values, _ = tensors.pop("blk.1.ffn_up.weight")
    tensors["blk.0.attn_q.bias"] = (np.zeros(192, np.float32), Q.F32)
    tensors["blk.0.attn_v.weight"] = (values[:90], Q.F32)
    for name in ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight"):
      raw = np.zeros((256, 512 // 256 * 84), np.uint8)
      tensors[name] = (raw, Q.Q2_K)

  file = file_of("llama", tmp_path, changes=changes)
  with pytest.raises(ValueError) as error:
    gguf_file.read(file)
  lines = str(error.value).splitlines()
  assert lines[1:] == [
    "  shape: blk.0.attn_v.weight is [90, 256], must be [96, 256]",
    "  type: blk.0.ffn_down.weight is Q2_K",
    "  missing: blk.1.ffn_up.weight [512, 256]",
    "  type: blk.1.ffn_down.weight is Q2_K",
    "  unexpected: blk.0.attn_q.bias",
  ]
  assert "5 mismatches" in lines[0] and "Q4_K" in lines[0]


def test_a_type_that_the_library_does_not_know(llama, tmp_path):
  raw = bytearray(llama.read_bytes())
  place = raw.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
  assert raw[place : place + 4] == u32(8)
  raw[place : place + 4] = u32(999)
  file = tmp_path / "model.gguf"
  file.write_bytes(raw)
  with pytest.raises(ValueError, match=r"type: token_embd.weight is type 999"):
    gguf_file.read(file)


@pytest.mark.parametrize(
  "edit, message",
  [
    ({"block_count": 10**6}, r"block_count is 1000000, and the file has"),
    ({"block_count": 0}, r"block_count is 0, must be from 1"),
    ({"embedding_length": "x"}, r"embedding_length is 'x'.*type int"),
    ({"attention.head_count_kv": 3}, r"4 query heads .* share 3 key-value"),
    ({"attention.key_length": 47}, r"be even"),
    ({"attention.value_length": 32}, r"must equal the keys' 48"),
    (
      {"attention.layer_norm_rms_epsilon": float("nan")},
      r"layer_norm_rms_epsilon is nan, must be positive",
    ),
    ({"rope.freq_base": 0.0}, r"freq_base is 0.0, must be positive"),
    ({"context_length": None}, r"lacks llama.context_length"),
    (
      {"feed_forward_length": None, "attention.head_count": None},
      r"(?s)lacks llama.attention.head_count.*lacks llama.feed_forward",
    ),
  ],
)
def test_impossible_metadata_is_refused(edit, message, tmp_path):
  def changes(metadata, tensors):
    for name, value in edit.items():
      metadata.pop(f"llama.{name}")
      if value is not None:
        metadata[f"llama.{name}"] = value

  with pytest.raises(ValueError, match=message):
    gguf_file.read(file_of("llama", tmp_path, changes=changes))


@pytest.mark.parametrize(
  "factors, message",
  [
    (np.zeros(24, np.float32), r"divisors are positive"),
    (np.ones(23, np.float32), r"F32\[23\], must be F32\[24\]"),
  ],
)
def test_impossible_rope_factors_are_refused(factors, message, tmp_path):
  def changes(metadata, tensors):
    tensors["rope_freqs.weight"] = (factors, Q.F32)

  with pytest.raises(ValueError, match=message):
    gguf_file.read(file_of("llama", tmp_path, changes=changes))


def test_one_of_two_longrope_factors_is_refused(tmp_path):
  def changes(metadata, tensors):
    del tensors["rope_factors_long.weight"]

  with pytest.raises(ValueError, match=r"lacks rope_factors_long.weight"):
    gguf_file.read(file_of("phi3_longrope", tmp_path, changes=changes))


def test_fuzzed_headers_raise_value_errors_alone(llama, tmp_path):
  """Random edits of a header are read or refused, in little time and memory."""
  length = min(t.offset for t in gguf_header.read(llama).tensors.values())
  raw, size = llama.read_bytes()[:length], llama.stat().st_size
  file = tmp_path / "model.gguf"
  outcomes, peaks = {True: 0, False: 0}, []

  edits = st.lists(
    st.tuples(
      st.integers(4, length - 1),
      st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**61)]),
      ),
    ),
    min_size=1,
    max_size=4,
  )

  @settings(max_examples=100, deadline=2_000, database=None)
  @given(edits, st.one_of(st.none(), st.integers(0, length)))
  def fuzz(edits, end):
    data = bytearray(raw)
    for place, patch in edits:
      data[place : place + len(patch)] = patch
    file.write_bytes(data[:end])
    if end is None:
      os.truncate(file, size)  # weights without bytes on disk
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
      gguf_file.read(file)
      outcomes[True] += 1
    except ValueError as error:
      assert str(file) in str(error)
      outcomes[False] += 1
    peaks.append(tracemalloc.get_traced_memory()[1] - before)

  tracemalloc.start()
  fuzz()
  tracemalloc.stop()
  assert outcomes[False] > 30, outcomes
  # No allocation of what a header claims.
  assert max(peaks) < 2**20


def test_a_claim_costs_neither_time_nor_memory(tmp_path):
  """16 MiB that claim to be millions of entries are refused at once."""
  claim = header([key("a", 9, struct.pack("<IQ", 8, 2**21 - 32))])
  file = tmp_path / "model.gguf"
  file.write_bytes(claim + b"\xff" * 2**24)
  start = time.process_time()
  with pytest.raises(ValueError, match=r"a would take at least"):
    gguf_file.read(file)
  assert time.process_time() - start < 1


@pytest.mark.parametrize(
  "edit, message",
  [
    ({"token_type": 3}, r"token_type is '3' \(int\), must be of type ndarray"),
    (
      {"eos_token_id": 2},
      r"names \[2\] as ends of text, and has tokens",
    ),
    ({"eos_token_id": "a"}, r"eos_token_id is 'a' \(str\)"),
    ({"bos_token_id": "a"}, r"bos_token_id is 'a' \(str\)"),
  ],
)
def test_impossible_ends_are_refused(edit, message, tmp_path):
  def changes(metadata, tensors):
    metadata["tokenizer.ggml.tokens"] = ["a", "b"]
    for name, value in edit.items():
      metadata[f"tokenizer.ggml.{name}"] = value

  with pytest.raises(ValueError, match=message):
    gguf_file.read(file_of("llama", tmp_path, changes=changes))


# Paths -----------------------------------------------------------------------


def test_a_directory_with_one_file_is_a_checkpoint(llama, tmp_path):
  assert gguf_file.is_gguf(llama) and gguf_file.is_gguf(llama.parent)
  assert gguf_file.find(llama.parent) == llama == gguf_file.find(str(llama))
  assert not gguf_file.is_gguf(tmp_path)
  assert not gguf_file.is_gguf(tmp_path / "missing")
  (tmp_path / "notes.txt").write_text("GGU")
  assert not gguf_file.is_gguf(tmp_path / "notes.txt")
  (tmp_path / "a.gguf").write_bytes(llama.read_bytes())
  (tmp_path / "model.safetensors").touch()
  assert not gguf_file.is_gguf(tmp_path)


def test_paths_that_name_no_single_file(llama, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"holds no .gguf file"):
    gguf_file.find(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"x.gguf is not there"):
    gguf_file.find(tmp_path / "x.gguf")
  for name in ("b.gguf", "a.gguf"):
    (tmp_path / name).write_bytes(llama.read_bytes())
  with pytest.raises(ValueError, match=r"2 GGUF files: a.gguf, b.gguf. Name"):
    gguf_file.find(tmp_path)
  split = tmp_path / "split"
  split.mkdir()
  for i in (1, 2):
    (split / f"m-0000{i}-of-00002.gguf").write_bytes(llama.read_bytes())
  with pytest.raises(ValueError, match=r"one part of a split GGUF.*--merge"):
    gguf_file.find(split)


def test_without_the_library_one_error_says_so(llama, monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(ImportError, match=r"pip install gguf"):
    gguf_file.read(llama)


# Real files ------------------------------------------------------------------


def equal_to_transformers(file, folder):
  import transformers

  (folder / "model.gguf").symlink_to(file)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, gguf_file="model.gguf", dtype="float32"
  )
  state = dict(model.state_dict())
  checkpoint = gguf_file.read(folder)
  assert checkpoint.config["tie_word_embeddings"]
  state.pop("lm_head.weight")
  assert state.keys() == checkpoint.tensors.keys()
  for name, tensor in checkpoint.tensors.items():
    np.testing.assert_array_equal(whole(tensor), state[name].numpy(), name)
  theirs = model.config.to_dict()
  for field in (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
  ):
    assert checkpoint.config[field] == theirs[field]
  return checkpoint.config


@pytest.mark.slow
def test_smollm2(tmp_path):
  config = equal_to_transformers(gguf_files.smollm2(), tmp_path)
  assert config["rope_theta"] == 100_000.0 and config["rms_norm_eps"] == 1e-5
  assert (config["hidden_size"], config["vocab_size"]) == (576, 49_152)


@pytest.mark.slow
def test_gemma(tmp_path):
  file = gguf_files.gemma(tmp_path)
  folder = tmp_path / "link"
  folder.mkdir()
  config = equal_to_transformers(file, folder)
  assert config["model_type"] == "gemma3_text"
  assert config["layer_types"].count("full_attention") == 3
  assert config["sliding_window"] == 512 and config["rms_norm_eps"] == 1e-6
