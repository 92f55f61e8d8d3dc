"""What was made from other data, tokenizers or models is not gone on with."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.configs import tiny
from opera_jax.data import storyworld
from opera_jax.models import decoder, hf_checkpoint, lora
from opera_jax.run import setup, workdir
from opera_jax.stages import supervised
from opera_jax.train import checkpoint


def _write(path, seed, count=60):
  rows = [
    {n: getattr(p, n) for n in ("id", "task", "prompt", "reference")}
    for p in storyworld.prompts(count, seed)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make(tmp_path):
  """`make(**changes of config.data)`: a run on `tasks.jsonl`."""
  _write(tmp_path / "tasks.jsonl", seed=1)

  def made(folder="run", redo="", path="tasks.jsonl", **changes):
    config = tiny.get_config("smoke")
    config.unlock()
    config.data.kind = "jsonl"
    config.data.path = str(tmp_path / path)
    config.data.documents = 40
    config.data.synthesis, config.data.rl, config.data.held_out = 12, 8, 4
    config.data.update(changes)
    config.redo = redo
    return setup.setup(
      tmp_path / folder,
      temperature=1.0,
      **{name: config[name] for name in setup.SECTIONS},
    )

  return made


STAGES = {
  "synthesize": {"tasks": ("synthesis",)},
  "rl": {"tasks": ("rl",)},
  "evaluate": {"tasks": ("held_out",)},
  "base": {"tasks": ("documents",)},
}


def _begin(run):
  for name, reads in STAGES.items():
    run.stage(name, **reads).begin()


def _refused(run):
  """The stages that are not gone on with, and what they say."""
  out = {}
  for name, reads in STAGES.items():
    try:
      run.stage(name, **reads)
    except ValueError as error:
      out[name] = str(error)
  return out


def test_a_tokenizer_that_nothing_was_made_with_is_made_again(make, capsys):
  """The first start failed after it; the second has other documents."""
  before = make().tokenizer_digest
  assert make(documents=50).tokenizer_digest != before
  assert "redo: drops tokenizer" in capsys.readouterr().out
  make(documents=50).stage("base", tasks=("documents",)).begin()
  with pytest.raises(ValueError, match=r"data\.documents: 50 then, 40 now"):
    make()


def test_new_content_of_the_same_path_is_refused(make, tmp_path):
  _begin(make())
  _write(tmp_path / "tasks.jsonl", seed=2)
  with pytest.raises(ValueError) as caught:
    make()
  said = str(caught.value)
  for words in (
    "Stage tokenizer",
    f"data.path ({tmp_path / 'tasks.jsonl'}): sha256",
    "a new --workdir",
    "--config.redo=tokenizer",
  ):
    assert words in said, said
  # The old content under a new name is the same.
  _write(tmp_path / "moved.jsonl", seed=1)
  assert not _refused(make(path="moved.jsonl"))
  # Redone, all of it begins anew; what it was lies beside it.
  run = make(redo="tokenizer")
  assert not _refused(run)
  assert (tmp_path / "run" / "dropped" / "tokenizer-1" / "DONE.json").exists()


@pytest.mark.parametrize(
  "change,stages",
  [
    ({"documents": 50}, {"base"}),
    ({"synthesis": 13}, {"synthesize", "rl"}),
    ({"rl": 9}, {"rl"}),
    ({"held_out": 5}, set(STAGES)),
    ({"prompt_words": 5_000}, set(STAGES)),
  ],
)
def test_a_setting_matters_to_the_stages_that_read_it(make, change, stages):
  _begin(make())
  # The tokenizer, too, is trained on documents: it is looked at by itself.
  made_again = make("other", **change)
  run = dataclasses.replace(
    made_again, workdir=make().workdir, tokenizer_digest=make().tokenizer_digest
  )
  said = _refused(run)
  assert set(said) == stages
  for words in said.values():
    assert f"data.{next(iter(change))}: " in words


def test_maths_and_responses_are_looked_at_where_they_are_read(make, tmp_path):
  maths = tmp_path / "maths.jsonl"

  def sums(solved):
    maths.write_text(
      "".join(
        json.dumps({"question": f"{i} + 1?", "answer": f"It {solved} #### {i}"})
        + "\n"
        for i in range(20)
      )
    )

  responses = tmp_path / "responses.jsonl"

  def answers(text):
    responses.write_text(
      "".join(
        json.dumps({"id": p.id, "score": 1, "response": f"{text} {i} so."})
        + "\n"
        for i, p in enumerate(storyworld.prompts(60, 1))
      )
    )

  sums("is"), answers("A fox")
  given = {"math_path": str(maths), "responses_path": str(responses)}
  first = make(**given)
  _begin(first)
  assert not _refused(make(**given))
  answers("An owl")
  with pytest.raises(ValueError, match=r"data\.responses_path \(.*responses\."):
    make(**given)
  run = dataclasses.replace(
    make("other", **given),
    workdir=first.workdir,
    tokenizer_digest=first.tokenizer_digest,
  )
  assert set(_refused(run)) == {"base"}
  answers("A fox"), sums("was")
  with pytest.raises(ValueError, match=r"data\.math_path \(.*maths\.jsonl\)"):
    make(**given)


def test_a_tokenizer_that_has_changed_is_refused(make, tmp_path):
  make()
  path = tmp_path / "run" / "tokenizer" / "tokenizer_config.json"
  path.write_text(path.read_text().replace("{", "{ ", 1))
  with pytest.raises(ValueError, match="holds another tokenizer.*redo=token"):
    make()


def test_another_tokenizer_under_the_same_path_is_refused(make, tmp_path):
  def of(seed):
    config = tiny.get_config("smoke")
    config.unlock()
    config.seed, config.data.documents = seed, 40
    made = setup.setup(
      tmp_path / f"source-{seed}",
      temperature=1.0,
      **{name: config[name] for name in setup.SECTIONS},
    )
    made.tokenizer.save(tmp_path / "words")

  def using(**changes):
    config = tiny.get_config("smoke")
    config.unlock()
    config.tokenizer.path = str(tmp_path / "words")
    config.update(changes)
    return setup.setup(
      tmp_path / "run",
      temperature=1.0,
      **{name: config[name] for name in setup.SECTIONS},
    )

  of(0)
  using()
  using().stage("base").begin()
  of(1)
  with pytest.raises(ValueError, match=r"tokenizer\.path \(.*words\): sha256"):
    using()
  # Once it is saved in the workdir, where it came from may be gone.
  (tmp_path / "words").rename(tmp_path / "gone")
  using()


def test_another_checkpoint_under_the_same_path_is_refused(make, tmp_path):
  run = make()
  recipe = supervised.Recipe(**tiny.get_config("smoke").base)

  def load():
    with checkpoint.Preemption() as preemption:
      supervised.base(run, recipe, preemption, path=str(tmp_path / "model"))

  def write(seed):
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    _, params = decoder.create(run.model, seed=seed)
    hf_checkpoint.save(tmp_path / "model", params, run.model)

  write(1)
  load()
  load()
  write(2)
  with pytest.raises(ValueError, match=r"checkpoint \(.*model\): sha256"):
    load()
  (tmp_path / "model").rename(tmp_path / "gone")
  load()


def test_a_model_made_again_under_its_successors_is_refused(make):
  run = make()
  for seed, refused in ((1, False), (1, False), (2, True)):
    params = decoder.create(run.model, seed=seed)[1]
    params = jax.device_put(
      params, jax.tree.map(lambda x: x.sharding, run.initial())
    )
    base = run.workdir / "base"
    if (base / "model").exists():
      (base / "model").rename(base / f"before-{seed}-{refused}")
    run.stage("base").finish({"model": run.save("base", params)})
    if refused:
      with pytest.raises(ValueError, match=r"base/model \(.*\): sha256"):
        run.stage("sft", models=("base",))
    else:
      run.stage("sft", models=("base",)).begin()
  # Nor is a model that is not the one its stage has reported.
  (base / "model").rename(base / "newest")
  (base / "before-1-False").rename(base / "model")
  with pytest.raises(ValueError, match="holds another model.*redo=base"):
    run.load("base")


def test_how_often_a_stage_saves_does_not_matter(make):
  run = make()
  run.stage("sft", sft={"epochs": 1, "checkpoint_every": 5}).begin()
  run.stage("sft", sft={"epochs": 1, "checkpoint_every": 6})
  assert "sft.epochs" in workdir.settings(run.workdir, "sft")


def test_with_lora_a_model_is_loaded_frozen_beside_an_adapter_that_is_off(make):
  run = make()
  assert run.with_lora(None) is run
  run.stage("sft").finish({"model": run.save("sft", run.initial())})
  low = run.with_lora(lora.Settings(rank=2, targets=("q", "down")))
  adapter, base = lora.split(low.load("sft"))
  plain = run.load("sft")
  for ours, theirs in zip(jax.tree.leaves(base), jax.tree.leaves(plain)):
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))
  assert not any(x.any() for x in jax.tree.leaves(adapter))
  # Sampling and saving see the merged model, in its own dtypes.
  used = jax.tree.map(lambda x: x + 0.1, low.new_adapter(0))
  params = lora.combine(used, base)
  merged = lora.merge(params, low.model.lora, "float32")
  shape = jax.tree.structure(plain)
  assert jax.tree.structure(low.for_rollout(params)) == shape
  low.stage("rl").finish({"model": low.save("rl", params)})
  for got in (low.for_rollout(params), run.load("rl")):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(merged)):
      np.testing.assert_array_equal(ours, theirs)
  for ours, theirs in zip(
    jax.tree.leaves(low.load_adapter("rl")), jax.tree.leaves(used)
  ):
    np.testing.assert_array_equal(ours, theirs)
    assert ours.sharding == theirs.sharding
  with pytest.raises(FileNotFoundError, match="config.sft.lora.rank above 0"):
    low.load_adapter("sft")
  other = run.with_lora(lora.Settings(rank=3, targets=("q", "down")))
  with pytest.raises(checkpoint.MismatchError, match="q_lora_a"):
    other.load_adapter("rl")


def test_the_tokenizer_is_configured_once_and_kept(make, tmp_path):
  def using(**changes):
    config = tiny.get_config("smoke")
    config.unlock()
    config.data.documents = 40
    config.tokenizer.update(changes)
    return setup.setup(
      tmp_path / "run",
      temperature=1.0,
      **{name: config[name] for name in setup.SECTIONS},
    ).tokenizer

  file = tmp_path / "template.jinja"
  file.write_text(
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}A: <reason>{% endif %}"
  )
  options = {"think": ("<reason>", "</reason>"), "chat_template": str(file)}
  for _ in range(2):
    made = using(**options, enable_thinking="on")
    assert made.think == ("<reason>", "</reason>") and made.opens_thought
    assert made.decode(made.chat_prompt("Hi")) == "HiA: <reason>"
    assert made.enable_thinking is True
  workdir.Stage(tmp_path / "run", "base", {}).begin()
  with pytest.raises(ValueError, match="enable_thinking: 'on' then"):
    using(**options)
  file.write_text(file.read_text() + " ")
  with pytest.raises(ValueError, match=r"tokenizer\.chat_template \(.*sha256"):
    using(**options, enable_thinking="on")
