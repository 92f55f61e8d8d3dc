"""The search stops at words, scores what it keeps, and repeats no fault of the
release.

What a slot draws is scripted, so that every candidate is known; scores come
from a real model. `test_search_sampled` samples.
"""

import dataclasses

import jax
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.models import decoder
from opera_jax.rollout import prompt_slots as prompt_slots_lib
from opera_jax.rollout import slots, workers
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.synthesis import filters, search
from opera_jax.text import automaton
from opera_jax.text import tokenizer as tokenizer_lib

PROMPT = structs.Prompt("p", "open_ended", "Tell a story.", "A story.")
OPENING = "The scene is the old mill.\n\nWait,"
# Candidates of each round, as sampled after the trigger: up to the next stop
# word at the head of a sentence, or </think>.
ROUNDS = [
    [" it rains.\n\nBut", " the attribute. Hmm,", " it should be so.\n\nBut",
     " there is a key.\n\nHowever,"],
    [" one.\n</think>", " two.\n\nHmm,", " 3.\n\nWait,", " four.\n</think>"],
    [" end.\n</think>"] * 4,
    [" end.\n</think>"] * 4,
]  # fmt: skip
ANSWER = "\n\nThe end.<|im_end|>"


class ScriptedEngine:
  """Returns given texts instead of sampling, and records its calls.

  It is its own only worker. What it "samples" is scored by a real model in one
  pass over the context and the text.
  """

  num_prompt_slots = 1

  def padded_vocab_size(self):
    return self.tokenizer.vocab_size

  def __init__(self, tokenizer, machine, **script):
    self.tokenizer, (self.params, self.logprob_scorer) = tokenizer, machine
    script = {"opening": OPENING, "rounds": ROUNDS, "answer": ANSWER} | script
    self.script = [[script["opening"]], *script["rounds"]]
    self.answer = [script["answer"]]
    self.calls, self.prefills = [], []

  def check(self, prompts, settings):
    """What is scripted can be sampled."""

  def bucket(self, prompt):
    return 1

  def start_workers(
    self,
    params,
    slots,
    settings,
    stops,
    *,
    contexts,
    extra_prefix_tokens,
    per_prompt_slot,
    with_model_logprob,
  ):
    self.slots_per_prompt, self.stops = slots, stops
    assert per_prompt_slot and with_model_logprob == (slots > 1)
    return workers.Workers([self])

  def prefill(self, contexts):
    for prompt_slot, _, tokens in contexts:
      assert prompt_slot == 0
      self.context = tokens
      self.prefills.append(self.tokenizer.decode(tokens))

  def fork(self, forks):
    self.forks = forks

  def retire(self, prompt_slots):
    """Nothing lies anywhere."""

  def extend_prefix(self, kept):
    for _, slot, tokens in kept:
      np.testing.assert_array_equal(tokens, self.drawn[slot][: len(tokens)])
      self.context = np.concatenate([self.context, tokens])

  def num_live(self):
    return 1

  def decode(self, stop_after):
    context = self.tokenizer.decode(self.context)
    self.calls.append((context, len(self.forks)))
    texts = self.script[min(len(self.calls), len(self.script)) - 1]
    if context.rstrip().endswith(self.tokenizer.think[1]):
      texts = self.answer
    texts = texts[: len(self.forks)]
    self.drawn = [
      self.tokenizer.encode_template(t.removesuffix("~")) for t in texts
    ]
    return [self._piece(slot, text) for slot, text in enumerate(texts)]

  def _piece(self, slot, text):
    tokens = self.drawn[slot]
    whole = [np.concatenate([self.context, tokens])]
    own = self.logprob_scorer.score(self.params, whole).prefix_logprob[0]
    fork = self.forks[slot]
    state, events = np.int32(fork.state), []
    for token in tokens:
      state, event = automaton.step(self.stops, state, np.int32(token))
      events.append(int(event))
    # The automaton stops the thought where the script ends it.
    if not text.endswith("~") and not text.endswith("<|im_end|>"):
      ends = events[-1] or self.stops.end_event[state]
      assert ends and not any(events[:-1]), (text, events)
    else:
      assert not any(events), (text, events)
    return prompt_slots_lib.Piece(
      prompt_slot=0, slot=slot, tokens=tokens,
      logprob=tokens * np.float32(np.nan),
      model_logprob=own[len(self.context) :], live=False,
      ended=0 if text.endswith("~") else slots.STOPPED,
    )  # fmt: skip


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
    batch_size=1,
    prefix_buckets=(192,),
    slot_buckets=(1,),
    continuation_buckets=(32,),
  )
  return params, logprob_scorer


def _run(tokenizer, machine, engine, **settings):
  params, logprob_scorer = machine
  searcher = search.Searcher(engine, logprob_scorer, tokenizer, **settings)
  (trace,) = searcher.run(None, params, [PROMPT], jax.random.key(0))
  return trace


def test_trigger_opens_the_candidate_and_the_lowest_is_kept(tokenizer, machine):
  engine = ScriptedEngine(tokenizer, machine)
  trace = _run(tokenizer, machine, engine)
  assert trace.status == "complete"
  first = trace.rounds[0]
  assert first.trigger == "Wait"
  # The candidate ends before the next stop word.
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
  assert tokenizer.decode(trace.completion) == (
    f"<think>\n{trace.thought}</think>{ANSWER}"
  )


@pytest.mark.parametrize("kind", ["sequence", "candidate"])
def test_perplexity_covers_exactly_what_is_kept(tokenizer, machine, kind):
  params, logprob_scorer = machine
  trace = _run(
    tokenizer, machine, ScriptedEngine(tokenizer, machine), score=kind
  )
  head = tokenizer.encode_template(
    "<|im_start|>user\nTell a story.<|im_end|>\n<|im_start|>assistant\n"
    "<think>\nThe scene is the old mill.\n\n"
  )
  assert trace.rounds[0].candidates
  for candidate in trace.rounds[0].candidates:
    tokens = np.concatenate(
      [
        tokenizer.encode("Wait"),
        tokenizer.encode(candidate.text.removeprefix("Wait")),
      ]
    )
    whole = logprob_scorer.score(params, [np.concatenate([head, tokens])])
    logprob = whole.prefix_logprob[0][1:]
    if kind == "candidate":
      logprob = logprob[-len(tokens) :]
    assert candidate.tokens == len(tokens)
    np.testing.assert_allclose(
      candidate.perplexity, np.exp(-logprob.mean()), rtol=1e-4
    )


def test_after_the_budget_the_thought_continues_without_search(
  tokenizer, machine
):
  rounds = [[" so.\n\nBut"] * 4] * 2 + [[" to the end.\n\nHmm, yes.\n</think>"]]
  engine = ScriptedEngine(tokenizer, machine, rounds=rounds)
  trace = _run(tokenizer, machine, engine, budget=2)
  assert len(trace.rounds) == 2
  assert trace.status == "complete"
  assert trace.thought.endswith("But to the end.\n\nHmm, yes.\n")
  # Two rounds of four, then one sample without stop words, then the answer.
  assert [count for _, count in engine.calls] == [1, 4, 4, 1, 1]
  assert len(engine.prefills) == 1


def test_answer_comes_from_the_original_prompt(tokenizer, machine):
  engine = ScriptedEngine(tokenizer, machine)
  _run(tokenizer, machine, engine, template="Think aloud. {prompt}")
  assert len(engine.prefills) == 2
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
def test_broken_traces_say_why(tokenizer, machine, changes, status):
  trace = _run(
    tokenizer, machine, ScriptedEngine(tokenizer, machine, **changes)
  )
  assert trace.status == status


def test_finished_candidates_are_preferred(tokenizer, machine):
  rounds = [[" on and on~", " stop.<|im_end|>", " fine.\n</think>", " and~"]]
  trace = _run(
    tokenizer, machine, ScriptedEngine(tokenizer, machine, rounds=rounds)
  )
  assert trace.rounds[0].kept == 2
  assert trace.status == "complete"


@pytest.mark.parametrize(
  "changes, limit, thought",
  [
    ({"opening": "It goes on and on~"}, 99, "It goes on and on"),
    ({"opening": "It goes on and on~"}, 4, None),
    ({"opening": "It stops.<|im_end|>"}, 99, "It stops."),
    ({"opening": "<|im_end|>"}, 99, ""),
    ({"rounds": [[" and on~"] * 4]}, 99, f"{OPENING[:-1]} and on"),
    ({"opening": "It goes to its own end.\n</think>"}, 5, None),
  ],
)  # fmt: skip
def test_thoughts_are_closed_by_force(
  tokenizer, machine, changes, limit, thought
):
  engine = ScriptedEngine(tokenizer, machine, **changes)
  trace = _run(
    tokenizer, machine, engine, close_thought=True, max_thought_tokens=limit
  )
  assert (trace.status, trace.forced) == ("complete", True)
  if thought is None:  # the first tokens of what was sampled
    text = changes["opening"].removesuffix("~")
    thought = tokenizer.decode(tokenizer.encode_template(text)[:limit])
  whole = tokenizer.decode(trace.completion)
  assert whole == f"<think>\n{thought}\n</think>\n\n{ANSWER}"
  assert trace.thought == thought + "\n"
  assert trace.answer == "The end."
  # The answer's context was computed anew, from the original prompt.
  assert engine.prefills[1].endswith(f"<think>\n{thought}\n</think>\n\n")


def test_a_thought_that_closes_itself_is_left_alone(tokenizer, machine):
  usual = _run(tokenizer, machine, ScriptedEngine(tokenizer, machine))
  engine = ScriptedEngine(tokenizer, machine)
  trace = _run(tokenizer, machine, engine, close_thought=True)
  assert trace == usual and not trace.forced
  assert len(engine.prefills) == 1


@pytest.mark.parametrize("stop_words", [search.STOP_WORDS, ("\n\n",)])
def test_tags_over_several_tokens(tokenizer, machine, stop_words):
  """Every text ends where it did, by the same words and a tag as a string."""
  strings = tokenizer.configured(think=("<reason>", "</reason>"))
  assert strings.vocab_size == tokenizer.vocab_size
  opening, rounds = OPENING, ROUNDS
  if stop_words == ("\n\n",):
    opening = "The mill.\n\n"
    rounds = [["It rains.\n\n", "But.\n\n", " end.\n</think>", "A\n.\n\n"]]
    rounds += [[" end.\n</think>"] * 4]
  rounds = [[t.replace("think>", "reason>") for t in texts] for texts in rounds]
  engine = ScriptedEngine(strings, machine, opening=opening, rounds=rounds)
  trace = _run(strings, machine, engine, stop_words=stop_words)
  assert trace.status == "complete" and not trace.forced
  whole = strings.decode(trace.completion)
  assert whole == f"<reason>\n{trace.thought}</reason>{ANSWER}"
  assert "reason>" not in trace.thought + trace.answer
  for made in trace.rounds:
    assert made.kept == int(np.argmin([c.perplexity for c in made.candidates]))


def test_a_tag_inside_a_thought_is_seen_by_the_filters(tokenizer, machine):
  strings = tokenizer.configured(think=("<reason>", "</reason>"))
  engine = ScriptedEngine(strings, machine, opening="A <reason> b.\n</reason>")
  trace = _run(strings, machine, engine)
  assert trace.thought == "A <think> b.\n"
  found = filters.reason(trace, filters.Rules(min_reflections=0), ())
  assert found == "think tag in the thought"


def test_a_prompt_that_opens_the_thought(tokenizer, machine, tmp_path):
  opened = _with_head(tokenizer, tmp_path, "<think>\n")
  engine = ScriptedEngine(opened, machine)
  trace = _run(opened, machine, engine)
  usual = _run(tokenizer, machine, ScriptedEngine(tokenizer, machine))
  # The same contexts and so the same search; only the completion is shorter.
  assert engine.prefills[0].count("<think>") == 1
  assert (trace.rounds, trace.thought) == (usual.rounds, usual.thought)
  head = len(tokenizer.thought_head)
  assert trace.completion.tolist() == usual.completion[head:].tolist()


def test_a_prompt_that_closes_the_thought_is_refused(
  tokenizer, machine, tmp_path
):
  closed = _with_head(tokenizer, tmp_path, "<think>\n\n</think>\n\n")
  with pytest.raises(ValueError, match="enable_thinking"):
    _run(closed, machine, ScriptedEngine(closed, machine))


def _with_head(tokenizer, folder, head):
  """The tokenizer with a chat template that begins the completion."""
  text = tokenizer_lib.CHAT_TEMPLATE.replace(
    "'<|im_start|>assistant\\n'",
    repr("<|im_start|>assistant\n" + head).replace("\n", "\\n"),
  )
  file = folder / "template.jinja"
  file.write_text(text)
  return tokenizer.configured(chat_template=str(file))


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"score": "cheap"}, "score must be one of"),
    ({"candidates": 0}, "at least 1"),
    ({"budget": -1}, "at least 0"),
    ({"stop_words": ("Wait", "\n\n")}, "not both"),
    ({"stop_words": ()}, "at least one"),
    ({"stop_words": ("Wait ",)}, "no white space at its ends"),
    ({"template": "no placeholder"}, "exactly once"),
  ],
)
def test_bad_settings_are_refused(tokenizer, machine, settings, message):
  with pytest.raises(ValueError, match=message):
    _run(tokenizer, machine, ScriptedEngine(tokenizer, machine), **settings)


def test_traces_are_plain_records(tokenizer, machine):
  trace = _run(tokenizer, machine, ScriptedEngine(tokenizer, machine))
  assert dataclasses.asdict(trace)["rounds"][0]["trigger"] == "Wait"


def test_separators_stop_at_every_step(tokenizer, machine):
  """No word is needed, what follows may be one, and a step ends exactly."""
  opening = "The mill.\n\n"
  rounds = [
    ["It rains.\n\n", "But why.\n\n", "So.\n\n", "A key\n.\n\n"],
    [" end.\n</think>"] * 4,
  ]
  engine = ScriptedEngine(tokenizer, machine, opening=opening, rounds=rounds)
  trace = _run(tokenizer, machine, engine, stop_words=("\n\n",))
  assert [c.text for c in trace.rounds[0].candidates] == rounds[0]
  assert {r.trigger for r in trace.rounds} == {""}
  kept = rounds[0][trace.rounds[0].kept]
  assert trace.thought == f"{opening}{kept} end.\n"
  assert trace.status == "complete"


def test_a_judge_chooses_in_place_of_the_score(tokenizer, machine):
  asked = []

  def last(prompt, thought, candidates):
    asked.append((prompt, thought, list(candidates)))
    return np.int64(len(candidates) - 1)

  rounds = [[" on and on~", " it.\n\nBut", " so.\n\nBut", " and~"], *ROUNDS[2:]]
  engine = ScriptedEngine(tokenizer, machine, rounds=rounds)
  trace = _run(tokenizer, machine, engine, choose=last)
  # Unfinished candidates are not offered.
  assert asked[0] == (
    "Tell a story.",
    "The scene is the old mill.\n\n",
    ["Wait it.\n\n", "Wait so.\n\n"],
  )
  assert [r.kept for r in trace.rounds] == [2, 3]
  usual = _run(
    tokenizer, machine, ScriptedEngine(tokenizer, machine, rounds=rounds)
  )
  assert usual.rounds[0].candidates == trace.rounds[0].candidates


@pytest.mark.parametrize("choice", [4, -1, True, None, "1", 0.0])
def test_an_invalid_choice_is_refused(tokenizer, machine, choice):
  with pytest.raises(ValueError, match="among 4 candidates of prompt 'p'"):
    _run(
      tokenizer,
      machine,
      ScriptedEngine(tokenizer, machine),
      choose=lambda *_: choice,
    )
