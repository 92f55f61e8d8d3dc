"""Whatever a judge replies ends in a grade or as unreadable, in time.

Each test draws 2,000 replies from a seed that it prints; FUZZ_SEED repeats one.
"""

import asyncio
import gc
import json
import os
import random
import time
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st

from opera_jax.rewards import chat, endpoint, judge, replies

from rewards import hostile_server  # isort: skip

pytestmark = pytest.mark.slow

EXAMPLES = 2_000
SECONDS = 2.0  # that one reply may take
GROWTH = 20_000  # bytes that 100 of them may leave
PEAK = 40_000_000  # bytes that one may take
READS = {"rubric": judge.read_grades, "pairwise": judge.read_choice}
GRADES = dict.fromkeys(judge.DIMENSIONS, 3)

# Pieces that JSON, thoughts, rubrics and attacks are made of.
PIECES = st.sampled_from(
  [
    *("{", "}", "[", "]", '"', "\\", ",", ":", " ", "\n", "\x00", "\ud800"),
    *("null", "true", "false", "NaN", "Infinity", "-", "1e999", "9" * 5000),
    *("<think>", "</think>", "```json\n", "```", "{clarity}", "data: "),
    *("A", "B", "tie", "better", '"better"', '"better": "A"', "1", "5", "4.0"),
    *(f'"{name}": ' for name in judge.DIMENSIONS),
    *(json.dumps(GRADES), '{"better": "B"}', '{"a":', '{"a":[', "\u2028"),
  ]
)
SCALARS = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.sampled_from([10**400, -(10**400), 1, 5, 4.0]),
  st.floats(),
  st.text(max_size=20),
  st.sampled_from(["A", "B", "tie"]),
)
KEYS = st.sampled_from(
  [*judge.DIMENSIONS, "better", "choices", "message", "content", "usage", "a"]
)
VALUES = st.recursive(
  SCALARS,
  lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)
  ),
  max_leaves=20,
)


@st.composite
def texts(draw) -> str:
  """Pieces in a row, some of them many times over, around whole objects."""
  parts = draw(
    st.lists(
      st.one_of(
        PIECES,
        st.text(max_size=30),
        VALUES.map(lambda value: json.dumps(value)),
        st.tuples(PIECES, st.sampled_from([3, 100, 5_000, 100_000])).map(
          lambda pair: (pair[0] * pair[1])[:200_000]
        ),
      ),
      max_size=12,
    )
  )
  return "".join(parts)


@st.composite
def bodies(draw) -> bytes:
  """What comes over the wire: noise, other JSON, or a chat completion."""
  kind = draw(st.integers(0, 3))
  if kind == 0:
    return draw(st.binary(max_size=200))
  if kind == 1:
    return json.dumps(draw(VALUES)).encode()
  answer = {
    "choices": [{"message": {"content": draw(st.one_of(texts(), VALUES))}}],
    "usage": draw(VALUES),
  }
  body = json.dumps(answer).encode()
  if kind == 2:
    return body[: draw(st.integers(0, len(body)))]
  return body


def _fuzz(test, strategy):
  """Runs a test on 2,000 examples, from a printed seed; and looks for leaks."""
  seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().getrandbits(32)))
  print(f"FUZZ_SEED={seed}", flush=True)
  seen = []

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,  # each test looks at the clock itself
    database=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(example=strategy)
  def every(example):
    if len(seen) < 100:
      seen.append(example)
    test(example)

  every()
  # What hypothesis keeps is not ours, so some are read again without it.
  for example in seen:
    test(example)
  tracemalloc.start()
  try:
    held = []
    for _ in range(4):
      for example in seen:
        test(example)
      gc.collect()
      held.append(tracemalloc.get_traced_memory()[0])
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  # Threads come and go; what leaks grows every time.
  assert min(b - a for a, b in zip(held, held[1:])) < GROWTH
  assert peak < PEAK


def _sane(value) -> bool:
  """Whether a value is one that a judge may give."""
  if isinstance(value, dict):
    return set(value) == set(judge.DIMENSIONS) and all(
      type(grade) is int and 1 <= grade <= 5 for grade in value.values()
    )
  return value in (0.0, 0.5, 1.0)


@pytest.mark.parametrize("mode", READS)
def test_any_text_is_read_or_unreadable(mode):
  read = READS[mode]

  def test(text):
    begin = time.process_time()
    try:
      value, reply = replies.last_object(text, read)
    except replies.Unreadable as error:
      assert len(str(error)) < 500
    else:
      assert _sane(value) and read(reply) == value
    assert time.process_time() - begin < SECONDS

  _fuzz(test, texts())


@pytest.mark.parametrize("mode", READS)
def test_any_value_is_a_grade_or_none(mode):
  def test(value):
    reply = value if isinstance(value, dict) else {"better": value}
    try:
      got = READS[mode](reply)
    except replies.Unreadable as error:
      assert len(str(error)) < 500
    else:
      assert _sane(got)

  _fuzz(test, VALUES)


def test_any_body_has_a_text_or_is_unreadable():
  def test(body):
    begin = time.process_time()
    try:
      text, tokens = replies.content(body)
    except replies.Unreadable as error:
      assert len(str(error)) < 500
    else:
      assert isinstance(text, str)
      assert all(type(n) is int and 0 <= n <= 10**8 for n in tokens)
    assert time.process_time() - begin < SECONDS

  _fuzz(test, bodies())


def test_any_body_over_the_wire_is_a_grade_or_a_failure():
  # One loop and one connection for all; the way of a question is the same.
  with hostile_server.running(lambda question: b"") as server:
    client = endpoint.Client(
      server.address, "m", key_variable="", retries=1, backoff=0.0, timeout=5.0
    )
    wanted = judge._FORMATS["rubric"]

    async def all_of_them():
      async with chat.opened(
        server.address, "", timeout=5.0, reply_bytes=100_000
      ) as opened:
        loop = asyncio.get_running_loop()

        def test(body):
          server.say = lambda question: body
          for record in (server.bodies, server.seen, server.headers):
            record.clear()
          begin = time.monotonic()
          got = asyncio.run_coroutine_threadsafe(
            client._answer(chat, opened, "q", wanted, False), loop
          ).result(20)
          assert isinstance(got, endpoint.Failure) or _sane(got)
          assert time.monotonic() - begin < 10

        await asyncio.to_thread(_fuzz, test, bodies())

    asyncio.run(all_of_them())
    assert client.requests >= EXAMPLES
