"""The driver hands old, reference and cap each to the step that is its own."""

import types

import jax
import ml_collections
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.experiments import opera_rl
from opera_jax.losses import kl
from opera_jax.losses import policy as policy_loss
from opera_jax.rl import advantages, learner, score

PROMPTS, SAMPLES = 2, 2
SIZES = (3, 2, 4, 1)
OLD, REF, DRAWN, CAP = -1.0, -1.5, -2.0, 1.25
COEF = 0.125


def _scored(finished=True):
  rng = np.random.default_rng(0)
  ids = [np.arange(1, 4, dtype=np.int32), np.arange(1, 3, dtype=np.int32)]
  completions = [
    structs.Sample(
      rng.integers(5, 9, n).astype(np.int32),
      np.full(n, DRAWN, np.float32),
      finished or n != max(SIZES),
    )
    for n in SIZES
  ]
  rollouts = structs.Rollouts(
    prompts=[structs.Prompt(str(b), "math", "q", "1") for b in range(PROMPTS)],
    samples=SAMPLES,
    prompt_ids=ids,
    completions=completions,
    texts=[""] * len(SIZES),
    thoughts=None,
    encode=None,
    chat_prompt=None,
  )
  prefixes = [
    np.concatenate([ids[r // SAMPLES], s.tokens])
    for r, s in enumerate(completions)
  ]
  total = np.asarray([[1.0, 0.0], [0.25, 0.5]], np.float32)
  return score.Scored(total, {}, prefixes, None, None, None, None, 0, rollouts)


def _logprobs(scored, value):
  """`value` on every completion token, and what must not be read before."""
  rows = [np.full(len(p), value, np.float32) for p in scored.prefixes]
  for row, size in zip(rows, SIZES):
    row[: len(row) - size] = np.nan
  return structs.Logprobs(rows, rows, [], [], 0, 0)


def _packed(*, finished=True, estimator="reinforce", **changes):
  rl = ml_collections.ConfigDict(
    {
      "prompts": PROMPTS,
      "mini_batch": 1,
      "row_buckets": (8,),
      "completions_per_row": 1,
      "kl_in": "reward",
      "kl_coef": COEF,
      "kl_estimator": "k1",
      "importance_cap": CAP,
      "importance_level": "token",
      "importance_mode": "truncate",
      "importance_floor": 0.0,
      "mask_truncated": False,
    }
    | changes
  )
  scored = _scored(finished)
  none = dict.fromkeys(
    ("optimizer", "update", "join", "values", "teacher_top"), None
  ) | dict.fromkeys(("critic", "pairs", "averaged"), False)
  options = {"reinforce": {"baseline": "none"}}
  rows, advantages_R, metrics = opera_rl.packed_rows(
    types.SimpleNamespace(
      engine=types.SimpleNamespace(bucket=len),
      mesh=jax.sharding.Mesh(np.asarray(jax.devices()[:1]), "data"),
    ),
    rl,
    scored,
    learn=learner.Learner(**none),
    estimators=advantages.WeightedEstimators(
      estimator,
      options if estimator == "reinforce" else {},
      None,
    ),
    old=_logprobs(scored, OLD),
    ref=_logprobs(scored, REF),
    params=None,
    models={},
  )
  assert [len(a) for a in advantages_R] == list(SIZES)
  every = np.concatenate([a[a != 0] for a in rows.advantage])
  if not changes.get("importance_cap", CAP):
    assert metrics["advantage/max"] == pytest.approx(every.max())
  return scored, rows


def test_old_and_reference_stand_where_the_loss_reads_them():
  _, rows = _packed()
  mask_RT = rows.loss_mask > 0
  assert mask_RT.sum() == sum(SIZES)
  np.testing.assert_array_equal(rows.old_logprob[mask_RT], OLD)
  np.testing.assert_array_equal(rows.ref_logprob[mask_RT], REF)


@pytest.mark.parametrize("cap", [CAP, 10.0])
def test_advantages_take_kl_from_old_to_ref_and_the_capped_weight(cap):
  scored, rows = _packed(importance_cap=cap)
  taken_R = np.asarray(SIZES) * COEF * kl.k1(OLD, REF)
  return_BN = scored.total_BN - taken_R.reshape(PROMPTS, SAMPLES)
  want_R = return_BN.reshape(-1)
  # exp(old - drawn) = e, above the first cap and below the second.
  weight = policy_loss.importance_weight(
    np.float32(OLD), np.float32(DRAWN), cap
  )
  assert weight == pytest.approx(min(cap, np.e))
  for row, mask, want in zip(rows.advantage, rows.loss_mask > 0, want_R):
    np.testing.assert_allclose(row[mask], weight * want, rtol=1e-5)


def test_kl_in_the_loss_leaves_advantages_alone():
  scored, rows = _packed(kl_in="loss", importance_cap=0.0)
  for row, mask, want in zip(
    rows.advantage, rows.loss_mask > 0, scored.total_BN.reshape(-1)
  ):
    np.testing.assert_allclose(row[mask], want, rtol=1e-5)


def test_truncated_completions_count_in_the_baseline_and_not_in_the_loss():
  """The third of four, of 4 tokens, has no end."""
  settings = {
    "kl_in": "loss", "importance_cap": 0.0, "estimator": "dr_grpo",
    "finished": False,
  }  # fmt: skip
  _, whole = _packed(**settings)
  scored, rows = _packed(**settings, mask_truncated=True)
  assert whole.loss_mask.sum(axis=1).tolist() == list(SIZES)
  assert rows.loss_mask.sum(axis=1).tolist() == [3, 2, 0, 1]
  centred = scored.total_BN - scored.total_BN.mean(axis=1, keepdims=True)
  last = rows.advantage[3][rows.loss_mask[3] > 0]
  np.testing.assert_allclose(last, centred[1, 1], rtol=1e-5)
