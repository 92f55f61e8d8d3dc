"""Cached tables are the tables of the same strings and vocabulary."""

import numpy as np
import pytest

from opera_jax.text import automaton, stop_automaton


def test_the_cache_knows_what_it_holds(tmp_path):
  vocab = [b"a", b"b", None]
  one = stop_automaton.compile(["a"], vocab, cache_dir=tmp_path)
  two = stop_automaton.compile(["b"], vocab, cache_dir=tmp_path)
  three = stop_automaton.compile(["a"], [b"b", b"a", None], cache_dir=tmp_path)
  rows = np.asarray([[0, 1]])
  events = [automaton.run(t, rows, np.full(1, 2)) for t in (one, two, three)]
  assert [e.tolist() for e in events] == [[[1, 0]], [[0, 1]], [[0, 1]]]


def test_a_broken_cache_file_is_rebuilt(tmp_path):
  vocab = [b"a", b"b", None]
  stop_automaton.compile(["a"], vocab, cache_dir=tmp_path)
  (path,) = tmp_path.iterdir()
  path.write_bytes(path.read_bytes()[:50])
  with pytest.warns(UserWarning, match="cannot be read"):
    stop_automaton.compile(["a"], vocab, cache_dir=tmp_path)
  stop_automaton.compile(["a"], vocab, cache_dir=tmp_path)
