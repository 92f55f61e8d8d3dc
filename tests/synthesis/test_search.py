"""The search brakes, prices what it keeps, and repeats no fault of the release.

The sampler is scripted here, so that every candidate is known; the prices come
from a real model.
"""

import dataclasses

import jax
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.data import storyworld
from opera_jax.models import qwen3
from opera_jax.scoring import price
from opera_jax.synthesis import search
from opera_jax.text import tokenizer as tokenizer_lib

PROMPT = structs.Prompt("p", "open_ended", "Tell a story.", "A story.")
OPENING = "The scene is the old mill.\n\nWait,"
# Candidates of each round, as sampled after the trigger: up to the next brake
# at the head of a sentence, or </think>.
ROUNDS = [
    [" it rains.\n\nBut", " the attribute. Hmm,", " it should be so.\n\nBut",
     " there is a key.\n\nHowever,"],
    [" one.\n</think>", " two.\n\nHmm,", " 3.\n\nWait,", " four.\n</think>"],
    [" end.\n</think>"] * 4,
    [" end.\n</think>"] * 4,
]  # fmt: skip
ANSWER = "\n\nThe end.<|im_end|>"


@pytest.fixture(scope="module")
def words():
  made = storyworld.corpus(200, 0)
  return tokenizer_lib.Tokenizer.train_bpe(
    [t for d in made for t in (d.prompt, d.thought, d.answer)], 420
  )


class ScriptedEngine:
  """Hands out given texts instead of sampling; remembers what it was asked."""

  def __init__(self, words, opening=OPENING, rounds=ROUNDS, answer=ANSWER):
    self.words, self.calls = words, []
    self.script = [[opening], *rounds, [answer]]
    self.answer = [answer]

  def sample(
    self, params, prompts, settings, key, *, samples=1, ids, stops=None,
    advance=None,
  ):  # fmt: skip
    if not prompts:
      return []
    context = self.words.decode(prompts[0])
    self.calls.append((context, samples, stops is not None))
    if context.endswith("</think>"):
      texts = self.answer
    else:
      texts = self.script[len(self.calls) - 1][:samples]
    return [[self._sample(text) for text in texts] for _ in prompts]

  def _sample(self, text):
    finished = not text.endswith("~")
    tokens = self.words.encode_template(text.removesuffix("~"))
    return structs.Sample(tokens, np.zeros(len(tokens), np.float32), finished)


@pytest.fixture(scope="module")
def machine(words, one_device):
  config = qwen3.Config(
    vocab_size=words.vocab_size, hidden=32, layers=1, heads=2, kv_heads=1,
    head_dim=16, intermediate=48,
  )  # fmt: skip
  graphdef, params = qwen3.create(config, 1)
  params = jax.tree.map(lambda x: x * 3.0, params)
  pricer = price.Pricer(
    graphdef,
    vocab_size=config.vocab_size,
    mesh=one_device,
    rows=2,
    length_buckets=(192,),
    slot_buckets=(4,),
    branch_buckets=(32,),
  )
  return params, pricer


def _run(words, machine, engine, **settings):
  params, pricer = machine
  searcher = search.Searcher(engine, pricer, words, **settings)
  (trace,) = searcher.run(None, params, [PROMPT], jax.random.key(0))
  return trace


def test_trigger_opens_the_candidate_and_the_lowest_is_kept(words, machine):
  engine = ScriptedEngine(words)
  trace = _run(words, machine, engine)
  assert trace.status == "complete"
  first = trace.rounds[0]
  assert first.trigger == "Wait"
  # What follows the next brake is not part of the candidate, nor is the brake.
  assert [c.text for c in first.candidates] == [
    "Wait it rains.\n\n", "Wait the attribute. ", "Wait it should be so.\n\n",
    "Wait there is a key.\n\n",
  ]  # fmt: skip
  for made in trace.rounds:
    assert made.kept == int(np.argmin([c.perplexity for c in made.candidates]))
    assert made.candidates[made.kept].text in trace.thought + "</think>"
  kept = "".join(r.candidates[r.kept].text for r in trace.rounds)
  opening = "The scene is the old mill.\n\n"
  assert trace.thought + "</think>" == opening + kept
  assert words.decode(trace.completion) == (
    f"<think>\n{trace.thought}</think>{ANSWER}"
  )


@pytest.mark.parametrize("kind", ["sequence", "candidate"])
def test_perplexity_covers_exactly_what_is_kept(words, machine, kind):
  params, pricer = machine
  trace = _run(words, machine, ScriptedEngine(words), price=kind)
  head = words.encode_template(
    "<|im_start|>user\nTell a story.<|im_end|>\n<|im_start|>assistant\n"
    "<think>\nThe scene is the old mill.\n\n"
  )
  assert trace.rounds[0].candidates
  for candidate in trace.rounds[0].candidates:
    tokens = np.concatenate(
      [words.encode("Wait"), words.encode(candidate.text.removeprefix("Wait"))]
    )
    whole = pricer.price(params, [np.concatenate([head, tokens])])
    logprob = whole.trunk_logprob[0][1:]
    if kind == "candidate":
      logprob = logprob[-len(tokens) :]
    assert candidate.tokens == len(tokens)
    np.testing.assert_allclose(
      candidate.perplexity, np.exp(-logprob.mean()), rtol=1e-4
    )


def test_budget_binds_and_the_thought_runs_on(words, machine):
  rounds = [[" so.\n\nBut"] * 4] * 2 + [[" to the end.\n\nHmm, yes.\n</think>"]]
  engine = ScriptedEngine(words, rounds=rounds)
  trace = _run(words, machine, engine, budget=2)
  assert len(trace.rounds) == 2
  assert trace.status == "complete"
  assert trace.thought.endswith("But to the end.\n\nHmm, yes.\n")
  # Two rounds of four, then one sample without brakes, then the answer.
  assert [(n, stops) for _, n, stops in engine.calls] == [
    (1, True), (4, True), (4, True), (1, False), (1, False),
  ]  # fmt: skip


def test_answer_comes_from_the_original_prompt(words, machine):
  engine = ScriptedEngine(words)
  _run(words, machine, engine, template="Think aloud. {prompt}")
  assert "Think aloud. Tell a story." in engine.calls[0][0]
  assert "Think aloud" not in engine.calls[-1][0]
  assert "user\nTell a story.<|im_end|>" in engine.calls[-1][0]


@pytest.mark.parametrize(
  "changes, status",
  [
    ({"opening": "It goes on and on~"}, "thought too long"),
    ({"opening": "It stops.<|im_end|>"}, "turn ended inside the thought"),
    ({"opening": "No reflection.\n</think>"}, "complete"),
    ({"rounds": [[" and on~"] * 4]}, "thought too long"),
    ({"answer": "\n\nThe answer goes on~"}, "answer too long"),
  ],
)
def test_broken_traces_say_why(words, machine, changes, status):
  trace = _run(words, machine, ScriptedEngine(words, **changes))
  assert trace.status == status


def test_whole_candidates_go_before_broken_ones(words, machine):
  rounds = [[" on and on~", " stop.<|im_end|>", " fine.\n</think>", " and~"]]
  trace = _run(words, machine, ScriptedEngine(words, rounds=rounds))
  assert trace.rounds[0].kept == 2
  assert trace.status == "complete"


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"price": "cheap"}, "price must be one of"),
    ({"candidates": 0}, "at least 1"),
    ({"template": "no placeholder"}, "exactly once"),
  ],
)
def test_bad_settings_are_refused(words, machine, settings, message):
  with pytest.raises(ValueError, match=message):
    _run(words, machine, ScriptedEngine(words), **settings)


def test_traces_are_plain_records(words, machine):
  trace = _run(words, machine, ScriptedEngine(words))
  assert dataclasses.asdict(trace)["rounds"][0]["trigger"] == "Wait"
