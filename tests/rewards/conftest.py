"""Samples as rewards see them, made of texts."""

import numpy as np
import pytest

from opera_jax import structs


@pytest.fixture
def rollouts():
  """`rollouts(groups, tasks)`: [B][N] texts; a token a character."""

  def build(groups, tasks=None, finished=True):
    tasks = tasks or [
      structs.Prompt(str(b), "math", f"q{b}", "4") for b in range(len(groups))
    ]

    def encode(text):
      return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    texts = [text for group in groups for text in group]
    return structs.Rollouts(
      prompts=tasks,
      samples=len(groups[0]),
      prompt_ids=[encode(t.prompt) for t in tasks],
      completions=[
        structs.Sample(encode(t), np.zeros(len(t), np.float32), finished)
        for t in texts
      ],
      texts=texts,
      thoughts=None,
      encode=encode,
      chat_prompt=lambda text: encode(f"<{text}>"),
    )

  return build


@pytest.fixture
def result():
  """`answers(rollouts, seed)`: random log-probabilities of rows and null
  prefixes."""

  def build(rollouts, request=None, seed=0):
    rng = np.random.default_rng(seed)

    def logprob(size):
      return -rng.uniform(0.05, 2, size).astype(np.float32)

    row = [logprob(len(s.tokens)) for s in rollouts.completions]
    prefixes = request.prefixes if request else ()
    return structs.LogprobResult(
      completion_logprob=row,
      completion_entropy=row,
      prefix_logprob=[logprob(len(t)) for t in prefixes],
    )

  return build
