"""What rewards pay a trained tiny policy's samples, and their spoiled twins."""

import numpy as np
import pytest

from opera_jax.configs.methods import base
from opera_jax.evals import probes
from opera_jax.rl import score
from opera_jax.run import setup
from opera_jax.stages import held_out, reward_probes, supervised
from opera_jax.train import checkpoint

pytestmark = pytest.mark.slow
PARTS = {
  "opera": {},
  "r_self": {"terms": "opera", "mode": "r_self"},
  "verifiable": {"terms": "verifiable"},
  "format": {"terms": "format"},
  "short": {"terms": "length", "options": {"length": {"kind": "o1_pruner"}}},
  "sar": {"terms": "sar"},
}


@pytest.fixture(scope="module")
def paid(tmp_path_factory):
  """By reward and probe, what 24 tasks were paid; and the tasks."""
  config = base.smoke()
  config.data.documents = 2_400
  config.data.held_out = 24
  run = setup.setup(
    tmp_path_factory.mktemp("probing"),
    temperature=1.0,
    **{name: config[name] for name in setup.SECTIONS},
  )
  with checkpoint.Preemption() as preemption:
    supervised.base(run, supervised.Recipe(**config.base), preemption)
  params, prompts = run.load("base"), run.tasks.held_out
  groups = held_out.draw(run, params, prompts, samples=1, max_new_tokens=120)
  scorers = {
    name: score.RewardScorer(run.logprob_scorer, run.tokenizer, **settings)
    for name, settings in PARTS.items()
  }
  texts = [run.tokenizer.decode(g[0].tokens, skip_special=True) for g in groups]
  return (
    reward_probes.answers(run, scorers, params, prompts, texts),
    prompts,
    texts,
  )


def test_every_reward_answers_every_probe(paid):
  answered, prompts, _ = paid
  assert set(answered) == set(PARTS)
  for by_probe in answered.values():
    assert tuple(by_probe) == probes.NAMES
    for total_B in by_probe.values():
      assert total_B.shape == (len(prompts),) and np.isfinite(total_B).all()


def test_a_thought_cut_to_nothing_reflects_on_nothing(paid):
  answered, _, _ = paid
  assert not answered["r_self"]["thought_cut"].any()
  assert not answered["format"]["thought_cut"].any()


def test_repeating_a_thought_costs_where_length_does(paid):
  answered, _, texts = paid
  thought = np.asarray([bool(probes.read(t).steps) for t in texts])
  short = answered["short"]
  assert thought.sum() > 4
  assert (short["thought_repeated"] < short["honest"])[thought].all()


def test_what_can_be_gamed_is_seen(paid):
  """Echoing the reference wins both rewards that read it; keywords without
  content answer no sum."""
  answered, prompts, _ = paid
  maths = np.asarray([p.task == "math" for p in prompts])
  assert 4 < maths.sum() < 20
  assert answered["verifiable"]["reference_echoed"][maths].all()
  assert not answered["verifiable"]["keywords"].any()
  opera = {name: v[~maths].mean() for name, v in answered["opera"].items()}
  assert opera["reference_echoed"] > opera["honest"]
