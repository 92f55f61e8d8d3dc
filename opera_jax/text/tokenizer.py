"""Text to token ids and back: byte-level BPE with Qwen3's special tokens.

Untrusted text (prompts, references, data files) goes through `encode`, which
has never heard of the special tokens: a prompt that spells "</think>" stays
plain text. Only `encode_template`, for our own layouts, knows them.
"""

import base64
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, trainers

from opera_jax import hub
from opera_jax.text import byte_level

PAD = "<|endoftext|>"
TURN_OPEN = "<|im_start|>"
TURN_CLOSE = "<|im_end|>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
REQUIRED = (PAD, TURN_OPEN, TURN_CLOSE, THINK_OPEN, THINK_CLOSE)

# In id order from the first id after the ranks; the flag says "special".
QWEN3_ADDED = (
    *((name, True) for name in (PAD, TURN_OPEN, TURN_CLOSE)),
    *((f"<|{name}|>", True) for name in (
        "object_ref_start", "object_ref_end", "box_start", "box_end",
        "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad",
        "image_pad", "video_pad",
    )),
    *((name, False) for name in (
        "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
        "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
        "<tool_response>", "</tool_response>", THINK_OPEN, THINK_CLOSE,
    )),
)  # fmt: skip
QWEN_RANKS = 151_643
MOST_IDS = 2**20  # a table of bytes is made for all of them

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message.content -%}
{%- if message.role == 'assistant' and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


def _default_config() -> dict[str, Any]:
  return {
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": TURN_CLOSE,
    "errors": "replace",
    "model_max_length": 131_072,
    "pad_token": PAD,
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
  }


class Tokenizer:
  """A byte-level BPE that holds Qwen3's chat and think tokens.

  Attributes:
    vocab_size: number of ids, the highest id plus one. A model may have more
      embedding rows (Qwen3: 151,669 ids, 151,936 rows).
    pad_id: id of `<|endoftext|>`.
    end_id: id of `<|im_end|>`, the end of a turn.
    end_ids: every id that ends a completion, `end_id` first. A checkpoint's
      generation_config.json may name several.
    unused_ids: ids below `vocab_size` that no token has.
    think_open_id: id of `<think>`.
    think_close_id: id of `</think>`.
    vocab_bytes: for each id the raw bytes of an ordinary token, or None for
      an added token (special or tag) and for an id nothing uses.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    config: dict[str, Any] | None = None,
    end_ids: Iterable[int] = (),
  ):
    """Wraps a tokenizer of Hugging Face `tokenizers`.

    Args:
      backend: a byte-level BPE with the tokens of `REQUIRED` added.
      config: contents of tokenizer_config.json; None means Qwen3's layout.
      end_ids: ids that end a completion, besides that of `<|im_end|>`.

    Raises:
      ValueError: a required token is missing, the model is not byte-level, or
        an end id is outside the vocabulary.
    """
    ids: dict[str, Any] = {n: backend.token_to_id(n) for n in REQUIRED}
    missing = [name for name, index in ids.items() if index is None]
    if missing:
      raise ValueError(
        f"The tokenizer lacks {', '.join(missing)}. The method needs each of"
        f" {', '.join(REQUIRED)} as one token. Use a Qwen3 tokenizer, train"
        " one with Tokenizer.train_bpe, or add them to the added_tokens of"
        " tokenizer.json and grow the model's embedding to match."
      )
    highest = max(backend.get_vocab().values())
    if highest > MOST_IDS:
      raise ValueError(
        f"The tokenizer has an id {highest}, and no model has so many; ids go"
        f" up to {MOST_IDS}. Mend tokenizer.json or fetch it again."
      )
    self.backend = backend
    self.config = dict(config) if config is not None else _default_config()
    added = backend.get_added_tokens_decoder()
    self._added = {index: token.content for index, token in added.items()}
    self._special = {index for index, token in added.items() if token.special}
    self._plain = self._without_added_tokens()
    self.vocab_size = 1 + highest
    self.pad_id: int = ids[PAD]
    self.end_id: int = ids[TURN_CLOSE]
    self.think_open_id: int = ids[THINK_OPEN]
    self.think_close_id: int = ids[THINK_CLOSE]
    self.vocab_bytes = self._vocab_bytes()
    self.end_ids = tuple(dict.fromkeys((self.end_id, *end_ids)))
    beyond = [i for i in self.end_ids if not 0 <= i < self.vocab_size]
    if beyond:
      raise ValueError(
        f"eos_token_id names {beyond}, and the tokenizer has ids 0 to"
        f" {self.vocab_size - 1}. Mend generation_config.json, or name the"
        " tokenizer that belongs to it."
      )
    self.unused_ids = tuple(
      index
      for index, piece in enumerate(self.vocab_bytes)
      if piece is None and index not in self._added
    )

  def _without_added_tokens(self) -> tokenizers.Tokenizer:
    # `encode_special_tokens` hides only tokens flagged special; Qwen3's think
    # tags are not, so the pipeline for untrusted text has no added token.
    spec = json.loads(self.backend.to_str())
    spec.update(added_tokens=[], truncation=None, padding=None)
    # Some vocabularies list their added tokens among the pieces too.
    pieces = spec["model"].get("vocab", {})
    for name in self._added.values():
      pieces.pop(name, None)
    return tokenizers.Tokenizer.from_str(json.dumps(spec))

  def _vocab_bytes(self) -> list[bytes | None]:
    table = byte_level.byte_of_symbol()
    result: list[bytes | None] = [None] * self.vocab_size
    for piece, index in self.backend.get_vocab(with_added_tokens=False).items():
      if index in self._added:
        continue
      try:
        result[index] = bytes(table[symbol] for symbol in piece)
      except KeyError as error:
        raise ValueError(
          f"Token {index} is {piece!r}, and {error} is no symbol of the"
          " byte-level alphabet. Only byte-level BPE tokenizers (GPT-2,"
          " Qwen, Llama 3) are read; convert this one or train one with"
          " Tokenizer.train_bpe."
        ) from error
    return result

  @classmethod
  def load(cls, path_or_hub_id: str | pathlib.Path) -> "Tokenizer":
    """Reads tokenizer.json from a directory, or from the Hugging Face hub.

    A generation_config.json beside it says which ids end a completion.

    Raises:
      FileNotFoundError: the directory has no tokenizer.json.
      ValueError: a required token is missing, or an end id is no token.
    """
    folder = pathlib.Path(path_or_hub_id)
    if folder.is_dir():
      paths = {name: folder / name for name in _FILES}
      files = {name: p if p.exists() else None for name, p in paths.items()}
      if files["tokenizer.json"] is None:
        raise FileNotFoundError(
          f"{folder} holds no tokenizer.json. Write one with Tokenizer.save,"
          " or name a directory of a Hugging Face model."
        )
    else:
      files = _download(str(path_or_hub_id))
    config = None
    if files["tokenizer_config.json"] is not None:
      config = json.loads(files["tokenizer_config.json"].read_text("utf-8"))
      if files["chat_template.jinja"] is not None:
        template = files["chat_template.jinja"].read_text("utf-8")
        config["chat_template"] = template
    backend = tokenizers.Tokenizer.from_file(str(files["tokenizer.json"]))
    return cls(backend, config, end_ids(files[_GENERATION]))

  @classmethod
  def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Trains a byte-level BPE with Qwen's split pattern.

    Args:
      texts: the corpus.
      vocab_size: ids wanted, the five special tokens included; a corpus with
        too few pairs gives fewer.

    Raises:
      ValueError: vocab_size below 256 bytes plus the special tokens.
    """
    smallest = 256 + len(REQUIRED)
    if vocab_size < smallest:
      raise ValueError(
        f"vocab_size {vocab_size} is below {smallest}: 256 bytes and"
        f" {len(REQUIRED)} special tokens must fit. Raise it."
      )
    backend = byte_level.pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size - len(REQUIRED),
      initial_alphabet=sorted(byte_level.byte_of_symbol()),
      special_tokens=[],
      show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tags = (THINK_OPEN, THINK_CLOSE)
    _add_tokens(backend, [(name, name not in tags) for name in REQUIRED])
    return cls(backend)

  @classmethod
  def from_tiktoken(cls, path: str | pathlib.Path) -> "Tokenizer":
    """Builds the exact Qwen3 tokenizer from the file of Qwen's BPE ranks.

    Args:
      path: lines of "base64-token rank", 151,643 of them.

    Raises:
      ValueError: a malformed line, or another number of ranks.
    """
    ranks: dict[bytes, int] = {}
    with open(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        try:
          token, rank = line.split()
          ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
          raise ValueError(
            f"{path}:{number}: {line[:60]!r} is not 'base64-token rank'."
            " Fetch the file of ranks again."
          ) from error
    if len(ranks) != QWEN_RANKS or set(ranks.values()) != set(
      range(len(ranks))
    ):
      raise ValueError(
        f"{path}: {len(ranks)} distinct tokens, but Qwen has"
        f" {QWEN_RANKS} with ranks 0 to {QWEN_RANKS - 1}. Fetch it again."
      )
    backend = byte_level.pipeline(byte_level.bpe_of_ranks(ranks))
    _add_tokens(backend, QWEN3_ADDED)
    return cls(backend)

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the end ids.

    `transformers.AutoTokenizer.from_pretrained(directory)` reads them.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    added = {
      str(index): {
        "content": token.content,
        "lstrip": token.lstrip,
        "normalized": token.normalized,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
        "special": token.special,
      }
      for index, token in self.backend.get_added_tokens_decoder().items()
    }
    config = self.config | {"added_tokens_decoder": added}
    (directory / "tokenizer_config.json").write_text(
      json.dumps(config, indent=2, ensure_ascii=False), "utf-8"
    )
    (directory / _GENERATION).write_text(
      json.dumps(self.generation_config(), indent=2) + "\n", "utf-8"
    )
    self.backend.save(str(directory / "tokenizer.json"))

  def generation_config(self) -> dict[str, Any]:
    """What generation_config.json says of the ends: one id, or all of them."""
    ends = list(self.end_ids)
    return {
      "eos_token_id": ends if len(ends) > 1 else ends[0],
      "pad_token_id": self.pad_id,
    }

  def with_ends(self, ids: Iterable[int]) -> "Tokenizer":
    """The same tokenizer, with further ids that end a completion.

    Raises:
      ValueError: an id outside the vocabulary.
    """
    return Tokenizer(self.backend, self.config, (*self.end_ids, *ids))

  def encode(self, text: str) -> np.ndarray:
    """Untrusted text to ids [T] int32; no special token can come out."""
    encoding = self._plain.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` for many texts, in parallel threads."""
    encodings = self._plain.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

  def encode_template(self, text: str) -> np.ndarray:
    """Our own text to ids [T] int32; a spelled special token becomes one."""
    encoding = self.backend.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
    """Ids to text; bytes that are no UTF-8 and unused ids become U+FFFD.

    Args:
      ids: token ids.
      skip_special: leave out tokens flagged special. The think tags are not
        (as in Qwen3), so they always show.
    """
    parts = []
    for index in map(int, ids):
      if index in self._added:
        if not (skip_special and index in self._special):
          parts.append(self._added[index].encode())
        continue
      known = 0 <= index < self.vocab_size
      piece = self.vocab_bytes[index] if known else None
      parts.append("\ufffd".encode() if piece is None else piece)
    return b"".join(parts).decode("utf-8", errors="replace")

  def chat_prompt(self, prompt: str, system: str | None = None) -> np.ndarray:
    """Ids [T] int32 of a user turn and the head of the assistant's turn.

    Qwen3's layout. The completion that follows reads
    "<think>\\n ... \\n</think>\\n\\n answer<|im_end|>".
    """
    turns = [] if system is None else [("system", system)]
    turns.append(("user", prompt))
    newline = self.encode("\n")
    parts = []
    for role, text in turns:
      parts += [
        self.encode_template(TURN_OPEN),
        self.encode(f"{role}\n{text}"),
        self.encode_template(TURN_CLOSE),
        newline,
      ]
    parts.append(self.encode_template(f"{TURN_OPEN}assistant\n"))
    return np.concatenate(parts)


_GENERATION = "generation_config.json"
_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "chat_template.jinja",
  _GENERATION,
)


def end_ids(path: str | pathlib.Path | None) -> tuple[int, ...]:
  """The `eos_token_id` of a generation_config.json: one id, a list, or none.

  Args:
    path: of the file; None, or one that is not there, names no id.

  Raises:
    ValueError: it is not JSON, or its ids are no whole numbers.
  """
  if path is None or not pathlib.Path(path).exists():
    return ()
  try:
    stated = json.loads(pathlib.Path(path).read_text("utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path} is not JSON ({error}). Fetch it again, or delete it to stop at"
      f" {TURN_CLOSE} alone."
    ) from error
  ids = stated.get("eos_token_id") if isinstance(stated, dict) else stated
  ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
  if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
    raise ValueError(
      f"{path} says eos_token_id = {ids!r}; it must be a token id or a list of"
      " them. Mend it, or delete the file."
    )
  return tuple(ids)


def _download(hub_id: str) -> dict[str, pathlib.Path | None]:
  import huggingface_hub
  from huggingface_hub import errors

  files: dict[str, pathlib.Path | None] = {}
  hub_id, revision = hub.split(hub_id)
  for name in _FILES:
    try:
      files[name] = pathlib.Path(
        huggingface_hub.hf_hub_download(hub_id, name, revision=revision)
      )
    except errors.EntryNotFoundError:
      if name == "tokenizer.json":
        raise
      files[name] = None
    except errors.HFValidationError as error:
      raise FileNotFoundError(
        f"{hub_id!r} is neither a directory nor a Hugging Face hub id. Give"
        " a directory that holds tokenizer.json, or an id such as"
        " 'Qwen/Qwen3-0.6B'."
      ) from error
  return files


def _add_tokens(
  backend: tokenizers.Tokenizer, names: Iterable[tuple[str, bool]]
) -> None:
  backend.add_tokens(
    [
      tokenizers.AddedToken(name, normalized=False, special=special)
      for name, special in names
    ]
  )
