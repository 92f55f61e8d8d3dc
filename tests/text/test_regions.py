"""Automata side by side act as each does alone."""

import numpy as np
import pytest

from opera_jax.text import automaton, regions, stop_automaton

VOCAB = [b"a", b"b", b"ab", b"\n", b"\n\n", b" stop", b"stop", None, None]


def _events(table, start, tokens):
  state, codes = np.int32(start), []
  for token in tokens:
    state, code = automaton.step(table, state, np.int32(token))
    codes.append(int(code))
  return codes


@pytest.mark.slow
def test_regions_act_as_their_automata():
  one = stop_automaton.compile(["stop"], VOCAB, right_boundary=True)
  two = stop_automaton.compile(["\n\n", "ba"], VOCAB)
  parts = [(one, [7]), (two, []), (None, [8]), (None, [])]
  table, starts = regions.join(parts, len(VOCAB))
  rng = np.random.default_rng(0)
  for _ in range(20):
    tokens = rng.integers(0, len(VOCAB) + 1, 30)  # one past the vocabulary too
    for (alone, stop_ids), start in zip(parts, starts, strict=True):
      want = [0] * 30 if alone is None else _events(alone, 0, tokens)
      want = [
        code or int(token in stop_ids) for code, token in zip(want, tokens)
      ]
      assert _events(table, start, tokens) == want
  assert table.next_state.shape[1] <= len(VOCAB) + 1


@pytest.mark.parametrize(
  "part, message", [((None, [9]), "stops at"), ((3, []), "compiled for")]
)
def test_other_vocabularies_are_refused(part, message):
  if part[0] == 3:
    part = stop_automaton.compile(["a"], VOCAB[:3]), []
  with pytest.raises(ValueError, match=message):
    regions.join([(None, []), part], len(VOCAB))
