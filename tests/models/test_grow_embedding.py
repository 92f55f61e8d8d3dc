"""New tokens get the mean row, and change nothing for the old ones."""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from opera_jax.models import grow_embedding


@dataclasses.dataclass
class Stored:
  """What a checkpoint's reader gives."""

  array: np.ndarray
  file = pathlib.Path("model.safetensors")
  dtype = "F32"

  @property
  def shape(self):
    return self.array.shape

  def rows(self, start, stop):
    return self.array[start:stop]


def grow(array, old, new):
  """All rows of the grown tensor, read in pieces."""
  after = grow_embedding.grown_rows(len(array), new)
  tensor = grow_embedding.GrownTensor(Stored(array), old, after)
  cuts = [*range(0, after, 37), after]
  pieces = [tensor.rows(*pair) for pair in zip(cuts, cuts[1:])]
  return np.concatenate(pieces)


def rows(count, width, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, width)).astype(dtype)


@pytest.mark.parametrize(
  ("count", "old", "new", "after"),
  [(300, 300, 302, 384), (384, 300, 302, 384), (256, 250, 256, 256),
   (128, 128, 257, 384), (130, 130, 130, 130)],
)  # fmt: skip
def test_rows_of_old_and_new_tokens(count, old, new, after):
  before = rows(count, 8)
  grown = grow(before, old, new)
  assert grown.shape == (after, 8) and grown.dtype == before.dtype
  assert grow_embedding.grown_rows(count, new) == after
  mean = np.asarray([sum(before[:old, d].tolist()) / old for d in range(8)])
  np.testing.assert_array_equal(grown[:old], before[:old])
  # Rows of a checkpoint that belonged to no token are the mean too.
  for row in grown[old:]:
    np.testing.assert_allclose(row, mean, atol=1e-6)
  assert before[old:].tolist() == rows(count, 8)[old:].tolist()


def test_log_probabilities_of_a_grown_model():
  """In transformers: the old tokens lose what the new rows' logits take."""
  config = transformers.LlamaConfig(
    vocab_size=200,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
  )
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(config).eval()
  tokens = torch.arange(12)[None]
  with torch.no_grad():
    before = model(tokens).logits.log_softmax(-1)
  old = model.get_input_embeddings().weight.detach().numpy().copy()
  model.resize_token_embeddings(256, mean_resizing=False)
  grown = grow(old, 200, 202)
  with torch.no_grad():
    model.get_input_embeddings().weight.copy_(torch.from_numpy(grown))
    logits = model(tokens).logits
  after = logits.log_softmax(-1)[..., :200]
  mean = logits[..., :200].mean(-1, keepdim=True)
  torch.testing.assert_close(
    logits[..., 200:], mean.expand(-1, -1, 56), atol=1e-5, rtol=0
  )
  assert float((before - after).max()) < 56 / 200
  share = 56 * torch.exp(mean - logits[..., :200].logsumexp(-1, keepdim=True))
  torch.testing.assert_close(
    after, before - torch.log1p(share), atol=1e-5, rtol=0
  )


def test_bfloat16_is_summed_in_float32():
  before = rows(4_000, 4, dtype=np.float32) * 0.01 + 1
  grown = grow(before.astype(ml_dtypes.bfloat16), 4_000, 4_001)
  assert grown.dtype == ml_dtypes.bfloat16
  np.testing.assert_allclose(grown[4_000].astype(np.float32), 1, atol=0.01)


@pytest.mark.parametrize(("old", "new"), [(301, 302), (0, 3)])
def test_what_cannot_grow(old, new):
  with pytest.raises(ValueError, match="cannot grow"):
    grow(rows(300, 2), old, new)
