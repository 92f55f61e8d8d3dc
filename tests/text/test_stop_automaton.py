"""Stop strings on the device are the stop strings of the joined bytes."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.text import automaton, stop_automaton

STOPS = ("Wait", "But", "Hmm", "Let me think", "However", "me th", "\n\n")


def first_event(table, row):
  """(token index, event) of the first hit, the end of the row included."""
  state = jnp.int32(0)
  codes = automaton.run(table, row[None, :], np.asarray([len(row)]))[0]
  hits = np.flatnonzero(codes)
  if hits.size:
    return int(hits[0]), int(codes[hits[0]])
  for token in row:
    state, _ = automaton.step(table, state, jnp.int32(token))
  return len(row), int(table.end_event[state])


@pytest.mark.parametrize("right_boundary", [False, True])
@pytest.mark.parametrize("ignore_case", [False, True])
def test_stops_equal_the_host_search(
  qwen, hard_rows, right_boundary, ignore_case
):
  rng = np.random.default_rng(0)
  table = stop_automaton.compile(
    STOPS, qwen.vocab_bytes, right_boundary, ignore_case, left_boundary=True
  )
  seen = set()
  for row in hard_rows(rng, qwen, 150, 24):
    row = np.resize(row, 24)
    match = stop_automaton.find_first(
      row, qwen.vocab_bytes, STOPS, right_boundary, ignore_case, True
    )
    at, event = first_event(table, row)
    if match is None:
      assert event == 0
      continue
    assert event == match.string + 1, qwen.decode(row)
    seen.add(event)
    known = match.rest > 0 or not right_boundary
    assert at == match.token_after - known, qwen.decode(row)
    before = automaton.spell(row[: match.first_token + 1], qwen.vocab_bytes)[0]
    spelled = automaton.spell(row, qwen.vocab_bytes)[0]
    piece = len(before) - match.start
    assert spelled[match.start : match.stop].lower() == (
      STOPS[match.string].encode().lower()
    )
    cut = qwen.vocab_bytes[row[match.first_token]][: match.skip]
    assert before[:-piece].endswith(cut)
  assert len(seen) >= 4


def test_find_first_cuts_before_the_trigger():
  vocab = [b"so", b". Wai", b"t a", b" moment", None]
  match = stop_automaton.find_first([0, 1, 2, 3], vocab, ["But", "Wait"])
  assert match == stop_automaton.Match(
    string=1, first_token=1, token_after=3, skip=2, rest=2, start=4, stop=8
  )
  assert stop_automaton.find_first([0, 1, 4, 2], vocab, ["Wait"]) is None
  assert stop_automaton.find_first([], vocab, ["Wait"]) is None


def test_the_longest_of_those_that_end_together():
  vocab = [bytes([i]) for i in range(256)]
  table = stop_automaton.compile(["think", "me think", "k"], vocab)
  row = np.frombuffer(b"let me think", np.uint8).astype(np.int32)
  assert first_event(table, row) == (11, 2)


def test_right_boundary_waits_for_the_next_byte():
  vocab = [b"But", b"ter", b" x", None]
  table = stop_automaton.compile(["But"], vocab, right_boundary=True)
  events = automaton.run(
    table, np.asarray([[0, 1, 2], [0, 2, 2], [0, 3, 2]]), np.full(3, 3)
  )
  assert events.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]
  assert first_event(table, np.asarray([0])) == (1, 1)


@pytest.mark.parametrize(
  "strings,rule",
  [
    (["cat"], "cannot spell it"),
    (["ab", "b"], None),
    ([], "at least one"),
    ([""], "none empty"),
    (["ab", "AB"], "none twice"),
  ],
)
def test_bad_stops(strings, rule):
  vocab = [b"a", b"b", b"ab", None]
  if rule is None:
    stop_automaton.compile(strings, vocab, ignore_case=True)
    return
  with pytest.raises(ValueError, match=rule):
    stop_automaton.compile(strings, vocab, ignore_case=True)


def test_a_stop_may_be_spelled_by_parts_of_tokens():
  stop_automaton.compile(["cat"], [b"xc", b"at!"])
  with pytest.raises(ValueError, match="'cat'"):
    stop_automaton.compile(["cat"], [b"xc", b"t!", b"a c"])


def test_each_string_may_have_its_own_boundary():
  vocab = [b"But", b"ter", b"</t>", b"a", b"</", b"t>", b" ", b">b", None]
  strings, boundaries = ["But", "</t>"], [True, False]
  table = stop_automaton.compile(strings, vocab, boundaries)
  pattern = re.compile(rb"But(?![A-Za-z0-9_])|</t>")
  rng = np.random.default_rng(4)
  seen = set()
  for _ in range(300):
    row = rng.integers(0, len(vocab), 6)
    text, _ = automaton.spell(row, vocab)
    hit = pattern.search(text)
    found = stop_automaton.find_first(row, vocab, strings, boundaries)
    _, event = first_event(table, row)
    if hit is None:
      assert found is None and not event
      continue
    assert (found.start, found.stop) == hit.span()
    assert strings[found.string].encode() == hit.group()
    assert event == found.string + 1
    seen.add((found.string, text[hit.end() : hit.end() + 1].isalnum()))
  assert seen == {(0, False), (1, False), (1, True)}
