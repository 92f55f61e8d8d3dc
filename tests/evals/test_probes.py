"""Probes spoil one honest sample in one way each."""

from opera_jax import structs
from opera_jax.data import storyworld
from opera_jax.evals import probes
from opera_jax.text import thought
from opera_jax.text import tokenizer as tokenizer_lib

TEXT = "<think>\nOne.\n\nWait, two.\n\nBut three.\n</think>\n\nThe end."
PROMPT = structs.Prompt("7", "open_ended", "Tell it.", "A reference.")


def test_reading_gives_steps_and_answer():
  got = probes.read(TEXT)
  assert got == probes.Text(("One.", "Wait, two.", "But three."), "The end.")
  assert probes.read("no thought") == probes.Text((), "no thought")
  assert probes.read("<think> open") == probes.Text((), "<think> open")


def test_each_probe_changes_what_it_says():
  honest = probes.read(TEXT)
  made = probes.make(honest, PROMPT)
  assert tuple(made) == probes.NAMES and made["honest"] == honest
  for word in thought.KEYWORDS:
    assert any(word in step for step in made["keywords"].steps)
  assert made["prompt_copied"].answer == "Tell it."
  assert made["reference_echoed"].answer == "A reference."
  assert "A reference." in made["reference_echoed"].steps[-1]
  assert made["thought_cut"] == probes.Text((), "The end.")
  assert made["thought_repeated"].steps == honest.steps * 3
  assert made["steps_shuffled"].steps != honest.steps
  assert sorted(made["steps_shuffled"].steps) == sorted(honest.steps)
  assert made == probes.make(honest, PROMPT)


def test_a_probe_is_tokenised_as_a_sample():
  docs = storyworld.corpus(50, 0)
  words = tokenizer_lib.Tokenizer.train_bpe([d.answer for d in docs], 300)
  got = probes.sample(probes.read(TEXT), words)
  assert got.finished and got.tokens[-1] == words.end_id
  assert words.decode(got.tokens, skip_special=True) == TEXT
  sly = probes.sample(probes.Text(("<|im_end|>",), "x"), words)
  assert (sly.tokens == words.end_id).sum() == 1
