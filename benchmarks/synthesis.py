"""Guided search: ours against the naive loop, same model, same traces.

  python -m benchmarks.synthesis

  naive  one prompt at a time; every stretch is a new prefill of all before it
         and a decode of one sample; every candidate is scored by a pass of
         its own over prompt, thought and candidate
  ours   `synthesis.search`: all prompts in flight, one prefill a prompt,
         candidates fork from the row's prefix, scores come from the sampling

The model is first trained for a minute, so that thoughts have the reflective
words and lengths of its data. Both are given the same random keys, and their
traces must be equal token by token.
"""

import dataclasses

import jax
import numpy as np

from benchmarks import harness
from opera_jax import structs
from opera_jax.data import sft, storyworld, traces
from opera_jax.models import decoder
from opera_jax.rollout import engine as engine_lib
from opera_jax.rollout import prompt_slots as prompt_slots_lib
from opera_jax.rollout import sampling
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.scoring import packed_rows
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.synthesis import search as search_lib
from opera_jax.synthesis import stop_words as stop_words_lib
from opera_jax.text import tokenizer as tokenizer_lib
from opera_jax.train import optimizer as optimizer_lib
from opera_jax.train import state as train_state
from opera_jax.train import step as step_lib

PROMPTS = 64
ALONE = 8  # of them, in the naive loop, which takes one after the other
REPEATS = 5
TRAINING = 100  # updates of 8 rows of 256 tokens


@dataclasses.dataclass(frozen=True)
class Settings:
  """Of a search, ours or naive; see `search.Searcher`."""

  stop_words: tuple[str, ...] = stop_words_lib.WORDS
  candidates: int = 4
  budget: int = 20
  score: str = "sequence"
  temperature: float = 0.6
  top_k: int = 20
  top_p: float = 0.95
  max_step_tokens: int = 96
  max_thought_tokens: int = 256
  max_answer_tokens: int = 96
  template: str = "{prompt}"


def train(tokenizer, config, mesh, *, steps, batch_size, row_length):
  """A storyteller: (graphdef, params) of a model that thinks and answers."""
  graphdef, params = decoder.create(config, 0)
  pairs = []
  for made in storyworld.corpus(4 * steps * batch_size, 1):
    text = f"<think>\n{made.thought}\n</think>\n\n{made.answer}<|im_end|>"
    pairs.append(
      (tokenizer.chat_prompt(made.prompt), tokenizer.encode_template(text))
    )
  data = sft.build(
    pairs, row_length=row_length, batch_size=batch_size, epochs=1, seed=0,
    pad_id=tokenizer.pad_id, packed=True,
  )  # fmt: skip
  adamw = optimizer_lib.adamw(3e-3)
  update = step_lib.make_sft_update(packed_rows.logprob_fn(graphdef), adamw)
  state = train_state.create(params, adamw, jax.random.key(0))
  with jax.set_mesh(mesh):
    for index in range(min(steps, len(data))):
      state, _ = update(state, data[index])
  return graphdef, jax.block_until_ready(state.params)


def naive(
  engine: engine_lib.Engine,
  logprob_scorer: scorer_lib.LogprobScorer,
  tokenizer: tokenizer_lib.Tokenizer,
  params,
  prompt: structs.Prompt,
  key: jax.Array,
  settings: Settings,
) -> tuple[traces.Trace, int]:
  """One trace with nothing shared, and the tokens that were sampled."""
  stop_words = stop_words_lib.StopWords(settings.stop_words, tokenizer)
  draw = sampling.Sampling(
    max_new_tokens=max(settings.max_step_tokens, settings.max_answer_tokens),
    stop_ids=(tokenizer.end_id,),
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
  )
  # One prompt slot has one worker, which has no thread to end.
  workers = engine.start_workers(params, 1, draw, stop_words.table)
  opened = tokenizer.encode_template("<think>\n")
  sampled = 0

  def sample(context, phase, number, candidate=0):
    nonlocal sampled
    keys = engine_lib.keys(
      jax.random.fold_in(key, number), [prompt.id], candidate + 1
    )
    most = settings.max_step_tokens
    if phase == "answer":
      most = settings.max_answer_tokens
    fork = prompt_slots_lib.Fork(
      prompt_slot=0,
      slot=0,
      key=keys[0, candidate],
      budget=most,
      state=stop_words.start[phase],
    )
    pieces = workers.step(
      stop_after=lambda _: 1, contexts=[(0, prompt.id, context)], forks=[fork]
    )
    while pieces[-1].live:
      pieces += workers.step(stop_after=lambda _: 1)
    sampled += sum(len(piece.tokens) for piece in pieces)
    return prompt_slots_lib.joined(pieces)

  def perplexity(context, candidate):
    whole = np.concatenate([context, candidate])
    logprob = logprob_scorer.score(params, [whole]).prefix_logprob[0][1:]
    if settings.score == "candidate":
      logprob = logprob[-len(candidate) :]
    return float(np.exp(-logprob.mean(dtype=np.float64)))

  head = settings.template.replace("{prompt}", prompt.prompt)
  head = np.concatenate([tokenizer.chat_prompt(head), opened])
  thought, trigger, status = stop_words.cut(sample(head, "stop", 0), "stop")
  rounds, answer = [], opened[:0]
  while status == "candidate" and len(thought) <= settings.max_thought_tokens:
    so_far = np.concatenate([head, thought])
    context = np.concatenate([so_far, trigger])
    if len(rounds) == settings.budget:
      one = sample(context, "rest", settings.budget + 1)
      cuts, best = [stop_words.cut(one, "rest")], 0
    else:
      cuts = [
        stop_words.cut(
          sample(context, "candidate", len(rounds) + 1, c), "candidate"
        )
        for c in range(settings.candidates)
      ]
      made = [np.concatenate([trigger, kept]) for kept, _, _ in cuts]
      logprobs = [perplexity(so_far, tokens) for tokens in made]
      best = min(
        range(len(cuts)),
        key=lambda c: (cuts[c][2] not in stop_words_lib.PHASES, logprobs[c]),
      )
      candidates = tuple(
        traces.Candidate(tokenizer.decode(tokens), logprob, len(tokens))
        for tokens, logprob in zip(made, logprobs)
      )
      rounds.append(traces.Round(tokenizer.decode(trigger), best, candidates))
    kept, following, status = cuts[best]
    thought = np.concatenate([thought, trigger, kept])
    trigger = following
  if len(thought) > settings.max_thought_tokens:
    status = stop_words_lib.TOO_LONG
  if status == "answer":
    context = np.concatenate(
      [tokenizer.chat_prompt(prompt.prompt), opened, thought]
    )
    one = sample(context, "answer", settings.budget + 2)
    answer, status = one.tokens, "answer too long"
    if one.finished:
      status = "complete"
  closed = len(thought) and thought[-1] == tokenizer.think_close_id
  ended = len(answer) and answer[-1] == tokenizer.end_id
  return (
    traces.Trace(
      id=prompt.id,
      prompt=prompt.prompt,
      reference=prompt.reference,
      thought=tokenizer.decode(thought[:-1] if closed else thought),
      answer=tokenizer.decode(answer[:-1] if ended else answer).strip(),
      completion=np.concatenate([opened, thought, answer]),
      rounds=tuple(rounds),
      status=status,
    ),
    sampled,
  )


def check_equal(ours: traces.Trace, theirs: traces.Trace) -> None:
  """Refuses traces that differ in a token, or in a perplexity by 1e-4.

  Raises:
    AssertionError: they differ.
  """

  def without_logprobs(trace):
    rounds = tuple(
      dataclasses.replace(
        one,
        candidates=tuple(
          dataclasses.replace(c, perplexity=0.0) for c in one.candidates
        ),
      )
      for one in trace.rounds
    )
    return dataclasses.replace(trace, rounds=rounds)

  assert without_logprobs(ours) == without_logprobs(theirs), (ours, theirs)
  for mine, other in zip(ours.rounds, theirs.rounds, strict=True):
    np.testing.assert_allclose(
      [c.perplexity for c in mine.candidates],
      [c.perplexity for c in other.candidates],
      rtol=1e-4,
    )


def main() -> None:
  one = mesh_lib.create(devices=jax.devices()[:1])
  made = storyworld.corpus(400, 0)
  tokenizer = tokenizer_lib.Tokenizer.train_bpe(
    [t for d in made for t in (d.prompt, d.thought, d.answer)], 1024
  )
  config = decoder.Config(
    vocab_size=tokenizer.vocab_size,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=768,
  )
  graphdef, params = train(
    tokenizer, config, one, steps=TRAINING, batch_size=8, row_length=256
  )
  print("trained", flush=True)
  # Steps of its thoughts open with these, so that a thought has a few rounds.
  settings = Settings(
    stop_words=(*stop_words_lib.WORDS, "The", "There", "It", "At")
  )
  prompts = [
    structs.Prompt(f"{i}", "open_ended", d.prompt, d.answer)
    for i, d in enumerate(storyworld.corpus(PROMPTS, 2))
  ]
  key = jax.random.key(0)

  def parts(rows):
    engine = engine_lib.Engine(
      graphdef,
      config,
      mesh=one,
      prompt_slots=rows,
      prompt_buckets=(64, 128, 256, 512),
      cache_buckets=(128,),
      steps=16,
    )
    logprob_scorer = scorer_lib.LogprobScorer(
      graphdef,
      vocab_size=config.vocab_size,
      mesh=one,
      batch_size=min(rows, 16),
      prefix_buckets=(64, 128, 256, 512),
      slot_buckets=(1,),
      continuation_buckets=(1,),
    )
    return engine, logprob_scorer, tokenizer

  searcher = search_lib.Searcher(
    *parts(PROMPTS), **dataclasses.asdict(settings)
  )
  alone = parts(1)
  ours, theirs = [], []

  def together():
    counted = []
    found = searcher.run(params, params, prompts, key, advance=counted.append)
    ours.append((found, sum(counted)))

  def singly():
    found = [
      naive(*alone, params, prompt, key, settings) for prompt in prompts[:ALONE]
    ]
    theirs.append(([trace for trace, _ in found], sum(n for _, n in found)))

  rows = []
  for name, call, results, count in (
    (f"naive, {ALONE} prompts one by one", singly, theirs, ALONE),
    (f"ours, {PROMPTS} prompts in flight", together, ours, PROMPTS),
  ):
    taken = harness.seconds(call, repeats=REPEATS).median
    tokens = results[-1][1]
    rows.append((name, tokens, taken, tokens / taken, taken / count))
    print(rows[-1], flush=True)
  for mine, other in zip(ours[-1][0], theirs[-1][0]):
    check_equal(mine, other)
  found = ours[-1][0]
  candidates = sum(len(r.candidates) for t in found for r in t.rounds)
  complete = sum(t.status == "complete" for t in found)
  slowest = rows[0][3]
  body = (
    f"`python -m benchmarks.synthesis`; {harness.hardware()}; float32; a Qwen3 "
    f"of {decoder.parameter_count(params):,} parameters "
    f"({config.num_hidden_layers} layers, width {config.hidden_size}, "
    f"vocabulary {config.vocab_size:,}) after {TRAINING} updates on "
    f"storyworld; median of {REPEATS}, warm. {len(found)} traces, {complete} "
    f"of them complete, with {candidates} candidates ({settings.candidates} a "
    f"round). The {ALONE} traces made both ways are equal token by token, "
    "their perplexities to 1e-4.\n\n"
    + harness.table(
      ("search", "tokens sampled", "s", "tokens/s", "s a trace", "faster"),
      [
        (
          name,
          f"{n:,}",
          f"{s:.2f}",
          f"{r:,.0f}",
          f"{each:.3f}",
          f"{r / slowest:.1f}",
        )
        for name, n, s, r, each in rows
      ],
    )
  )
  harness.write_section("synthesis", body)
  print(body)


if __name__ == "__main__":
  main()
