"""Builds a tokenizer from the pieces, scores and merges of a GGUF file.

A file says which of two models it has:

- "gpt2", byte-level BPE: tokens and merges are stored. How text is split before
  is stored by name alone, so the patterns of the published tokenizers are here.
- "llama", SentencePiece's BPE: pieces and scores are stored, and those
  neighbours merge first that make the piece of the highest score. The merges
  are derived from the scores.

transformers builds these, too, but not always rightly: it reads Gemma's pieces
as a unigram model and drops the start token, and it does not split SmolLM's
digits before BPE. So it is not asked.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from opera_jax import gguf_header
from opera_jax.text import byte_level

_SPACE = "▁"  # SentencePiece's sign of a space
_MOST_CHARACTERS = 512  # of a piece: each way to halve it is tried
_KEY = "tokenizer.ggml"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, gguf_header.CONTROL, 4
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

_LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Phi-3.5's tokens after which its published tokenizer keeps a space or newline;
# its other added tokens swallow what follows, and no GGUF file says so.
_PHI_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class GgufTokenizer:
  """A GGUF file's tokenizer.

  Attributes:
    backend: control tokens are added tokens that are special; user-defined
      ones are added tokens that are not, but for SentencePiece's runs of white
      space, which are text and stay ordinary pieces. Every token has the id
      that the file gives it.
    config: what tokenizer_config.json would say.
    end_ids: ids that end a completion, see `gguf_header.end_ids`.
  """

  backend: tokenizers.Tokenizer
  config: dict[str, Any]
  end_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Split:
  """What happens to text before byte-level BPE."""

  steps: tuple[pre_tokenizers.PreTokenizer, ...]
  nfc: bool = False  # normalise Unicode first
  whole: bool = False  # a piece of the split that is a token needs no merges
  add_bos: bool = False  # where the file does not say


def _pattern(pattern: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
  return (
    pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  )


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = _Split(_pattern(_LLAMA3_PATTERN), whole=True, add_bos=True)
_SPLITS = {
  "gpt-2": _Split((_GPT2,)),
  "llama-bpe": _LLAMA3,
  "llama-v3": _LLAMA3,
  "llama3": _LLAMA3,
  "qwen2": _Split(_pattern(byte_level.SPLIT_PATTERN), nfc=True),
  "smollm": _Split((pre_tokenizers.Digits(individual_digits=True), _GPT2)),
}


def build(path: str | pathlib.Path) -> GgufTokenizer:
  """Builds the tokenizer of a GGUF file.

  Args:
    path: the file, or a directory that holds no other.

  Raises:
    FileNotFoundError: no such file.
    ImportError: the package `gguf` is not installed.
    ValueError: a damaged file; no tokenizer in it, or one of another model or
      with an unknown split; lists whose lengths differ, a token that stands
      twice, merges of what are no tokens, an id without a token.
  """
  header = gguf_header.read(path)
  model = header.get(f"{_KEY}.model", str)
  builders = {"gpt2": _byte_level, "llama": _sentencepiece}
  if model not in builders:
    raise ValueError(
      f"{header.file} has a tokenizer of the model {model[:80]!r}, and "
      f"{', '.join(builders)} are read. Choose another model, or give its "
      "tokenizer as a directory with tokenizer.json."
    )
  tokens = header.get(gguf_header.TOKENS, list)
  types = _numbers(header, gguf_header.TYPES, len(tokens)).tolist()
  _check_tokens(header, tokens)
  backend, add_bos = builders[model](header, tokens, types)
  named = {
    name: _token(header, tokens, key)
    for name, key in (
      ("bos_token", "bos"),
      ("eos_token", "eos"),
      ("unk_token", "unknown"),
      ("pad_token", "padding"),
    )
  }
  added = _added(header, tokens, types, set(named.values()), model == "llama")
  backend.add_tokens(added)
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": header.get("tokenizer.chat_template", str, "") or None,
    "clean_up_tokenization_spaces": False,
    "add_bos_token": header.get(
      f"{_KEY}.add_bos_token", bool, add_bos and named["bos_token"] is not None
    ),
    "add_eos_token": header.get(f"{_KEY}.add_eos_token", bool, False),
    **named,
  }
  _add_ends(header, backend, config)
  return GgufTokenizer(backend, config, gguf_header.end_ids(header))


def _numbers(header: gguf_header.Header, key: str, count: int) -> np.ndarray:
  """An array of the metadata with one finite number a token."""
  values = header.get(key, np.ndarray)
  if len(values) != count or not np.isfinite(values).all():
    raise ValueError(
      f"{header.file}: {key} has {len(values)} numbers for {count} tokens, "
      "must have one each, and finite. Convert the model again."
    )
  return values


def _check_tokens(header: gguf_header.Header, tokens: Sequence[str]) -> None:
  if len(set(tokens)) != len(tokens):
    twice = collections.Counter(tokens).most_common(1)[0][0]
    raise ValueError(
      f"{header.file} has the token {twice[:80]!r} twice. Convert the model "
      "again."
    )
  longest = max(tokens, key=len, default="")
  if not longest or len(longest) > _MOST_CHARACTERS:
    raise ValueError(
      f"{header.file}: the longest of {len(tokens)} tokens has "
      f"{len(longest)} characters, must have 1 to {_MOST_CHARACTERS}. Convert "
      "the model again."
    )


def _token(
  header: gguf_header.Header, tokens: Sequence[str], name: str
) -> str | None:
  """The token of an id of the metadata; None where there is none."""
  key = f"{_KEY}.{name}_token_id"
  if key not in header.metadata:
    return None
  index = header.get(key, int)
  if not 0 <= index < len(tokens):
    raise ValueError(
      f"{header.file}: {key} is {index}, and there are tokens 0 to "
      f"{len(tokens) - 1}. Convert the model again."
    )
  return tokens[index]


def _added(
  header: gguf_header.Header,
  tokens: Sequence[str],
  types: Sequence[int],
  named: set[str | None],
  sentencepiece: bool,
) -> list[tokenizers.AddedToken]:
  """The added tokens in the order of their ids."""
  swallows = header.metadata.get("general.architecture") == "phi3"
  added = []
  for token, kind in zip(tokens, types):
    special = kind in (_UNKNOWN, _CONTROL) or token in named
    if sentencepiece and _is_run(token, kind):
      continue
    if special or kind == _USER_DEFINED:
      added.append(
        tokenizers.AddedToken(
          token,
          normalized=False,
          special=special,
          rstrip=swallows and sentencepiece and token not in _PHI_KEEPS_SPACE,
        )
      )
  return added


def _is_run(token: str, kind: int) -> bool:
  """Whether a piece is a user-defined run of white space.

  SentencePiece cuts these out of the text before it merges, the longest first.
  """
  return kind == _USER_DEFINED and token.replace(_SPACE, " ").isspace()


def _add_ends(
  header: gguf_header.Header,
  backend: tokenizers.Tokenizer,
  config: dict[str, Any],
) -> None:
  """Lets `add_special_tokens` add the start and the end that the file wants."""
  bos = config["bos_token"] if config["add_bos_token"] else None
  eos = config["eos_token"] if config["add_eos_token"] else None
  for name, token in (("bos", bos), ("eos", eos)):
    if token is None and config[f"add_{name}_token"]:
      raise ValueError(
        f"{header.file} wants the {name} token added to texts, and names "
        "none. Convert the model again."
      )
  if bos is None and eos is None:
    return
  before, after = [bos] if bos else [], [eos] if eos else []
  backend.post_processor = processors.TemplateProcessing(
    single=[*before, "$A", *after],
    pair=[*before, "$A", *after, *before, "$B", *after],
    special_tokens=[
      (token, backend.token_to_id(token)) for token in (*before, *after)
    ],
  )


def _byte_level(
  header: gguf_header.Header, tokens: Sequence[str], types: Sequence[int]
) -> tuple[tokenizers.Tokenizer, bool]:
  """The byte-level BPE, and whether it starts texts with the start token."""
  name = header.get(f"{_KEY}.pre", str)
  if name not in _SPLITS:
    raise ValueError(
      f"{header.file} splits text as {name[:80]!r} does ({_KEY}.pre), and "
      f"{', '.join(_SPLITS)} are known. Give the model's tokenizer as a "
      "directory with tokenizer.json."
    )
  split = _SPLITS[name]
  vocab = {token: index for index, token in enumerate(tokens)}
  merges = []
  for line in header.get(f"{_KEY}.merges", list):
    left, _, right = line.partition(" ")
    if not (left in vocab and right in vocab and left + right in vocab):
      raise ValueError(
        f"{header.file} merges {line[:80]!r}, and these or what they make are "
        "no tokens. Convert the model again."
      )
    if types[vocab[left + right]] == _CONTROL:
      raise ValueError(
        f"{header.file} merges {line[:80]!r} into a control token, so that "
        "plain text could spell it. Do not use this file."
      )
    merges.append((left, right))
  backend = tokenizers.Tokenizer(
    models.BPE(vocab, merges, ignore_merges=split.whole)
  )
  if split.nfc:
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(list(split.steps))
  backend.decoder = decoders.ByteLevel()
  return backend, split.add_bos


def _sentencepiece(
  header: gguf_header.Header, tokens: Sequence[str], types: Sequence[int]
) -> tuple[tokenizers.Tokenizer, bool]:
  """SentencePiece's BPE, and that it starts texts with the start token."""
  scores = _numbers(header, f"{_KEY}.scores", len(tokens)).tolist()
  runs = [_is_run(token, kind) for token, kind in zip(tokens, types)]
  # llama.cpp's converter spells the spaces of user-defined pieces as such.
  pieces = [
    token.replace(" ", _SPACE) if run else token
    for token, run in zip(tokens, runs)
  ]
  vocab = {piece: index for index, piece in enumerate(pieces)}
  # Runs of white space come first, as their score in SentencePiece's own file
  # says; llama.cpp's converter overwrites it.
  order = {
    piece: (not run, -score, index)
    for index, (piece, run, kind, score) in enumerate(
      zip(pieces, runs, types, scores)
    )
    if run or kind == _NORMAL
  }
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab,
      _merges(order),
      unk_token=_token(header, tokens, "unknown"),
      fuse_unk=True,
      byte_fallback=all(piece in vocab for piece in _BYTES),
    )
  )
  # llama.cpp's default, and right for Phi-3.5, whose file does not say.
  prefix = header.get(f"{_KEY}.add_space_prefix", bool, True)
  spaces = normalizers.Replace(" ", _SPACE)
  plain = [decoders.Replace(_SPACE, " "), decoders.ByteFallback()]
  plain.append(decoders.Fuse())
  if prefix:
    backend.normalizer = normalizers.Sequence(
      [normalizers.Prepend(_SPACE), spaces]
    )
    plain.append(decoders.Strip(" ", 1, 0))
  else:
    backend.normalizer = spaces
  longest_first = sorted(
    (piece for piece, run in zip(pieces, runs) if run and len(piece) > 1),
    key=len,
    reverse=True,
  )
  if longest_first:
    backend.pre_tokenizer = pre_tokenizers.Split(
      tokenizers.Regex("|".join(map(re.escape, longest_first))),
      behavior="isolated",
    )
  backend.decoder = decoders.Sequence(plain)
  return backend, True


def _merges(
  order: dict[str, tuple[bool, float, int]],
) -> list[tuple[str, str]]:
  """All ways to halve a piece into two pieces, those of early pieces first.

  SentencePiece merges the leftmost of two pairs with equal scores, where BPE
  by merges takes the earlier merge; trained pieces have scores of their own.

  Args:
    order: sort key of every piece that text may merge into.
  """
  merges = []
  for piece in sorted(order, key=order.__getitem__):
    halves = (
      (piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1)
    )
    merges += [pair for pair in halves if pair[0] in order and pair[1] in order]
  return merges
