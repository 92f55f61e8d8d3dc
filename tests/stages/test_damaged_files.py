"""Damage to a file of a run costs that file, or is named with a way on."""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from opera_jax.configs import tiny
from opera_jax.data import traces
from opera_jax.models import decoder
from opera_jax.rollout import sampling
from opera_jax.run import setup, workdir
from opera_jax.stages import pool, rl_select
from opera_jax.synthesis import rl_filter
from opera_jax.train import checkpoint, metrics


def _cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)


def _empty(path):
  path.write_bytes(b"")


def _other_type(path):
  path.write_text("[1, 2]\n")


def _bare(path):
  path.write_text('"text"\n')


def _deep(path):
  path.write_text("[" * 200_000)


def _folder(path):
  path.unlink()
  path.mkdir()


def _dangling(path):
  path.unlink()
  path.symlink_to(path.parent / "nowhere")


def _loop(path):
  path.unlink()
  path.symlink_to(path)


ALL = (_cut, _flip, _empty, _other_type, _bare, _deep, _folder, _dangling)
ALL += (_loop,)
every_damage = pytest.mark.parametrize(
  "damage", ALL, ids=[one.__name__[1:] for one in ALL]
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A run's folder with a tokenizer and the model of a finished stage."""
  folder = tmp_path_factory.mktemp("source") / "run"
  run = _setup(folder)
  params = jax.device_put(
    decoder.create(run.model, seed=1)[1],
    jax.tree.map(lambda x: x.sharding, run.initial()),
  )
  run.stage("base").finish({"model": run.save("base", params)})
  return folder


@pytest.fixture
def folder(source, tmp_path):
  """A copy of it, to be damaged."""
  return pathlib.Path(shutil.copytree(source, tmp_path / "run"))


def _setup(folder):
  config = tiny.get_config("smoke")
  config.unlock()
  config.data.documents = 60
  return setup.setup(
    folder,
    temperature=1.0,
    **{name: config[name] for name in setup.SECTIONS},
  )


def _says(error, path) -> None:
  """It names the file, and what to do."""
  said = str(error)
  assert str(path) in said, said
  for word in (
    "copy",
    "delete",
    "rights",
    "permissions",
    "redo",
    "workdir",
    "drop",
  ):
    if word in said:
      return
  raise AssertionError(said)


@every_damage
@pytest.mark.parametrize("name", ["SETTINGS.json", "DONE.json"])
@pytest.mark.parametrize("stage", ["base", "tokenizer"])
def test_a_record_of_a_stage(folder, stage, name, damage):
  path = folder / stage / name
  before = sorted(p.name for p in (folder / stage).iterdir())
  damage(path)
  with pytest.raises((ValueError, OSError)) as caught:
    run = _setup(folder)
    run.stage("base").finished()
    run.load("base")
  _says(caught.value, path)
  assert sorted(p.name for p in (folder / stage).iterdir()) == before
  if damage is not _folder:
    # The way that is offered leads on.
    workdir.redo(folder, stage)
    run = _setup(folder)
    assert not run.stage("base").finished()


@every_damage
def test_the_list_of_a_models_files(folder, damage):
  run, path = _setup(folder), folder / "base" / "model" / "0" / "FILES.json"
  damage(path)
  with pytest.raises(ValueError, match="FILES.json.*from a copy; or") as caught:
    run.load("base")
  assert str(folder / "base" / "model") in str(caught.value)
  # Nothing was moved by looking.
  assert os.path.lexists(path)


@pytest.mark.parametrize("damage", (_cut, _flip, _empty, _folder, _dangling))
def test_the_files_of_a_model(folder, damage):
  run, model = _setup(folder), folder / "base" / "model"
  files = [
    path
    for path in sorted((model / "0").rglob("*"))
    if path.is_file() and path.name != "FILES.json" and path.stat().st_size
  ]
  assert len(files) > 3
  for path in files:
    kept = path.read_bytes()
    damage(path)
    with pytest.raises(ValueError, match="is damaged: 0: .*from a copy"):
      run.load("base")
    path.rmdir() if path.is_dir() else path.unlink()
    path.write_bytes(kept)
  run.load("base")


@every_damage
def test_the_list_of_a_checkpoint_is_passed_over(tmp_path, damage):
  saves = checkpoint.Checkpoints(tmp_path)
  for step in (1, 2):
    saves.save(step, {"w": np.full(3, step, np.float32)}, {"s": step})
  saves.close()
  damage(tmp_path / "2" / "FILES.json")
  with pytest.warns(RuntimeWarning, match="damaged checkpoint 2"):
    saves = checkpoint.Checkpoints(tmp_path)
  step, _, host = saves.restore({"w": jax.numpy.zeros(3)})
  assert (step, host) == (1, {"s": 1})
  assert (tmp_path / "damaged" / "2-0").exists()


@pytest.mark.parametrize(
  "listing",
  [
    "{}",
    '{"a": 1}',
    '{"a": [1]}',
    '{"a": [1, "x"]}',
    '{"a": [1, null]}',
    '{"../../../etc/passwd": [1, 2]}',
    '{"/etc/passwd": [1, 2]}',
    "null",
    "7",
  ],
)
def test_a_list_of_nothing_is_no_list(tmp_path, listing):
  saves = checkpoint.Checkpoints(tmp_path)
  saves.save(1, {"w": np.ones(3)}, {})
  saves.close()
  (tmp_path / "1" / "FILES.json").write_text(listing)
  with pytest.warns(
    RuntimeWarning, match="damaged checkpoint 1.*is not a list"
  ):
    assert checkpoint.Checkpoints(tmp_path).latest() is None


LINES = [{"step": i, "a": 0.1 * i} for i in (1, 2, 3)]


def _log(folder):
  path = folder / "metrics.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
  return path


def test_a_metrics_line_that_was_cut_short_is_left_out(tmp_path):
  path = _log(tmp_path)
  path.write_bytes(path.read_bytes()[:-4])
  assert metrics.read(path) == LINES[:2]
  metrics.Metrics(tmp_path, "metrics", last_step=2).close()
  assert metrics.read(path) == LINES[:2]


@pytest.mark.parametrize(
  "line",
  [
    b"garbage\n",
    b'{"step": 2, \xff\xfe}\n',
    b"[1]\n",
    b"null\n",
    b'{"a": 1}\n',
    b'{"step": "x"}\n',
    b"[" * 200_000 + b"\n",
    b"\0" * 50 + b"\n",
  ],
)
def test_a_metrics_line_that_is_none_is_named(tmp_path, line):
  path = _log(tmp_path)
  whole = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(whole[0] + line + whole[2])
  before = path.read_bytes()
  for read in (
    lambda: metrics.read(path),
    lambda: metrics.Metrics(tmp_path, "metrics", last_step=3),
  ):
    with pytest.raises(ValueError, match="jsonl:2: .*is not a line of metrics"):
      read()
    assert path.read_bytes() == before
  # The way that is offered leads on.
  path.write_bytes(whole[0] + whole[2])
  metrics.Metrics(tmp_path, "metrics", last_step=3).close()
  assert metrics.read(path) == [LINES[0], LINES[2]]


@pytest.mark.parametrize("damage", (_folder, _dangling, _loop))
def test_a_metrics_file_that_cannot_be_read_is_named(tmp_path, damage):
  path = _log(tmp_path)
  damage(path)
  with pytest.raises(OSError, match="metrics.jsonl cannot be read.*move it"):
    metrics.read(path)


@every_damage
def test_a_cached_automaton_is_built_again(folder, damage):
  (path,) = (folder / "automata").iterdir()
  want = path.read_bytes()
  damage(path)
  with pytest.warns(UserWarning, match="automaton-.*cannot be"):
    _setup(folder)
  if damage is not _folder:
    assert np.load(path)["event"].tolist()
    assert len(path.read_bytes()) == len(want)


def test_every_flipped_byte_of_an_automaton(folder):
  (path,) = (folder / "automata").iterdir()
  whole = path.read_bytes()
  from opera_jax.text import table_cache

  want = {name: t.tobytes() for name, t in table_cache._read(path).items()}
  for place in range(len(whole)):
    content = bytearray(whole)
    content[place] ^= 0x41
    path.write_bytes(content)
    try:
      found = table_cache._read(path)
    except table_cache.DAMAGE:
      continue
    assert {name: t.tobytes() for name, t in found.items()} == want


@every_damage
def test_the_list_of_a_set_of_traces(tmp_path, damage):
  trace = traces.Trace(
    id="a",
    prompt="p",
    reference="r",
    thought="t",
    answer="a",
    completion=np.arange(3, dtype=np.int32),
    rounds=(),
    status="complete",
  )
  traces.write(tmp_path / "set", [trace])
  assert not traces.damage(tmp_path / "set")
  damage(tmp_path / "set" / "FILES.json")
  assert "FILES.json" in traces.damage(tmp_path / "set")
  # It is written anew, from the parts.
  traces.write(tmp_path / "set", [trace])
  assert not traces.damage(tmp_path / "set")


@pytest.mark.parametrize(
  "damage", (_cut, _flip, _empty, _other_type, _dangling)
)
def test_an_embedding_is_made_again(tmp_path, damage):
  path = tmp_path / "0.npy"
  np.save(path, np.ones((2, 3), np.float32))
  assert pool._saved(path, 2).shape == (2, 3)
  damage(path)
  if damage is _flip:  # a number among numbers: it may not show
    np.save(path, np.full((2, 3), np.nan, np.float32))
  with pytest.warns(RuntimeWarning, match="embedded again"):
    assert pool._saved(path, 2) is None


@pytest.mark.parametrize(
  "damage", (_cut, _empty, _other_type, _bare, _folder, _dangling)
)
def test_the_chosen_prompts_of_rl(folder, damage):
  run = _setup(folder)
  stage = workdir.Stage(folder, "sft", {})
  stage.finish({"model": "made up"})
  prompts = [
    dataclasses.replace(p, columns={"grade": 2.5}) for p in run.tasks.rl[:5]
  ]
  run = dataclasses.replace(
    run, tasks=dataclasses.replace(run.tasks, rl=prompts)
  )
  rules = rl_filter.Rules(judge="column:grade")
  settings = sampling.Sampling(max_new_tokens=8)
  with checkpoint.Preemption() as preemption:
    chosen = rl_select.select(run, rules, settings, preemption)
    assert len(chosen.tasks.rl) == 5
    path = folder / "select_rl" / "prompts.jsonl"
    damage(path)
    with pytest.raises((ValueError, OSError)) as caught:
      rl_select.select(run, rules, settings, preemption)
  _says(caught.value, path)


@every_damage
def test_a_redo_that_is_under_way(folder, damage):
  workdir.redo(folder, "base")
  damage(folder / "REDO.json")
  with pytest.raises((ValueError, OSError)) as caught:
    workdir.redo(folder, "base")
  _says(caught.value, folder / "REDO.json")
