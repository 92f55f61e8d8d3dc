"""Stop strings on the device are the stop strings of the joined bytes."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.text import automaton, thought

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
  table = automaton.compile_stops(
    STOPS, qwen.vocab_bytes, right_boundary, ignore_case, left_boundary=True
  )
  seen = set()
  for row in hard_rows(rng, qwen, 150, 24):
    row = np.resize(row, 24)
    match = automaton.find_first(
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


def test_step_is_run_one_token_at_a_time(small):
  table = automaton.compile(
    thought.KEYWORDS,
    "\n\n",
    "word",
    small.vocab_bytes,
    small.think_open_id,
    small.think_close_id,
  )
  rows = np.random.default_rng(0).integers(0, small.vocab_size, (5, 40))
  rows[:, 0] = small.think_open_id
  codes = automaton.run(table, rows, np.full(5, 40))
  state = jnp.zeros(5, jnp.int32)
  one = jax.jit(automaton.step)
  for t in range(40):
    state, event = one(table, state, jnp.asarray(rows[:, t]))
    assert np.array_equal(event, codes[:, t])


def test_find_first_cuts_before_the_trigger():
  vocab = [b"so", b". Wai", b"t a", b" moment", None]
  match = automaton.find_first([0, 1, 2, 3], vocab, ["But", "Wait"])
  assert match == automaton.Match(
    string=1, first_token=1, token_after=3, skip=2, rest=2, start=4, stop=8
  )
  assert automaton.find_first([0, 1, 4, 2], vocab, ["Wait"]) is None
  assert automaton.find_first([], vocab, ["Wait"]) is None


def test_the_longest_of_those_that_end_together():
  vocab = [bytes([i]) for i in range(256)]
  table = automaton.compile_stops(["think", "me think", "k"], vocab)
  row = np.frombuffer(b"let me think", np.uint8).astype(np.int32)
  assert first_event(table, row) == (11, 2)


def test_right_boundary_waits_for_the_next_byte():
  vocab = [b"But", b"ter", b" x", None]
  table = automaton.compile_stops(["But"], vocab, right_boundary=True)
  events = automaton.run(
    table, np.asarray([[0, 1, 2], [0, 2, 2], [0, 3, 2]]), np.full(3, 3)
  )
  assert events.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]
  assert first_event(table, np.asarray([0])) == (1, 1)


def test_ids_beyond_the_vocabulary_are_special():
  table = automaton.compile_stops(["ab"], [b"a", b"b", None])
  rows = np.asarray([[0, 1], [0, 2], [0, 99], [0, -3]])
  rows = np.concatenate([rows, np.full((4, 1), 1)], 1)
  events = automaton.run(table, rows, np.full(4, 3))
  assert events.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


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
    automaton.compile_stops(strings, vocab, ignore_case=True)
    return
  with pytest.raises(ValueError, match=rule):
    automaton.compile_stops(strings, vocab, ignore_case=True)


def test_a_stop_may_be_spelled_by_parts_of_tokens():
  automaton.compile_stops(["cat"], [b"xc", b"at!"])
  with pytest.raises(ValueError, match="'cat'"):
    automaton.compile_stops(["cat"], [b"xc", b"t!", b"a c"])


@pytest.mark.parametrize(
  "change,rule",
  [
    ({"match": "stem"}, "'word' or 'substring'"),
    ({"separator": "---"}, "white space"),
    ({"separator": ""}, "white space"),
    ({"keywords": ["But", " wait"]}, "' wait' can never match"),
    ({"keywords": [""]}, "can never match"),
    ({"keywords": ["let me"], "separator": " "}, "does not hold"),
    ({"think_open_id": 3}, "Id 3 of <think>"),
    ({"think_close_id": 9}, "Id 9 of </think>"),
  ],
)
def test_bad_compile_arguments(change, rule):
  arguments = {
    "keywords": ["But"],
    "separator": "\n\n",
    "match": "word",
    "vocab_bytes": [None, None, b"a", b"b"],
    "think_open_id": 0,
    "think_close_id": 1,
  }
  with pytest.raises(ValueError, match=rule):
    automaton.compile(**(arguments | change))


def test_qwens_table_is_quick_and_cached(qwen, tmp_path):
  def build():
    begun = time.perf_counter()
    table = automaton.compile(
      thought.KEYWORDS,
      "\n\n",
      "word",
      qwen.vocab_bytes,
      qwen.think_open_id,
      qwen.think_close_id,
      cache_dir=tmp_path,
    )
    return table, time.perf_counter() - begun

  first, seconds = build()
  assert seconds < 10
  assert len(list(tmp_path.iterdir())) == 1
  second, _ = build()
  for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    assert one.dtype == two.dtype and np.array_equal(one, two)


def test_the_cache_knows_what_it_holds(tmp_path):
  vocab = [b"a", b"b", None]
  one = automaton.compile_stops(["a"], vocab, cache_dir=tmp_path)
  two = automaton.compile_stops(["b"], vocab, cache_dir=tmp_path)
  three = automaton.compile_stops(["a"], [b"b", b"a", None], cache_dir=tmp_path)
  rows = np.asarray([[0, 1]])
  events = [automaton.run(t, rows, np.full(1, 2)) for t in (one, two, three)]
  assert [e.tolist() for e in events] == [[[1, 0]], [[0, 1]], [[0, 1]]]


def test_a_broken_cache_file_is_built_anew(tmp_path):
  vocab = [b"a", b"b", None]
  automaton.compile_stops(["a"], vocab, cache_dir=tmp_path)
  (path,) = tmp_path.iterdir()
  path.write_bytes(path.read_bytes()[:50])
  with pytest.warns(UserWarning, match="cannot be read"):
    automaton.compile_stops(["a"], vocab, cache_dir=tmp_path)
  automaton.compile_stops(["a"], vocab, cache_dir=tmp_path)


def test_a_token_of_too_many_steps():
  vocab = [None, None, b"\n\n" + b"a\n\n" * 17]
  with pytest.raises(ValueError, match="more than 16 whole steps"):
    automaton.compile(["But"], "\n\n", "word", vocab, 0, 1)
