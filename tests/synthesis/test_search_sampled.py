"""Searches that sample, against a naive one that shares nothing."""

import dataclasses

import jax
import pytest

from benchmarks import synthesis
from opera_jax import structs
from opera_jax.data import storyworld
from opera_jax.rollout import engine as engine_lib
from opera_jax.scoring import logprob_scorer
from opera_jax.synthesis import search


def _engine(teller, device, **changes):
  config, graphdef, _ = teller
  values = {
    "prompt_slots": 4, "prompt_buckets": (64, 128), "cache_buckets": (128,),
    "steps": 16,
  }  # fmt: skip
  return engine_lib.Engine(graphdef, config, mesh=device, **values | changes)


def _logprob_scorer(teller, device, rows=4):
  config, graphdef, _ = teller
  return logprob_scorer.LogprobScorer(
    graphdef,
    vocab_size=config.vocab_size,
    mesh=device,
    batch_size=rows,
    prefix_buckets=(64, 128, 512),
    slot_buckets=(1,),
    continuation_buckets=(1,),
  )


def _prompts(count):
  made = storyworld.corpus(count, 7)
  return [
    structs.Prompt(f"p{i}", "open_ended", d.prompt, d.answer)
    for i, d in enumerate(made)
  ]


def _search(teller, tokenizer, device, prompts, settings, **changes):
  searcher = search.Searcher(
    _engine(teller, device, **changes),
    _logprob_scorer(teller, device),
    tokenizer,
    **dataclasses.asdict(settings),
  )
  return searcher.run(teller[2], teller[2], prompts, jax.random.key(5))


# Most steps of the model's thoughts begin with one of these words.
STOP_OFTEN = synthesis.Settings(
  stop_words=(*search.STOP_WORDS, "The", "There", "It", "At", "Later"),
  max_step_tokens=80,
  budget=3,
)


@pytest.fixture(scope="module")
def usual(teller, tokenizer, one_device):
  return _search(teller, tokenizer, one_device, _prompts(10), STOP_OFTEN)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    pytest.param(
      {"score": "candidate", "template": "Think, and doubt. {prompt}"},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {"stop_words": ("\n\n",), "budget": 5, "max_thought_tokens": 60},
      marks=pytest.mark.slow,
    ),
    pytest.param({"budget": 0}, marks=pytest.mark.slow),
  ],
)
def test_traces_equal_those_of_a_naive_search(
  teller, tokenizer, one_device, changes
):
  """A prefill for every stretch and a pass for every score: the same."""
  settings = dataclasses.replace(STOP_OFTEN, **changes)
  prompts = _prompts(4)
  ours = _search(teller, tokenizer, one_device, prompts, settings)
  alone = _engine(teller, one_device, prompt_slots=1, prompt_buckets=(512,))
  rounds = 0
  for prompt, trace in zip(prompts, ours, strict=True):
    theirs, _ = synthesis.naive(
      alone, _logprob_scorer(teller, one_device, 1), tokenizer, teller[2],
      prompt, jax.random.key(5), settings,
    )  # fmt: skip
    synthesis.check_equal(trace, theirs)
    rounds += len(trace.rounds)
  assert rounds or not settings.budget
  assert "complete" in {trace.status for trace in ours}


@pytest.mark.slow
def test_a_trace_does_not_depend_on_other_prompts(
  teller, tokenizer, one_device, usual
):
  """Neighbours, order, rows and steps: none of them changes a token."""
  assert len({len(trace.rounds) for trace in usual}) > 1
  order = [7, 2, 9, 4, 0]
  prompts = _prompts(10)
  few = [prompts[i] for i in order]
  got = _search(teller, tokenizer, one_device, few, STOP_OFTEN)
  assert got == [usual[i] for i in order]  # every bit, scores too
  got = _search(
    teller, tokenizer, one_device, few, STOP_OFTEN, prompt_slots=2, steps=5
  )
  for index, trace in zip(order, got, strict=True):
    synthesis.check_equal(trace, usual[index])


def test_a_prompt_is_computed_once(teller, tokenizer, one_device):
  engine = _engine(teller, one_device)
  admitted, prefill = [], engine._programs["prefill"]

  def counted(*arguments, prompt_slot_R, **keywords):
    B = len(arguments[2])  # prefix_length_B
    admitted.extend(int(slot) for slot in prompt_slot_R if slot < B)
    return prefill(*arguments, prompt_slot_R=prompt_slot_R, **keywords)

  engine._programs["prefill"] = counted
  for template, times in (("{prompt}", 1), ("Think. {prompt}", 2)):
    searcher = search.Searcher(
      engine,
      _logprob_scorer(teller, one_device),
      tokenizer,
      **dataclasses.asdict(dataclasses.replace(STOP_OFTEN, template=template)),
    )
    traces = searcher.run(teller[2], teller[2], _prompts(6), jax.random.key(1))
    # The second prefill is for the answer, after the original prompt.
    answers = sum(len(t.answer) > 0 for t in traces)
    assert sum(len(t.rounds) for t in traces) > 4
    assert len(admitted) == 6 + (times - 1) * answers
    admitted.clear()


def test_on_a_cpu_thoughts_have_room_from_the_start(
  teller, tokenizer, one_device
):
  """Longer prefixes would compile every program that acts on them again."""
  engine = _engine(teller, one_device, prompt_buckets=(128, 256))
  grown, begun = [], []
  grow, empty = engine._programs["grow_prefix"], engine._programs["empty"]
  engine._programs["grow_prefix"] = lambda *a, **k: (
    grown.append(k["capacity"]) or grow(*a, **k)
  )
  engine._programs["empty"] = lambda *a, **k: (
    begun.append(a[3]) or empty(*a, **k)
  )
  searcher = search.Searcher(
    engine,
    _logprob_scorer(teller, one_device),
    tokenizer,
    **dataclasses.asdict(
      dataclasses.replace(STOP_OFTEN, max_thought_tokens=150)
    ),
  )
  found = searcher.run(teller[2], teller[2], _prompts(4), jax.random.key(5))
  assert any(len(trace.completion) > 64 for trace in found)
  assert set(begun) == {256} and not grown
