"""Words of any language; scripts by the names Unicode gives."""

import pytest

from opera_jax.text import words


@pytest.mark.parametrize(
  "text, expected",
  [
    ("It's 3.5, wait!", ["It", "s", "3", "5", "wait"]),
    ("写一篇 essay吗", ["写", "一", "篇", "essay", "吗"]),
    ("Ведь это так", ["Ведь", "это", "так"]),
    ("", []),
  ],
)
def test_split(text, expected):
  assert words.split(text) == expected


def test_normal_is_blind_to_case_width_and_spacing():
  assert words.normal("  Ｔｅｌｌ\n a   STORY ") == words.normal("tell a story")
  assert words.normal("tell a story") != words.normal("tell two stories")


def test_ngrams():
  assert words.ngrams(list("abcd"), 3) == [("a", "b", "c"), ("b", "c", "d")]
  assert words.ngrams(list("ab"), 3) == [("a", "b")]
  assert words.ngrams([], 3) == []


def test_scripts():
  counts = words.scripts("Ab, 写篇 да かカ 3!")
  assert counts == {"LATIN": 2, "HAN": 2, "CYRILLIC": 2, "KANA": 2}
