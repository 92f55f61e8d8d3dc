"""A config that a run has left is the config that it was given."""

import json

import pytest
from conftest import ROOT

from opera_jax import config_file, user_errors
from opera_jax.configs import common
from opera_jax.stages import config_check

SHIPPED = [
  "configs/tiny.py",
  "configs/tiny.py:smoke",
  "configs/open_ended.py",
  "configs/smollm2.py",
  "configs/qwen3_8b.py:v5p_4x4x4",
  *(
    f"configs/methods/{file.name}"
    for file in sorted((ROOT / "configs" / "methods").glob("[a-z]*.py"))
    if "def get_config" in file.read_text()
  ),
]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_is_read_back_as_it_was(tmp_path, name):
  config = config_file.load(name)
  path = tmp_path / config_file.NAME
  path.write_text(config_file.text(config))
  again = config_file.load(str(path))
  assert again.to_dict() == config.to_dict()
  assert again.is_locked
  # Types are kept, so that an override is read as before.
  for section in ("rl", "model", "engine"):
    for field in config[section]:
      assert again[section].get_type(field) == config[section].get_type(field)


def test_a_redo_is_not_repeated(tmp_path):
  config = config_file.load("configs/tiny.py").unlock()
  config.redo = "rl"
  assert json.loads(config_file.text(config))["redo"] == ""


def test_a_users_tables_are_replaced_and_not_merged(tmp_path):
  path = tmp_path / "mine.json"
  path.write_text(
    json.dumps({"data": {"task_map": {"chat": "open_ended"}}, "seed": 3})
  )
  config = config_file.load(str(path))
  assert config.data.task_map.to_dict() == {"chat": "open_ended"}
  assert config.data.rl == common.get_config().data.rl and config.seed == 3


def test_every_table_of_a_config_is_known():
  tables = []
  for section, (_, rules) in config_check.RULES.items():
    for name, rule in rules.items():
      # A table's rule takes any names; every other rule refuses a mapping.
      if name not in ("checkpoint",) and not rule({}) and rule("x"):
        tables.append(f"{section}.{name}")
  assert sorted(tables) == sorted(config_file.TABLES)


@pytest.mark.parametrize(
  "text, said",
  [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ('{"rl": {"stepz": 3}}', "did you mean config.rl.steps?"),
    ('{"rl": {"credit": "grpo"}}', "is now config.rl.advantage"),
    ('{"rl": 3}', "config.rl is 3"),
    ('{"seed": {"a": 1}}', "config.seed is"),
    ('{"rl": {"steps": "many"}}', "config.rl.steps is 'many'"),
    ('{"reward": {"options": {"__class__": 3}}}', "config.reward.options is"),
    (
      '{"reward": {"options":' + '{"a":' * 900 + "1" + "}" * 902,
      "config.reward.options is",
    ),
    ('{"rl": {"steps": "' + "a" * 9_000 + '"}}', "config.rl.steps is 'aaa"),
    (json.dumps(dict.fromkeys(map(str, range(99)))), "and 79 faults more"),
    (" " * 1_000_001, "more than 1,000,000 bytes"),
  ],
  ids=lambda text: text[:40],
)
def test_a_json_file_that_is_no_config(tmp_path, text, said):
  path = tmp_path / "config.json"
  path.write_text(text)
  with pytest.raises(ValueError) as caught:
    config_file.load(str(path))
  assert said in str(caught.value) and str(path) in str(caught.value)
  assert len(str(caught.value)) < 2_000


def test_a_link_to_nothing_is_not_its_own_nearest(tmp_path):
  path = tmp_path / config_file.NAME
  path.symlink_to(path)
  with pytest.raises(FileNotFoundError, match="cannot be read") as caught:
    config_file.load(str(path))
  assert "did you mean" not in str(caught.value)


def test_the_nearest_file_is_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match="mean 'configs/tiny.py'"):
    config_file.load("configs/tinny.py:smoke")
  (tmp_path / "mine.py").write_text("")
  with pytest.raises(FileNotFoundError, match=r"mean 'mine\.py'"):
    config_file.load("mime.py")


def test_a_bug_in_a_config_file_is_no_message(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("def get_config():\n  return len(3)\n")
  with pytest.raises(user_errors.ConfigFileError) as caught:
    config_file.load(str(path))
  assert isinstance(caught.value.__cause__, TypeError)
  path.write_text("def get_config():\n  raise ValueError('choose a size')\n")
  with pytest.raises(ValueError, match="choose a size"):
    config_file.load(str(path))


@pytest.mark.parametrize(
  "argv",
  [
    ["--workdir={}"],
    ["-workdir={}"],
    ["--workdir", "{}"],
    ["--config.rl.steps=3", "--workdir={}", "--debug"],
  ],
)
def test_a_workdir_says_its_config(tmp_path, argv):
  argv = ["opera_rl", *(one.format(tmp_path) for one in argv)]
  assert config_file.of_workdir(argv) == ""
  (tmp_path / config_file.NAME).write_text("{}")
  assert config_file.of_workdir(argv) == str(tmp_path / config_file.NAME)
  assert config_file.of_workdir(["opera_rl", "--", *argv[1:]]) == ""


def test_tuples_within_tuples_are_kept(tmp_path):
  config = config_file.load("configs/tiny.py").unlock()
  config.rollout.logit_bias = ((3, 1.5), (4, -2.0))
  config.reward.options = {"verifiable": {"names": ("a", "b")}}
  path = tmp_path / config_file.NAME
  path.write_text(config_file.text(config))
  assert config_file.load(str(path)).to_dict() == config.to_dict()
