"""An evaluation that is told to stop keeps what it has done of each model."""

import types

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.rollout import sampling
from opera_jax.run import partial_results
from opera_jax.stages import evaluate
from opera_jax.text import tokenizer as tokenizer_lib

COUNT = 10
SETTINGS = evaluate.Settings(
  samples=2,
  temperature=1.0,
  top_p=1.0,
  max_new_tokens=8,
  thoughts=0,
  resamples=10,
)
PROMPTS = [
  structs.Prompt(f"p{i}", "math" if i < 4 else "open_ended", "Say.", "r")
  for i in range(COUNT)
]
IDS = [np.asarray([i + 1], np.int32) for i in range(COUNT)]


class _Run:
  """Models, an engine and a eval_scorer that note what they are asked for."""

  seed = 0
  reward = {"terms": "opera + verifiable"}
  tokenizer = types.SimpleNamespace(end_id=0)

  def __init__(self):
    self.asked = []
    self.engine = self.eval_scorer = self

  def sampling(self, **settings):
    return sampling.Sampling(stop_ids=(0,), **settings)

  def load(self, model):
    return model

  def for_rollout(self, params):
    return params

  def sample(self, params, prompts, settings, key, *, samples, ids, advance):
    self.asked.append(("sample", params, ids[0]))
    out = []
    for one in prompts:
      group = []
      for n in range(samples):
        tokens = np.arange(one[0] + n, dtype=np.int32)
        advance(len(tokens))
        logprob = np.full(len(tokens), -1 / 3, np.float32)
        group.append(structs.Sample(tokens, logprob, True, "stop"))
      out.append(group)
    return out

  def score(self, params, prompts, ids, groups, *, advance):
    self.asked.append(("score", params, prompts[0].id))
    advance(1)
    return None


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
  """`evaluated(run, stop)`: one model's outcome; ends at the stopth call."""
  monkeypatch.setattr(partial_results, "PROMPTS_PER_BLOCK", 4)

  def measures(run, params, prompts, ids, groups, scored, told, advance):
    found = {"length": np.asarray([len(g[1].tokens) / 3 for g in groups])}
    if any(p.task == "open_ended" for p in prompts):
      found["r_self"] = np.ones(len(prompts))
    return found

  def records(run, model, scored, own, facts):
    return [{"model": model}]

  monkeypatch.setattr(evaluate, "_measures", measures)
  monkeypatch.setattr(evaluate, "_records", records)

  def one(run, stop=None, folder="pieces"):
    calls = []

    def advance(tokens):
      calls.append(tokens)
      if len(calls) == stop:
        raise SystemExit(143)

    return evaluate._one_model(
      run,
      "sft",
      "sft",
      PROMPTS,
      IDS,
      SETTINGS,
      partial_results.PartialResults(tmp_path / folder),
      advance,
    )

  return one


@pytest.mark.parametrize("stop", [1, 8, 9, 12, 17, 18, 23])
def test_ended_anywhere_it_repeats_nothing_that_was_done(evaluated, stop):
  straight = _Run()
  want_groups, want, want_records = evaluated(straight, folder="straight")
  assert len(straight.asked) == 6  # three pieces, sampled and scored
  first, second = _Run(), _Run()
  with pytest.raises(SystemExit):
    evaluated(first, stop)
  groups, values, records = evaluated(second)
  assert records == want_records and len(records) == 3
  # The call that was ended is all that is done a second time.
  assert first.asked[:-1] + second.asked == straight.asked
  assert [[s.tokens.tobytes() for s in g] for g in groups] == [
    [s.tokens.tobytes() for s in g] for g in want_groups
  ]
  assert {k: v.tolist() for k, v in values.items()} == {
    k: v.tolist() for k, v in want.items()
  }


def test_a_measure_that_some_pieces_lack_is_0_there(evaluated):
  _, values, _ = evaluated(_Run())
  assert values["r_self"].tolist() == [0.0] * 4 + [1.0] * 6
  assert len(values["length"]) == COUNT


@pytest.mark.parametrize("tags", [(), ("<reason>", "</reason>")])
def test_thought_and_answer_of_a_completion(tags):
  words = tokenizer_lib.Tokenizer.train_bpe(["hm yes"], 300).configured(
    think=tags
  )
  run = types.SimpleNamespace(tokenizer=words)

  def sample(tokens):
    return structs.Sample(tokens, np.zeros(len(tokens), np.float32), True)

  closed = sample(words.completion("hm", "yes"))
  assert evaluate.answer_text(run, closed) == "yes"
  thought = words.decode(evaluate._thought(run, closed))
  assert thought == f"{words.think[0]}\nhm\n{words.think[1]}"
  cut = sample(words.completion("hm", "yes", closed=False))
  assert evaluate.answer_text(run, cut) == ""
  assert evaluate._thought(run, cut).tolist() == cut.tokens[:-1].tolist()
  # A model that has never seen the tags opens no thought: all is its answer.
  plain = sample(words.encode("hm yes"))
  assert evaluate.answer_text(run, plain) == "hm yes"
  # Thinking is off: the prompt closed the thought.
  run.tokenizer = off = words.configured(think=tags, enable_thinking="off")
  assert off.closes_thought == (not tags)
  if not tags:
    answer = sample(off.completion("hm", "yes"))
    assert evaluate.answer_text(run, answer) == "yes"
    assert evaluate._thought(run, answer).size == 0
