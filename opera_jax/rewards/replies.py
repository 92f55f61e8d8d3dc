"""Parses a judge's replies: untrusted text of any shape and length.

Every function returns a value or raises `Unreadable`, in roughly linear time
and memory.
"""

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

_Value = TypeVar("_Value")
TAIL = 65_536  # characters at the end of a reply that are searched
WORK = 5_000_000  # characters parsed before the search is given up
LEVELS = 900  # of nested objects that are parsed
_OBJECT = re.compile(r'\{\s*"')
_SKIPPED = 100  # braces skipped after too deep nesting
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
MOST_TOKENS = 100_000_000  # of one reply; more is no count of tokens


class Unreadable(ValueError):
  """A reply that does not have the requested form."""


def content(body: bytes) -> tuple[str, tuple[int, int]]:
  """The text of a chat completion, and its prompt and completion tokens.

  Args:
    body: the JSON that an endpoint replied with.

  Returns:
    The text of the first choice; counts of tokens, 0 where the endpoint does
    not say.

  Raises:
    Unreadable: no JSON, or not of that form.
  """
  try:
    answer = json.loads(body.decode("utf-8", "replace"))
  except (ValueError, RecursionError) as error:
    raise Unreadable(
      f"the endpoint's reply is no JSON ({type(error).__name__})"
    ) from error
  text = answer
  for key, kind in (("choices", list), (0, dict), ("message", dict)):
    text = _within(text, key)
    if not isinstance(text, kind):
      raise Unreadable(
        f"the endpoint's reply has no {kind.__name__} at {key!r} of "
        "choices[0].message"
      )
  text = text.get("content")
  if not isinstance(text, str):
    raise Unreadable(
      f"the message's content is {type(text).__name__} and no text"
    )
  usage = _within(answer, "usage")
  return text, (
    _tokens(_within(usage, "prompt_tokens")),
    _tokens(_within(usage, "completion_tokens")),
  )


def last_object(
  text: str, read: Callable[[dict[str, Any]], _Value]
) -> tuple[_Value, dict[str, Any]]:
  """The last JSON object in a text that `read` accepts.

  Thinking, braces in text and code fences are skipped. Objects inside an
  accepted object or inside a thought do not count.

  Args:
    text: a reply; if very long, only its end is searched.
    read: turns an object into a value, or raises `Unreadable`.

  Returns:
    The value, and the object.

  Raises:
    Unreadable: there is none, or the search was too expensive.
  """
  text = text[-TAIL:]
  closed = text.rfind(THINK_CLOSE)
  if closed < 0 and text.lstrip().startswith(THINK_OPEN):
    raise Unreadable("the thought has no end; raise the judge's max_tokens")
  decoder = json.JSONDecoder()
  found, why = None, "it holds no JSON object"
  work, begin = WORK, _next(text, 0)
  height = _heights(text)
  while begin >= 0:
    end = begin + 1
    try:
      # How deep a parser goes before it gives up differs between Pythons.
      if height[begin] > LEVELS:
        raise RecursionError
      value, stop = decoder.raw_decode(text, begin)
    except json.JSONDecodeError as error:
      work -= max(error.pos - begin, 1)
    except ValueError:
      work -= TAIL  # a huge number; the error does not tell the position
    except RecursionError:
      # Objects that begin just inside are almost as deep.
      work -= TAIL // 4
      for _ in range(_SKIPPED):
        end = _next(text, end) + 1 or len(text)
    else:
      work -= stop - begin
      try:
        accepted = read(value)
      except Unreadable as error:
        why = str(error)
      else:
        end = stop
        if stop > closed:
          found = accepted, value
    if work < 0:
      raise Unreadable("it holds too many braces to be searched")
    begin = _next(text, end)
  if found is None:
    raise Unreadable(why)
  return found


def _heights(text: str) -> np.ndarray:
  """Brackets that are open at once behind each place, at most; int64 [C].

  Brackets inside of strings count too: it is a bound for a parser, no more.
  """
  codes_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
  opens_C = np.isin(codes_C, [ord("{"), ord("[")]).astype(np.int64)
  closes_C = np.isin(codes_C, [ord("}"), ord("]")])
  depth_C = np.cumsum(opens_C - closes_C)
  highest_C = np.maximum.accumulate(depth_C[::-1])[::-1]
  return highest_C - depth_C


def _next(text: str, begin: int) -> int:
  """Position of the next possible object with a key; -1 if there is none."""
  match = _OBJECT.search(text, begin)
  return match.start() if match else -1


def _within(value: Any, key: str | int) -> Any:
  if isinstance(value, dict):
    return value.get(key)
  if isinstance(value, list) and key == 0 and value:
    return value[0]
  return None


def _tokens(value: Any) -> int:
  """A valid token count, otherwise 0."""
  if type(value) is int and 0 <= value <= MOST_TOKENS:
    return value
  return 0
