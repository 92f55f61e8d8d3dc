"""No sample depends on slots, neighbours, refills or growing caches."""

import jax
import numpy as np
import pytest

from opera_jax.models import decoder
from opera_jax.rollout import (
  decode_loop,
  engine,
  prompt_slots,
  sampling,
  workers,
)
from opera_jax.sharding import layout, mesh, rules

STOP = 7
SETTINGS = sampling.Sampling(max_new_tokens=40, stop_ids=(STOP, 11, 13, 17))
KEY = 5


def _engine(tiny_model, device_mesh, **changes):
  config, graphdef, _ = tiny_model
  values = {
    "prompt_slots": 3,
    "slots": 2,
    "prompt_buckets": (8, 16),
    "steps": 8,
  }
  return engine.Engine(graphdef, config, mesh=device_mesh, **values | changes)


def _prompts(count=7):
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 17, count)
  return [rng.integers(20, 300, n).astype(np.int32) for n in sizes]


def _same(left, right):
  for a, b in zip(left, right, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x.tokens, y.tokens)
      np.testing.assert_array_equal(x.logprob, y.logprob)
      assert (x.finished, x.reason) == (y.finished, y.reason)


@pytest.fixture(scope="module")
def usual(tiny_model, one_device):
  sampler = _engine(tiny_model, one_device)
  return sampler.sample(
    tiny_model[2], _prompts(), SETTINGS, jax.random.key(KEY), samples=5
  )


def test_lengths_differ_so_that_slots_are_refilled(usual):
  lengths = {len(s.tokens) for group in usual for s in group}
  assert len(lengths) > 5
  assert {s.reason for group in usual for s in group} == {"stop", "length"}


@pytest.mark.parametrize(
  "changes", [{"steps": 3}, {"slots": 1}, {"cache_buckets": (128, 512)}]
)
def test_slots_and_steps_change_no_bit(tiny_model, one_device, usual, changes):
  sampler = _engine(tiny_model, one_device, **changes)
  got = sampler.sample(
    tiny_model[2], _prompts(), SETTINGS, jax.random.key(KEY), samples=5
  )
  _same(usual, got)


def test_neighbours_change_no_bit(tiny_model, one_device, usual):
  names = [str(i) for i in range(7)]
  sampler = _engine(tiny_model, one_device)
  order = [4, 0, 6, 2]
  got = sampler.sample(
    tiny_model[2],
    [_prompts()[i] for i in order],
    SETTINGS,
    jax.random.key(KEY),
    samples=5,
    ids=[names[i] for i in order],
  )
  _same([usual[i] for i in order], got)


@pytest.fixture(scope="module")
def wide_model():
  """Wide enough for a CPU to add up in several orders."""
  config = decoder.Config(
    vocab_size=300,
    hidden_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=768,
  )
  return config, *decoder.create(config, 3)


@pytest.mark.slow
def test_compaction_eviction_and_workers_change_no_bit(
  wide_model, one_device, monkeypatch
):
  """Few or many active slots, in 16 prompt slots, the last 4, or 2 x 8."""
  monkeypatch.setattr(prompt_slots, "MIN_PROMPT_SLOTS", 4)
  monkeypatch.setattr(workers, "num_workers", lambda *_: 1)
  settings = sampling.Sampling(max_new_tokens=12, stop_ids=tuple(range(20)))
  sampler = _engine(wide_model, one_device, prompt_slots=16, slots=4, steps=4)
  rng = np.random.default_rng(1)
  prompts = [rng.integers(20, 300, 9).astype(np.int32) for _ in range(20)]

  def draw(places):
    return sampler.sample(
      wide_model[2],
      [prompts[i] for i in places],
      settings,
      jax.random.key(0),
      samples=4,
      ids=[str(i) for i in places],
    )

  sizes, decode = set(), sampler._programs["decode"]

  def watched(*arguments, **static):
    slots, active_slots = arguments[1].token, static["slot_M"]
    sizes.add(
      (
        slots.shape[0],
        slots.size if active_slots is None else len(active_slots),
      )
    )
    return decode(*arguments, **static)

  sampler._programs["decode"] = watched
  every = draw(range(20))
  assert len({count for count, _ in sizes}) > 1
  assert len({active_slots for _, active_slots in sizes}) > 2
  _same([every[7]], draw([7]))
  sizes.clear()
  monkeypatch.setattr(workers, "num_workers", lambda *_: 2)
  _same(every, draw(range(20)))
  assert {count for count, _ in sizes} == {8}


@pytest.mark.parametrize(
  "prompt_slots_, slots, sizes",
  [
    (1, 1, [1]),
    (16, 1, [8, 16]),
    (16, 8, [8, 16, 32, 64, 128]),
    (64, 4, [8, 16, 32, 64, 128, 256]),
    (25, 2, [25, 50]),
  ],
)
def test_active_slots_come_in_few_sizes(prompt_slots_, slots, sizes):
  assert prompt_slots.active_slot_counts(prompt_slots_, slots) == sizes


def test_one_prompt_is_computed_once(tiny_model, one_device):
  sampler = _engine(tiny_model, one_device)
  calls = []
  prefill = sampler._programs["prefill"]

  def counted(*arguments, prompt_slot_R, **keywords):
    calls.append(np.asarray(prompt_slot_R))
    return prefill(*arguments, prompt_slot_R=prompt_slot_R, **keywords)

  sampler._programs["prefill"] = counted
  (group,) = sampler.sample(
    tiny_model[2], _prompts()[:1], SETTINGS, jax.random.key(1), samples=16
  )
  assert len(group) == 16 and len(calls) == 1
  assert (calls[0] < 3).sum() == 1  # one prompt; the rest is padding


def test_caches_grow(tiny_model, one_device, slow_logprob):
  settings = sampling.Sampling(max_new_tokens=150)
  sampler = _engine(
    tiny_model,
    one_device,
    prompt_slots=1,
    slots=2,
    cache_buckets=(128,),
    steps=64,
  )
  prompt = _prompts()[0]
  ((one, two),) = sampler.sample(
    tiny_model[2], [prompt], settings, jax.random.key(0), samples=2
  )
  for sample in (one, two):
    assert len(sample.tokens) == 150 and sample.reason == "length"
    want = slow_logprob(np.concatenate([prompt, sample.tokens]))
    np.testing.assert_allclose(
      sample.logprob, want[len(prompt) - 1 :], atol=1e-4
    )


def test_tokens_stream_as_they_come(tiny_model, one_device, usual):
  seen = {}

  def on_tokens(prompt, sample, tokens):
    seen.setdefault((prompt, sample), []).append(tokens)

  _engine(tiny_model, one_device).sample(
    tiny_model[2],
    _prompts(),
    SETTINGS,
    jax.random.key(KEY),
    samples=5,
    on_tokens=on_tokens,
  )
  assert max(map(len, seen.values())) > 2
  for (prompt, sample), pieces in seen.items():
    np.testing.assert_array_equal(
      np.concatenate(pieces), usual[prompt][sample].tokens
    )


@pytest.mark.parametrize(
  "error, num_workers",
  [(KeyboardInterrupt, 1), (OSError, 1), (KeyboardInterrupt, 3)],
)
def test_an_interrupted_call_leaves_nothing(
  tiny_model, one_device, usual, monkeypatch, error, num_workers
):
  """No half sample is given as a whole one, and the engine goes on."""
  monkeypatch.setattr(workers, "num_workers", lambda *_: num_workers)
  sampler = _engine(tiny_model, one_device)
  seen, whole = [], []

  def on_tokens(prompt, sample, tokens):
    seen.append((prompt, sample))
    if len(seen) == 9:
      raise error

  def draw(**changes):
    return sampler.sample(
      tiny_model[2],
      _prompts(),
      SETTINGS,
      jax.random.key(KEY),
      samples=5,
      advance=whole.append,
      **changes,
    )

  with pytest.raises(error):
    draw(on_tokens=on_tokens)
  lengths = [len(s.tokens) for group in usual for s in group]
  assert len(whole) < len(lengths) and set(whole) <= set(lengths)
  whole.clear()
  _same(usual, draw())
  assert sorted(whole) == sorted(lengths)


def test_seeds_name_samples(tiny_model, one_device):
  sampler = _engine(tiny_model, one_device)
  prompts = [_prompts()[0]] * 2

  def draw(seeds, key=0):
    return sampler.sample(
      tiny_model[2],
      prompts,
      SETTINGS,
      jax.random.key(key),
      samples=2,
      seeds=seeds,
    )

  one, two = draw([[1, 2], [2, 1]])
  _same([one], [two[::-1]])
  _same([one], [draw([[1, 2], [3, 4]], key=9)[0]])
  with pytest.raises(ValueError, match="one a sample"):
    draw([[1, 2]])


@pytest.mark.slow
def test_meshes_give_the_same_samples(tiny_model, usual):
  many = mesh.create({"data": 2, "fsdp": 2, "tensor": 2})
  params = layout.move(
    tiny_model[2], decoder.logical_axes(tiny_model[2]), many, rules.ROLLOUT
  )
  got = _engine(tiny_model, many, prompt_slots=4).sample(
    params, _prompts(), SETTINGS, jax.random.key(KEY), samples=5
  )
  for a, b in zip(usual, got, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x.tokens, y.tokens)
      np.testing.assert_allclose(x.logprob, y.logprob, rtol=1e-5, atol=1e-5)


def _state(tiny_model, capacity=1024):
  config, graphdef, params = tiny_model
  made = decode_loop.programs(graphdef)
  state = made["empty"](config, 4, 4, 256, capacity, recent=0, dtype="float32")
  return made, params, state


def test_decoding_copies_no_cache(tiny_model, one_device):
  made, params, state = _state(tiny_model)
  with jax.set_mesh(one_device):
    compiled = (
      made["decode"]
      .lower(
        params,
        state,
        None,
        np.int32(1),
        made["unstack_layers"](params),
        settings=SETTINGS,
        steps=8,
      )
      .compile()
    )
  cache = sum(x.nbytes for x in jax.tree.leaves(state.cache))
  memory = compiled.memory_analysis()
  # The caches are updated in place, and no part of them is copied.
  assert memory.alias_size_in_bytes >= cache
  assert memory.temp_size_in_bytes < 0.1 * cache
  B, S, K, C, H = state.cache.k[0].shape
  whole = f"f32[{B},{S},{K},{C},{H}]"
  copies = [
    line
    for line in compiled.as_text().splitlines()
    if whole in line.split("=")[-1].split("(")[0] and " copy(" in line
  ]
  assert not copies, copies


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_kept_sample_becomes_prefix(
  tiny_model, one_device, slow_logprob, monkeypatch, num_workers
):
  """Kept tokens become context: twice, beyond the prefix's first capacity."""
  monkeypatch.setattr(workers, "num_workers", lambda *_: num_workers)
  settings = sampling.Sampling(max_new_tokens=60, temperature=0.7)
  sampler = _engine(tiny_model, one_device, prompt_slots=2, slots=3, steps=16)
  keys = engine.keys(jax.random.key(3), ["a", "b"], 3)
  context = _prompts()[:2]
  with sampler.start_workers(
    tiny_model[2], 3, settings, None, with_model_logprob=True
  ) as running:
    step = {"contexts": [(p, str(p), c) for p, c in enumerate(context)]}
    for chosen, count in (
      ((2, 1), (60, 4)),
      ((0, 0), (55, 60)),
      ((1, 2), (5, 9)),
    ):
      step["forks"] = [
        prompt_slots.Fork(p, s, keys[p, s], budget=60)
        for p in range(2)
        for s in range(3)
      ]
      grown, ended = {}, 0
      while ended < 6:
        pieces = running.step(
          stop_after=lambda _: prompt_slots.NO_EARLY_RETURN, **step
        )
        step = {}
        for piece in pieces:
          grown.setdefault((piece.prompt_slot, piece.slot), []).append(piece)
        ended += sum(not piece.live for piece in pieces)
      kept = []
      for (prompt_slot, slot), mine in grown.items():
        sample = prompt_slots.joined(mine)
        assert len(sample.tokens) == 60
        score = np.concatenate([piece.model_logprob for piece in mine])
        tokens = np.concatenate([context[prompt_slot], sample.tokens])
        want = slow_logprob(tokens)[len(context[prompt_slot]) - 1 :]
        np.testing.assert_allclose(score, want, atol=1e-4)
        assert not np.allclose(sample.logprob, want, atol=1e-2)
        if slot == chosen[prompt_slot]:
          tokens = sample.tokens[: count[prompt_slot]]
          kept.append((prompt_slot, slot, tokens))
      step = {"kept": kept}
      for prompt_slot, _, tokens in kept:
        context[prompt_slot] = np.concatenate([context[prompt_slot], tokens])
    assert max(map(len, context)) > 128


def test_decoding_scores_only_when_asked(tiny_model, one_device):
  """Not asked for, a second pass over the logits is not compiled."""
  made, params, state = _state(tiny_model, 128)
  settings = sampling.Sampling(max_new_tokens=8, temperature=0.7)
  V = tiny_model[0].vocab_size

  def exponentials(**static):
    with jax.set_mesh(one_device):
      text = str(
        made["decode"]
        .trace(
          params,
          state,
          None,
          np.int32(1),
          made["unstack_layers"](params),
          settings=settings,
          steps=8,
          **static,
        )
        .jaxpr
      )
    return sum(f"f32[16,{V}] = exp" in line for line in text.splitlines())

  assert 0 < exponentials() == exponentials(with_model_logprob=True) - 1
