"""Labels of a completion's numbers on the page, and what they mean."""

# name in the files -> (label, one sentence)
TERMS = {
  "reward": ("reward", "The weighted sum of config.reward.terms."),
  "facts": (
    "facts kept",
    "Stated facts that the answer keeps, of 5. No reward sees it.",
  ),
  "correct": ("right answer", "1 if the maths answer is right, else 0."),
  "count": (
    "reflections that count",
    "Reflective steps of the thought that raise log P(reference).",
  ),
  "r_self": ("R_self", "tanh(reflections that count / tau), from 0 to 1."),
  "r_ppl": (
    "R_ppl",
    "Rank of log P(reference) among the samples of this prompt, 1 the best.",
  ),
  "score": (
    "log P(reference)",
    "Of the reference after the prompt and the whole completion, in nats per "
    "token.",
  ),
  "opera": ("OPERA", "alpha R_ppl + (1 - alpha) R_self."),
  "completion_tokens": ("length", "Tokens of the completion."),
  "thought_tokens": ("thought length", "Tokens between the think tags."),
  "advantage": (
    "advantage",
    "What the update multiplies the completion's log-probability with, mean "
    "over its tokens.",
  ),
}


def label(name: str) -> str:
  """A term's label; its own name if it has none."""
  return TERMS[name][0] if name in TERMS else name


def meaning(name: str) -> str:
  """A sentence about a term; "" for a term that the user brought."""
  return TERMS[name][1] if name in TERMS else ""
