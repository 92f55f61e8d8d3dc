"""Files become disjoint tasks and documents, or an error that names its line.

The fast tests write their own files; the real ones are `shared_data`.
"""

import dataclasses
import json
import lzma
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT

from opera_jax import structs
from opera_jax.configs import common, open_ended
from opera_jax.data import drafts
from opera_jax.experiments import opera_rl
from opera_jax.rl import score, step_metrics
from opera_jax.run import tasks
from opera_jax.text import words

SUBJECTS = ("storm", "garden", "harbor", "bridge", "winter", "orchard", "mill")


def _rows(count):
  """Tasks about distinct things."""
  out = []
  for i in range(count):
    thing = f"{SUBJECTS[i % len(SUBJECTS)]} {i}"
    out.append(
      {
        "id": f"t{i}",
        "task": "chat",
        "prompt": f"Write about the {thing}.",
        "reference": f"The {thing} was cold and quiet. " * 6,
      }
    )
  return out


def _maths(count):
  return [
    {
      "question": f"Ann has {i} cats and buys 2. How many?",
      "answer": f"She has {i} + 2 = <<{i}+2={i + 2}>>{i + 2} cats.\n"
      f"#### {i + 2}",
    }
    for i in range(count)
  ]


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _load(**changes):
  data = common.get_config().data.to_dict() | {
    "kind": "jsonl",
    "task_map": {"chat": "open_ended", "math": "math"},
    "synthesis": 4,
    "rl": 100,
    "held_out": 5,
    "documents": 40,
    "excerpt_words": 12,
  }
  return tasks.load(seed=0, **(data | changes))


def test_no_document_knows_a_held_out_prompt(tmp_path):
  loaded = _load(
    path=_write(tmp_path / "a.jsonl", _rows(20)),
    math_path=_write(tmp_path / "m.jsonl", _maths(30)),
    math_limit=10,
    documents=60,
  )
  held = {p.prompt for p in loaded.held_out}
  train = {p.prompt for p in loaded.rl}
  assert len(held) == 5 and len(train) == 25 and not held & train
  assert {p.prompt for p in loaded.synthesis} < train
  known = {d.prompt for d in loaded.documents}
  assert len(loaded.documents) == 60 and not held & known
  # Every training task, and maths rows beyond the limit, give documents.
  assert train <= known and known - train
  again = _load(
    path=_write(tmp_path / "a.jsonl", _rows(20)),
    math_path=_write(tmp_path / "m.jsonl", _maths(30)),
    math_limit=10,
    documents=60,
  )
  assert again == loaded


def test_a_mix_of_sets_keeps_ids_apart_and_duplicates_together(tmp_path):
  """The shared prompt and the near duplicate are on one side, in both sets."""
  first, second = _rows(60), _rows(75)[60:]
  long = "Tell me in five calm words why the harbor is so very quiet today"
  first[0]["prompt"] = second[0]["prompt"] = "Say the same."
  first[1]["prompt"], second[1]["prompt"] = long, long + " please"
  for new, row in enumerate(second):
    row["id"] = f"t{new}"  # as in the first set
  sources = [
    _write(tmp_path / "a.jsonl", first),
    _write(tmp_path / "b.jsonl", second),
    _write(tmp_path / "m.jsonl", _maths(30)),
  ]
  mix = list(zip(sources, (2.0, 1.0, 1.0), ("large", "small", "sums")))
  sides = set()
  for held_out in range(4, 30, 2):
    loaded = _load(
      mix=mix,
      math_path=sources[2],
      near_duplicate=0.7,
      held_out=held_out,
      documents=0,
    )
    every = [*loaded.rl, *loaded.held_out]
    # Each set gives what it has of 100 tasks, the rest by weight.
    assert len({p.id for p in every}) == len(every)
    assert {p.id.partition("/")[0] for p in every} == {"large", "small", "sums"}
    assert all(p.id.startswith(f"{p.set}/") for p in every)
    assert {p.set for p in every if p.task == "math"} == {"sums"}
    held = {p.id for p in loaded.held_out}
    for one in ("t0", "t1"):
      assert (f"large/{one}" in held) == (f"small/{one}" in held)
      sides.add(f"large/{one}" in held)
  assert sides == {True, False}
  assert loaded.weights == {"large": 2.0, "small": 1.0, "sums": 1.0}
  assert set(loaded.digests) == {f"data.mix/{name}" for name in loaded.weights}
  few = _load(mix=mix, math_path=sources[2], rl=20, documents=0)
  counts = {name: 0 for name in few.weights}
  for prompt in few.rl:
    counts[prompt.set] += 1
  assert counts == {"large": 10, "small": 5, "sums": 5}
  assert [p.set for p in few.rl[:10]] != ["large"] * 10  # shuffled


def test_a_set_with_too_few_tasks_for_its_share_is_refused(tmp_path):
  first = _write(tmp_path / "a.jsonl", _rows(60))
  second = _write(tmp_path / "b.jsonl", _rows(63)[60:])
  config = common.get_config()
  config.rl.prompts = 8
  loaded = _load(mix=[(first, 5.0), (second, 1.0)], held_out=0, documents=0)
  opera_rl.check_enough_prompts(config, loaded)
  loaded = dataclasses.replace(loaded, weights={"a": 1.0, "b": 1.0})
  with pytest.raises(ValueError, match="Set 'b' .* has 3 prompts .* up to 4"):
    opera_rl.check_enough_prompts(config, loaded)


def test_bad_rows_of_all_sets_are_in_one_error(tmp_path):
  first, second = _rows(4), _rows(4)
  first[1]["prompt"] = ""
  second[2]["task"] = "dance"
  sources = [
    _write(tmp_path / "a.jsonl", first),
    _write(tmp_path / "b.jsonl", second),
  ]
  with pytest.raises(ValueError) as error:
    _load(mix=[(source, 1.0) for source in sources])
  assert "a.jsonl:2:" in str(error.value) and "b.jsonl:3:" in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_no_embedded_task_or_document_says_what_a_held_out_one_does(share):
  """There are but 624 distinct sums: without care a third of them leaks."""
  data = common.get_config().data.to_dict() | {
    "math_share": share,
    "synthesis": 60,
    "rl": 80,
    "held_out": 120,
    "documents": 900,
  }
  loaded = tasks.load(seed=0, **data)
  held = {words.normal(p.prompt) for p in loaded.held_out}
  assert len(loaded.held_out) == 120 and len(loaded.documents) == 900
  for others in (loaded.synthesis, loaded.rl, loaded.documents):
    assert held.isdisjoint(words.normal(p.prompt) for p in others)
  assert tasks.load(seed=0, **data) == loaded
  with pytest.raises(ValueError, match="Lower config.data.held_out"):
    tasks.load(seed=0, **data | {"math_share": 1.0, "held_out": 60_000})


def test_what_differs_in_case_or_space_alone_falls_on_one_side(tmp_path):
  rows = []
  for row in _rows(12):
    for i, text in enumerate((row["prompt"], row["prompt"].upper() + " ")):
      rows.append(row | {"id": f"{row['id']}.{i}", "prompt": text})
  bare = [
    {
      "id": f"b{i}",
      "task": "chat",
      "reference": "",
      "prompt": f"  {row['prompt'].lower()}",
    }
    for i, row in enumerate(_rows(12))
  ]
  loaded = _load(
    path=_write(tmp_path / "a.jsonl", [*rows, *bare]),
    held_out=6,
    synthesis=10,
    documents=0,
  )
  held = {words.normal(p.prompt) for p in loaded.held_out}
  assert len(loaded.held_out) == 6 and len(held) == 3
  for others in (loaded.synthesis, loaded.rl):
    assert held.isdisjoint(words.normal(p.prompt) for p in others)
  assert any("the prompt of a held-out task" in note for note in loaded.notes)


def test_references_are_excerpts_and_the_notes_say_so(tmp_path, capsys):
  rows = _rows(10)
  rows[3]["prompt"] = "word " * 40
  loaded = _load(path=_write(tmp_path / "a.jsonl", rows), prompt_words=30)
  every = loaded.rl + loaded.held_out
  assert len(every) == 9
  for prompt in every:
    assert prompt.reference.endswith("quiet.")
    assert len(prompt.reference.split()) <= 12
  notes = " ".join(loaded.notes)
  assert "Dropped 1 open-ended and 0 maths tasks" in notes
  assert "The references of 9 open-ended tasks" in notes
  printed = capsys.readouterr().out
  assert all(note in printed for note in loaded.notes)
  whole = _load(path=_write(tmp_path / "a.jsonl", _rows(10)), excerpt_words=0)
  assert all(len(p.reference.split()) > 12 for p in whole.rl)
  assert "excerpt" not in " ".join(whole.notes)


def test_maths_alone_thinks_its_solution_and_answers_it(tmp_path):
  loaded = _load(math_path=_write(tmp_path / "m.jsonl", _maths(12)), held_out=2)
  assert all(p.task == "math" and p.reference.isdigit() for p in loaded.rl)
  assert all(p.id.startswith("math/") for p in loaded.rl)
  checked = 0
  for document in loaded.documents:
    number = int(document.prompt.split()[2])
    steps = document.thought.split("\n\n")
    assert steps[0] == f"She has {number} + 2 = {number + 2} cats."
    assert document.answer == f"The answer is {number + 2}."
    assert "<<" not in document.thought and "#" not in document.thought
    checked += f"{number}+2 = {number + 2}" in " ".join(steps[1:])
  assert 0 < checked < len(loaded.documents)


def test_the_answer_of_a_document_is_the_better_response(tmp_path):
  rows = _rows(9)
  responses = [
    {
      "id": row["id"],
      "score": score,
      "response": f"{name} words about {row['id']} are these words here. " * 3,
    }
    for row in rows
    for score, name in ((0.2, "Weak"), (0.9, "Strong"))
  ]
  path = tmp_path / "r.jsonl.xz"
  lines = [json.dumps(r) for r in responses]
  lines.insert(1, json.dumps({"id": "t0", "score": 0.5, "response": " "}))
  path.write_bytes(lzma.compress("\n".join(lines).encode()))
  loaded = _load(
    path=_write(tmp_path / "a.jsonl", rows), responses_path=str(path)
  )
  id_of = {row["prompt"]: row["id"] for row in rows}
  own, steps = 0, 0
  for document in loaded.documents:
    name = id_of[document.prompt]
    assert document.answer == f"Strong words about {name} are these words here."
    for step in document.thought.split("\n\n"):
      assert "words about t" in step
      steps += 1
      own += f"about {name} " in step
  # Most steps stay with the prompt, some go astray.
  assert steps / 2 < own < steps
  assert {d.closed for d in loaded.documents} == {True, False}
  assert any(d.after for d in loaded.documents)


@pytest.mark.parametrize(
  "words, expected",
  [
    (0, "One two. Three four five. Six seven"),
    (7, "One two. Three four five. Six seven"),
    (6, "One two. Three four five."),
    (4, "One two."),
    (3, "One two."),
    (2, "One two."),
    (1, "One"),
  ],
)
def test_excerpt(words, expected):
  text = "One two. Three four five. Six seven\n"
  assert drafts.excerpt(text, words) == expected


def test_excerpt_does_not_end_on_the_number_of_a_list():
  text = "There are steps to take:\n\n1. Go on and on and on"
  assert drafts.excerpt(text, 6) == "There are steps to take:\n\n1."
  text = "Take a step. Then:\n\n1. Go on and on and on"
  assert drafts.excerpt(text, 5) == "Take a step."


def test_sentences_lose_markup_and_are_never_none():
  text = "## A heading\n- **Bold** claims need five words.\n3. Short one.\n"
  assert drafts.sentences(text, (4, 9)) == ["Bold claims need five words."]
  assert drafts.sentences("no sentence here", (4, 9)) == ["no sentence here"]


@pytest.mark.parametrize(
  "line, rule",
  [
    ("{broken", r"r.jsonl:2: .* is not a line of JSON"),
    ('["a"]', r"r.jsonl:2: .* is no JSON object"),
    ('{"id": "t1", "response": "x"}', r"r.jsonl:2: .*'score'"),
    ('{"id": "t1", "score": "high", "response": "x"}', r":2: score is 'high'"),
    ('{"id": "t1", "score": NaN, "response": "x"}', r":2: 'score' holds nan"),
    ('{"id": "t1", "score": 1, "response": null}', r":2: .*NoneType"),
  ],
)
def test_bad_responses(tmp_path, line, rule):
  path = tmp_path / "r.jsonl"
  path.write_text('{"id": "t0", "score": 1, "response": "fine"}\n' + line)
  with pytest.raises(ValueError, match=rule):
    drafts.read_responses(path, ["t0", "t1"])


def test_bad_response_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="config.data.responses_path"):
    drafts.read_responses(tmp_path / "none.jsonl", ["t0"])
  path = tmp_path / "r.jsonl"
  path.write_text('{"id": "other", "score": 1, "response": "fine"}\n')
  with pytest.raises(ValueError, match="1 lines answers one of the 2"):
    drafts.read_responses(path, ["t0", "t1"])
  packed = tmp_path / "r.jsonl.xz"
  packed.write_bytes(lzma.compress(path.read_bytes())[:-12])
  with pytest.raises(ValueError, match="r.jsonl.xz:.* breaks off"):
    drafts.read_responses(packed, ["t0"])


@pytest.mark.parametrize(
  "changes, error, rule",
  [
    ({"kind": "books"}, ValueError, "'books'; use 'storyworld' or 'jsonl'"),
    ({"path": ""}, ValueError, "--config.data.path=FILE"),
    ({"path": "no/such.jsonl"}, FileNotFoundError, "no/such.jsonl: no such"),
    ({"math_path": "none.jsonl"}, FileNotFoundError, "none.jsonl: no such"),
    ({"held_out": 9}, ValueError, r"(?s)9 tasks are left .*held_out is 9"),
    (
      {"synthesis": 5, "needs": {"synthesis": 1}},
      ValueError,
      "(?s)is 5 prompts and only 4 remain beside 5 held out.*"
      "These values fit: --config.data.held_out=1",
    ),
    ({"task_map": {}}, ValueError, r"a.jsonl:1: task is 'chat'.*task_map"),
    ({"prompt_words": 2}, ValueError, "(?s)0 tasks are left.*prompt_words"),
  ],
)
def test_bad_settings(tmp_path, changes, error, rule):
  path = _write(tmp_path / "a.jsonl", _rows(9))
  with pytest.raises(error, match=rule):
    _load(**({"path": path} | changes))


def test_a_file_without_tasks_is_open_ended_and_says_so(tmp_path, capsys):
  rows = [{"prompt": r["prompt"], "reference": "It is."} for r in _rows(9)]
  path = _write(tmp_path / "a.jsonl", rows)
  loaded = _load(path=path)
  assert {p.task for p in loaded.rl} == {"open_ended"}
  said = capsys.readouterr().out
  assert f"{path} has no column 'task', so its 9 tasks are open-ended" in said
  _load(path=path, default_task="open_ended")
  assert "has no column" not in capsys.readouterr().out


def test_shares_divide_what_there_is(tmp_path):
  rows = _rows(40)
  bare = [r | {"id": f"b{i}", "prompt": f"Bare {i}.", "reference": ""}
          for i, r in enumerate(_rows(3))]  # fmt: skip
  path = _write(tmp_path / "a.jsonl", [*rows, *bare])
  loaded = _load(path=path, shares=(0.4, 0.5, 0.1), documents=0)
  sides = [loaded.synthesis, loaded.rl, loaded.held_out]
  assert list(map(len, sides)) == [16 + 3, 20, 4]
  ids = [prompt.id for side in sides for prompt in side]
  assert len(set(ids)) == 43  # no two stages share a task
  assert _load(path=path, shares=(0.4, 0.5, 0.1), documents=0) == loaded
  alone = _load(path=path, shares=(0.0, 1.0, 0.0), documents=0)
  assert (len(alone.rl), alone.synthesis, alone.held_out) == (40, [], [])
  # Two tasks that stay together do not fit into one held-out place.
  twins = [row | {"id": row["id"] + "x"} for row in _rows(10)]
  _write(tmp_path / "b.jsonl", [*_rows(10), *twins])
  odd = _load(
    path=str(tmp_path / "b.jsonl"), shares=(0.4, 0.4, 0.15), documents=0
  )
  assert len(odd.held_out) == 2


def test_a_set_too_small_says_all_that_it_lacks_and_what_fits(tmp_path):
  path = _write(tmp_path / "a.jsonl", _rows(40))
  asked = {"synthesis": 20_000, "rl": 1_674, "held_out": 20, "documents": 0}
  needs = {"synthesis": 1, "rl": 64, "held_out": 1}
  with pytest.raises(ValueError) as error:
    _load(path=path, **asked, needs=needs)
  said = str(error.value)
  assert "40 tasks are left with a reference, too few for synthesis 20" in said
  assert "only 20 remain beside 20 held out" in said
  assert "RL gets 20 tasks and takes config.rl.prompts = 64" in said
  assert '--config.data.shares="(0.4,0.5,0.1)"' in said
  flags = dict(
    part.removeprefix("--config.").split("=")
    for part in said.partition("These values fit: ")[2].split("\n")[0].split()
  )
  needs["rl"] = int(flags.pop("rl.prompts"))
  fitting = {name.removeprefix("data."): int(v) for name, v in flags.items()}
  assert needs["rl"] == 32 and fitting == {"held_out": 4, "synthesis": 36}
  _load(path=path, **asked | fitting, needs=needs)
  # A stage that does not run needs none, and the split stays the same.
  rl_alone = _load(path=path, **asked, needs={"rl": 8})
  assert rl_alone.rl == _load(path=path, **asked).rl


def test_bare_maths_answers_cannot_be_pretrained_on(tmp_path):
  rows = [
    {"id": i, "task": "math", "prompt": f"{i} + 1?", "reference": f"{i + 1}"}
    for i in range(9)
  ]
  path = _write(tmp_path / "a.jsonl", rows)
  with pytest.raises(ValueError, match="None of 4 .*config.data.documents"):
    _load(path=path)
  assert _load(path=path, documents=0).documents == []


def test_too_few_rl_tasks_stop_before_any_training(tmp_path):
  config = open_ended.get_config()
  config.data.path = _write(tmp_path / "a.jsonl", _rows(9))
  config.data.held_out = 6
  config.data.synthesis = 3
  config.base.batch_size = config.sft.batch_size = 8  # of eight devices
  with pytest.raises(
    ValueError, match="RL gets 3 tasks and takes config.rl.prompts = 12"
  ):
    opera_rl.opera(config, str(tmp_path / "run"))
  assert not (tmp_path / "run" / "base").exists()


def test_parts_of_one_task_are_averaged_over_that_task_alone():
  parts = {
    "score": np.asarray([[-2.0, -4.0], [0.0, 0.0]]),
    "correct": np.asarray([[0.0, 0.0], [1.0, 0.0]]),
    "cannot_tell": np.asarray([[0.0, 0.0], [0.0, 1.0]]),
    "check_failed": np.asarray([[0.0, 0.0], [1.0, 1.0]]),
    "undecided": np.asarray([[0.0, 0.0], [0.0, 0.0]]),
    "reflections": np.asarray([[1, 1], [0, 0]]),
  }
  sample = structs.Sample(np.zeros(2, np.int32), np.zeros(2), True)
  logprobs = structs.Logprobs(
    [np.zeros(3)] * 4, [np.zeros(3)] * 4, [], [], 12, 0
  )

  def metrics(opened, ema):
    scored = score.Scored(
      np.asarray([[0.2, 0.4], [1.0, 0.0]]),
      parts,
      [],
      logprobs,
      None,
      None,
      np.asarray(opened),
      separate_tokens=20,
      rollouts=types.SimpleNamespace(
        texts=["yes"] * 4, prompts=[types.SimpleNamespace(set="")] * 2
      ),
    )
    clock = {"time/start": 0.0, "time/reward": 1.0}
    return step_metrics.rl_step(
      scored,
      [[sample] * 2] * 2,
      old=logprobs,
      ema=ema,
      updates=[{}],
      clock=clock,
    )

  both = metrics([True, False], -3.0)
  assert both["time/reward_fraction"] == 1.0
  assert both["scoring/separate_tokens"] == 20
  assert both["reward/score"] == -3.0 and both["reward/correct"] == 0.5
  shares = [both[f"reward/{name}"] for name in step_metrics.MATHS[2:]]
  assert shares == [0.5, 1.0, 0.0]
  assert both["thought/reflections"] == 0.5
  assert both["sampler_trainer/truncation_diff"] == 0.0
  sample = dataclasses.replace(sample, truncated_logprob=np.full(2, 0.25))
  assert metrics([True, False], -3.0)["sampler_trainer/truncation_diff"] == 0.25
  maths = metrics([False, False], None)
  assert "reward/score" not in maths and "reward/score_ema" not in maths


def test_real_files_load(shared_data):
  config = open_ended.get_config()
  data = config.data.to_dict() | {
    "path": str(shared_data / "open_ended" / "train.jsonl"),
    "math_path": str(shared_data / "gsm8k" / "train.jsonl"),
    "documents": 300,
  }
  loaded = tasks.load(seed=0, **data)
  assert len(loaded.held_out) == 100
  assert len(loaded.rl) == 438 - 147 + 150 - 100
  assert len(loaded.documents) == 300
  longest = max(len(p.reference.split()) for p in loaded.rl)
  assert longest <= config.data.excerpt_words


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["open_ended and maths", "maths alone"])
def test_the_chain_runs_on_files(tmp_path, kind):
  """Every stage finishes on a user's own small files."""
  maths = _write(tmp_path / "m.jsonl", _maths(60))
  flags = [
    f"--config.data.math_path={maths}",
    "--config.data.synthesis=4",  # of 20 maths tasks 16 are held out
  ]
  if kind != "maths alone":
    flags.append(
      f"--config.data.path={_write(tmp_path / 'a.jsonl', _rows(60))}"
    )
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.opera_rl"),
      "--config=configs/open_ended.py:smoke",
      f"--workdir={tmp_path / 'run'}",
      "--config.data.documents=1200",
      "--config.seed=3",  # holds tasks of both kinds out
      *flags,
    ],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": ""},  # one device
    capture_output=True,
    text=True,
    check=False,
    timeout=1700,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  result = json.loads((tmp_path / "run/evaluate/DONE.json").read_text())
  measures = {row["measure"]["key"] for row in result["table"]}
  assert "correct" in measures
  assert ("r_self" in measures) == (kind != "maths alone")
  lines = (tmp_path / "run/rl/metrics.jsonl").read_text().splitlines()
  assert len(lines) == 2
  assert "excerpt" in (tmp_path / "run/report.html").read_text() or (
    kind == "maths alone"
  )
