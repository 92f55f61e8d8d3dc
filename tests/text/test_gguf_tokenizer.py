"""Tokenizers of GGUF files against BPE written out slowly, and transformers.

Two real files are tested where they are to be had: SmolLM2's ids against those
of transformers, and the losses that both models have on one sentence.
"""

import importlib
import inspect
import itertools
import json
import random
import re
import unicodedata

import gguf_files
import numpy as np
import pytest
import regex
import tokenizers
from gguf_files import Q
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opera_jax import gguf_header
from opera_jax.text import byte_level, gguf_tokenizer, tokenizer

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
SENTENCE = (
  "The quick brown fox jumps over the lazy dog. It was a bright cold day in "
  "April, and the clocks were striking thirteen."
)
TEXTS = (
  *("", "a", " ", "  ", "  lead", "trail  ", "a\n\nb\n\n\n c", "\t\tx", "\r\n"),
  *("1234567890 3.14159 1,000", "   1 2  34\n\n  5", "x1y22z333", "²³ ½ Ⅷ ٣٤"),
  *("I'll we've it's DON'T can'T", "naïve café", "e\u0301 \u1100\u1161 \ufb01"),
  *("中文字符 日本語 한국어 العربية हिन्दी", "😀👍🏽 𝔹", "\u00a0\u3000 x"),
  "def f(x):\n    return x**2  # hi\n\tpass\n",
  "http://a.b/c?d=e&f=g%20",
  "=" * 40 + "-" * 33 + " " * 65 + "\n" * 40,
  SENTENCE,
)


def write(folder, metadata):
  """A GGUF file that holds a tokenizer and one number."""
  return gguf_files.write(
    folder / "model.gguf",
    metadata.pop("general.architecture", "llama"),
    metadata,
    {"x": (np.zeros(1, np.float32), Q.F32)},
  )


def texts():
  """Fixed texts, and random ones of awkward characters."""
  rng = random.Random(0)
  letters = "ab tTé中😀e\u0301\n\t 12.,'_<>"
  yield from TEXTS
  for _ in range(300):
    yield "".join(rng.choices(letters, k=rng.randint(1, 40)))


# Byte-level BPE -----------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
  """Tokens and merges of a BPE that has seen the texts, digits split."""
  corpus = [*TEXTS, *itertools.islice(texts(), 100)] * 3
  spec = json.loads(tokenizer.Tokenizer.train_bpe(corpus, 700).backend.to_str())
  model = spec["model"]
  tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
  tokens += [token["content"] for token in spec["added_tokens"]]
  return tokens, [" ".join(pair) for pair in model["merges"]]


def byte_level_metadata(trained, pre):
  tokens, merges = trained
  special = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
  types = [
    CONTROL if t in special else USER if t.endswith("think>") else NORMAL
    for t in tokens
  ]
  return {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": list(tokens),
    "tokenizer.ggml.token_type": np.array(types, np.int32),
    "tokenizer.ggml.merges": list(merges),
    "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
    "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
  }


def published_pattern(pre):
  """The pattern of a published tokenizer, as other libraries have it."""
  from tiktoken_ext import openai_public

  # `from transformers import` gives a function of this name.
  convert_slow_tokenizer = importlib.import_module(
    "transformers.convert_slow_tokenizer"
  )
  if pre == "llama-bpe":
    init = convert_slow_tokenizer.TikTokenConverter.__init__
    return inspect.signature(init).parameters["pattern"].default
  if pre == "qwen2":
    qwen = convert_slow_tokenizer.Qwen2Converter(None).converted(
      {"a": 0, "b": 1, "ab": 2}, [("a", "b")]
    )
    steps = json.loads(qwen.to_str())["pre_tokenizer"]["pretokenizers"]
    return steps[0]["pattern"]["Regex"]
  return openai_public.r50k_pat_str


def slow_byte_level(text, pre, pattern, tokens, merges):
  """Ids by the definition: split, spell bytes, merge the lowest rank."""
  vocab = {token: index for index, token in enumerate(tokens)}
  rank = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
  if pre == "qwen2":
    text = unicodedata.normalize("NFC", text)
  words = [text]
  if pre == "smollm":
    words = regex.findall(r"\p{N}|[^\p{N}]+", text)
  ids = []
  for word in itertools.chain.from_iterable(
    regex.findall(pattern, word) for word in words
  ):
    parts = [byte_level.symbol_of_byte()[b] for b in word.encode()]
    if pre == "llama-bpe" and "".join(parts) in vocab:
      parts = ["".join(parts)]
    while True:
      pairs = [p for p in zip(parts, parts[1:]) if p in rank]
      if not pairs:
        break
      best = min(pairs, key=rank.__getitem__)
      merged, i = [], 0
      while i < len(parts):
        hit = tuple(parts[i : i + 2]) == best
        merged.append("".join(parts[i : i + 1 + hit]))
        i += 1 + hit
      parts = merged
    ids += [vocab[part] for part in parts]
  return ids


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_byte_level_ids_are_those_of_slow_bpe(pre, trained, tmp_path):
  tokens, merges = trained
  # A token that no merges reach: only llama-bpe finds it.
  assert "Ġunreached" not in tokens
  tokens = [*tokens, "Ġunreached"]
  metadata = byte_level_metadata((tokens, merges), pre)
  built = gguf_tokenizer.build(write(tmp_path, metadata))
  pattern = published_pattern(pre)
  for text in (*texts(), "an unreached one"):
    ids = built.backend.encode(text, add_special_tokens=False).ids
    assert ids == slow_byte_level(text, pre, pattern, tokens, merges), text
    wanted = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    assert built.backend.decode(ids) == wanted
  starts = built.backend.encode("a").tokens == ["<|im_start|>", "a"]
  assert starts == built.config["add_bos_token"] == (pre == "llama-bpe")


def test_the_splits_differ(trained, tmp_path):
  """Each of the four cuts this text in another way."""
  cuts = set()
  for pre in ("gpt-2", "llama-bpe", "qwen2", "smollm"):
    metadata = byte_level_metadata(trained, pre)
    backend = gguf_tokenizer.build(write(tmp_path, metadata)).backend
    parts = backend.pre_tokenizer.pre_tokenize_str("a.\n  12345")
    cuts.add(tuple(part for part, _ in parts))
  assert len(cuts) == 4


def test_added_tokens_and_what_the_config_says(trained, tmp_path):
  tokens, _ = trained
  metadata = byte_level_metadata(trained, "qwen2")
  metadata["tokenizer.chat_template"] = "{{ messages }}"
  built = gguf_tokenizer.build(write(tmp_path, metadata))
  added = built.backend.get_added_tokens_decoder()
  assert {index: (t.content, t.special) for index, t in added.items()} == {
    tokens.index(name): (name, "think" not in name)
    for name in tokenizer.TRAINED
  }
  assert built.config == {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": "{{ messages }}",
    "clean_up_tokenization_spaces": False,
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": None,
    "pad_token": "<|endoftext|>",
  }
  end, pad = tokens.index("<|im_end|>"), tokens.index("<|endoftext|>")
  assert built.end_ids == (end, pad)
  ids = built.backend.encode("a<think>b<|im_end|>").ids
  assert ids[1] == tokens.index("<think>") and ids[-1] == end


def test_transformers_takes_what_is_built(trained, tmp_path):
  import transformers

  metadata = byte_level_metadata(trained, "qwen2")
  metadata["tokenizer.chat_template"] = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
  )
  built = gguf_tokenizer.build(write(tmp_path, metadata))
  config = {k: v for k, v in built.config.items() if k != "tokenizer_class"}
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=built.backend, **config
  )
  assert len(theirs) == len(trained[0])
  assert (theirs.eos_token, theirs.pad_token_id) == (
    "<|im_end|>",
    trained[0].index("<|endoftext|>"),
  )
  messages = [{"role": "user", "content": "ab"}]
  assert theirs.apply_chat_template(messages, return_dict=False) == (
    built.backend.encode("<|im_start|>ab<|im_end|>").ids
  )


# SentencePiece's BPE ------------------------------------------------------

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
RUNS = [c * n for c in "\n " for n in range(1, 5) if c * n != " "]
# "<s>" can be made of pieces; a control token must not come of them.
PIECES = (
  *("▁t", "he", "▁the", "in", "▁a", "er", "an", "▁an", "th", "at", "▁that"),
  *("hat", "re", "▁there", "ther", "e▁", "n▁", "▁▁a", "<s", "ab", "bab", "aba"),
  *("▁", *"abehinrstxyé中<>.12/"),
)
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *RUNS, "<t>", *PIECES]
TYPES = (
  [UNKNOWN, CONTROL, CONTROL]
  + [BYTE] * 256
  + [USER] * (len(RUNS) + 1)
  + [NORMAL] * len(PIECES)
)
SCORES = [-1000.0] * 3 + [0.0] * 256 + [-1000.0] * (len(RUNS) + 1)
SCORES += [-float(i) for i in range(len(PIECES))]


def sentencepiece_metadata(**changes):
  metadata = {
    "model": "llama",
    "pre": "default",
    "tokens": list(TOKENS),
    "scores": np.array(SCORES, np.float32),
    "token_type": np.array(TYPES, np.int32),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    "add_space_prefix": False,
  } | changes
  return {
    key if "." in key else f"tokenizer.ggml.{key}": value
    for key, value in metadata.items()
    if value is not None
  }


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sentencepiece")
  return gguf_tokenizer.build(write(folder, sentencepiece_metadata()))


def slow_sentencepiece(text, tokens, types, scores):
  """Ids by the definition of SentencePiece's BPE.

  User-defined pieces are cut out, the longest first; then the two neighbours
  whose concatenation has the highest score merge, the leftmost on a tie, until
  none make a piece. Characters that are no piece become their bytes.
  """
  vocab = {token: index for index, token in enumerate(tokens)}
  text = text.replace(" ", "▁")
  frozen = sorted(
    (t.replace(" ", "▁") for t, k in zip(tokens, types) if k == USER),
    key=len,
    reverse=True,
  )
  index = vocab | {
    t.replace(" ", "▁"): i
    for i, (t, k) in enumerate(zip(tokens, types))
    if k == USER
  }
  score = {t: s for t, k, s in zip(tokens, types, scores) if k == NORMAL}
  pattern = "|".join(map(re.escape, frozen))
  ids = []
  for part in re.split(f"({pattern})", text) if frozen else [text]:
    if part in frozen:
      ids.append(index[part])
      continue
    symbols = list(part)
    while True:
      pairs = [a + b for a, b in zip(symbols, symbols[1:])]
      known = [pair for pair in pairs if pair in score]
      if not known:
        break
      at = pairs.index(max(known, key=score.__getitem__))
      symbols[at : at + 2] = [pairs[at]]
    for symbol in symbols:
      if symbol in score:
        ids.append(vocab[symbol])
      else:
        ids += [vocab[f"<0x{byte:02X}>"] for byte in symbol.encode()]
  return ids


@settings(max_examples=300, deadline=None, database=None)
@example("the  that\n\n\n   a there   <s <t> é中😀\x00▁ bab")
@example(" " * 9 + "\n" * 7 + "abababab")
@given(st.text(alphabet="abehinrtx <>s\n😀é", max_size=30))
def test_sentencepiece_ids_are_those_of_slow_merges(sentencepiece, text):
  text = re.sub("<s>+", "<s", text)  # spells a control token
  ids = sentencepiece.backend.encode(text, add_special_tokens=False).ids
  assert ids == slow_sentencepiece(text, TOKENS, TYPES, SCORES)
  assert sentencepiece.backend.decode(ids) == text.replace("▁", " ")


def test_tokens_have_the_ids_of_the_file(sentencepiece):
  backend = sentencepiece.backend
  for index, token in enumerate(TOKENS):
    run = TYPES[index] == USER and token.isspace()
    spelled = token.replace(" ", "▁") if run else token
    assert backend.token_to_id(spelled) == index
  added = backend.get_added_tokens_decoder()
  assert {t.content: t.special for t in added.values()} == {
    "<unk>": True,
    "<s>": True,
    "</s>": True,
    "<t>": False,
  }
  assert backend.get_vocab_size() == len(TOKENS)


def test_pieces_never_merge_into_a_control_token(sentencepiece):
  """Without its added tokens the pipeline has no way to one."""
  spec = json.loads(sentencepiece.backend.to_str())
  spec.update(added_tokens=[], post_processor=None)
  plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
  assert "<s" in plain.encode("a <s> b").tokens
  for text in ("<s>", "</s>", "<unk>", "<0x0A>", "a<s>b", "<t>"):
    ids = plain.encode(text).ids
    assert {TYPES[index] for index in ids} <= {NORMAL, BYTE}
    byte_ids = {TOKENS.index(f"<0x{b:02X}>") for b in text.encode()}
    assert all(TYPES[i] == NORMAL or i in byte_ids for i in ids)
  # Runs of white space are text, and stay whole there too.
  assert plain.encode("a\n\n\nb").tokens == ["a", "\n\n\n", "b"]


def test_the_start_and_the_end_are_added_where_the_file_says(tmp_path):
  built = gguf_tokenizer.build(write(tmp_path, sentencepiece_metadata()))
  assert built.config["add_bos_token"] and not built.config["add_eos_token"]
  assert built.backend.encode("a").tokens == ["<s>", "a"]
  metadata = sentencepiece_metadata(add_bos_token=False, add_eos_token=True)
  built = gguf_tokenizer.build(write(tmp_path, metadata))
  assert built.backend.encode("a").tokens == ["a", "</s>"]
  metadata = sentencepiece_metadata(add_bos_token=False)
  built = gguf_tokenizer.build(write(tmp_path, metadata))
  assert built.backend.encode("a").tokens == ["a"]


@pytest.mark.parametrize("stated", [None, True])
def test_a_space_is_prefixed_unless_the_file_says_no(stated, tmp_path):
  metadata = sentencepiece_metadata(add_space_prefix=stated)
  backend = gguf_tokenizer.build(write(tmp_path, metadata)).backend
  encoding = backend.encode("the an", add_special_tokens=False)
  assert encoding.tokens == ["▁the", "▁an"]
  assert backend.decode(encoding.ids) == "the an"


def test_phi3s_tokens_swallow_the_space_that_follows(tmp_path):
  """As in Phi-3.5's tokenizer_config.json; transformers has the same list."""
  from transformers.integrations import ggml

  tokens = [*TOKENS, "<|user|>", "<|end|>", "<|endoftext|>"]
  types = [*TYPES, CONTROL, CONTROL, CONTROL]
  metadata = sentencepiece_metadata(
    **{"general.architecture": "phi3"},
    tokens=tokens,
    token_type=np.array(types, np.int32),
    scores=np.array([*SCORES, -1000.0, -1000.0, -1000.0], np.float32),
  )
  backend = gguf_tokenizer.build(write(tmp_path, metadata)).backend
  theirs = ggml.GGUFPhi3Converter(
    {"tokens": tokens, "scores": [*SCORES, 0, 0, 0], "merges": []}
  ).tokenizer
  published = inspect.getsource(theirs)
  compared = 0
  for index, token in backend.get_added_tokens_decoder().items():
    name = re.escape(token.content)
    line = re.search(rf'AddedToken\("{name}".*', published)
    if line is not None:
      swallows = backend.encode(f"{token.content}\nx").ids[-2] == index
      assert swallows == ("rstrip=True" in line.group()), token
      compared += 1
  assert compared == 4
  newline, x = TOKENS.index("\n"), TOKENS.index("x")
  assert backend.encode("<s>\nx").ids == [1, 1, newline, x]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model": "bert"}, r"tokenizer of the model 'bert', and gpt2, llama"),
    ({"model": None}, r"lacks tokenizer.ggml.model"),
    ({"tokens": None}, r"lacks tokenizer.ggml.tokens"),
    ({"scores": None}, r"lacks tokenizer.ggml.scores"),
    ({"tokens": [*TOKENS[:-1], "<s>"]}, r"has the token '<s>' twice"),
    ({"tokens": [*TOKENS[:-1], "y" * 600]}, r"has 600 characters, must have"),
    (
      {"token_type": np.array(TYPES[1:], np.int32)},
      r"token_type has \d+ numbers for \d+ tokens",
    ),
    (
      {"scores": np.array([float("nan"), *SCORES[1:]], np.float32)},
      r"scores has .* finite",
    ),
    ({"token_type": 3}, r"token_type is '3' \(int\), must be of type ndarray"),
    ({"tokens": "abc"}, r"tokens is 'abc' \(str\), must be of type list"),
    ({"tokenizer.chat_template": 7}, r"chat_template is '7' \(int\)"),
    ({"bos_token_id": 10**6}, r"bos_token_id is 1000000, and there are"),
    ({"eos_token_id": 10**6}, r"1000000"),
    ({"eot_token_id": 10**6}, r"names \[1000000\] as ends of text"),
    (
      {"bos_token_id": None, "add_bos_token": True},
      r"wants the bos token added .* names none",
    ),
    ({"model": "gpt2"}, r"splits text as 'default' does .*gpt-2, llama-bpe"),
    ({"model": "gpt2", "pre": None}, r"lacks tokenizer.ggml.pre"),
    ({"model": "gpt2", "pre": "qwen2"}, r"lacks tokenizer.ggml.merges"),
    (
      {"model": "gpt2", "pre": "qwen2", "merges": ["a b", "t zz"]},
      r"merges 't zz', and these or what they make are no tokens",
    ),
    (
      {"model": "gpt2", "pre": "qwen2", "merges": ["<s >"]},
      r"merges '<s >' into a control token",
    ),
  ],
)
def test_bad_tokenizers_are_refused(changes, message, tmp_path):
  file = write(tmp_path, sentencepiece_metadata(**changes))
  with pytest.raises(ValueError, match=message) as error:
    gguf_tokenizer.build(file)
  assert str(file) in str(error.value)


def test_the_ends_are_named_or_spelled(tmp_path):
  """Gemma's files name <eos> alone; the end of a turn goes by its spelling."""
  tokens = [*TOKENS, "<end_of_turn>", "<|im_end|>", "<|eot_id|>", "q"]
  types = [*TYPES, CONTROL, NORMAL, CONTROL, NORMAL]
  metadata = sentencepiece_metadata(
    tokens=tokens,
    token_type=np.array(types, np.int32),
    scores=np.array([*SCORES, 0, 0, 0, 0], np.float32),
    eom_token_id=tokens.index("q"),
  )
  header = gguf_header.read(write(tmp_path, metadata))
  assert gguf_header.end_ids(header) == (
    2,
    tokens.index("q"),
    tokens.index("<end_of_turn>"),
    tokens.index("<|eot_id|>"),
  )


# Real files ------------------------------------------------------------------


def prompts(shared_data, count=150):
  with open(shared_data / "open_ended" / "train.jsonl") as lines:
    for line in itertools.islice(lines, count):
      yield from (v for v in json.loads(line).values() if isinstance(v, str))


def loss(folder, ids):
  """Mean loss per token of the folder's model.gguf, by transformers."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, gguf_file="model.gguf", dtype=torch.float32
  ).eval()
  tokens = torch.tensor([ids])
  with torch.no_grad():
    return model(tokens, labels=tokens).loss.item()


@pytest.mark.slow
def test_smollm2(tmp_path, shared_data):
  """transformers' ids, but where digits must be split before BPE.

  transformers leaves that split out, so that it cuts a run of white space
  before a digit in another place.
  """
  import transformers

  (tmp_path / "model.gguf").symlink_to(gguf_files.smollm2())
  built = gguf_tokenizer.build(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(
    tmp_path, gguf_file="model.gguf"
  )
  header = gguf_header.read(tmp_path)
  tokens, merges = (
    header.get(f"tokenizer.ggml.{key}", list) for key in ("tokens", "merges")
  )
  pattern = published_pattern("smollm")
  bytes_of = set("".join(t for t in tokens if not t.startswith("<")))
  spelled = byte_level.symbol_of_byte()
  same = differ = 0
  for text in (*texts(), *prompts(shared_data)):
    if any(spelled[b] not in bytes_of for b in text.encode()):
      continue  # the vocabulary lacks 21 rare bytes
    ids = built.backend.encode(text).ids
    unsplit = theirs.encode(text, add_special_tokens=False)
    assert ids == slow_byte_level(text, "smollm", pattern, tokens, merges), text
    assert unsplit == slow_byte_level(text, "gpt-2", pattern, tokens, merges)
    if not regex.search(r"\s\s\p{N}|[^\P{N}0-9]", text):
      assert ids == unsplit
    same += ids == unsplit
    differ += ids != unsplit
    assert built.backend.decode(ids) == text
  assert same > 300 and differ > 0
  assert built.end_ids == (2, 0) and "im_start" in built.config["chat_template"]
  ids = built.backend.encode(SENTENCE).ids
  assert loss(tmp_path, ids) == pytest.approx(3.69, abs=0.01)


@pytest.mark.slow
def test_gemma(tmp_path, shared_data):
  """Merged by score, with its start token; other ids have a loss of 9."""
  folder = tmp_path / "link"
  folder.mkdir()
  (folder / "model.gguf").symlink_to(gguf_files.gemma(tmp_path))
  built = gguf_tokenizer.build(folder)
  header = gguf_header.read(folder)
  tokens = header.get(gguf_header.TOKENS, list)
  types = header.get(gguf_header.TYPES, np.ndarray).tolist()
  scores = header.get("tokenizer.ggml.scores", np.ndarray).tolist()
  vocabulary = [tokens, types, scores]
  compared = 0
  for text in (*TEXTS, *itertools.islice(prompts(shared_data), 20)):
    text = text[:400]
    ids = built.backend.encode(text, add_special_tokens=False).ids
    assert ids == slow_sentencepiece(text, *vocabulary), text
    compared += 1
  assert compared > 30
  ids = built.backend.encode(SENTENCE).ids
  assert tokens[ids[0]] == "<bos>" and len(ids) == 27
  assert built.end_ids == (1, 106) and built.config["chat_template"] is None
  assert loss(folder, ids) == pytest.approx(3.01, abs=0.01)
