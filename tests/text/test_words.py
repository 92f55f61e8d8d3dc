"""Words of any language; scripts by the names Unicode gives."""

import unicodedata

import growth
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


@pytest.mark.parametrize(
  "text",
  [
    "cafe\u0301 na\u00efve \ufb01ne \u00a8 \u1112\u1161\u11ab \ufdfa",
    "\u5199\u4e00\u7bc7 \uff34\uff25\uff38\uff34\u3000\uff76\uff9e",
    "a\u00a0b\u2003c\nd",
    "e\u0301\u0316" * 500,
    "e\u0316\u0301" * 501,
    "\u1112\u1161\u11ab" * 500,
    "\u5199" * 255 + "e\u0301\u0316" + "\u5199" * 300,
    " \u0301" * 300,
  ],
)
def test_pieces_are_normalised_as_the_whole(text):
  whole = unicodedata.normalize("NFKC", text).casefold()
  assert words.normal(text) == " ".join(whole.split())


@pytest.mark.parametrize(
  "unit",
  [
    "\u0f73",
    "\u0316\u0301",
    "\u0301\u0345\u0316",
    "a\u0301",
    "\ufdfa",
    "\u00a8",
  ],
)
def test_no_text_takes_long_to_normalise(unit):
  def call(text):
    words.split(words.normal(text))

  ratio = growth.twice_doubled(call, lambda n: unit * (n // len(unit)), 10_000)
  assert ratio < growth.LINEAR
