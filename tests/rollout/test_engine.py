"""The sampler samples what the model says, whoever its neighbours are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.models import decoder
from opera_jax.rollout import engine, sampling
from opera_jax.sharding import layout, mesh, rules
from opera_jax.text import stop_automaton

STOP = 7


def _engine(tiny_model, device_mesh, rows=8):
  config, graphdef, _ = tiny_model
  return engine.Engine(
    graphdef,
    config,
    mesh=device_mesh,
    prompt_slots=rows,
    prompt_buckets=(8, 16),
  )


def _prompts(seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(8, 300, n).astype(np.int32) for n in (3, 8, 1, 11, 6)]


def test_logprobs_are_the_models_own(tiny_model, one_device, slow_logprob):
  settings = sampling.Sampling(max_new_tokens=9, stop_ids=(STOP,))
  prompts = _prompts()
  out = _engine(tiny_model, one_device).sample(
    tiny_model[2], prompts, settings, jax.random.key(0), samples=3
  )
  lengths = set()
  for prompt, group in zip(prompts, out):
    assert len(group) == 3
    for sample in group:
      want = slow_logprob(np.concatenate([prompt, sample.tokens]))
      want = want[len(prompt) - 1 :]
      np.testing.assert_allclose(sample.logprob, want, atol=1e-4)
      assert sample.finished == (sample.tokens[-1] == STOP)
      assert STOP not in sample.tokens[:-1]
      lengths.add(len(sample.tokens))
  assert 9 in lengths


def test_a_prompt_that_comes_twice_is_sampled_anew(tiny_model, one_device):
  """Keys follow the prompt's id; each time it comes has its own."""
  settings = sampling.Sampling(max_new_tokens=9, stop_ids=(STOP,))
  prompt, other = _prompts()[:2]
  sampler = _engine(tiny_model, one_device)

  def draw(prompts, ids):
    out = sampler.sample(
      tiny_model[2], prompts, settings, jax.random.key(0), samples=2, ids=ids
    )
    return [[s.tokens.tolist() for s in group] for group in out]

  twice = draw([prompt, other, prompt], ["a", "b", "a"])
  assert twice[0] != twice[2]
  assert draw([prompt, other], ["a", "b"]) == twice[:2]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_have_their_logprob_as_sampled(tiny_model, one_device, top_p):
  """And rows of the head that pad the vocabulary are not sampled."""
  settings = sampling.Sampling(
    max_new_tokens=12, stop_ids=(STOP,), top_p=top_p, vocab_size=200
  )
  out = _engine(tiny_model, one_device).sample(
    tiny_model[2],
    [p % 200 for p in _prompts()],
    settings,
    jax.random.key(0),
    samples=3,
  )
  for sample in (s for group in out for s in group):
    assert sample.tokens.max() < 200
    assert sample.truncated_logprob.shape == sample.logprob.shape
    gap = sample.behavior_logprob() - sample.logprob
    assert (gap > 0).all() and (np.exp(sample.behavior_logprob()) <= 1).all()


def test_greedy_is_argmax(tiny_model, one_device, slow_logprob):
  settings = sampling.Sampling(
    max_new_tokens=6, temperature=0.0, stop_ids=(STOP,)
  )
  prompt = _prompts()[1]
  ((sample,),) = _engine(tiny_model, one_device).sample(
    tiny_model[2], [prompt], settings, jax.random.key(0)
  )
  tokens = list(prompt)
  for token in sample.tokens:
    every = [
      slow_logprob(np.array([*tokens, t]))[-1]
      for t in (token, *range(0, 300, 37))
    ]
    assert int(np.argmax(every)) == 0
    tokens.append(token)


def test_neighbours_and_order_do_not_matter(tiny_model, one_device):
  settings = sampling.Sampling(max_new_tokens=8, stop_ids=(STOP,))
  prompts, names = _prompts(1), list("abcde")
  sampler = _engine(tiny_model, one_device)
  args = (settings, jax.random.key(5))
  out = sampler.sample(tiny_model[2], prompts, *args, samples=2, ids=names)
  back = sampler.sample(
    tiny_model[2], prompts[::-1], *args, samples=2, ids=names[::-1]
  )
  for a, b in zip(out, back[::-1]):
    for x, y in zip(a, b):
      np.testing.assert_array_equal(x.tokens, y.tokens)
  assert not np.array_equal(out[0][0].tokens, out[0][1].tokens)


@pytest.mark.slow
def test_mesh_does_not_change_samples(tiny_model, one_device):
  settings = sampling.Sampling(max_new_tokens=8, stop_ids=(STOP,))
  args = (settings, jax.random.key(5))
  want = _engine(tiny_model, one_device).sample(
    tiny_model[2], _prompts(2), *args, samples=2
  )
  many = mesh.create({"data": 2, "fsdp": 2, "tensor": 2})
  params = layout.move(
    tiny_model[2], decoder.logical_axes(tiny_model[2]), many, rules.ROLLOUT
  )
  got = _engine(tiny_model, many).sample(params, _prompts(2), *args, samples=2)
  for a, b in zip(want, got):
    for x, y in zip(a, b):
      np.testing.assert_array_equal(x.tokens, y.tokens)
      np.testing.assert_allclose(x.logprob, y.logprob, rtol=1e-5, atol=1e-5)


def test_stop_strings_end_a_sample(tiny_model, one_device):
  letters = [bytes([65 + i % 26]) for i in range(300)]
  stops = stop_automaton.compile(["AB", "C"], letters)
  settings = sampling.Sampling(max_new_tokens=24, stop_ids=(STOP,))
  out = _engine(tiny_model, one_device).sample(
    tiny_model[2],
    _prompts(3),
    settings,
    jax.random.key(1),
    samples=4,
    stops=stops,
  )
  ended = 0
  for group in out:
    for sample in group:
      text = b"".join(letters[t] for t in sample.tokens).decode()
      hit = "AB" in text or "C" in text
      assert sample.finished == (hit or sample.tokens[-1] == STOP)
      assert "AB" not in text[:-1] and "C" not in text[:-1]
      ended += hit
  assert ended > 5


def test_bad_prompts_are_refused(tiny_model, one_device):
  sampler = _engine(tiny_model, one_device)
  settings = sampling.Sampling(max_new_tokens=2, stop_ids=(STOP,))
  for prompt, message in [
    (np.zeros(0, np.int32), "no tokens"),
    (np.zeros(17, np.int32), "largest prompt bucket"),
    (np.array([300]), "outside"),
  ]:
    with pytest.raises(ValueError, match=message):
      sampler.sample(tiny_model[2], [prompt], settings, jax.random.key(0))
  with pytest.raises(ValueError, match="max_new_tokens"):
    sampling.Sampling(max_new_tokens=0, stop_ids=(STOP,))
  broken = jax.tree.map(lambda x: x * np.nan, tiny_model[2])
  with pytest.raises(FloatingPointError, match="not finite"):
    sampler.sample(broken, [np.array([1])], settings, jax.random.key(0))


@pytest.mark.parametrize(
  "top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (6, 0.8)]
)
def test_frequencies_follow_the_truncated_distribution(top_k, top_p):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=12).astype(np.float32) * 1.5
  p = np.exp(logits / 0.8 - np.logaddexp.reduce(logits / 0.8))
  kept = np.ones(12, bool)
  if top_k:
    kept &= p >= np.sort(p)[-top_k]
  order = np.argsort(-p)
  inside = np.where(kept[order], p[order], 0) / p[kept].sum()
  nucleus = np.cumsum(inside) - inside < top_p
  kept[order[~nucleus]] = False
  want = np.where(kept, p, 0) / p[kept].sum()
  draws = 20_000
  tokens, logprob, truncated = sampling.sample(
    jnp.broadcast_to(jnp.asarray(logits), (draws, 12)),
    jax.random.split(jax.random.key(0), draws),
    sampling.Sampling(
      max_new_tokens=1,
      stop_ids=(0,),
      temperature=0.8,
      top_k=top_k,
      top_p=top_p,
    ),
  )
  seen = np.bincount(np.asarray(tokens), minlength=12)
  assert not seen[~kept].any()
  chi2 = ((seen - draws * want)[kept] ** 2 / (draws * want[kept])).sum()
  # 99.9th percentile of chi-squared with 11 degrees of freedom.
  assert chi2 < 31.3
  np.testing.assert_allclose(logprob, np.log(p)[np.asarray(tokens)], atol=1e-4)
  # And under the distribution that was sampled from.
  sampled = np.asarray(tokens)
  np.testing.assert_allclose(truncated, np.log(want[sampled]), atol=1e-4)
