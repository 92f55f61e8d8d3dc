"""Small tokenizers in the shapes of well-known model families.

Each is trained here and written as a directory of Hugging Face, with a chat
template of our own in the shape of the family's.
"""

import json
import pathlib

import tokenizers
import transformers
from tokenizers import (
  AddedToken,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  trainers,
)

from opera_jax.text import byte_level

CORPUS = (
  ["But wait, the user said so.\n\nHmm. However, let me think. 12 apples."] * 5
  + ["def f(x):\n  return x  # naïve\n\n\n", "<h1>T</h1>"] * 5
  + ["the quick brown fox jumps over a lazy dog, and 34 pears"] * 5
)

CHATML = (
  "{%- for m in messages -%}"
  "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
  "{%- endfor -%}"
  "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
  "{%- if enable_thinking is defined and enable_thinking is false -%}"
  "{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
)
# Trims what a message says and writes the token that begins a text.
LLAMA3 = (
  "{{ bos_token }}{%- for m in messages -%}"
  "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
  "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{%- endfor -%}"
  "{%- if add_generation_prompt -%}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
# Folds the system turn into the user's, and insists on alternation.
GEMMA = (
  "{{ bos_token }}{%- set first = '' -%}{%- set turns = messages -%}"
  "{%- if messages[0].role == 'system' -%}"
  "{%- set first = messages[0].content + '\n\n' -%}"
  "{%- set turns = messages[1:] -%}{%- endif -%}"
  "{%- for m in turns -%}"
  "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
  "{{ raise_exception('Roles must alternate') }}{%- endif -%}"
  "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
  "{{ '\n' + (first if loop.first else '') + m.content | trim }}"
  "{{ '<end_of_turn>\n' }}{%- endfor -%}"
  "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}"
  "{%- endif -%}"
)
# The control tokens are put together around the role.
PHI = (
  "{% for m in messages %}"
  "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Opens the thought itself, and knows no system turn.
DEEPSEEK = (
  "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'system' -%}"
  "{{ raise_exception('System role not supported') }}"
  "{%- elif m.role == 'user' -%}{{ '<User>' + m.content }}"
  "{%- else -%}{{ '<Assistant>' + m.content + eos_token }}{%- endif -%}"
  "{%- endfor -%}"
  "{%- if add_generation_prompt -%}{{ '<Assistant><think>\n' }}{%- endif -%}"
)


def llama3(folder: pathlib.Path) -> None:
  """Byte-level BPE whose control tokens follow the vocabulary."""
  names = ("start_header_id", "end_header_id", "eot_id", "end_of_text")
  _byte_level(
    folder,
    ["<|begin_of_text|>", *(f"<|{name}|>" for name in names)],
    bos_token="<|begin_of_text|>",
    eos_token="<|end_of_text|>",
    chat_template=LLAMA3,
  )


def chatml(folder: pathlib.Path, tags: bool = False) -> None:
  """Byte-level BPE with ChatML, like SmolLM2; with think tags, like Qwen3."""
  names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  _byte_level(
    folder,
    names + ["<think>", "</think>"] * tags,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    chat_template=CHATML,
  )


def gemma(folder: pathlib.Path) -> None:
  """SentencePiece BPE with bytes, white space and HTML as tokens."""
  _sentence_piece(folder, ["<start_of_turn>", "<end_of_turn>"], GEMMA)


def gemma_unigram(folder: pathlib.Path) -> None:
  """The same with a Unigram model."""
  names = ["<start_of_turn>", "<end_of_turn>"]
  _sentence_piece(folder, names, GEMMA, unigram=True)


def phi(folder: pathlib.Path) -> None:
  """Llama 2's: a space is put before every piece of text."""
  names = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
  _sentence_piece(folder, names, PHI, prefix="prepend", strips=True)


def deepseek(folder: pathlib.Path) -> None:
  """A space is put before the first piece of text; thoughts are opened."""
  _sentence_piece(
    folder,
    ["<User>", "<Assistant>"],
    DEEPSEEK,
    prefix="metaspace",
    more=["<think>", "</think>"],
  )


ALL = {
  f.__name__: f for f in (llama3, chatml, gemma, gemma_unigram, phi, deepseek)
}


def _byte_level(folder, names, **roles) -> None:
  backend = byte_level.pipeline(models.BPE(ignore_merges=True))
  trainer = trainers.BpeTrainer(
    vocab_size=360,
    initial_alphabet=sorted(byte_level.byte_of_symbol()),
    show_progress=False,
  )
  backend.train_from_iterator(CORPUS, trainer)
  tags = ("<think>", "</think>")
  backend.add_tokens(
    [AddedToken(n, normalized=False, special=n not in tags) for n in names]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, **roles
  ).save_pretrained(folder)


def _sentence_piece(
  folder, names, template, *, prefix="", unigram=False, strips=False, more=()
) -> None:
  controls = ["<unk>", "<pad>", "<eos>", "<bos>", *names]
  pieces = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<h1>", "</h1>"]
  bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
  known = [*controls, *bytes_, *pieces]
  if unigram:
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0)], 0))
    trainer = trainers.UnigramTrainer(
      vocab_size=420,
      special_tokens=known,
      unk_token="<unk>",
      show_progress=False,
    )
  else:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(
      vocab_size=480, special_tokens=known, show_progress=False
    )
  spaces = normalizers.Replace(" ", "▁")
  if prefix == "prepend":
    steps = [normalizers.Prepend("▁"), spaces]
    backend.normalizer = normalizers.Sequence(steps)
  elif prefix == "metaspace":
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
      prepend_scheme="first", split=False
    )
  else:
    backend.normalizer = spaces
  backend.train_from_iterator(CORPUS, trainer)
  spec = json.loads(backend.to_str())
  spec["model"]["byte_fallback"] = True
  spec["added_tokens"] = [
    token
    | {
      "normalized": False,
      "special": token["content"] in controls,
      "rstrip": strips and token["content"] in names,
    }
    for token in spec["added_tokens"]
    if token["content"] not in bytes_
  ]
  backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback()]
  steps.append(decoders.Fuse())
  if prefix:
    steps.append(decoders.Strip(" ", 1, 0))
  backend.decoder = decoders.Sequence(steps)
  backend.add_tokens(
    [AddedToken(n, normalized=False, special=False) for n in more]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token="<bos>",
    eos_token="<eos>",
    unk_token="<unk>",
    pad_token="<pad>",
    chat_template=template,
  ).save_pretrained(folder)
