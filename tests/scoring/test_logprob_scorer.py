"""Prefixes with continuations score like separate prefixes, on any mesh."""

import jax
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.models import decoder
from opera_jax.scoring import logprob_scorer as scorer_lib
from opera_jax.sharding import layout, mesh, rules

BUCKETS = {
  "batch_size": 8,
  "prefix_buckets": (16, 32),
  "slot_buckets": (1, 4),
  "continuation_buckets": (8, 16),
}


def _problem(seed=0, vocab=300):
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.integers(0, vocab, n).astype(np.int32)  # noqa: E731
  rows = [draw(n) for n in (5, 12, 30, 16, 1, 24)]
  continuations = []
  for _ in range(23):
    prefix = int(rng.integers(len(rows)))
    size = int(rng.integers(1, 13))
    continuations.append(
      structs.Continuation(
        prefix=prefix,
        fork=int(rng.integers(1, len(rows[prefix]) + 1)),
        tokens=draw(size),
        skip=int(rng.integers(0, size)),
      )
    )
  # Seven more on one prefix: more than the largest slot bucket holds.
  continuations += [
    structs.Continuation(prefix=2, fork=f, tokens=draw(4)) for f in range(1, 8)
  ]
  return rows, continuations


def test_continuations_score_like_separate_prefixes(
  tiny_model, one_device, slow_logprob
):
  config, graphdef, params = tiny_model
  rows, continuations = _problem()
  logprob_scorer = scorer_lib.LogprobScorer(
    graphdef, vocab_size=config.vocab_size, mesh=one_device, **BUCKETS
  )
  logprobs = logprob_scorer.score(params, rows, continuations)
  for row, got in zip(rows, logprobs.prefix_logprob):
    assert got[0] == 0
    np.testing.assert_allclose(got[1:], slow_logprob(row), atol=1e-5)
  for continuation, got in zip(continuations, logprobs.continuation_logprob):
    prefix = rows[continuation.prefix][: continuation.fork]
    whole = slow_logprob(np.concatenate([prefix, continuation.tokens]))
    want = whole[continuation.fork - 1 + continuation.skip :]
    np.testing.assert_allclose(got, want, atol=1e-5)
  assert logprobs.prefix_tokens == sum(map(len, rows))
  # Entropies of continuations equal those of the same tokens scored as separate
  # prefixes, which tests/models/test_parity.py compares with torch.
  whole = logprob_scorer.score(
    params,
    [
      np.concatenate([rows[b.prefix][: b.fork], b.tokens])
      for b in continuations
    ],
  )
  for continuation, got, want in zip(
    continuations, logprobs.continuation_entropy, whole.prefix_entropy
  ):
    np.testing.assert_allclose(
      got, want[continuation.fork + continuation.skip :], atol=1e-5
    )


@pytest.mark.parametrize(
  "shape",
  [
    {"fsdp": 8},
    pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "tensor": 4}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 1, "tensor": 8}, marks=pytest.mark.slow),
    pytest.param({"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
    {"fsdp": 2, "sequence": 2, "tensor": 2},
  ],
)
def test_mesh_does_not_change_logprobs(one_device, shape):
  config = decoder.Config(
    vocab_size=304,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=6,
    intermediate_size=80,
  )
  graphdef, params = decoder.create(config, 0)
  rows, continuations = _problem(1, vocab=304)
  made = {"vocab_size": config.vocab_size, **BUCKETS}
  want = scorer_lib.LogprobScorer(graphdef, mesh=one_device, **made).score(
    params, rows, continuations
  )
  many = mesh.create(shape)
  sharded = layout.move(params, decoder.logical_axes(params), many, rules.TRAIN)
  got = scorer_lib.LogprobScorer(graphdef, mesh=many, **made).score(
    sharded, rows, continuations
  )
  for a, b in zip(want.continuation_logprob, got.continuation_logprob):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for a, b in zip(want.continuation_entropy, got.continuation_entropy):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for a, b in zip(want.prefix_logprob, got.prefix_logprob):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_diverged_parameters_are_named(tiny_model, one_device):
  config, graphdef, params = tiny_model
  broken = jax.tree.map(lambda x: x * np.nan, params)
  logprob_scorer = scorer_lib.LogprobScorer(
    graphdef, vocab_size=config.vocab_size, mesh=one_device, **BUCKETS
  )
  with pytest.raises(FloatingPointError, match="not finite"):
    logprob_scorer.score(broken, [np.array([1, 2])])


def test_prefixes_must_divide_the_mesh(tiny_model):
  config, graphdef, _ = tiny_model
  with pytest.raises(ValueError, match="config.scoring.batch_size"):
    scorer_lib.LogprobScorer(
      graphdef, vocab_size=config.vocab_size, mesh=mesh.create(), batch_size=6
    )


@pytest.mark.parametrize("fits", [True, False])
def test_completions_are_scored_as_prefixes_are(tiny_model, one_device, fits):
  config, graphdef, params = tiny_model
  draw = np.random.default_rng(5)

  def tokens(size):
    return draw.integers(0, config.vocab_size, size).astype(np.int32)

  prompts = [tokens(n) for n in (3, 9)]
  completions = [tokens(n) for n in (1, 7, 7, 4, 2, 7)]
  other = [tokens(5)]
  logprob_scorer = scorer_lib.LogprobScorer(
    graphdef,
    vocab_size=config.vocab_size,
    mesh=one_device,
    batch_size=2,
    prefix_buckets=(16,),
    slot_buckets=(4,),
    continuation_buckets=(8,) if fits else (6,),
  )
  got = logprob_scorer.score_completions(params, prompts, completions, other)
  rows = [
    np.concatenate([prompts[i // 3], c]) for i, c in enumerate(completions)
  ]
  want = logprob_scorer.score(params, rows + other)
  assert not got.continuation_logprob
  # If the completions are continuations, their prompt is computed once.
  assert got.prefix_tokens == (3 + 9 + 5 if fits else want.prefix_tokens)
  for name in ("prefix_logprob", "prefix_entropy"):
    for one, row in zip(getattr(got, name), getattr(want, name), strict=True):
      np.testing.assert_allclose(one, row, rtol=1e-5, atol=1e-5)
