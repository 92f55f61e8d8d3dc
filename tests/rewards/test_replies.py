"""What is read out of a judge's reply, whatever stands around it."""

import json
import time

import pytest

from opera_jax.rewards import judge, replies

from rewards import hostile_server  # isort: skip

A = '{"better": "A"}'
B = '{"better": "B"}'


def _short(value):
  return ascii(value)[:40]


@pytest.mark.parametrize(
  "text, want",
  [
    (A, 1.0),
    (f"```json\n{A}\n```", 1.0),
    ("If {clarity} matters: " + A, 1.0),
    ("{" * 50 + A, 1.0),
    (A + "}" * 50, 1.0),
    (A + " {", 1.0),
    (f"First {A}, no: {B}", 0.0),
    (f"{B} {{'better': 'A'}} {{}}", 0.0),
    (f'{A} {{"better": true}} {{"better": "C"}}', 1.0),
    (f"<think>Perhaps {B}?</think>\n{A}", 1.0),
    (f"Perhaps {B}?</think>\n{A}", 1.0),
    ('{"better": "A", "why": "</think>"}', 1.0),
    ('{"verdict": {"better": "B"}}', 0.0),
    ('[{"better": "B"}]', 0.0),
    ('{"why": "not {\\"better\\": \\"A\\"}", "better": "B"}', 0.0),
    ('{"better": "A", "inner": {"better": "B"}}', 1.0),
    ('{"a": 1e999, "better": "tie"}', 0.5),
    ('{"a": NaN, "better": "tie"}', 0.5),
    ('{"n": ' + "9" * 5000 + "} " + A, 1.0),
    ('{"a":' * 3000 + A, 1.0),
    ("[" * 60_000 + A, 1.0),
    ("x" * 500_000 + A, 1.0),
    ("\ud800 \x00" + A, 1.0),
  ],
  ids=_short,
)
def test_the_last_object_that_fits_is_taken(text, want):
  value, reply = replies.last_object(text, judge.read_choice)
  assert value == want and reply["better"] in judge.CHOICES


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "no JSON object"),
    ("A", "no JSON object"),
    ("null", "no JSON object"),
    ("[]", "no JSON object"),
    ("}{", "no JSON object"),
    ('{"better": "A"', "no JSON object"),
    ("{}", "no JSON object"),
    ('{"best": "A"}', "says None"),
    ('{"better": ["A"]}', "says a list"),
    (f"<think>I say {A}", "the thought has no end"),
    (f"{A}</think>", "no JSON object"),
    (f"<think>{A}</think> so.", "no JSON object"),
    ('{"better": ' + "[" * 50_000, "no JSON object"),
  ],
  ids=_short,
)
def test_what_is_unreadable(text, message):
  with pytest.raises(replies.Unreadable, match=message):
    replies.last_object(text, judge.read_choice)


HARD = {
  "braces": lambda n: "{" * n,
  "open objects": lambda n: '{"a":' * (n // 5),
  "open arrays": lambda n: '{"a":[' * (n // 6),
  "objects in one": lambda n: '{"a":[' * 300 + "{}," * (n // 3),
  "digits": lambda n: '{"a":' + "1" * n,
  "numbers": lambda n: ('{"a":' + "1" * 5000) * (n // 5005),
  "strings": lambda n: '{"' * (n // 2),
  "long strings": lambda n: '{"a' + "b" * n,
  "escapes": lambda n: '{"' + "\\" * n,
  "spaces": lambda n: "{" + " " * n,
}


@pytest.mark.parametrize("name", HARD)
def test_a_hard_reply_costs_little(name):
  for size in (65_000, 1_000_000):
    text = HARD[name](size)
    begin = time.process_time()
    with pytest.raises(replies.Unreadable):
      replies.last_object(text, judge.read_choice)
    assert time.process_time() - begin < 2.0


def test_the_search_is_given_up():
  text = '{"a":' * 800 + "[" + "1," * 28_000
  with pytest.raises(replies.Unreadable, match="too many braces"):
    replies.last_object(text + A, judge.read_choice)


@pytest.mark.parametrize(
  "body",
  [
    b"",
    b"null",
    b"[]",
    b"3",
    b'"text"',
    b"{}",
    b"{broken",
    b"\xff\xfe\x00",
    b'{"choices": null}',
    b'{"choices": []}',
    b'{"choices": {"0": {"message": {"content": "x"}}}}',
    b'{"choices": [null]}',
    b'{"choices": ["x"]}',
    b'{"choices": [{}]}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": [1]}]}',
    b'{"choices": [{"message": {}}]}',
    b'{"choices": [{"message": {"content": null}}]}',
    b'{"choices": [{"message": {"content": ["x"]}}]}',
    b'{"choices": [{"message": {"content": {"better": "A"}}}]}',
    b'{"choices": [{"message": {"content": 1e999}}]}',
    b"[" * 100_000,
    b'{"choices":' * 50_000,
    b'{"choices": ' + b"9" * 100_000 + b"}",
  ],
  ids=_short,
)
def test_a_body_of_another_form_is_unreadable(body):
  with pytest.raises(replies.Unreadable, match="the endpoint|the message"):
    replies.content(body)


@pytest.mark.parametrize(
  "usage, want",
  [
    ({"prompt_tokens": 5, "completion_tokens": 7}, (5, 7)),
    (None, (0, 0)),
    ("x", (0, 0)),
    ([], (0, 0)),
    ({"prompt_tokens": "5"}, (0, 0)),
    ({"prompt_tokens": True, "completion_tokens": -3}, (0, 0)),
    ({"prompt_tokens": float("inf"), "completion_tokens": 1e30}, (0, 0)),
    ({"prompt_tokens": 10**30}, (0, 0)),
    ({"prompt_tokens": {"a": 1}, "completion_tokens": 2}, (0, 2)),
  ],
)
def test_only_counts_are_counted(usage, want):
  text, tokens = replies.content(hostile_server.completion(A, usage))
  assert json.loads(text) == {"better": "A"} and tokens == want
