"""The RL prompts are chosen by samples of the SFT model, once."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.configs import tiny
from opera_jax.rollout import sampling
from opera_jax.run import setup, workdir
from opera_jax.stages import rl_select
from opera_jax.synthesis import rl_filter
from opera_jax.train import checkpoint

SETTINGS = sampling.Sampling(max_new_tokens=8)


# A judge: 5 for the sum of 2 and 3, 2 for the rest.
JUDGE = """
def shortness(prompts, completions, reference, **_):
  return [5 if "five" in text else 2 for text in completions]
"""


class _Engine:
  """Says "five" to what asks for it, and as many right sums as the id says."""

  def __init__(self, words):
    self.words, self.asked = words, []

  def sample(self, params, prompts, settings, key, *, samples, ids, advance):
    self.asked.append((tuple(ids), samples))
    return [[self._one(name, n) for n in range(samples)] for name in ids]

  def _one(self, name, n):
    if name.startswith("m"):
      text = f"#### {2 if n < int(name[1:]) else 7}"
    else:
      text = "five" if name == "o0" else "none"
    tokens = self.words.encode(text)
    return structs.Sample(tokens, np.zeros(len(tokens), np.float32), True)


@pytest.fixture
def run(tmp_path, monkeypatch):
  config = tiny.get_config("smoke")
  config.unlock()
  config.data.documents = 60
  made = setup.setup(
    tmp_path / "run",
    temperature=1.0,
    **{name: config[name] for name in setup.SECTIONS},
  )
  monkeypatch.setattr(setup.Run, "load", lambda run, _: run.initial())
  workdir.Stage(made.workdir, "sft", {}).finish({"model": "made up"})
  rl = [structs.Prompt(f"m{k}", "math", "1 + 1?", "2") for k in range(4)]
  rl += [structs.Prompt(f"o{k}", "open_ended", "Say.", "r") for k in range(3)]
  return dataclasses.replace(
    made,
    engine=_Engine(made.tokenizer),
    tasks=dataclasses.replace(made.tasks, rl=rl),
  )


def test_maths_by_samples_and_the_rest_by_a_judge(run, tmp_path, monkeypatch):
  (tmp_path / "my_judge.py").write_text(JUDGE)
  monkeypatch.syspath_prepend(tmp_path)
  rules = rl_filter.Rules(samples=3, right=(1, 2), judge="my_judge:shortness")
  for _ in range(2):
    with checkpoint.Preemption() as preemption:
      chosen = rl_select.select(run, rules, SETTINGS, preemption)
    assert [p.id for p in chosen.tasks.rl] == ["m1", "m2", "o1", "o2"]
  # The second time nothing is sampled.
  assert run.engine.asked == [
    (("m0", "m1", "m2", "m3"), 3), (("o0", "o1", "o2"), 1),
  ]  # fmt: skip
  folder = run.workdir / "select_rl"
  rejected = [
    json.loads(line)
    for line in (folder / "rejected.jsonl").read_text().splitlines()
  ]
  assert [(r["id"], r["reason"]) for r in rejected] == [
    ("m0", "0 of 3 right"), ("m3", "3 of 3 right"), ("o0", "score above 3"),
  ]  # fmt: skip
  assert rejected[0]["right"] == 0 and rejected[2]["score"] == 5
  counts = json.loads((folder / "DONE.json").read_text())
  assert counts["kept"] == 4 and sum(counts.values()) == 7
  # RL begun on other prompts is not mixed with these.
  place, digest = chosen.tasks.digests["select_rl/prompts"]
  content = (folder / "prompts.jsonl").read_bytes()
  assert place == str(folder / "prompts.jsonl")
  assert digest == hashlib.sha256(content).hexdigest()


def test_no_rules_no_stage(run):
  with checkpoint.Preemption() as preemption:
    chosen = rl_select.select(run, rl_filter.Rules(), SETTINGS, preemption)
  assert chosen is run
  assert not (run.workdir / "select_rl").exists()


def test_the_settings_of_the_maths_checks_hold_here_too(run, monkeypatch):
  asked = []

  def correct_many(texts, references, **settings):
    asked.append((len(texts), settings))
    return [True] * len(texts)

  monkeypatch.setattr(rl_select.verifiable, "correct_many", correct_many)
  options = {"verifiable": {"timeout": 2.5, "workers": 3}}
  run = dataclasses.replace(run, reward=run.reward | {"options": options})
  rules = rl_filter.Rules(samples=3, right=(3,))
  with checkpoint.Preemption() as preemption:
    rl_select.select(run, rules, SETTINGS, preemption)
  settings = {"method": "exact", "timeout": 2.5, "workers": 3}
  assert asked == [(12, settings)]
