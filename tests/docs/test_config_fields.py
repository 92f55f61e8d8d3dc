"""The config page says of every field what configs/common.py says."""

import runpy

import pytest
from conftest import ROOT

from scripts.docs import config_fields

COMMON = ROOT / "configs" / "common.py"
EXAMPLE = '''
STAGES = "a,b"


def shared() -> dict:
  """Fields of two sections."""
  return {
    "rate": 0.1,  # [P]; or 0.2
    # A comment above,
    # of two lines.
    "names": ("a",),
  }


def get_config():
  """The config."""
  config = ml_collections.ConfigDict()
  config.stages = STAGES  # in this order
  config.mesh = {"data": 1, "fsdp": -1}  # devices | axes
  config.first = shared()
  config.first.rate = 0.3  # [C]
  # Of the second.
  config.second = {  # and last
    "flag": True,
    "samples": 0,  # of a prompt; [P] 8; 0 keeps all
    "inner": {
      "text": "\\n",  # [C]
    },
  }
  return config
'''


def _fields(source):
  return {f.name: f for s in config_fields.read(source) for f in s.fields}


def test_values_comments_and_sources_of_an_example():
  fields = _fields(EXAMPLE)
  assert {name: f.default for name, f in fields.items()} == {
    "stages": "a,b",
    "mesh": {"data": 1, "fsdp": -1},
    "first.rate": 0.3,
    "first.names": ("a",),
    "second.flag": True,
    "second.samples": 0,
    "second.inner.text": "\n",
  }
  assert fields["stages"].text == "In this order."
  assert fields["first.names"].text == "A comment above, of two lines."
  # An override has the tag of its own line, and the words of the field's.
  assert fields["first.rate"].source == config_fields.RELEASE
  assert fields["first.rate"].text == "Or 0.2."
  # [P] before a number speaks of that number.
  assert fields["second.samples"].source == config_fields.OURS
  assert "the paper has 8" in fields["second.samples"].text
  texts = {s.name: s.text for s in config_fields.read(EXAMPLE)}
  assert texts["second"] == "Of the second. and last."


def test_a_placeholder_has_a_type_and_no_value():
  source = (
    "def get_config():\n  unset = config_dict.placeholder\n"
    '  config.model = {\n    "size": unset(int),  # of it\n  }\n'
  )
  (field,) = _fields(source).values()
  assert (field.name, field.default) == ("model.size", None)
  assert "| `None` | integer |" in config_fields.markdown(
    config_fields.read(source)
  )


def test_a_field_without_a_description_stops_the_build():
  sections = config_fields.read(EXAMPLE)
  missing = ["second.flag", "second.inner.text"]  # a tag says nothing of it
  assert config_fields.undocumented(sections) == missing
  with pytest.raises(
    config_fields.UndocumentedError, match="second.flag, second.inner.text"
  ):
    config_fields.markdown(sections)


def test_a_statement_that_is_no_field_is_named():
  with pytest.raises(config_fields.UndocumentedError, match="other = 1"):
    config_fields.read("def get_config():\n  other = 1\n")


def test_what_a_comment_holds_is_shown_as_it_is():
  source = EXAMPLE.replace('"flag": True,', '"flag": True,  # yes | a*b*c </x>')
  source = source.replace('"\\n",  # [C]', '"\\n",  # [C] a line')
  rows = config_fields.markdown(config_fields.read(source)).splitlines()
  assert (
    "| `second.flag`{ #second.flag } | `True` | true or false | ours | "
    "Yes \\| a\\*b\\*c &lt;/x>. |"
  ) in rows
  assert (
    '| `second.inner.text`{ #second.inner.text } | `"\\n"` | text | '
    "released code | A line. |"
  ) in rows


def test_every_field_of_the_config_is_read_with_its_value():
  config = runpy.run_path(str(COMMON))["get_config"]().to_dict()
  fields = _fields(COMMON.read_text("utf-8"))
  # An empty mapping has no leaf in either.
  read = config_fields.flat({name: f.default for name, f in fields.items()})
  assert read == config_fields.flat(config)


def test_every_field_has_a_comment():
  sections = config_fields.read(COMMON.read_text("utf-8"))
  assert config_fields.undocumented(sections) == []
