"""The reward equals its slow definition: one forward pass per prefix."""

import dataclasses

import jax
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.data import storyworld
from opera_jax.models import decoder
from opera_jax.rl import score
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.sharding import compile_log
from opera_jax.text import thought
from opera_jax.text import tokenizer as tokenizer_lib

# Groups of completions: ragged, truncated, silent, tied, with keywords inside
# words, over token boundaries and doubled. "|" marks where tokens are cut.
GROUPS = [
  [
    "<think>\nThe story is about Mira.\n\nWait, the scene is the old mill."
    "\n\nBut there must be a brass key.\n</think>\n\nMira came.<|im_end|>",
    "<think>\nHmm, I wonder.\n\nHowever, at the end they walk on alone.\n"
    "</think>\n\nIn the end they walk on alone.<|im_end|>",
    "<think>\nThe attribute is a button. Await it.\n</think>\n\nSo.<|im_end|>",
    "<think>\nWait, this thought is cut off.\n\nBut it goes on and",
  ],
  [
    "<think>\nW|ait, split ov|er tokens.\n\n\n\nh|m|m again\n\n</think>\n\n"
    "One.<|im_end|>",
    "<think>\nNo thought reflects here.\n\nNone at all.\n</think>\n\nOne."
    "<|im_end|>",
    # Twice the same completion: a tie in the group.
    "<think>\nLet me think. There will be a red lantern.\n\nBut but but."
    "\n</think>\n\nTwo.<|im_end|>",
    "<think>\nLet me think. There will be a red lantern.\n\nBut but but."
    "\n</think>\n\nTwo.<|im_end|>",
  ],
  [
    "no thought at all<|im_end|>",
    "</think>\n\n<think>\n\nBut opened after it closed.\n\n</think><|im_end|>",
    "<think>\n</think>\n\n<|im_end|>",
    "<think>\nWait.\n\nWait.\n\nWait.\n</think>\n\nThree<|im_end|>",
  ],
]


@pytest.fixture(scope="module")
def world(one_device):
  corpus = storyworld.corpus(200, 0)
  words = tokenizer_lib.Tokenizer.train_bpe(
    [t for d in corpus for t in (d.prompt, d.thought, d.answer)], 420
  )
  config = decoder.Config(
    vocab_size=words.vocab_size,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    rope_theta=10_000.0,
  )
  graphdef, params = decoder.create(config, 0)
  params = jax.tree.map(lambda x: x * 2.0, params)
  logprob_scorer = scorer_lib.LogprobScorer(
    graphdef,
    vocab_size=config.vocab_size,
    mesh=one_device,
    batch_size=4,
    prefix_buckets=(96, 192),
    slot_buckets=(2, 8),
    continuation_buckets=(64,),
  )
  return words, graphdef, params, logprob_scorer


def _tokens(words, text):
  parts = [words.encode_template(part) for part in text.split("|")]
  if "<|im_end|>" in text:
    parts = [words.encode_template(text.replace("<|im_end|>", "\0"))]
    head = [p for p in text.removesuffix("<|im_end|>").split("|") if p]
    parts = [words.encode_template(p) for p in head]
    parts.append(np.asarray([words.end_id]))
  return np.concatenate(parts).astype(np.int32)


def _definition(world, prompt_ids, groups, references, bridge, match):
  """R_self, R_ppl and counts by separate forward passes and plain loops."""
  words, graphdef, params, _ = world
  from flax import nnx

  from opera_jax.models import attention

  @jax.jit
  def hidden(tokens_1T):
    model = nnx.merge(graphdef, params)
    T = tokens_1T.shape[1]
    out, _ = model(
      tokens_1T,
      np.arange(T)[None],
      attention.causal(np.ones((1, T), np.int32)),
    )
    head, _ = model.head_matrix()
    return jax.nn.log_softmax(out[0] @ head.T)

  def mean_logprob(context, target):
    row = np.concatenate([context, target])
    # Causal: what stands after the row cannot change it.
    padded = np.pad(row, (0, 256 - len(row)))
    table = np.asarray(hidden(padded[None]))
    places = np.arange(len(context), len(row))
    return table[places - 1, row[places]].mean()

  bridge_ids = words.encode_template(bridge)
  count_BN, self_BN, rank_BN = [], [], []
  for prompt, group, reference in zip(prompt_ids, groups, references):
    counts, scores = [], []
    for tokens in group:
      steps = thought.define(
        tokens,
        words.vocab_bytes,
        words.think_open,
        words.think_close,
        match=match,
      )
      count = 0
      before = next(
        (
          n
          for n in range(len(tokens) + 1)
          if words.think[0] in words.decode(tokens[:n])
        ),
        0,
      )
      for step in steps:
        logprobs = [
          mean_logprob(
            np.concatenate([prompt, tokens[:end], bridge_ids]), reference
          )
          for end in (before, step.end)
        ]
        if step.reflective and logprobs[1] > logprobs[0]:
          count += 1
        before = step.end
      counts.append(count)
      scores.append(mean_logprob(np.concatenate([prompt, tokens]), reference))
    count_BN.append(counts)
    self_BN.append([np.tanh(c / 2) for c in counts])
    rank_BN.append(
      [sum(o < s for o in scores) / (len(scores) - 1) for s in scores]
    )
  return np.array(count_BN), np.array(self_BN), np.array(rank_BN)


@pytest.mark.parametrize("tag", ["think", "reason"])
@pytest.mark.parametrize(
  "bridge, match", [("", "word"), ("\n</think>\n\n", "substring")]
)
def test_reward_equals_the_slow_definition(world, bridge, match, tag):
  """The tags are tokens, or strings over several tokens."""
  words, graphdef, params, logprob_scorer = world
  words = words.configured(think=(f"<{tag}>", f"</{tag}>"))
  assert (words.think_open_id is None) == (tag == "reason")
  world = words, graphdef, params, logprob_scorer
  bridge = bridge.replace("think", tag)
  tasks = storyworld.prompts(len(GROUPS), 3)
  prompt_ids = [words.chat_prompt(t.prompt) for t in tasks]
  groups = [
    [_tokens(words, text.replace("think>", f"{tag}>")) for text in group]
    for group in GROUPS
  ]
  samples = [
    [
      structs.Sample(t, np.zeros(len(t), np.float32), t[-1] == words.end_id)
      for t in group
    ]
    for group in groups
  ]
  scorer = score.RewardScorer(logprob_scorer, words, bridge=bridge, match=match)
  got = scorer.score(params, tasks, prompt_ids, samples)
  references = [words.encode(t.reference) for t in tasks]
  count, r_self, r_ppl = _definition(
    world, prompt_ids, groups, references, bridge, match
  )
  np.testing.assert_array_equal(got.terms["count"], count)
  np.testing.assert_allclose(got.terms["r_self"], r_self, atol=1e-5)
  np.testing.assert_allclose(got.terms["r_ppl"], r_ppl, atol=1e-5)
  np.testing.assert_allclose(
    got.total_BN, 0.3 * r_ppl + 0.7 * r_self, atol=1e-5
  )
  # Scored: less than one row for each prefix of every step would cost.
  scored = got.logprobs.prefix_tokens + got.logprobs.continuation_tokens
  steps = int(got.thoughts.count.sum()) + int((got.thoughts.count > 0).sum())
  assert got.separate_tokens > steps * len(references[0])
  assert scored < got.separate_tokens
  # The cases are what they are meant to be.
  assert count.max() >= 1
  assert r_ppl[1, 2] == r_ppl[1, 3]
  assert not got.terms["closed"][0, 3]
  assert count[0, 3] == 0
  assert (
    got.terms["reflections"][0, 2] == (2 if match == "substring" else 0) / 2
  )


def test_a_thought_that_the_prompt_opened_is_rewarded_alike(world, tmp_path):
  """The same tokens; only where the prompt ends is another place."""
  words, _, params, logprob_scorer = world
  file = tmp_path / "opens.jinja"
  file.write_text(
    tokenizer_lib.CHAT_TEMPLATE.replace(
      "assistant\\n'", "assistant\\n<think>\\n'"
    )
  )
  opens = words.configured(chat_template=str(file))
  assert opens.opens_thought and not words.opens_thought
  head = len(words.thought_head)
  tasks = storyworld.prompts(2, 3)
  groups = [[_tokens(words, text) for text in group] for group in GROUPS[:2]]
  scored = []
  for made, cut in ((words, 0), (opens, head)):
    prompt_ids = [made.chat_prompt(t.prompt) for t in tasks]
    samples = [
      [
        structs.Sample(
          t[cut:], np.zeros(len(t) - cut, np.float32), t[-1] == words.end_id
        )
        for t in group
      ]
      for group in groups
    ]
    scorer = score.RewardScorer(
      logprob_scorer, made, terms="opera + verifiable + 0.5*format"
    )
    scored.append(scorer.score(params, tasks, prompt_ids, samples))
  usual, opened = scored
  assert usual.rollouts.texts == opened.rollouts.texts
  assert (
    usual.terms.keys() == opened.terms.keys() and usual.terms["count"].any()
  )
  for name, value in usual.terms.items():
    if name == "thought_tokens":  # the newline behind the tag is not sampled
      value = value - (head - 1) * usual.terms["closed"]
    np.testing.assert_allclose(
      opened.terms[name], value, atol=1e-6, err_msg=name
    )
  for one, two in zip(usual.prefixes, opened.prefixes):
    np.testing.assert_array_equal(one, two)
  np.testing.assert_array_equal(
    usual.thoughts.step_end[usual.thoughts.closed]
    - head * (usual.thoughts.step_end > 0)[usual.thoughts.closed],
    opened.thoughts.step_end[usual.thoughts.closed],
  )


def test_maths_rows_get_zero_or_one(world):
  words, _, params, logprob_scorer = world
  tasks = [
    structs.Prompt("m", "math", "What is 2 + 2?", "4"),
    *storyworld.prompts(1, 3),
  ]
  texts = [
    "<think>\nWait, 5.\n</think>\n\nThe answer is 4.<|im_end|>",
    "<think>\nWait, 4.\n</think>\n\nThe answer is 5.<|im_end|>",
  ]
  samples = [
    [
      structs.Sample(t, np.zeros(len(t), np.float32), True)
      for t in (_tokens(words, text) for text in texts)
    ]
    for _ in tasks
  ]
  ids = [words.chat_prompt(t.prompt) for t in tasks]
  got = score.RewardScorer(logprob_scorer, words).score(
    params, tasks, ids, samples
  )
  np.testing.assert_array_equal(got.total_BN[0], [1, 0])
  for part in ("r_self", "r_ppl", "count"):
    np.testing.assert_array_equal(got.terms[part][0], [0, 0])
  np.testing.assert_array_equal(got.terms["correct"], [[1, 0], [0, 0]])


def test_prompts_are_paid_by_the_sum_of_their_task_or_set(world):
  """Terms are computed once and equal those of one sum; totals differ."""
  words, _, params, logprob_scorer = world
  tasks = [
    structs.Prompt("m", "math", "What is 2 + 2?", "4"),
    *storyworld.prompts(2, 3),
  ]
  tasks[2] = dataclasses.replace(tasks[2], set="tales")
  texts = [
    "<think>\nWait, 5.\n</think>\n\nThe answer is 4.<|im_end|>",
    "<think>\nWait, 4.\n</think>\n\nIt is 5.<|im_end|>",
  ]
  samples = [
    [
      structs.Sample(t, np.zeros(len(t), np.float32), True)
      for t in (_tokens(words, text) for text in texts)
    ]
    for _ in tasks
  ]
  ids = [words.chat_prompt(t.prompt) for t in tasks]
  plain = score.RewardScorer(
    logprob_scorer, words, terms="opera + verifiable + entropy"
  ).score(params, tasks, ids, samples)
  by_task = {"math": "3*verifiable + 0.5*entropy", "tales": "-2*entropy"}
  got = score.RewardScorer(
    logprob_scorer, words, terms="opera", by_task=by_task
  ).score(params, tasks, ids, samples)
  assert set(got.terms) == set(plain.terms)
  for name, value in plain.terms.items():
    np.testing.assert_array_equal(got.terms[name], value)
  terms = plain.terms
  want = [
    3 * terms["verifiable"][0] + 0.5 * terms["entropy"][0],
    terms["opera"][1],
    -2 * terms["entropy"][2],
  ]
  np.testing.assert_allclose(got.total_BN, want, rtol=1e-6)
  # The weights follow their prompts into another batch.
  joined = score.join([(got, [2]), (dataclasses.replace(got), [0, 1])])
  for name, weight in got.weights.items():
    np.testing.assert_array_equal(joined.weights[name], weight[[2, 0, 1]])


def test_empty_reference_and_single_sample_are_refused(world):
  words, _, params, logprob_scorer = world
  scorer = score.RewardScorer(logprob_scorer, words)
  task = structs.Prompt("a", "open_ended", "Tell.", "")
  sample = structs.Sample(
    _tokens(words, GROUPS[0][0]), np.zeros(3, np.float32), True
  )
  ids = [words.chat_prompt("Tell.")]
  with pytest.raises(ValueError, match="no tokens"):
    scorer.score(params, [task], ids, [[sample, sample]])
  task = structs.Prompt("a", "open_ended", "Tell.", "A story.")
  with pytest.raises(ValueError, match="config.rl.samples"):
    scorer.score(params, [task], ids, [[sample]])


def test_steps_are_found_by_one_program_whatever_the_number_of_samples(world):
  words, _, _, logprob_scorer = world
  scorer = score.RewardScorer(logprob_scorer, words)
  texts = [text for group in GROUPS for text in group]
  own = [
    structs.Sample(t, np.zeros(len(t), np.float32), True)
    for t in (_tokens(words, text) for text in texts)
  ]
  spans = compile_log.spans()
  before = len(spans)
  each = [scorer.thoughts([sample]) for sample in own]
  assert compile_log.programs(spans[before:]) <= 1
  before = len(spans)
  # 144 of them are more than one block holds.
  found, total_R = scorer.thoughts(own * 12)
  assert compile_log.programs(spans[before:]) == 0
  assert len(total_R) == len(found.count) == 12 * len(own)
  for index in range(12 * len(own)):
    one, total = each[index % len(own)]
    assert total_R[index] == total[0]
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(one)):
      np.testing.assert_array_equal(got[index], want[0])
  assert {int(n) for n in total_R} > {0, 2}
