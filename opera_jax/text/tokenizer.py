"""Text to token ids and back, by the tokenizer of any model.

A model's tokenizer is read by transformers, and its chat template lays out the
prompts. What a stranger wrote (prompts, references, data files) never becomes a
control token: a prompt that spells "</think>" stays plain text. Only
`encode_template`, for our own layouts, and the chat template itself write
control tokens.

A thought stands between two tags. They are one token each, or strings over
several tokens; and the chat template may open the thought itself. The methods
about thoughts hide these differences from the rest of the code.
"""

import base64
import datetime
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, trainers

from opera_jax import gguf_header, hub
from opera_jax.text import byte_level, sealed
from opera_jax.text import chat_template as chat_template_lib
from opera_jax.text import vocab_bytes as vocab_bytes_lib

PAD = "<|endoftext|>"
TURN_OPEN, TURN_CLOSE = chat_template_lib.CHATML_TOKENS
THINK_TAGS = THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# What a tokenizer that is trained here gets.
TRAINED = (PAD, TURN_OPEN, TURN_CLOSE, THINK_OPEN, THINK_CLOSE)
CHAT_TEMPLATE = chat_template_lib.CHATML

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
  """A tokenizer of Hugging Face `tokenizers` with its chat template.

  Attributes:
    vocab_size: number of ids, the highest id plus one. A model may have more
      embedding rows (Qwen3: 151,669 ids, 151,936 rows).
    think: the strings that open and close a thought.
    think_open_id: id of the opening tag; None if it is no token of its own.
    think_close_id: likewise of the closing tag.
    think_open: the id, or else the string that is matched over several tokens.
    think_close: likewise.
    vocab_bytes: for each id the raw bytes of an ordinary token, or None for a
      control token (special, or a tag) and for an id nothing uses.
    unused_ids: ids below `vocab_size` that no token has.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any] | None = None,
    end_ids: Iterable[int] = (),
    *,
    think: Sequence[str] = THINK_TAGS,
    enable_thinking: bool | None = None,
    date: str = "",
  ):
    """Wraps a tokenizer of Hugging Face `tokenizers`.

    Args:
      backend: a byte-level BPE, or a SentencePiece vocabulary.
      config: contents of tokenizer_config.json: the names of the tokens
        (`eos_token`, `pad_token`, ...) and `chat_template`, which may be
        missing until a prompt is asked for. None means the layout of the
        tokenizers that are trained here, which is Qwen3's.
      end_ids: ids that end a completion, besides those that the config and the
        chat template name.
      think: the strings that open and close a thought. They are matched as
        tokens if the tokenizer has both as added tokens, else as bytes.
      enable_thinking: passed to the chat template; None passes nothing.
      date: the day (YYYY-MM-DD) for a chat template that writes one; "" is
        today. A saved tokenizer keeps its day, so that a run's prompts do not
        change at midnight.

    Raises:
      ValueError: the vocabulary is of another kind, one think tag alone is a
        token, or an end id is outside the vocabulary.
    """
    spec = json.loads(backend.to_str())
    vocab = backend.get_vocab()
    highest = max(vocab.values())
    if highest > MOST_IDS:
      raise ValueError(
        f"The tokenizer has an id {highest}, and no model has so many; ids go"
        f" up to {MOST_IDS}. Mend tokenizer.json or fetch it again."
      )
    self.backend = backend
    self.config = dict(config) if config is not None else _default_config()
    self.vocab_size = 1 + highest
    self.enable_thinking = enable_thinking
    self.date = date or datetime.date.today().isoformat()
    added = backend.get_added_tokens_decoder()
    self._find_think_tags(
      think, {token.content: index for index, token in added.items()}
    )
    controls = self._controls(spec, added)
    self._control_names = {index: name for name, index in controls.items()}
    self._skipped = {
      index
      for name, index in controls.items()
      if name not in self.think and (index not in added or added[index].special)
    }
    self.vocab_bytes = self._vocab_bytes(spec, added)
    self.unused_ids = tuple(
      index
      for index, piece in enumerate(self.vocab_bytes)
      if piece is None and index not in self._control_names
    )
    # Text that follows other text has no space put before it.
    self._sealed = sealed.Sealed(vocab_bytes_lib.without_prefix(spec), controls)
    self._whole = (
      self._sealed
      if vocab_bytes_lib.without_prefix(spec) == spec
      else sealed.Sealed(spec, controls)
    )
    self._more_end_ids = tuple(end_ids)
    beyond = [i for i in self._more_end_ids if not 0 <= i < self.vocab_size]
    if beyond:
      raise ValueError(
        f"eos_token_id names {beyond}, and the tokenizer has ids 0 to"
        f" {self.vocab_size - 1}. Mend generation_config.json, or name the"
        " tokenizer that belongs to it."
      )

  def _find_think_tags(
    self, think: Sequence[str], id_of: Mapping[str, int]
  ) -> None:
    if len(think) != 2 or not all(think) or think[0] == think[1]:
      raise ValueError(
        f"The think tags are {tuple(think)}; there must be two strings, one"
        " that opens a thought and another that closes it. Change"
        " config.tokenizer.think."
      )
    self.think: tuple[str, str] = (think[0], think[1])
    self.think_open_id: int | None = id_of.get(think[0])
    self.think_close_id: int | None = id_of.get(think[1])
    if (self.think_open_id is None) != (self.think_close_id is None):
      raise ValueError(
        f"Of the think tags {self.think} only one is a token of this"
        " tokenizer; both must be tokens, or neither. Change"
        " config.tokenizer.think."
      )
    self.think_open: int | str = think[0]
    self.think_close: int | str = think[1]
    if self.think_open_id is not None and self.think_close_id is not None:
      self.think_open = self.think_open_id
      self.think_close = self.think_close_id

  def _controls(
    self, spec: Mapping[str, Any], added: Mapping[int, Any]
  ) -> dict[str, int]:
    """Name and id of the tokens that no text may become.

    These are all added tokens but those that are ordinary text: Gemma adds runs
    of white space and HTML tags, which it knows only as such tokens.
    """
    named = set(_names(self.config)) | set(self.think)
    template = self.config.get("chat_template") or ""
    vocab = spec["model"]["vocab"]
    listed = set(vocab) if isinstance(vocab, Mapping) else {p for p, _ in vocab}
    out = {}
    for index, token in added.items():
      name = token.content
      blank = not name.replace("\u2581", " ").strip()
      markup = name in listed and name in _HTML
      is_text = not token.special and name not in named and (
        blank or (markup and name not in template)
      )  # fmt: skip
      if not is_text:
        out[name] = index
    unknown = spec["model"].get("unk_token") or _name(
      self.config.get("unk_token")
    )
    if unknown and unknown in listed:
      out[unknown] = self.backend.get_vocab()[unknown]
    return out

  def _vocab_bytes(
    self, spec: Mapping[str, Any], added: Mapping[int, Any]
  ) -> list[bytes | None]:
    read = vocab_bytes_lib.reader(spec)
    result: list[bytes | None] = [None] * self.vocab_size
    for piece, index in self.backend.get_vocab(with_added_tokens=False).items():
      if index in self._control_names or index in added:
        continue
      try:
        result[index] = read(piece)
      except KeyError as error:
        raise ValueError(
          f"Token {index} is {piece!r}, and {error} is no symbol of the"
          " byte-level alphabet, by which this tokenizer decodes. Mend"
          " tokenizer.json, or name another model's."
        ) from error
    for index, token in added.items():
      if index not in self._control_names:
        result[index] = token.content.replace("\u2581", " ").encode()
    return result

  @classmethod
  def load(cls, path_or_hub_id: str | pathlib.Path) -> "Tokenizer":
    """Reads the tokenizer of a model.

    Args:
      path_or_hub_id: a directory, a GGUF file or a directory with one, or an id
        of the Hugging Face hub (NAME@REVISION). In a directory
        generation_config.json, or else config.json, may name further ids that
        end a completion.

    Raises:
      FileNotFoundError: no tokenizer there.
      ValueError: transformers cannot read it, or only by slow Python code; or
        what `Tokenizer` refuses.
    """
    path = pathlib.Path(path_or_hub_id)
    gguf = _gguf_file(path)
    if gguf is not None:
      from opera_jax.text import gguf_tokenizer

      built = gguf_tokenizer.build(gguf)
      return cls(built.backend, built.config, built.end_ids)
    if not path.is_dir():
      path = _download(str(path_or_hub_id))
    if not any((path / name).exists() for name in _VOCABULARIES):
      raise FileNotFoundError(
        f"{path} holds no tokenizer.json. Write one with Tokenizer.save,"
        " or name a directory of a Hugging Face model."
      )
    config: dict[str, Any] = {}
    if (path / _CONFIG).exists():
      config = json.loads((path / _CONFIG).read_text("utf-8"))
    config.pop("added_tokens_decoder", None)
    ends = end_ids(path / _GENERATION) or end_ids(path / "config.json")
    ours = config.pop(_OURS, None)
    if ours is not None:  # `save` wrote it, and nothing needs transformers
      backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
      return cls(backend, config, ends, **ours)
    backend, read = _by_transformers(path)
    return cls(backend, config | read, ends)

  @classmethod
  def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Trains a byte-level BPE with Qwen's split pattern.

    Args:
      texts: the corpus.
      vocab_size: ids wanted, the five added tokens included; a corpus with
        too few pairs gives fewer.

    Raises:
      ValueError: vocab_size below 256 bytes plus the special tokens.
    """
    smallest = 256 + len(TRAINED)
    if vocab_size < smallest:
      raise ValueError(
        f"vocab_size {vocab_size} is below {smallest}: 256 bytes and"
        f" {len(TRAINED)} special tokens must fit. Raise it."
      )
    backend = byte_level.pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size - len(TRAINED),
      initial_alphabet=sorted(byte_level.byte_of_symbol()),
      special_tokens=[],
      show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tags = (THINK_OPEN, THINK_CLOSE)
    _add_tokens(backend, [(name, name not in tags) for name in TRAINED])
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
    ours: dict[str, Any] = {
      "think": list(self.think),
      "enable_thinking": self.enable_thinking,
    }
    if _DATE in (self.config.get("chat_template") or ""):
      ours["date"] = self.date
    config = self.config | {"added_tokens_decoder": added, _OURS: ours}
    (directory / _CONFIG).write_text(
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

  def _changed(self, **changes: Any) -> "Tokenizer":
    """A copy with other arguments of `Tokenizer`."""
    arguments: dict[str, Any] = {
      "backend": self.backend,
      "config": self.config,
      "end_ids": self._more_end_ids,
      "think": self.think,
      "enable_thinking": self.enable_thinking,
      "date": self.date,
    }
    return Tokenizer(**arguments | changes)

  def with_ends(self, ids: Iterable[int]) -> "Tokenizer":
    """The same tokenizer, with further ids that end a completion.

    Raises:
      ValueError: an id outside the vocabulary.
    """
    more = tuple(ids)
    if not more:
      return self
    return self._changed(end_ids=(*self._more_end_ids, *more))

  def with_think_tokens(self) -> "Tokenizer":
    """The same tokenizer, with each think tag as one token.

    Tags that it lacks get the ids after the last one; the model's embedding
    needs rows for them, see `models.grow_embedding`.

    Raises:
      ValueError: the ids have gaps, so that none is free after the last.
    """
    return self.configured()

  def configured(
    self,
    *,
    think: Sequence[str] = (),
    chat_template: str = "",
    enable_thinking: str = "",
  ) -> "Tokenizer":
    """The same tokenizer by the fields of config.tokenizer.

    Args:
      think: two strings between which a thought stands: tokens if the tokenizer
        has them, else matched as bytes. None given means the tokenizer's own
        ("<think>" and "</think>") as tokens, which are added if they are
        missing: one token costs two rows of the embedding and cannot be spelled
        in several ways, as a string can.
      chat_template: "chatml", or a file with a Jinja template; "" keeps the
        tokenizer's own.
      enable_thinking: "on" or "off" for the chat template, "" for neither.

    Raises:
      FileNotFoundError: no such file.
      ValueError: what `Tokenizer` refuses, or tokens that cannot be added.
    """
    changes: dict[str, Any] = {}
    lacking: list[tuple[str, bool]] = []
    if chat_template == "chatml":
      changes["config"] = self.config | {"chat_template": CHAT_TEMPLATE}
      lacking += [
        (name, True)
        for name in chat_template_lib.CHATML_TOKENS
        if self.backend.token_to_id(name) is None
      ]
    elif chat_template:
      file = pathlib.Path(chat_template)
      if not file.is_file():
        raise FileNotFoundError(
          f"config.tokenizer.chat_template={chat_template}: no such file. Name"
          ' a file with a Jinja template, or "chatml".'
        )
      template = file.read_text("utf-8")
      changes["config"] = self.config | {"chat_template": template}
    if enable_thinking:
      changes["enable_thinking"] = enable_thinking == "on"
    if think:
      changes["think"] = tuple(think)
    elif self.think_open_id is None:
      lacking += [(tag, False) for tag in self.think]
    if lacking:
      changes["backend"] = self._with_added(lacking)
    return self._changed(**changes) if changes else self

  def _with_added(self, names: Sequence[tuple[str, bool]]) -> Any:
    """A backend with further tokens (name, whether it is special)."""
    backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
    _add_tokens(backend, names)
    ids = [backend.token_to_id(name) for name, _ in names]
    if ids != list(range(self.vocab_size, self.vocab_size + len(names))):
      raise ValueError(
        f"The tokens {[name for name, _ in names]} cannot be added after the"
        f" {self.vocab_size} ids of the tokenizer: they got the ids {ids}, as"
        " its ids have gaps or it lists one of them. Set"
        " config.tokenizer.think to two strings that it does not list."
      )
    return backend

  def encode(self, text: str) -> np.ndarray:
    """Untrusted text to ids [T] int32; no control token can come out.

    The text is read as following another: SentencePiece's space before the
    first word of a text is not added.
    """
    encoding = self._sealed.backend.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` for many texts, in parallel threads."""
    encodings = self._sealed.backend.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

  def encode_template(self, text: str) -> np.ndarray:
    """Our own text to ids [T] int32; a spelled control token becomes one."""
    return self.encode(self._sealed.trusted(text))

  def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
    """Ids to text; bytes that are no UTF-8 and unused ids become U+FFFD.

    The text is that of ids in the middle of a text: a space before its first
    word stays. The bytes of several tokens are joined before they are read as
    UTF-8, so that invalid bytes may give fewer U+FFFD than transformers writes.

    Args:
      ids: token ids.
      skip_special: leave out tokens flagged special. Think tags always show.
    """
    parts = []
    for index in map(int, ids):
      if index in self._control_names:
        if not (skip_special and index in self._skipped):
          parts.append(self._control_names[index].encode())
        continue
      known = 0 <= index < self.vocab_size
      piece = self.vocab_bytes[index] if known else None
      parts.append("\ufffd".encode() if piece is None else piece)
    return b"".join(parts).decode("utf-8", errors="replace")

  @functools.cached_property
  def chat(self) -> chat_template_lib.ChatTemplate:
    """The chat template.

    Raises:
      ValueError: the tokenizer has none.
    """
    text = self.config.get("chat_template")
    if not text:
      raise ValueError(
        "The tokenizer has no chat template, as base models often have none,"
        " and prompts are chats here. Name one in"
        " config.tokenizer.chat_template: the path of a Jinja file, or"
        ' "chatml".'
      )
    variables: dict[str, Any] = {
      name: _name(value)
      for name, value in self.config.items()
      if name.endswith("_token") and _name(value)
    }
    if self.enable_thinking is not None:
      variables["enable_thinking"] = self.enable_thinking
    if _DATE in text:
      variables[_DATE] = datetime.datetime.fromisoformat(self.date).strftime
    return chat_template_lib.ChatTemplate(text, variables, self._whole)

  def chat_prompt(
    self,
    prompt: str | Sequence[chat_template_lib.Message],
    system: str | None = None,
  ) -> np.ndarray:
    """Ids [T] int32 of a chat and the head of the assistant's turn.

    The ids are transformers' for the model's own chat template, but for text
    that spells a control token, which stays text. This holds for think tags in
    an assistant's message too: the template cannot cut that thought out.

    Args:
      prompt: the user's turn; or messages with "role" (system, user,
        assistant) and "content". Untrusted.
      system: a system turn to begin with, or None.

    Raises:
      ValueError: no chat template, one without a head of the assistant's turn,
        or messages that it refuses.
    """
    turns: list[chat_template_lib.Message] = []
    if system is not None:
      turns.append({"role": "system", "content": system})
    if isinstance(prompt, str):
      turns.append({"role": "user", "content": prompt})
    else:
      turns.extend(prompt)
    encoding = self._whole.backend.encode(
      self.chat.prompt(turns), add_special_tokens=False
    )
    return np.asarray(encoding.ids, np.int32)

  def _id_of(self, role: str) -> int | None:
    """Id of a token that the config names, such as `eos_token`; or None."""
    name = _name(self.config.get(role))
    return self.backend.token_to_id(name) if name else None

  @functools.cached_property
  def end_ids(self) -> tuple[int, ...]:
    """Every id that ends a completion, `end_id` first.

    The token with which the chat template ends the assistant's turn, the
    `eos_token`, and what generation_config.json lists.

    Raises:
      ValueError: there is none.
    """
    turn_end = self.chat.turn_end if self.config.get("chat_template") else None
    found = (
      None if turn_end is None else self.backend.token_to_id(turn_end),
      self._id_of("eos_token"),
      *self._more_end_ids,
    )
    ids = tuple(dict.fromkeys(index for index in found if index is not None))
    if not ids:
      raise ValueError(
        "No token ends a completion: the tokenizer names no eos_token, and its"
        " chat template ends no turn with a token. Name the token in"
        " tokenizer_config.json, or its id as eos_token_id in"
        " generation_config.json."
      )
    return ids

  @property
  def end_id(self) -> int:
    """The id with which a completion of ours ends."""
    return self.end_ids[0]

  @functools.cached_property
  def pad_id(self) -> int:
    """Id of the `pad_token`; of the `eos_token`, or of any end, without one."""
    for index in (self._id_of("pad_token"), self._id_of("eos_token")):
      if index is not None:
        return index
    return self.end_id

  @functools.cached_property
  def _prompt_thought(self) -> tuple[str, bool]:
    """What the chat template writes of a thought, and whether it closes it."""
    head = self.chat.head if self.config.get("chat_template") else ""
    _, opens, thought = head.rpartition(self.think[0])
    return opens + thought if opens else "", self.think[1] in thought

  @property
  def opens_thought(self) -> bool:
    """Whether a chat prompt ends inside the thought."""
    text, closed = self._prompt_thought
    return bool(text) and not closed

  @property
  def closes_thought(self) -> bool:
    """Whether a chat prompt ends after an empty thought: thinking is off."""
    return self._prompt_thought[1]

  @property
  def opened_text(self) -> str:
    """The begin of the thought that a chat prompt ends with, or ""."""
    return self._prompt_thought[0] if self.opens_thought else ""

  @property
  def thought_head(self) -> np.ndarray:
    """Ids that a completion begins with: the opening tag and a newline.

    Empty where the chat prompt has opened the thought, or has closed it.
    """
    if self.opens_thought or self.closes_thought:
      return np.zeros(0, np.int32)
    return self.encode_template(f"{self.think[0]}\n")

  @property
  def thought_tail(self) -> np.ndarray:
    """Ids between thought and answer: a newline, the closing tag, a gap."""
    return self.encode_template(f"\n{self.think[1]}\n\n")

  @property
  def closing_tag(self) -> np.ndarray:
    """Ids of the closing tag alone."""
    return self.encode_template(self.think[1])

  @property
  def empty_thought(self) -> np.ndarray:
    """Ids after a chat prompt that leave the thought empty."""
    if self.closes_thought:
      return np.zeros(0, np.int32)
    return np.concatenate([self.thought_head, self.thought_tail])

  def completion(
    self, thought: str, answer: str, *, closed: bool = True, after: str = ""
  ) -> np.ndarray:
    """Ids [T] int32 of a whole completion; only our own tags become tags.

    Args:
      thought: untrusted; left out if the chat prompt has closed the thought.
      answer: untrusted.
      closed: whether the tag that closes the thought is there.
      after: text behind the end of the turn.
    """
    parts = [self.encode(answer), np.asarray([self.end_id], np.int32)]
    if not self.closes_thought:
      tail = self.thought_tail if closed else self.encode("\n\n")
      parts = [self.thought_head, self.encode(thought), tail, *parts]
    return np.concatenate([*parts, self.encode(after)])

  def completion_text(self, ids: Iterable[int]) -> str:
    """The text of a completion, in one form for every tokenizer.

    Its tags read "<think>" and "</think>" whatever they are in the model, an
    opening tag that the chat prompt wrote is there, and special tokens are not.
    """
    text = self.decode(ids, skip_special=True)
    return self.plain_tags(self.opened_text + text)

  def plain_tags(self, text: str) -> str:
    """Text with think tags that read "<think>" and "</think>"."""
    for tag, plain in zip(self.think, THINK_TAGS):
      text = text.replace(tag, plain)
    return text

  def through_thought(self, ids: np.ndarray) -> np.ndarray | None:
    """The first ids of a completion, with the tag that closes the thought.

    None if the thought is not closed.
    """
    found = self._closing(ids)
    return None if found is None else ids[: found[1]]

  def before_closing_tag(self, ids: np.ndarray) -> np.ndarray | None:
    """The ids before the tag that closes the thought; None without one.

    A token that holds the tag's beginning and text before it is replaced by
    ids of that text.
    """
    found = self._closing(ids)
    if found is None:
      return None
    first, _, text = found
    rest = self.encode(text) if text else ids[:0]
    return np.concatenate([ids[:first], rest])

  def _closing(self, ids: np.ndarray) -> tuple[int, int, str] | None:
    """Where the first closing tag is.

    Returns:
      The first token with a byte of the tag, the number of tokens up to the
      tag's end, and the text of that first token before the tag.
    """
    if self.think_close_id is not None:
      at = np.flatnonzero(np.asarray(ids) == self.think_close_id)
      return (int(at[0]), int(at[0]) + 1, "") if at.size else None
    pieces = [
      self.vocab_bytes[i] if 0 <= i < self.vocab_size else None for i in ids
    ]
    # The byte 0xFF of a token without bytes is part of no tag.
    spelled = [b"\xff" if piece is None else piece for piece in pieces]
    tag = self.think[1].encode()
    begin = b"".join(spelled).find(tag)
    if begin < 0:
      return None
    ends = np.cumsum([len(piece) for piece in spelled])
    first = int(np.searchsorted(ends, begin, side="right"))
    last = int(np.searchsorted(ends, begin + len(tag), side="left"))
    before = spelled[first][: begin - (int(ends[first - 1]) if first else 0)]
    return first, last + 1, before.decode("utf-8", errors="replace")


# What transformers raises over files that it cannot make a tokenizer of.
_UNREADABLE = (
  AttributeError,
  ImportError,
  KeyError,
  OSError,
  TypeError,
  ValueError,
)
_DATE = "strftime_now"  # the function of templates that write the day
_OURS = "opera_jax"  # key in tokenizer_config.json of what only we read
_CONFIG = "tokenizer_config.json"
_GENERATION = "generation_config.json"
_VOCABULARIES = (
  *("tokenizer.json", "tokenizer.model", "spiece.model"),
  *("vocab.json", "vocab.txt"),
)
_FILES = ("*token*.json", "*.model", "vocab.*", "merges.txt", "*.jinja",
          "config.json", _GENERATION)  # fmt: skip
_HTML = frozenset(
  f"<{slash}{name}>"
  for slash in ("", "/")
  for name in (
    *("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"),
    *(f"h{level}" for level in range(1, 7)),
    *("blockquote", "strong", "em", "b", "i", "u", "sub", "sup", "code"),
    *("ul", "ol", "li", "p", "br", "div", "span", "a", "pre"),
  )
)


def _name(value: Any) -> str:
  """The name of a token as tokenizer_config.json states it; "" for none."""
  if isinstance(value, Mapping):
    value = value.get("content")
  return value if isinstance(value, str) else ""


def _names(config: Mapping[str, Any]) -> list[str]:
  """All tokens that the config gives a role."""
  more = [
    value
    for key in ("additional_special_tokens", "extra_special_tokens")
    for value in (config.get(key) or ())
  ]
  roles = [value for key, value in config.items() if key.endswith("_token")]
  return list(filter(None, map(_name, [*roles, *more])))


def _gguf_file(path: pathlib.Path) -> pathlib.Path | None:
  """The path if it is a GGUF checkpoint; a tokenizer.json beside it is read
  instead."""
  if (path / "tokenizer.json").exists():
    return None
  return path if gguf_header.is_gguf(path) else None


def _by_transformers(
  path: pathlib.Path,
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  """Backend and config of a directory, by `transformers.AutoTokenizer`."""
  from transformers.models.auto import tokenization_auto

  try:
    read = tokenization_auto.AutoTokenizer.from_pretrained(
      path, use_fast=True, trust_remote_code=False, local_files_only=True
    )
  except Exception as error:
    # tokenizers raises plain exceptions; of other classes only those pass for
    # faults of the files.
    if type(error) is not Exception and not isinstance(error, _UNREADABLE):
      raise
    raise ValueError(
      f"transformers cannot read the tokenizer in {path}: {error}. Fetch it"
      " again; a tokenizer that runs its own code is not read."
    ) from error
  if not read.is_fast:
    raise ValueError(
      f"The tokenizer in {path} is a {type(read).__name__}, which runs in"
      " Python and has no tokenizer.json. Convert it to a fast one (load it"
      " and save_pretrained where transformers can), or use another model's."
    )
  template = read.chat_template
  if isinstance(template, Mapping):
    template = template.get("default")
  roles = {
    name: value
    for name, value in read.special_tokens_map.items()
    if isinstance(value, str)
  }
  return read.backend_tokenizer, roles | {"chat_template": template}


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
      " the tokenizer's own end alone."
    ) from error
  ids = stated.get("eos_token_id") if isinstance(stated, dict) else stated
  ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
  if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
    raise ValueError(
      f"{path} says eos_token_id = {ids!r}; it must be a token id or a list of"
      " them. Mend it, or delete the file."
    )
  return tuple(ids)


def _download(hub_id: str) -> pathlib.Path:
  """The local folder with the tokenizer's files of a hub id."""
  import huggingface_hub
  from huggingface_hub import errors

  hub_id, revision = hub.split(hub_id)
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        hub_id, revision=revision, allow_patterns=list(_FILES)
      )
    )
  except errors.HFValidationError as error:
    raise FileNotFoundError(
      f"{hub_id!r} is neither a directory nor a Hugging Face hub id. Give"
      " a directory that holds tokenizer.json, a GGUF file, or an id such as"
      " 'Qwen/Qwen3-0.6B'."
    ) from error


def _add_tokens(
  backend: tokenizers.Tokenizer, names: Iterable[tuple[str, bool]]
) -> None:
  backend.add_tokens(
    [
      tokenizers.AddedToken(name, normalized=False, special=special)
      for name, special in names
    ]
  )
