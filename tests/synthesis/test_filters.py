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
  # One pass is enough: what is filtered may be larger than memory.
  why, counts = filters.verdicts(iter(GOOD + [t for t, _ in BAD]))
  assert why == [None] * len(GOOD) + [word for _, word in BAD]
  assert counts == {"kept": 3} | {word: 1 for _, word in BAD}
  assert sum(counts.values()) == len(GOOD) + len(BAD)


def test_keep_share_takes_the_least_perplexing():
  why, counts = filters.verdicts(GOOD, keep_share=0.67)
  assert why == ["perplexity", None, None]
  assert counts == {"kept": 2, "perplexity": 1}


def test_nothing_kept_is_an_error_that_counts():
  with pytest.raises(ValueError, match="answer too long.*config.select"):
    filters.verdicts([BAD[1][0]])
  with pytest.raises(ValueError, match="keep_share"):
    filters.verdicts(GOOD, keep_share=0.0)
