"""Text in, text out: stop strings to the character, pieces that join."""

import jax
import pytest

from opera_jax.models import decoder
from opera_jax.rollout import engine, sampling, text
from opera_jax.text import tokenizer as tokenizer_lib

SETTINGS = sampling.Sampling(max_new_tokens=40)
PROMPTS = ["A fox, please.", "Tell of the sea."]


@pytest.fixture(scope="module")
def parts(one_device):
  words = tokenizer_lib.Tokenizer.train_bpe(
    ["the fox saw the sea and the sea saw the fox. ümlaut"] * 20, 300
  )
  config = decoder.Config(
    vocab_size=words.vocab_size,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=48,
  )
  graphdef, params = decoder.create(config, 0)
  sampler = engine.Engine(
    graphdef, config, mesh=one_device, prompt_slots=2, slots=2, steps=8
  )
  return sampler, words, params


def _complete(parts, **settings):
  return text.complete(
    *parts, PROMPTS, SETTINGS, jax.random.key(0), samples=3, **settings
  )


def test_stop_strings_are_kept_or_dropped_to_the_character(parts):
  kept = _complete(parts, stop=["e", "sa"], keep_stop=True)
  dropped = _complete(parts, stop=["e", "sa"])
  stopped = 0
  for left, right in zip(kept, dropped, strict=True):
    for one, two in zip(left, right, strict=True):
      assert "e" not in two.text and "sa" not in two.text
      if one.text != two.text:
        assert one.text in (two.text + "e", two.text + "sa")
        assert one.sample.reason == "stop"
        stopped += 1
  assert stopped >= 2


def test_pieces_join_to_the_text(parts):
  for stop in ((), ("e",)):
    pieces = {}

    def on_text(prompt, sample, more, pieces=pieces):
      pieces.setdefault((prompt, sample), []).append(more)

    out = _complete(parts, stop=stop, on_text=on_text)
    for prompt, group in enumerate(out):
      for sample, one in enumerate(group):
        assert "".join(pieces.get((prompt, sample), [])) == one.text
    assert stop or max(map(len, pieces.values())) > 2


def test_without_stops_the_text_is_every_token(parts):
  _, words, _ = parts
  for group in _complete(parts):
    for one in group:
      assert one.text == words.decode(one.sample.tokens, skip_special=True)


def test_a_thought_that_the_template_opens_is_shown(parts, tmp_path):
  sampler, words, params = parts
  file = tmp_path / "opens.jinja"
  file.write_text(
    tokenizer_lib.CHAT_TEMPLATE.replace(
      "assistant\\n'", "assistant\\n<think>\\n'"
    )
  )
  opens = words.configured(chat_template=str(file))
  for stop in ((), ("e",)):
    pieces = []
    out = text.complete(
      *(sampler, opens, params, PROMPTS[:1], SETTINGS, jax.random.key(0)),
      stop=stop,
      on_text=lambda prompt, sample, more, pieces=pieces: pieces.append(more),
    )
    assert out[0][0].text.startswith("<think>\n")
    assert "".join(pieces) == out[0][0].text


def test_tags_of_other_names_are_shown_as_think_tags(parts):
  sampler, words, params = parts
  # Strings that this model is likely to sample.
  made = words.configured(think=("s", "e"))
  pieces = []
  out = text.complete(
    *(sampler, made, params, PROMPTS[:1], SETTINGS, jax.random.key(0)),
    on_text=lambda prompt, sample, more: pieces.append(more),
  )
  plain = words.decode(out[0][0].sample.tokens, skip_special=True)
  shown = plain.replace("s", "<think>").replace("e", "</think>")
  assert "".join(pieces) == out[0][0].text and "think>" in shown


def test_a_list_of_messages_is_a_prompt(parts):
  turns = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": PROMPTS[0]},
  ]
  sampler, words, params = parts
  one, two = (
    text.complete(
      sampler, words, params, [prompt], SETTINGS, jax.random.key(0), **more
    )
    for prompt, more in (
      (turns, {}),
      (PROMPTS[0], {"system": "Be terse."}),
    )
  )
  assert one[0][0].text == two[0][0].text


def test_a_stop_that_cannot_come_is_refused(parts):
  with pytest.raises(ValueError, match="stop string|Stop strings"):
    _complete(parts, stop=[""])
