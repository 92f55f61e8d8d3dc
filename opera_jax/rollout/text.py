"""Samples text for text: chat prompts in, completions out, streamed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.rollout import engine as engine_lib
from opera_jax.rollout import sampling as sampling_lib
from opera_jax.text import chat_template, stop_automaton
from opera_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Completion:
  """One completion as text; `sample` keeps every token that was sampled."""

  text: str  # without special tokens, with think tags
  sample: structs.Sample


def complete(
  engine: engine_lib.Engine,
  tokenizer: tokenizer_lib.Tokenizer,
  params: Any,
  prompts: Sequence[str | Sequence[chat_template.Message]],
  settings: sampling_lib.Sampling,
  key: jax.Array,
  *,
  samples: int = 1,
  system: str | None = None,
  stop: Sequence[str] = (),
  keep_stop: bool = False,
  on_text: Callable[[int, int, str], None] | None = None,
) -> list[list[Completion]]:
  """Answers chat prompts.

  Args:
    engine: the sampler.
    tokenizer: of the policy.
    params: parameters, in the ROLLOUT layout.
    prompts: user turns, or lists of messages with "role" and "content";
      untrusted.
    settings: how to sample. The tokenizer's end ids always stop a completion,
      and ids that it does not use are never sampled.
    key: random key.
    samples: completions per prompt.
    system: system message, or None.
    stop: strings that end a completion, cut at the character, not at the token.
    keep_stop: whether the stop string that was found stays in the text.
    on_text: called with (prompt, sample, new text) while sampling; the pieces
      of a sample join to its text. A thought that the chat template opens is
      part of the text.

  Returns:
    For each prompt its completions, in order.

  Raises:
    ValueError: a stop string that is empty, or that no tokens can spell; and
      what `Engine.sample` raises.
  """
  table = stop_automaton.compile(stop, tokenizer.vocab_bytes) if stop else None
  settings = sampling_lib.for_tokenizer(
    settings, tokenizer, engine.padded_vocab_size()
  )
  renamed = [
    tag for tag in tokenizer.think if tag not in tokenizer_lib.THINK_TAGS
  ]
  streams: dict[tuple[int, int], _Stream] = {}

  def on_tokens(prompt: int, sample: int, tokens: np.ndarray) -> None:
    stream = streams.setdefault((prompt, sample), _Stream())
    stream.tokens.extend(tokens.tolist())
    text = _spell(tokenizer, stream.tokens, stop, keep_stop)
    # Hold back the end: it may be half a character, or part of a stop string or
    # of a tag that is shown as another.
    held = max(map(len, (*stop, *renamed)), default=1) - 1
    held = max(held, len(text) - len(text.rstrip("\ufffd")))
    stable = text[: max(len(text) - held, 0)]
    if len(stable) > stream.shown and on_text is not None:
      on_text(prompt, sample, stable[stream.shown :])
      stream.shown = len(stable)

  sampled = engine.sample(
    params,
    [tokenizer.chat_prompt(p, system) for p in prompts],
    settings,
    key,
    samples=samples,
    stops=table,
    on_tokens=None if on_text is None else on_tokens,
  )
  out = [
    [
      Completion(_spell(tokenizer, sample.tokens, stop, keep_stop), sample)
      for sample in group
    ]
    for group in sampled
  ]
  for (prompt, sample), stream in streams.items():
    rest = out[prompt][sample].text[stream.shown :]
    if rest and on_text is not None:
      on_text(prompt, sample, rest)
  return out


@dataclasses.dataclass
class _Stream:
  """The tokens of a running sample, and how much text was passed on."""

  tokens: list[int] = dataclasses.field(default_factory=list)
  shown: int = 0  # characters


def _spell(
  tokenizer: tokenizer_lib.Tokenizer,
  tokens: Sequence[int] | np.ndarray,
  stop: Sequence[str],
  keep_stop: bool,
) -> str:
  """The text up to the first stop string, with or without it."""
  if not stop:
    return tokenizer.completion_text(tokens)
  found = stop_automaton.find_first(tokens, tokenizer.vocab_bytes, stop)
  if found is None:
    return tokenizer.completion_text(tokens)
  # `found.skip` counts bytes (a special token counts as one): cut the bytes.
  first = found.first_token
  before = tokenizer.decode(tokens[:first], skip_special=True)
  # Not a special token (None): the stop string starts in it.
  piece = tokenizer.vocab_bytes[int(tokens[first])] or b""
  before += piece[: found.skip].decode("utf-8", errors="replace")
  shown = before + (stop[found.string] if keep_stop else "")
  return tokenizer.plain_tags(tokenizer.opened_text + shown)
