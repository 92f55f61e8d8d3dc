"""What is fetched can be pinned, wherever it is fetched."""

import types

import pytest

from opera_jax import hub
from opera_jax.data import rows
from opera_jax.models import hf_config
from opera_jax.synthesis import embedding
from opera_jax.text import tokenizer


def test_a_name_may_carry_a_revision(tmp_path, monkeypatch):
  assert hub.split("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", None)
  assert hub.split("Qwen/Qwen3-0.6B@a1b2") == ("Qwen/Qwen3-0.6B", "a1b2")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a@b").mkdir()
  assert hub.split("a@b") == ("a@b", None)
  for wrong in ("@main", "x@"):
    with pytest.raises(ValueError, match="NAME@REVISION"):
      hub.split(wrong)


@pytest.fixture
def asked(monkeypatch, tmp_path):
  """What the hub's clients are asked for, in place of asking."""
  import datasets
  import huggingface_hub
  import sentence_transformers

  calls = []

  def note(result):
    def call(*names, revision=None, **_):
      calls.append((names[0], revision))
      return result

    return call

  monkeypatch.setattr(huggingface_hub, "snapshot_download", note(str(tmp_path)))
  monkeypatch.setattr(
    huggingface_hub, "hf_hub_download", note(str(tmp_path / "file"))
  )
  monkeypatch.setattr(datasets, "load_dataset", note([{"prompt": "a"}]))
  monkeypatch.setattr(
    sentence_transformers,
    "SentenceTransformer",
    note(types.SimpleNamespace()),
  )
  return calls


@pytest.mark.parametrize("revision", [None, "a1b2c3"])
def test_every_download_asks_for_the_revision(asked, revision):
  name = "some/name" if revision is None else f"some/name@{revision}"
  hf_config.folder(name, ("*.json",))
  assert tokenizer._download(name)
  assert list(rows.read(f"hf:{name}")) == [(1, {"prompt": "a"})]
  assert list(rows.read(f"hf:{name}:config#test"))
  embedding.sentence_transformer(name)
  assert len(asked) >= 5
  assert set(asked) == {("some/name", revision)}
