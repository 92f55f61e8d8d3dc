"""Screening counts and names every prompt that it drops."""

import pytest

from opera_jax import structs
from opera_jax.synthesis import screening

SETTINGS = {
  "min_chars": 5,
  "max_chars": 200,
  "max_reference_chars": 50,
  "languages": ("en", "zh"),
  "certainty": 0.5,
  "near_duplicate": 0.8,
  "ngram": 3,
}
GERMAN = (
  "Schreibe bitte einen langen Brief an deine Großmutter über das Wetter."
)


def _prompt(name, text, reference="r"):
  return structs.Prompt(name, "open_ended", text, reference)


KEPT = [
  _prompt("a", "Write a long letter to your grandmother about the weather."),
  _prompt("b", "请写一篇关于春天的短文,要求语言优美,不少于八百字。"),
  _prompt("c", "1 + 1?"),  # of no language
]
DROPPED = [
  (_prompt("d", "Hm."), "prompt too short", "3 characters"),
  (_prompt("e", "very " * 60), "prompt too long", "300 characters"),
  (_prompt("f", "Write on.", "r" * 60), "reference too long", "60 characters"),
  (_prompt("g", GERMAN), "language", "de with probability 1.00"),
  (_prompt("h", KEPT[0].prompt.lower()), "exact duplicate", "of a"),
  (_prompt("i", KEPT[0].prompt + " Now."), "near duplicate", "of a"),
]


def test_every_rule_names_what_it_drops():
  kept, rejected = screening.screen(
    KEPT + [prompt for prompt, _, _ in DROPPED], **SETTINGS
  )
  assert kept == KEPT
  assert [(r.prompt, r.reason, r.detail) for r in rejected] == DROPPED
  assert screening.counts(rejected) == {reason: 1 for _, reason, _ in DROPPED}


def test_disabled_limits_keep_everything():
  off = {
    "max_chars": 0, "max_reference_chars": 0, "languages": (), "min_chars": 0,
  }  # fmt: skip
  every = KEPT + [prompt for prompt, _, _ in DROPPED[:4]]
  assert screening.screen(every, **(SETTINGS | off)) == (every, [])


@pytest.mark.parametrize(
  "changes, rule",
  [
    ({"languages": ("en", "xx")}, r"names \['xx'\]; codes"),
    ({"certainty": 0.0}, "certainty is a probability"),
  ],
)
def test_bad_settings(changes, rule):
  with pytest.raises(ValueError, match=rule):
    screening.screen(KEPT, **(SETTINGS | changes))
