"""Renders a model's own chat template, with what the messages say kept apart.

transformers renders the template. What a stranger wrote in a message becomes
plain text, whatever it spells: its characters that control tokens begin or end
with are hidden while the template runs (see `sealed`).
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from opera_jax.text import sealed as sealed_lib

# At its import transformers advises to install PyTorch, which is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

ROLES = ("system", "user", "assistant")
CHATML = """\
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
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_REMEDY = (
  "Name another in config.tokenizer.chat_template: the path of a Jinja file, or"
  ' "chatml".'
)

Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A chat template with what it is rendered with.

  Attributes:
    text: Jinja.
    variables: names of tokens such as `bos_token`, and options.
    sealed: knows the control tokens.
  """

  text: str
  variables: Mapping[str, Any]
  sealed: sealed_lib.Sealed

  def prompt(self, messages: Sequence[Message]) -> str:
    """The messages and the head of the assistant's turn, for `sealed.backend`.

    Args:
      messages: turns with "role" and "content", untrusted.

    Raises:
      ValueError: a message of another form, one that the template refuses, or
        a template without a head of the assistant's turn.
    """
    self.head  # noqa: B018  raises if the template has none
    checked = [_checked(message) for message in messages]
    if not checked:
      raise ValueError(
        "A chat prompt has no message; give at least one of role 'user'."
      )
    hidden, shown = self.sealed.hide(
      (m["content"] for m in checked), around=self._characters
    )
    text = self._render(
      [m | {"content": m["content"].translate(hidden)} for m in checked], True
    )
    return self.sealed.trusted(text).translate(shown)

  @functools.cached_property
  def _characters(self) -> frozenset[str]:
    """All characters that the template may write by itself."""
    return frozenset(self.text).union(*map(str, self.variables.values()))

  @functools.cached_property
  def head(self) -> str:
    """What the template writes to begin the assistant's turn."""
    probe = [{"role": "user", "content": "x"}]
    without, text = self._render(probe, False), self._render(probe, True)
    same = 0
    while same < len(without) and without[same] == text[same : same + 1]:
      same += 1
    if not text[same:]:
      raise ValueError(
        "The chat template has no generation prompt: it writes the same with"
        " and without add_generation_prompt, so that the model is not told to"
        f" answer. {_REMEDY}"
      )
    return text[same:]

  @functools.cached_property
  def turn_end(self) -> str | None:
    """The control token that ends the assistant's turn, None if there is none.

    The one that follows the content of an assistant's message.
    """
    answer = next(
      chr(c) for c in sealed_lib.PRIVATE[0] if chr(c) not in self.text
    )
    text = self._render(
      [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": answer},
      ],
      False,
    )
    _, said, rest = text.partition(answer)
    controls = self.sealed.controls(rest)
    if not said or not controls or rest[: controls[0][0]].strip():
      return None
    return controls[0][2]

  def _render(self, messages: Sequence[Message], head: bool) -> str:
    import jinja2
    from transformers.utils import chat_template_utils

    try:
      # It returns the texts and something else, whatever its annotation says.
      rendered: Any = chat_template_utils.render_jinja_template(
        conversations=[[dict(message) for message in messages]],
        chat_template=self.text,
        add_generation_prompt=head,
        **self.variables,
      )
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(
        f"The chat template is no Jinja: {error}, line {error.lineno}."
        f" {_REMEDY}"
      ) from error
    except (jinja2.TemplateError, TypeError) as error:
      roles = ", ".join(message["role"] for message in messages)
      raise ValueError(
        f"The chat template refuses messages of the roles {roles}: {error}."
        " Leave out a system turn that the model does not know (put it into"
        f" the user's), and let user and assistant alternate. {_REMEDY}"
      ) from error
    return rendered[0][0]


def _checked(message: Message) -> dict[str, str]:
  """A message with its role and content alone."""
  role, content = message.get("role"), message.get("content")
  if role not in ROLES or not isinstance(content, str):
    raise ValueError(
      f"A message has the role {role!r} and content of type"
      f" {type(content).__name__}; the role must be one of {ROLES} and the"
      " content text."
    )
  return {"role": role, "content": content}
