"""Screens prompts for the pool: length, language, duplicates."""

import collections
import dataclasses
from collections.abc import Sequence

from py3langid import langid

from opera_jax import structs
from opera_jax.synthesis import dedup


@dataclasses.dataclass(frozen=True)
class Rejection:
  """A prompt that is not in the pool."""

  prompt: structs.Prompt
  reason: str  # rejections are counted by reason
  detail: str = ""  # the value that decided


def screen(
  prompts: Sequence[structs.Prompt],
  *,
  min_chars: int,
  max_chars: int,
  max_reference_chars: int,
  languages: Sequence[str],
  certainty: float,
  near_duplicate: float,
  ngram: int,
) -> tuple[list[structs.Prompt], list[Rejection]]:
  """Drops prompts by length, by language and as duplicates, in this order.

  Args:
    prompts: of all sources, with distinct ids.
    min_chars: minimum characters of a prompt.
    max_chars: maximum characters, 0 for no limit.
    max_reference_chars: maximum characters of a reference, 0 for no limit.
    languages: ISO 639-1 codes to keep; none keeps every language. py3langid
      (naive Bayes over byte n-grams) classifies the prompt as a whole; passages
      in another language are not detected.
    certainty: a prompt is dropped only if another language has at least this
      probability, so that "1 + 1?", which has no language, is kept.
    near_duplicate: see `dedup.repeats`.
    ngram: see `dedup.repeats`.

  Returns:
    (prompts that are kept in their order, rejections).

  Raises:
    ValueError: an unknown language, a certainty outside (0, 1]; see
      `dedup.repeats`.
  """
  if not 0 < certainty <= 1:
    raise ValueError(
      f"config.pool.certainty is a probability in (0, 1], got {certainty}."
    )
  identifier = _identifier(languages)
  passed, rejected = [], []
  for prompt in prompts:
    why = _check_length(
      prompt,
      min_chars=min_chars,
      max_chars=max_chars,
      max_reference_chars=max_reference_chars,
    )
    if not why and languages:
      code, probability = identifier.classify(prompt.prompt)
      if code not in languages and probability >= certainty:
        why = "language", f"{code} with probability {probability:.2f}"
    if why:
      rejected.append(Rejection(prompt, *why))
    else:
      passed.append(prompt)
  kept = []
  found = dedup.repeats(passed, threshold=near_duplicate, ngram=ngram)
  for prompt, duplicate in zip(passed, found):
    if duplicate:
      kind, original = duplicate
      rejected.append(Rejection(prompt, f"{kind} duplicate", f"of {original}"))
    else:
      kept.append(prompt)
  return kept, rejected


def counts(rejected: Sequence[Rejection]) -> dict[str, int]:
  """Rejections by reason, the most frequent first."""
  return dict(collections.Counter(r.reason for r in rejected).most_common())


def _check_length(
  prompt: structs.Prompt,
  *,
  min_chars: int,
  max_chars: int,
  max_reference_chars: int,
) -> tuple[str, str] | None:
  """Reason and detail of a rejection by length, or None."""
  size, reference = len(prompt.prompt), len(prompt.reference)
  if size < min_chars:
    return "prompt too short", f"{size} characters"
  if max_chars and size > max_chars:
    return "prompt too long", f"{size} characters"
  if max_reference_chars and reference > max_reference_chars:
    return "reference too long", f"{reference} characters"
  return None


def _identifier(languages: Sequence[str]) -> langid.LanguageIdentifier:
  """Loads the language identifier and checks the language codes."""
  identifier = langid.LanguageIdentifier.from_model_file(
    langid.MODEL_FILE, norm_probs=True
  )
  unknown = sorted(set(languages) - set(identifier.labels))
  if unknown:
    raise ValueError(
      f"config.pool.languages names {unknown}; codes are those of ISO 639-1 "
      f"that py3langid knows: {', '.join(sorted(identifier.labels))}."
    )
  return identifier
