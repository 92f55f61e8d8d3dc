"""REER keeps a replacement only if the reference becomes more likely.

What is drawn is scripted, so that every rewrite is known; scores come from a
real model, and are computed here once more by the definition.
"""

import jax
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.models import decoder
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.synthesis import rewrite

PROMPT = structs.Prompt("p", "open_ended", "Tell a story.", "The key was old.")
DRAFT = "The scene is the old mill.\n\nWait, it rains.\n\nSo be it.\n</think>"
REWRITES = [
  "There is a key.\n\n",
  "But the key was old.\n\n",
  "So it ends.\n</think>",
  "and on and on~",
]
ANSWER = "\n\nThe end.<|im_end|>"
HEAD = "<|im_start|>user\nTell a story.<|im_end|>\n<|im_start|>assistant\n"


class ScriptedEngine:
  """Hands out given texts instead of sampling; remembers what it was asked."""

  def __init__(self, tokenizer, draft=DRAFT, rewrites=REWRITES, answer=ANSWER):
    self.tokenizer, self.calls = tokenizer, []
    self.draft, self.rewrites, self.answer = draft, rewrites, answer

  def padded_vocab_size(self):
    return self.tokenizer.vocab_size

  def check(self, prompts, settings):
    self.checked = max(map(len, prompts))

  def sample(
    self, params, prompts, settings, key, *, samples, ids, stops, advance
  ):
    out = []
    for prompt in prompts:
      context = self.tokenizer.decode(prompt)
      self.calls.append((context, samples))
      if context.endswith(self.tokenizer.think[1]):
        texts = [self.answer]
      elif samples == 1:
        texts = [self.draft]
      else:
        texts = self.rewrites
      assert len(texts) == samples
      out.append([self._sample(text) for text in texts])
    return out

  def _sample(self, text):
    tokens = self.tokenizer.encode_template(text.removesuffix("~"))
    none = np.zeros(len(tokens), np.float32)
    return structs.Sample(tokens, none, not text.endswith("~"))


@pytest.fixture(scope="module")
def machine(tokenizer, one_device):
  config = decoder.Config(
    vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, intermediate_size=48,
  )  # fmt: skip
  graphdef, params = decoder.create(config, 1)
  params = jax.tree.map(lambda x: x * 3.0, params)
  logprob_scorer = scorer_lib.LogprobScorer(
    graphdef,
    vocab_size=config.vocab_size,
    mesh=one_device,
    batch_size=4,
    prefix_buckets=(192,),
    slot_buckets=(1,),
    continuation_buckets=(32,),
  )
  return params, logprob_scorer


def _run(tokenizer, machine, engine, prompt=PROMPT, **settings):
  params, logprob_scorer = machine
  rewriter = rewrite.Rewriter(engine, logprob_scorer, tokenizer, **settings)
  (trace,) = rewriter.run(None, params, [prompt], jax.random.key(0))
  return trace


def _perplexity(tokenizer, machine, thought):
  """PPL(y_ref | x, z) in one row, by the definition."""
  params, logprob_scorer = machine
  row = tokenizer.encode_template(f"{HEAD}<think>\n{thought}</think>")
  reference = tokenizer.encode(PROMPT.reference)
  row = np.concatenate([row, tokenizer.encode("\n\n"), reference])
  scored = logprob_scorer.score(params, [row]).prefix_logprob[0][
    -len(reference) :
  ]
  return float(np.exp(-scored.mean()))


def test_every_step_is_replayed_by_the_definition(tokenizer, machine):
  trace = _run(tokenizer, machine, ScriptedEngine(tokenizer), rounds=3)
  assert trace.status == "complete"
  steps = [
    "The scene is the old mill.\n\n",
    "Wait, it rains.\n\n",
    "So be it.\n",
  ]
  number, gains = 0, 0
  for _ in range(3):
    before = gains
    for place in range(len(steps)):
      made = trace.rounds[number]
      number += 1
      # Unfinished replacements are not tried. The others end with the
      # separator, the last step of the thought with a line break.
      end = "\n" if place == 2 else "\n\n"
      drawn = [text.partition("\n")[0] + end for text in REWRITES[:3]]
      tried = [steps[place], *drawn]
      assert [c.text for c in made.candidates] == tried
      expected = [
        _perplexity(
          tokenizer,
          machine,
          "".join([*steps[:place], text, *steps[place + 1 :]]),
        )
        for text in tried
      ]
      found = [c.perplexity for c in made.candidates]
      np.testing.assert_allclose(found, expected, rtol=1e-4)
      assert made.kept == int(np.argmin(found))
      gains += made.kept > 0
      steps[place] = tried[made.kept]
    if gains == before:
      break
  assert gains and number == len(trace.rounds)
  assert trace.thought == "".join(steps)
  assert trace.answer == "The end."
  assert tokenizer.decode(trace.completion) == (
    f"<think>\n{trace.thought}</think>{ANSWER}"
  )


def test_it_stops_after_a_round_without_improvement(tokenizer, machine):
  same = ["The scene is the old mill.\n\n"] * 4
  engine = ScriptedEngine(tokenizer, draft=same[0] + "</think>", rewrites=same)
  trace = _run(tokenizer, machine, engine)
  # On a tie the current step is kept.
  assert [made.kept for made in trace.rounds] == [0]
  assert [samples for _, samples in engine.calls] == [1, 4, 1]


def test_only_the_rewriter_sees_the_reference(tokenizer, machine):
  engine = ScriptedEngine(tokenizer)
  _run(
    tokenizer, machine, engine, rounds=1,
    template="Aloud: {prompt}", guide="{prompt} Known: {reference}",
  )  # fmt: skip
  (draft, _), *steps, (answer, _) = engine.calls
  assert "Aloud: Tell" in draft and "Known" not in draft
  assert steps and all("Known: The key was old." in c for c, _ in steps)
  # Each step is sampled after the current versions of the steps before it.
  assert steps[0][0].endswith("<think>\n")
  assert answer.startswith(f"{HEAD}<think>\n")


def test_a_replacement_that_makes_the_thought_too_long_is_rejected(
  tokenizer, machine
):
  engine = ScriptedEngine(tokenizer, draft="So.\n\nYes.\n</think>")
  size = len(tokenizer.encode("So.\n\nYes.\n"))
  trace = _run(tokenizer, machine, engine, max_thought_tokens=size)
  assert [len(made.candidates) for made in trace.rounds][0] == 1
  assert trace.thought == "So.\n\nYes.\n"
  head = len(tokenizer.encode_template(f"{HEAD}<think>\n"))
  assert engine.checked > head + size  # room for guide and thought


@pytest.mark.parametrize(
  "changes, status",
  [
    ({"draft": "On and on~"}, "thought too long"),
    ({"draft": "It stops.<|im_end|>"}, "turn ended inside the thought"),
    ({"draft": "</think>"}, "thought missing"),
    ({"answer": "\n\nThe answer goes on~"}, "answer too long"),
  ],
)
def test_broken_traces_say_why(tokenizer, machine, changes, status):
  trace = _run(
    tokenizer, machine, ScriptedEngine(tokenizer, **changes), rounds=1
  )
  assert trace.status == status


def test_bad_settings(tokenizer, machine):
  bare = structs.Prompt("q", "open_ended", "Tell.", "")
  with pytest.raises(ValueError, match="'q' has no reference.*method=search"):
    _run(tokenizer, machine, ScriptedEngine(tokenizer), prompt=bare)
  with pytest.raises(ValueError, match="candidates=0"):
    _run(tokenizer, machine, ScriptedEngine(tokenizer), candidates=0)
  with pytest.raises(ValueError, match="config.synthesis.guide"):
    _run(tokenizer, machine, ScriptedEngine(tokenizer), guide="{reference}")


@pytest.mark.parametrize(
  "draft, kept",
  [("It goes on.\n\nAnd on~", "And on"), ("It.\n\nEnds.<|im_end|>", "Ends.")],
)
def test_drafts_are_closed_by_force(tokenizer, machine, draft, kept):
  engine = ScriptedEngine(tokenizer, draft=draft, rewrites=["and~"] * 4)
  trace = _run(tokenizer, machine, engine, rounds=1, close_thought=True)
  assert (trace.status, trace.forced) == ("complete", True)
  thought = draft.partition("\n")[0] + "\n\n" + kept
  assert trace.thought == thought
  whole = tokenizer.decode(trace.completion)
  assert whole == f"<think>\n{thought}</think>{ANSWER}"
  usual = _run(tokenizer, machine, ScriptedEngine(tokenizer, draft=draft))
  assert usual.status != "complete" and not usual.forced


def test_tags_over_several_tokens(tokenizer, machine):
  strings = tokenizer.configured(think=("<reason>", "</reason>"))
  engine = ScriptedEngine(
    strings,
    draft=DRAFT.replace("think", "reason"),
    rewrites=[t.replace("think", "reason") for t in REWRITES],
  )
  trace = _run(strings, machine, engine, rounds=2)
  assert trace.status == "complete"
  assert "reason>" not in trace.thought + trace.answer
  whole = strings.decode(trace.completion)
  assert whole == f"<reason>\n{trace.thought}</reason>{ANSWER}"
  for made in trace.rounds:
    for candidate in made.candidates:
      assert "reason>" not in candidate.text
