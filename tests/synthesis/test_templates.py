"""Templates are checked when they are read, and never read what they hold."""

import pytest
from conftest import ROOT

from opera_jax.synthesis import templates


def test_text_and_files(tmp_path):
  assert templates.load("Say {prompt}", ("prompt",), "f") == "Say {prompt}"
  path = tmp_path / "a.txt"
  path.write_text("\nÜber {prompt}\n")
  assert templates.load(str(path), ("prompt",), "f") == "Über {prompt}"


def test_the_shipped_ones():
  folder = ROOT / "configs" / "templates"
  names = ("prompt",)
  text = templates.load(str(folder / "monologue.txt"), names, "f")
  # What the paper's meta-prompt asks for.
  for words in ("first person", "present tense", "but wait, the user said"):
    assert words in text
  names = ("prompt", "reference")
  templates.load(str(folder / "rewrite.txt"), names, "f")


@pytest.mark.parametrize(
  "value, error, rule",
  [
    ("no mark", ValueError, r"'no mark' holds \{prompt\} 0 times.*Correct f"),
    ("{prompt}{prompt}", ValueError, "2 times; it must hold it exactly once"),
    ("none.txt", FileNotFoundError, "f=none.txt: no such file"),
  ],
)
def test_errors(value, error, rule):
  with pytest.raises(error, match=rule):
    templates.load(value, ("prompt",), "f")


def test_values_are_not_searched():
  values = {"prompt": "a {reference} \\1", "reference": "{prompt}"}
  filled = templates.fill("<{prompt}|{reference}|{other}>", values)
  assert filled == "<a {reference} \\1|{prompt}|{other}>"


def test_the_shipped_ones_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  value = "configs/templates/rewrite.txt"
  text = (ROOT / value).read_text("utf-8").strip()
  assert templates.load(value, ("prompt", "reference"), "f") == text
