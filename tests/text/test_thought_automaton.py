"""Keywords and separators are checked, compiled quickly and cached."""

import time

import jax
import numpy as np
import pytest

from opera_jax.text import thought, thought_automaton


@pytest.mark.parametrize(
  "change,rule",
  [
    ({"match": "stem"}, "'word' or 'substring'"),
    ({"separator": "---"}, "white space"),
    ({"separator": ""}, "white space"),
    ({"keywords": ["But", " wait"]}, "' wait' can never match"),
    ({"keywords": [""]}, "can never match"),
    ({"keywords": ["let me"], "separator": " "}, "does not hold"),
    ({"think_open": 3}, "Id 3 of <think>"),
    ({"think_close": 9}, "Id 9 of </think>"),
    ({"think_close": "</think>"}, "tag 0 is matched"),
    ({"think_open": "<", "think_close": "a>"}, "tag 'a>' is matched"),
    ({"think_open": "<<", "think_close": ">"}, "tag '<<' is matched"),
    ({"think_open": "<a b>", "think_close": ">"}, "tag '<a b>' is matched"),
  ],
)
def test_bad_compile_arguments(change, rule):
  arguments = {
    "keywords": ["But"],
    "separator": "\n\n",
    "match": "word",
    "vocab_bytes": [None, None, b"a", b"b"],
    "think_open": 0,
    "think_close": 1,
  }
  with pytest.raises(ValueError, match=rule):
    thought_automaton.compile(**(arguments | change))


def test_qwens_table_is_quick_and_cached(qwen, tmp_path):
  def build():
    begun = time.perf_counter()
    table = thought_automaton.compile(
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


def test_a_token_of_too_many_steps():
  vocab = [None, None, b"\n\n" + b"a\n\n" * 17]
  with pytest.raises(ValueError, match="more than 16 whole steps"):
    thought_automaton.compile(["But"], "\n\n", "word", vocab, 0, 1)


def test_tables_of_strings_are_quick(qwen):
  begun = time.perf_counter()
  table = thought_automaton.compile(
    thought.KEYWORDS, "\n\n", "word", qwen.vocab_bytes, "<think>", "</think>"
  )
  assert time.perf_counter() - begun < 20
  assert table.next_state.shape[0] < 500
