"""What was read is known again by what it holds."""

import hashlib
import json
import pathlib

import datasets
import pytest

from opera_jax.data import digest, prompts

ROWS = [
  {"id": str(i), "task": "math", "prompt": f"{i}?", "reference": str(i)}
  for i in range(5)
]


def _jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _saved(path, rows):
  datasets.Dataset.from_list(rows).save_to_disk(str(path))
  return path


def _parquet(path, rows):
  datasets.Dataset.from_list(rows).to_parquet(str(path))
  return path


def _digest(path):
  source = digest.Source(pathlib.Path.read_bytes)
  prompts.load(path, read=source.read, seen=source.row)
  return source.hexdigest()


@pytest.mark.parametrize(
  "make,name",
  [(_jsonl, "a.jsonl"), (_parquet, "a.parquet"), (_saved, "a")],
)
def test_of_any_source_it_changes_with_the_content_alone(tmp_path, make, name):
  for folder in ("one", "same", "other"):
    (tmp_path / folder).mkdir()
  other = [*ROWS[:-1], ROWS[-1] | {"reference": "7"}]
  want = _digest(make(tmp_path / "one" / name, ROWS))
  assert _digest(make(tmp_path / "same" / name, ROWS)) == want
  assert _digest(make(tmp_path / "other" / name, other)) != want
  if name != "a":
    content = (tmp_path / "one" / name).read_bytes()
    assert want == hashlib.sha256(content).hexdigest()


def test_a_folder_by_its_files_names_and_content(tmp_path):
  (tmp_path / "sub").mkdir()
  big = b"x" * (3 << 20)
  (tmp_path / "sub" / "a").write_bytes(big)
  (tmp_path / "b.json").write_text("{}")
  assert digest.file(tmp_path / "sub" / "a") == hashlib.sha256(big).hexdigest()
  whole = digest.folder(tmp_path)
  assert digest.folder(tmp_path) == whole
  only = digest.folder(tmp_path, ("*.json",))
  (tmp_path / "sub" / "a").write_bytes(big[:-1] + b"y")
  assert digest.folder(tmp_path) != whole
  assert digest.folder(tmp_path, ("*.json",)) == only
  (tmp_path / "b.json").rename(tmp_path / "c.json")
  assert digest.folder(tmp_path, ("*.json",)) != only
