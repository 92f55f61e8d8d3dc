"""The bytes that each token of a vocabulary stands for.

Two alphabets are read. Byte-level BPE (GPT-2, Qwen, Llama 3, SmolLM2) spells
every byte as one printable character. SentencePiece (Gemma, Llama 2, Phi-3.5;
BPE or Unigram) spells a space as "▁", and a byte that no piece holds as
"<0xXX>".
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from opera_jax.text import byte_level

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def reader(spec: Mapping[str, Any]) -> Callable[[str], bytes]:
  """The function from a piece of the vocabulary to its bytes.

  Args:
    spec: contents of tokenizer.json.

  Returns:
    A function that raises a KeyError for a piece outside the alphabet.

  Raises:
    ValueError: the tokenizer uses another alphabet.
  """
  steps = {
    step["type"]: step
    for name in ("pre_tokenizer", "decoder")
    for step in _steps(spec.get(name))
  }
  if "ByteLevel" in steps:
    table = byte_level.byte_of_symbol()
    return lambda piece: bytes(table[symbol] for symbol in piece)
  spaces = [
    step["replacement"] if step["type"] == "Metaspace" else _replaced(step)
    for step in _steps(spec.get("decoder"))
    if step["type"] == "Metaspace"
    or (step["type"] == "Replace" and step["content"] == " ")
  ]
  if not spaces:
    raise ValueError(
      f"The tokenizer decodes by {sorted(steps) or 'nothing'}, from which the"
      " bytes of a token cannot be told. Byte-level vocabularies (GPT-2, Qwen,"
      " Llama 3) and SentencePiece's (Gemma, Llama 2) are read: use a model"
      " that has one, or train one with Tokenizer.train_bpe."
    )
  fallback = "ByteFallback" in steps

  def sentence_piece(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece) if fallback else None
    if byte:
      return bytes([int(byte[1], 16)])
    for space in spaces:
      piece = piece.replace(space, " ")
    return piece.encode()

  return sentence_piece


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
  """The steps of a normalizer, pre-tokenizer or decoder, sequences unrolled."""
  if step is None:
    return
  if step["type"] != "Sequence":
    yield step
    return
  for name in ("normalizers", "pretokenizers", "decoders"):
    for inner in step.get(name, ()):
      yield from _steps(inner)


def _replaced(step: Mapping[str, Any]) -> str:
  """The string that a Replace step replaces; a regular expression is none."""
  return step["pattern"].get("String", " ")


def without_prefix(spec: Mapping[str, Any]) -> dict[str, Any]:
  """The same tokenizer, but for text that does not begin a text.

  SentencePiece as in Llama 2 puts a space before a text, and GPT-2's family may
  (`add_prefix_space`). A text that follows another has no such space.

  Args:
    spec: contents of tokenizer.json.

  Returns:
    A copy with the steps that add a space changed; equal to `spec` if there are
    none.
  """

  def changed(step: Any) -> Any:
    if not isinstance(step, Mapping):
      return step
    step = dict(step)
    if step["type"] == "Metaspace":
      step["prepend_scheme"] = "never"
    if step["type"] == "ByteLevel":
      step["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
      if name in step:
        step[name] = [
          changed(inner) for inner in step[name] if inner["type"] != "Prepend"
        ]
    return step

  copy = dict(spec)
  for name in ("normalizer", "pre_tokenizer"):
    copy[name] = changed(spec.get(name))
  if (copy["normalizer"] or {}).get("type") == "Prepend":
    copy["normalizer"] = None
  return copy
