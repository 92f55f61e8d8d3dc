"""A small trained model whose thoughts contain stop words."""

import pytest

from benchmarks import synthesis
from opera_jax.data import storyworld
from opera_jax.models import decoder
from opera_jax.text import tokenizer as tokenizer_lib


@pytest.fixture(scope="session")
def tokenizer():
  made = storyworld.corpus(200, 0)
  return tokenizer_lib.Tokenizer.train_bpe(
    [t for d in made for t in (d.prompt, d.thought, d.answer)], 420
  )


@pytest.fixture(scope="session")
def teller(tokenizer, one_device):
  """(config, graphdef, params) of a storyteller."""
  config = decoder.Config(
    vocab_size=tokenizer.vocab_size, hidden_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, intermediate_size=96,
  )  # fmt: skip
  graphdef, params = synthesis.train(
    tokenizer, config, one_device, steps=150, batch_size=8, row_length=192
  )
  return config, graphdef, params
