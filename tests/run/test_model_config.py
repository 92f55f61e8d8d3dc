"""A checkpoint says what its model is; config.model says it without one."""

import dataclasses

import pytest

from opera_jax.configs import common
from opera_jax.models import decoder, hf_checkpoint, presets, rope
from opera_jax.run import model_config
from opera_jax.run import workdir as workdir_lib

UNSET = common.get_config().model.to_dict()
SIZES = {
  "vocab_size": 300,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "intermediate_size": 64,
}


@pytest.fixture
def checkpoint(tmp_path):
  """A small Qwen2 in float32: not what any field's default says."""
  config = decoder.Config(
    **SIZES, family="qwen2", qk_norm=False, qkv_bias=True, rope_theta=123.0
  )
  hf_checkpoint.save(tmp_path / "m", decoder.create(config, 0)[1], config)
  return str(tmp_path / "m"), config


def test_the_checkpoint_alone_fills_every_field(checkpoint):
  path, config = checkpoint
  assert model_config.resolve(UNSET, path) == config


def test_what_a_checkpoint_does_not_say_is_the_configs(checkpoint):
  path, config = checkpoint
  free = {"dtype": "bfloat16", "remat": "full", "attention": "xla"}
  made = model_config.resolve(UNSET | free, path)
  assert made == dataclasses.replace(config, **free)


def test_a_field_that_says_the_same_is_no_fault(checkpoint):
  path, config = checkpoint
  assert model_config.resolve(UNSET | SIZES, path) == config


def test_every_contradiction_is_named(checkpoint):
  path, _ = checkpoint
  wrong = {"hidden_size": 64, "qk_norm": True, "vocab_size": 301}
  with pytest.raises(ValueError) as error:
    model_config.resolve(UNSET | wrong, path)
  text = str(error.value)
  assert "config.model.hidden_size is 64 and the checkpoint's is 32" in text
  assert "config.model.qk_norm is True and the checkpoint's is False" in text
  assert "config.model.vocab_size is 301 and the checkpoint's is 300" in text
  assert "Leave these fields unset" in text


def test_a_tokenizer_with_more_ids_than_rows_is_refused(checkpoint):
  path, config = checkpoint
  fits = model_config.resolve(UNSET, path, vocab_size=300)
  assert fits == config
  with pytest.raises(ValueError, match="301 ids and the embedding of .* 300"):
    model_config.resolve(UNSET, path, vocab_size=301)
  grown = model_config.resolve(UNSET, path, vocab_size=302, added_tokens=True)
  assert grown == dataclasses.replace(config, vocab_size=384)


def test_without_a_checkpoint_it_is_a_small_qwen3():
  made = model_config.resolve(UNSET, vocab_size=640)
  assert made == decoder.Config(vocab_size=640, **model_config.SMALL)
  other = model_config.resolve(
    UNSET | {"family": "llama", "qk_norm": False, "hidden_size": 64},
    vocab_size=640,
  )
  assert (other.family, other.qk_norm, other.hidden_size) == (
    "llama",
    False,
    64,
  )
  with pytest.raises(ValueError, match="640 ids and config.model.vocab_size"):
    model_config.resolve(UNSET | {"vocab_size": 639}, vocab_size=640)


def test_a_published_model_needs_no_network_in_a_plan():
  made = model_config.resolve(UNSET, "Qwen/Qwen3-8B@abc", offline=True)
  assert made == presets.PRESETS["Qwen/Qwen3-8B"]
  assert (
    presets.find("Qwen/Qwen2.5-7B-Instruct")
    == presets.PRESETS["Qwen/Qwen2.5-7B"]
  )
  assert presets.find("someone/else") is None


def test_sequences_beyond_the_context_are_refused():
  config = decoder.Config(**SIZES, max_position_embeddings=100)
  model_config.check_context(config, 100)
  with pytest.raises(ValueError, match="101 together.*context is 100 tokens"):
    model_config.check_context(config, 101)


def test_short_factors_of_longrope_are_for_short_sequences():
  scaling = rope.Scaling(
    "longrope",
    original_max_position_embeddings=64,
    short_factor=(1.0,) * 4,
    long_factor=(2.0,) * 4,
  )
  config = decoder.Config(**SIZES, rope_scaling=scaling)
  model_config.check_context(config, 64)
  with pytest.raises(ValueError, match="up to 64.*rope_factors='long'"):
    model_config.check_context(config, 65)
  long = dataclasses.replace(config, rope_factors="long")
  model_config.check_context(long, 65)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_what_a_stage_recorded_is_the_model_again(name, tmp_path):
  config = presets.PRESETS[name]
  stage = workdir_lib.Stage(
    tmp_path, "sft", {"model": dataclasses.asdict(config)}
  )
  stage.begin()
  found = workdir_lib.nested(workdir_lib.settings(tmp_path, "sft"))["model"]
  assert model_config.restore(found) == config
