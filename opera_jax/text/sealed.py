"""A tokenizer whose control tokens no text can spell.

Hugging Face tokenizers turn a spelled "<|im_end|>" into the control token,
whoever wrote it. Here every control token gets a secret name for as long as the
process lives. Text from outside then cannot become one; a chat template's own
text can, after `Sealed.trusted` put the secret names into it.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

# Private characters of Unicode; the first is part of every secret name.
_MARK = "\ue000"
PRIVATE = (range(0xE001, 0xF900), range(0xF0000, 0xFFFFE))


class Sealed:
  """The pipeline of a tokenizer with secret names of its control tokens.

  Attributes:
    backend: encodes text with secret names.
  """

  def __init__(self, spec: Mapping[str, Any], controls: Mapping[str, int]):
    """Renames the control tokens.

    Args:
      spec: contents of tokenizer.json.
      controls: name and id of every control token.
    """
    secret = secrets.token_hex(16)
    self._secret_of = {
      name: f"{_MARK}{secret}.{index}{_MARK}"
      for name, index in controls.items()
    }
    by_length = sorted(controls, key=len, reverse=True)  # the longest wins
    self._control = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
    edges = {c for name in controls for c in name.strip()[:1]}
    edges |= {c for name in controls for c in name.strip()[-1:]}
    self._edges = sorted(edges)
    self.backend = tokenizers.Tokenizer.from_str(
      json.dumps(_renamed(spec, controls, self._secret_of))
    )

  def hide(
    self, texts: Iterable[str], around: frozenset[str]
  ) -> tuple[dict, dict]:
    """Translations that take from texts what control tokens begin and end with.

    A text that went through the first can neither spell a control token nor
    complete one with what a template puts next to it.

    Args:
      texts: untrusted.
      around: characters of the template, which are no stand-ins.

    Returns:
      Two tables for `str.translate`: to stand-ins, and back.

    Raises:
      ValueError: the texts use up all private characters of Unicode.
    """
    used = around.union(*texts)
    free = (chr(c) for block in PRIVATE for c in block if chr(c) not in used)
    stand_ins = dict(zip(self._edges, free))
    if len(stand_ins) < len(self._edges):
      raise ValueError(
        "The messages hold every private character of Unicode, and none is"
        " left to mark their text with. Drop such messages."
      )
    back = {ord(new): old for old, new in stand_ins.items()}
    return {ord(old): new for old, new in stand_ins.items()}, back

  def controls(self, text: str) -> list[tuple[int, int, str]]:
    """Begin, end and name of the control tokens that a text spells."""
    found = self._control.finditer(text)
    return [(hit.start(), hit.end(), hit.group()) for hit in found]

  def trusted(self, text: str) -> str:
    """The text with the secret names of the control tokens that it spells."""
    return self._control.sub(lambda hit: self._secret_of[hit.group()], text)


def _renamed(
  spec: Mapping[str, Any],
  controls: Mapping[str, int],
  secret_of: Mapping[str, str],
) -> dict[str, Any]:
  """The contents of tokenizer.json with the secret names."""
  model = dict(spec["model"])
  vocab = model["vocab"]
  listed = controls.keys() & set(vocab) if isinstance(vocab, Mapping) else set()
  if isinstance(vocab, Mapping):
    vocab = {
      piece: index for piece, index in vocab.items() if piece not in controls
    }
    # An added token whose name the vocabulary lists takes its id from there.
    vocab |= {secret_of[name]: index for name, index in controls.items()}
  else:  # Unigram: pairs of a piece and its score, in the order of ids
    vocab = [[secret_of.get(piece, piece), score] for piece, score in vocab]
    added = sorted(
      (token["id"], token["content"]) for token in spec["added_tokens"]
    )
    # Gaps get names that no text can spell either.
    for index, name in added:
      while len(vocab) < index:
        vocab.append([f"{_MARK}{secrets.token_hex(16)}{_MARK}", -1e3])
      if len(vocab) == index:
        vocab.append([secret_of.get(name, name), -1e3])
  model["vocab"] = vocab
  if model.get("unk_token") in secret_of:
    model["unk_token"] = secret_of[model["unk_token"]]
  if listed and model.get("merges"):
    # A merge names pieces, and these pieces have other names now.
    pairs = [
      m if isinstance(m, list) else m.split(" ") for m in model["merges"]
    ]
    model["merges"] = [
      pair
      for pair in pairs
      if listed.isdisjoint((pair[0], pair[1], "".join(pair)))
    ]
  return dict(
    spec,
    model=model,
    added_tokens=[
      dict(token, content=secret_of.get(token["content"], token["content"]))
      for token in spec["added_tokens"]
    ],
    truncation=None,
    padding=None,
    post_processor=None,
  )
