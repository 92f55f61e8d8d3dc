"""Every rejected trace has a reason, and the counts add up."""

import numpy as np
import pytest

from opera_jax.data import traces
from opera_jax.synthesis import filters


def _trace(name, thought, answer="Fine.", status="complete", perplexity=2.0):
  candidate = traces.Candidate("Wait.", perplexity, 2)
  return traces.Trace(
    id=name,
    prompt="Tell.",
    reference="A story.",
    thought=thought,
    answer=answer,
    completion=np.array([1, 2, 3], np.int32),
    rounds=(traces.Round("Wait", 0, (candidate,)),),
    status=status,
  )


GOOD = [
  _trace("a", "One.\n\nWait, two.", perplexity=3.0),
  _trace("b", "One.\n\nBut two.\n\nThree.", perplexity=1.0),
  _trace("c", "Hmm, one.", perplexity=2.0),
]
BAD = [
  (_trace("d", "A attribute."), "fewer than 1 reflections"),
  (_trace("e", "Wait.", status="answer too long"), "answer too long"),
  (_trace("f", "Wait.", answer=""), "answer missing"),
  (_trace("g", "Wait.\n\nWait.\n\nWait."), "repeated steps"),
]


def test_reasons_and_counts():
  kept, rejected, counts = filters.select(GOOD + [t for t, _ in BAD])
  assert [t.id for t in kept] == ["a", "b", "c"]
  assert [(t.id, why) for t, why in rejected] == [(t.id, w) for t, w in BAD]
  assert counts == {"kept": 3} | {why: 1 for _, why in BAD}
  assert sum(counts.values()) == len(GOOD) + len(BAD)


def test_keep_share_takes_the_least_perplexing():
  kept, rejected, counts = filters.select(GOOD, keep_share=0.67)
  assert [t.id for t in kept] == ["b", "c"]
  assert [(t.id, why) for t, why in rejected] == [("a", "perplexity")]
  assert counts == {"kept": 2, "perplexity": 1}


def test_nothing_kept_is_an_error_that_counts():
  with pytest.raises(ValueError, match="answer too long.*config.select"):
    filters.select([BAD[1][0]])
  with pytest.raises(ValueError, match="keep_share"):
    filters.select(GOOD, keep_share=0.0)
