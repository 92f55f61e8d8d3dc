"""Every kind of source gives the rows that were put into it."""

import json

import datasets
import numpy as np
import pytest

from opera_jax.data import prompts, rows, traces

ROWS = [
  {"question": "1 + 1?", "answer": "2", "n": 3},
  {"question": "Wie geht's? 好", "answer": "gut", "n": 4},
]


@pytest.fixture
def saved(tmp_path):
  datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
  datasets.DatasetDict(
    {"train": datasets.Dataset.from_list(ROWS),
     "test": datasets.Dataset.from_list(ROWS[:1])}
  ).save_to_disk(tmp_path / "many")  # fmt: skip
  return tmp_path


@pytest.mark.parametrize(
  "source, count", [("one", 2), ("many", 2), ("many#test", 1)]
)
def test_a_saved_hugging_face_data_set(saved, source, count):
  found = list(rows.read(f"{saved}/{source}"))
  assert found == list(enumerate(ROWS[:count], start=1))


def test_a_directory_that_load_dataset_reads(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  folder = tmp_path / "files"
  folder.mkdir()
  lines = [json.dumps(row) + "\n" for row in ROWS]
  (folder / "train.jsonl").write_text("".join(lines))
  assert [row for _, row in rows.read(f"hf:{folder}")] == ROWS


def test_prompts_of_a_saved_data_set(saved):
  loaded = prompts.load(
    saved / "many",
    fields={"prompt": "question", "reference": "answer"},
    default_task="open_ended",
  )
  assert [p.id for p in loaded] == ["line-1", "line-2"]
  assert loaded[1].prompt == ROWS[1]["question"]
  assert loaded[1].columns == {"n": 4}


def test_tfds_records_come_as_plain_values(tmp_path):
  trace = traces.Trace(
    id="a", prompt="Tell é.", reference="r", thought="t", answer="x",
    completion=np.array([1, 2], np.int32), rounds=(), status="complete",
  )  # fmt: skip
  traces.write(tmp_path / "set", [trace])
  folder = tmp_path / "set" / traces.TFDS
  ((line, row),) = rows.read(str(folder))
  assert line == 1
  assert row["prompt"] == "Tell é." and row["completion"] == [1, 2]
  with pytest.raises(ValueError, match=r"no split 'dev'; it has \['train'\]"):
    list(rows.read(f"{folder}#dev"))


@pytest.mark.parametrize(
  "source, error, rule",
  [
    ("none", FileNotFoundError, "none: no such file. Give a .jsonl"),
    ("many#dev", ValueError, r"no split 'dev'; it has \['train', 'test'\]"),
    ("", ValueError, "a directory without .*state.json"),
  ],
)
def test_bad_directories(saved, source, error, rule):
  with pytest.raises(error, match=rule):
    list(rows.read(f"{saved}/{source}"))


def test_a_name_that_the_hub_does_not_give():
  with pytest.raises(ValueError, match="hf:no/such: .* cannot be loaded"):
    list(rows.read("hf:no/such"))
  with pytest.raises(ValueError, match="tfds:no_such_set: .* cannot be made"):
    list(rows.read("tfds:no_such_set"))


def test_a_data_set_without_the_named_columns(saved):
  with pytest.raises(ValueError, match=r"one:1: no column 'prompt' for the"):
    prompts.load(saved / "one", default_task="math")


def test_a_reference_may_be_missing_where_it_is_not_needed(tmp_path):
  path = tmp_path / "a.jsonl"
  lines = [
    {"prompt": "a", "y": None}, {"prompt": "b", "y": " "},
    {"prompt": "c", "y": "d"},
  ]  # fmt: skip
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))

  def load(reference, task="open_ended"):
    loaded = prompts.load(
      path,
      fields={"prompt": "prompt", "reference": reference},
      default_task=task,
      require_reference=False,
    )
    return [p.reference for p in loaded]

  assert load("y") == ["", "", "d"]
  assert load(None) == load("") == ["", "", ""]
  with pytest.raises(ValueError, match=":1: no column 'z'"):
    load("z")
  with pytest.raises(ValueError, match=":1: 'y' is None; the reference must"):
    load("y", task="math")
