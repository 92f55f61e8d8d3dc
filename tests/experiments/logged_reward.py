"""A user's reward that writes down what it was asked about."""

import json
import os


def short(prompts, completions, *, id, **columns):
  """Minus the length; a line of the asked prompts' ids into $REWARD_LOG."""
  with open(os.environ["REWARD_LOG"], "a", encoding="utf-8") as file:
    file.write(json.dumps(sorted(set(id))) + "\n")
  return [-len(text) / 100 for text in completions]
