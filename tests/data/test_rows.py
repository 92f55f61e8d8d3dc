"""Every kind of source gives the rows that were put into it."""

import gzip
import json
import lzma

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


_DEEP = "[" * 40 + "]" * 40
_DEEPEST = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ('{"prompt": "a\\ud800b"}', "text that UTF-8 can write"),
    ('{"pr\\udfffompt": "a"}', "text that UTF-8 can write"),
    ('{"prompt": "a", "more": ["\\ud800"]}', "'more' holds .*UTF-8"),
    ('{"prompt": "a", "n": 1' + "0" * 5000 + "}", "not a line of JSON"),
    ('{"prompt": "a", "n": 1' + "0" * 50 + "}", "at most 64 bits"),
    ('{"prompt": "a", "n": NaN}', "'n' holds nan, and numbers must be finite"),
    ('{"prompt": "a", "n": -Infinity}', "numbers must be finite"),
    ('{"prompt": "a", "n": 1e999}', "numbers must be finite"),
    ('{"prompt": "a", "n": {"x": [NaN]}}', "'n' holds nan"),
    (f'{{"prompt": "a", "n": {_DEEP}}}', "more than 32 levels deep"),
    (f'{{"prompt": "a", "n": {_DEEPEST}}}', "levels"),
    ('{"prompt": "\x80"}', "not a line of JSON in UTF-8"),
  ],
)
def test_what_would_fail_later_is_refused_at_its_line(tmp_path, line, said):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"prompt": "fine"}\n' + line.encode("latin-1") + b"\n")
  with pytest.raises(ValueError, match=said) as error:
    list(rows.read(str(path)))
  assert f"{path}:2:" in str(error.value) and len(str(error.value)) < 600


def test_a_line_without_end_is_refused_before_it_is_whole(
  tmp_path, monkeypatch
):
  """200 MB from 900 KB of gzip."""
  monkeypatch.setattr(rows, "LINE_BYTES", 10_000)
  for name, opener in (("a.jsonl.gz", gzip.open), ("b.jsonl.xz", lzma.open)):
    with opener(tmp_path / name, "wb") as file:
      file.write(b'{"prompt": "fine"}\n{"prompt": "')
      file.write(b"a" * 3_000_000)
    with pytest.raises(ValueError, match=":2: the line is longer than 10,000"):
      list(rows.read(str(tmp_path / name)))


def test_other_sources_are_checked_too(tmp_path):
  pandas = pytest.importorskip("pandas")
  path = tmp_path / "a.parquet"
  pandas.DataFrame({"prompt": ["a", "b"], "n": [1.0, np.inf]}).to_parquet(path)
  with pytest.raises(ValueError, match="a.parquet:2: 'n' holds inf"):
    list(rows.read(str(path)))


def _tfds_directory(folder):
  made = [
    traces.Trace(
      id="a", prompt="p", reference="r", thought="t", answer="w",
      completion=np.zeros(2, np.int32), rounds=(), status="complete",
    )
  ]  # fmt: skip
  traces.write(folder, made)
  return folder / traces.TFDS


@pytest.mark.parametrize("legacy", [False, True])
def test_a_features_file_runs_no_code(tmp_path, monkeypatch, legacy):
  """It may name a class of a module that lies beside it."""
  directory = _tfds_directory(tmp_path / "set")
  assert list(rows.read(str(directory)))
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / "stranger.py").write_text(
    f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
  )
  key = "type" if legacy else "pythonClassName"
  content = {key: "stranger.Features", "content": {}}
  file = directory / "features.json"
  for spec in (content, {"a": [{"b": content}]}):
    file.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="'stranger.Features'. Only features"):
      list(rows.read(str(directory)))
  file.write_text("{")
  with pytest.raises(ValueError, match="features.json is not JSON"):
    list(rows.read(str(directory)))
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
  "name", ["huggingface:x", "kaggle:x/y", "./folder", "../x", "a b", ""]
)
def test_names_that_would_fetch_code_are_refused(name):
  with pytest.raises(ValueError, match="not the name of a TFDS data set"):
    list(rows.read(f"tfds:{name}"))


@pytest.mark.parametrize(
  "head",
  [
    "configs:\n- config_name: default\n  data_files: ../x.jsonl\n",
    "configs:\n- config_name: default\n  data_files:\n  - split: train\n"
    "    path: /etc/hostname\n",
    "configs:\n- config_name: default\n  data_dir: a/../../b\n",
    "configs:\n- config_name: d\n  data_files: ['https://h/x.jsonl']\n",
    "configs:\n- config_name: d\n  data_files: 'zip://a::../x.zip'\n",
  ],
)
def test_a_card_stays_in_its_directory(tmp_path, monkeypatch, head):
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  folder = tmp_path / "set"
  folder.mkdir()
  (tmp_path / "x.jsonl").write_text('{"prompt": "secret"}\n')
  (folder / "y.jsonl").write_text('{"prompt": "fine"}\n')
  (folder / "README.md").write_text(f"---\n{head}---\n")
  with pytest.raises(ValueError, match="lies outside of the directory"):
    list(rows.read(f"hf:{folder}"))
  inside = "configs:\n- config_name: default\n  data_files: y.jsonl\n"
  (folder / "README.md").write_text(f"---\n{inside}---\n")
  assert list(rows.read(f"hf:{folder}")) == [(1, {"prompt": "fine"})]
