"""Every rejected trace has a reason, and the counts add up."""

import numpy as np
import pytest

from opera_jax.data import traces
from opera_jax.synthesis import filters

PROMPT = "Tell of the storm that came over the harbour one night in spring."
NUMBERS = " ".join(f"word{i}" for i in range(40))


def _trace(
  name, thought="Wait, so.", answer="Fine.", status="complete", perplexity=2.0
):
  candidate = traces.Candidate("Wait.", perplexity, 2)
  return traces.Trace(
    id=name,
    prompt=PROMPT,
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
  (_trace("e", status="answer too long"), "answer too long"),
  (_trace("f", answer=" "), "answer missing"),
  (_trace("g", "Wait.\n\nWait.\n\nWait."), "repeated steps"),
  (
    _trace("h", status="thought too long"),
    "unclosed thought: thought too long",
  ),
  (_trace("i", "Wait. <think>"), "think tag in the thought"),
  (_trace("j", answer="So.</think> Fine."), "think tag in the answer"),
  (
    _trace("k", answer="It is so. Wait, is it?\nHmm, no.\nLet me think."),
    "thought goes on after the answer",
  ),
  (_trace("l", "Wait. " + "and so it goes " * 20), "repeated n-grams"),
  (_trace("m", answer=PROMPT.upper()), "answer copied from the prompt"),
  (
    _trace("n", answer="Well: " + PROMPT + " Yes."),
    "answer copied from the prompt",
  ),
  (
    _trace("o", "Wait, 我想这个故事应该很长。"),
    "language switch in the thought",
  ),
  (_trace("p", answer="Это сказка."), "language switch in the answer"),
]
# Each limit rejects a trace that passes without it.
LIMITS = [
  ({"min_thought_words": 3}, _trace("a"), "thought too short"),
  ({"max_thought_words": 1}, _trace("a"), "thought has too many words"),
  ({"min_answer_words": 2}, _trace("a"), "answer too short"),
  (
    {"max_answer_words": 39},
    _trace("a", answer=NUMBERS),
    "answer has too many words",
  ),
  (
    {"max_stop_words": 0},
    _trace("a", answer="Wait, no."),
    "thought goes on after the answer",
  ),
]


def test_reasons_and_counts():
  # One pass over a stream: the traces may not fit in memory.
  why, counts = filters.verdicts(
    iter(GOOD + [t for t, _ in BAD]), filters.Rules()
  )
  assert why == [None] * len(GOOD) + [word for _, word in BAD]
  assert counts["kept"] == len(GOOD)
  assert counts["answer copied from the prompt"] == 2
  assert sum(counts.values()) == len(GOOD) + len(BAD)


@pytest.mark.parametrize("limit, trace, word", LIMITS)
def test_limits(limit, trace, word):
  words = ("Wait",)
  assert filters.reason(trace, filters.Rules(**limit), words) == word
  assert filters.reason(trace, filters.Rules(), words) is None


def test_traces_that_pass():
  rules, keywords = filters.Rules(), ("Wait",)
  for trace in (
    # Speech in a story, a foreign name, a part of the prompt.
    _trace("a", answer='"Wait," he said. "Hmm." But waiting was no use.'),
    _trace("b", answer="They call it 雨, rain, in the old tongue of the isle."),
    _trace("c", answer=f"{PROMPT} {NUMBERS}"),
  ):
    assert filters.reason(trace, rules, keywords) is None, trace.answer


def test_a_fraction_of_one_disables_a_rule():
  off = filters.Rules(
    min_reflections=0, max_repeat=1, max_ngram_repeat=1, max_foreign=1,
    think_tags=True, max_stop_words=99,
  )  # fmt: skip
  left = [
    filters.reason(trace, off, ("Wait",))
    for trace, word in BAD
    if not word.startswith(("answer", "unclosed"))
  ]
  assert left == [None] * len(left)


def test_outliers_lie_far_from_the_median_either_way():
  rng = np.random.default_rng(0)
  near = np.exp(0.7 + 0.1 * rng.normal(size=40))
  score = [1.001, *near, 90.0]
  made = [_trace(str(i), perplexity=p) for i, p in enumerate(score)]
  why, counts = filters.verdicts(made, filters.Rules(max_deviation=5.0))
  assert why == ["perplexity outlier", *[None] * 40, "perplexity outlier"]
  assert counts == {"kept": 40, "perplexity outlier": 2}
  # Too few traces have no outliers.
  assert filters.verdicts(made[-5:], filters.Rules())[1] == {"kept": 5}
  off = filters.Rules(max_deviation=0)
  assert filters.verdicts(made, off)[1] == {"kept": 42}


def test_keep_share_takes_the_least_perplexing():
  why, counts = filters.verdicts(GOOD, filters.Rules(keep_share=0.67))
  assert why == ["perplexity", None, None]
  assert counts == {"kept": 2, "perplexity": 1}


def test_nothing_kept_is_an_error_that_counts():
  with pytest.raises(ValueError, match="answer too long.*config.select"):
    filters.verdicts([BAD[1][0]], filters.Rules())


@pytest.mark.parametrize(
  "changes",
  [
    {"keep_share": 0.0}, {"max_repeat": 1.5}, {"max_foreign": -0.1},
    {"ngram": 0}, {"max_deviation": -1.0},
  ],
)  # fmt: skip
def test_bad_rules(changes):
  with pytest.raises(ValueError, match=f"{next(iter(changes))}.*config.select"):
    filters.Rules(**changes)
