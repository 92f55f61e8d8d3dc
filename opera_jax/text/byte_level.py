"""Byte-level BPE: GPT-2's byte alphabet and Qwen's pipeline around it."""

import functools

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPLIT_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def byte_of_symbol() -> dict[str, int]:
  """GPT-2's alphabet: one printable character for each of the 256 bytes."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [byte for byte in range(256) if byte not in set(printable)]
  table = {chr(byte): byte for byte in printable}
  table.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
  return table


@functools.cache
def symbol_of_byte() -> dict[int, str]:
  return {byte: symbol for symbol, byte in byte_of_symbol().items()}


def pipeline(model: models.BPE) -> tokenizers.Tokenizer:
  """The pipeline around a byte-level BPE, as Qwen3's tokenizer has it."""
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  return backend


def bpe_of_ranks(ranks: dict[bytes, int]) -> models.BPE:
  """The merges behind the ranks: each way to halve a token into tokens.

  All ways, not one, because tiktoken merges any neighbours whose
  concatenation has the lowest rank.
  """
  symbol = symbol_of_byte()
  spell = {token: "".join(symbol[byte] for byte in token) for token in ranks}
  merges = []
  for token in sorted(ranks, key=ranks.__getitem__):
    halves = [(token[:i], token[i:]) for i in range(1, len(token))]
    known = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
    known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    merges += [(spell[left], spell[right]) for left, right in known]
  return models.BPE(
    vocab={spell[token]: rank for token, rank in ranks.items()},
    merges=merges,
  )
