"""Stop words: where sampling of a thought stops, and where the sample is cut.

Stop words are words or separators. A word begins the next step: the sample is
cut before it, and the word becomes the trigger, with which every candidate
begins. A separator ("\\n\\n") ends the current step: the sample is kept up to
the token that completes the separator, inclusive, and there is no trigger.
"""

from collections.abc import Sequence

import numpy as np

from opera_jax import structs
from opera_jax.text import automaton, regions, stop_automaton
from opera_jax.text import tokenizer as tokenizer_lib

WORDS = ("Wait", "But", "Hmm", "Let me think", "However")
# The phases of a prompt: the thought up to its first stop word, the candidates
# of a round, the thought after the last round, the answer.
PHASES = ("stop", "candidate", "rest", "answer")
TOO_LONG = "thought too long"
TURN_ENDED = "turn ended inside the thought"
UNCLOSED = (TOO_LONG, TURN_ENDED)


class StopWords:
  """The stop words of a search, compiled for the device and for the host."""

  def __init__(
    self, stop_words: Sequence[str], tokenizer: tokenizer_lib.Tokenizer
  ):
    """Compiles the stop words.

    Args:
      stop_words: words (exact case, no word character after them) or separators
        (white space).
      tokenizer: of the policy.

    Raises:
      ValueError: no stop word, an empty one, both words and separators, a word
        with white space at an end, or a stop word that the vocabulary cannot
        spell.
    """
    self._tokenizer = tokenizer
    self._stop_words = tuple(stop_words)
    blank = [not word.strip() for word in stop_words]
    if not stop_words or not all(stop_words) or any(blank) != all(blank):
      raise ValueError(
        f"Stop words are {self._stop_words}; they must be words, or separators "
        "made of white space, at least one and not both. Change "
        "config.synthesis.stop_words."
      )
    self._words = not blank[0]
    if self._words and any(word != word.strip() for word in stop_words):
      raise ValueError(
        f"Stop words are {self._stop_words}; a word has no white space at its "
        "ends. Change config.synthesis.stop_words."
      )
    # A candidate ends only at a word that opens a sentence.
    opening = self._stop_words
    if self._words:
      opening = tuple(
        lead + word for word in self._stop_words for lead in ("\n", ". ")
      )
    self._stops = {"stop": self._stop_words, "candidate": opening, "rest": ()}
    # The tag that closes the thought stops these phases too: as a token, or as
    # one more string, which may be followed by anything.
    close_id = tokenizer.think_close_id
    self._tags = () if close_id is not None else (tokenizer.think[1],)
    tables = {
      phase: stop_automaton.compile(
        (*strings, *self._tags),
        tokenizer.vocab_bytes,
        right_boundary=self._boundaries(phase),
      )
      for phase, strings in self._stops.items()
      if strings or self._tags
    }
    table, starts = regions.join(
      [
        (
          tables.get(phase),
          (close_id,) if close_id is not None and phase != "answer" else (),
        )
        for phase in PHASES
      ],
      tokenizer.vocab_size,
    )
    self.table: automaton.Automaton = table  # of all phases
    # The state of the table in which a sample of each phase starts.
    self.start: dict[str, int] = dict(zip(PHASES, starts))

  def _boundaries(self, phase: str) -> list[bool]:
    """For each string of a phase, whether no word character may follow it."""
    strings = self._stops[phase]
    return [self._words] * len(strings) + [False] * len(self._tags)

  def cut(
    self, sample: structs.Sample, phase: str
  ) -> tuple[np.ndarray, np.ndarray, str]:
    """Cuts a sampled piece of thought at its stop word.

    Args:
      sample: sampled in `phase`, which is not "answer".
      phase: one of `PHASES`.

    Returns:
      The tokens that are kept, the tokens of the trigger after them, and the
      next phase: "candidate" or "answer", or how the thought broke off.
    """
    tokens = sample.tokens
    none = tokens[:0]
    if not sample.finished:
      return tokens, none, TOO_LONG
    if tokens[-1] == self._tokenizer.think_close_id:
      return tokens, none, "answer"
    stops = self._stops[phase]
    vocab = self._tokenizer.vocab_bytes
    strings = (*stops, *self._tags)
    found = strings and stop_automaton.find_first(
      tokens, vocab, strings, right_boundary=self._boundaries(phase)
    )
    if not found:
      return tokens, none, TURN_ENDED
    if found.string == len(stops):
      return tokens[: found.token_after], none, "answer"
    if not self._words:
      return tokens[: found.token_after], none, "candidate"
    # The stop string may begin with "\n" or ". ", which are not in the trigger.
    string = stops[found.string]
    word = next(w for w in self._stop_words if string.endswith(w))
    _, ends = automaton.spell(tokens, vocab)
    first = int(np.searchsorted(ends, found.stop - len(word.encode()), "right"))
    return tokens[:first], tokens[first : found.token_after], "candidate"
