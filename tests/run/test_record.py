"""A workdir says how its run was started, and names no secret."""

import json
import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT

from opera_jax import config_file
from opera_jax.configs import tiny
from opera_jax.run import record, workdir


@pytest.fixture(scope="module")
def config():
  config = tiny.get_config("smoke").unlock()
  config.data.documents = 40
  config.data.synthesis, config.data.rl, config.data.held_out = 12, 8, 4
  return config


@pytest.fixture(scope="module")
def begun(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("begun")
  return folder, record.begin(folder, config, ("base",))


def _starts(folder):
  return json.loads((folder / record.FILE).read_text())["starts"]


def test_a_start_says_what_ran_where(begun):
  folder, _ = begun
  (start,) = _starts(folder)
  head = subprocess.run(
    ["git", "rev-parse", "HEAD"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  ).stdout.strip()
  if head:  # not in an unpacked archive
    assert start["code"]["commit"] == head
    assert isinstance(start["code"]["dirty"], bool)
  assert start["versions"]["jax"] == jax.__version__
  assert start["versions"]["python"] == sys.version.split()[0]
  assert set(record.PACKAGES) < set(start["versions"])
  assert None not in start["versions"].values()
  assert start["devices"].startswith(f"{jax.device_count()} x ")
  assert start["command"] == record.command(sys.argv)


def test_the_config_is_written_once_a_stage_accepts_it(begun, config):
  folder, run = begun
  path = folder / config_file.NAME
  assert not path.exists()
  stage = run.stage("base", tasks=("documents",), base={"rate": 1})
  assert not path.exists()
  stage.begin()
  written = path.read_text()
  assert json.loads(written)["data"]["documents"] == 40
  # A start that is refused leaves it as it is, and is listed nevertheless.
  other = config.copy_and_resolve_references()
  other.rl.steps = 77
  again = record.begin(folder, other, ("base",))
  with pytest.raises(ValueError, match=r"base\.rate: 1 then, 2 now"):
    again.stage("base", tasks=("documents",), base={"rate": 2})
  assert path.read_text() == written and len(_starts(folder)) == 2


def test_no_password_and_no_environment_is_kept(begun):
  line = [
    "opera_rl",
    "--config.reward.options={'judge': {'url': 'https://me:pw@host/v1'}}",
    "--config.data.path=hf:user@main",
    "--x=http://token@h:1/a?b=c@d",
  ]
  assert record.command(line) == [
    "opera_rl",
    "--config.reward.options={'judge': {'url': 'https://...@host/v1'}}",
    "--config.data.path=hf:user@main",
    "--x=http://...@h:1/a?b=c@d",
  ]
  folder, _ = begun
  text = (folder / record.FILE).read_text()
  for name in ("PATH", "HOME"):
    assert f'"{name}"' not in text
  assert os.environ["PATH"] not in text


def test_data_is_recorded_by_its_digest(tmp_path, config):
  path = tmp_path / "tasks.jsonl"
  rows = [
    {"id": str(i), "prompt": f"Say {i}.", "reference": f"It is {i}."}
    for i in range(40)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  own = config.copy_and_resolve_references()
  own.data.kind, own.data.path = "jsonl", str(path)
  own.data.default_task = "open_ended"
  record.begin(tmp_path / "run", own, ("base",))
  (start,) = _starts(tmp_path / "run")
  sums = subprocess.run(
    ["sha256sum", str(path)], capture_output=True, text=True, check=True
  ).stdout.split()[0]
  assert start["data"]["path"] == {"place": str(path), "sha256": sums}


def test_a_damaged_list_of_starts_is_named(tmp_path, config):
  (tmp_path / record.FILE).write_text("{")
  with pytest.raises(ValueError, match=r"run\.json is damaged.*delete it"):
    record.begin(tmp_path, config, ("base",))


def test_a_start_that_failed_behind_its_tokenizer_has_left_no_run(tmp_path):
  workdir.Stage(tmp_path / "failed", "tokenizer", {}).finish({})
  with pytest.raises(FileNotFoundError, match="failed holds no run"):
    workdir.existing(tmp_path / "failed")


def test_a_workdir_that_is_none_is_named_and_not_created(tmp_path):
  for name in ("first", "second"):
    workdir.Stage(tmp_path / name, "base", {}).begin()
  (tmp_path / "empty").mkdir()
  assert workdir.existing(tmp_path / "first") == tmp_path / "first"
  with pytest.raises(FileNotFoundError, match="mean 'first'"):
    workdir.existing(tmp_path / "frist")
  with pytest.raises(FileNotFoundError, match="the runs first, second"):
    workdir.existing(tmp_path)
  with pytest.raises(FileNotFoundError, match="empty holds no run"):
    workdir.existing(tmp_path / "empty")
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "empty", "first", "second",
  ]  # fmt: skip


@pytest.mark.parametrize("starts", [3, None, {"a": 1}])
def test_a_record_without_a_list_of_starts_is_refused(begun, config, starts):
  folder, _ = begun
  path = folder / record.FILE
  before = path.read_text()
  path.write_text(json.dumps({"starts": starts}))
  with pytest.raises(ValueError, match="run.json is damaged: its starts are"):
    record.begin(folder, config, ("base",))
  path.write_text(before)


def test_a_start_of_some_stages_leaves_what_the_config_says_of_others(
  config, tmp_path
):
  for name in ("base", "rl"):
    workdir.Stage(tmp_path, name, {}).begin()
  record.end(tmp_path, config, ("base", "rl"))
  path = tmp_path / config_file.NAME
  other = config.copy_and_resolve_references()
  other.stages = "evaluate, report"
  other.rl.steps, other.reward.alpha, other.rollout.top_k = 77, 0.125, 9
  other.base.epochs, other.sft.epochs = 5, 6
  record.end(tmp_path, other, ("base", "evaluate", "report"))
  now = config_file.load(str(path))
  for section in ("rl", "reward", "rollout"):
    assert now[section].to_dict() == config[section].to_dict()
  assert now.base.epochs == 5 and now.sft.epochs == 6  # SFT has not begun
  assert sorted(now.stages.split(",")) == sorted(config.stages.split(","))
  record.end(tmp_path, other, ("rl",))
  assert config_file.load(str(path)).rl.steps == 77


def test_a_damaged_config_is_written_anew(config, tmp_path, capsys):
  path = tmp_path / config_file.NAME
  path.write_text("{")
  record.end(tmp_path, config, ("base",))
  assert "written anew" in capsys.readouterr().out
  assert config_file.load(str(path)).to_dict() == config.to_dict()
