"""AdvantageInputs with random log-probabilities and ragged completions."""

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.advantages import inputs as inputs_lib


@pytest.fixture
def make():
  """`make(reward_BN, lengths=...)` builds inputs."""

  def build(
    reward_BN,
    lengths=None,
    *,
    success_BN=None,
    with_answer=None,
    seed=0,
    prompts=None,
  ):
    """AdvantageInputs with random log-probabilities; ragged completions."""
    reward_BN = np.asarray(reward_BN, np.float32)
    rng = np.random.default_rng(seed)
    B, N = reward_BN.shape
    lengths = lengths or list(rng.integers(1, 7, B * N))
    tokens = [np.arange(c, dtype=np.int32) for c in lengths]
    logprobs = [-rng.uniform(0.1, 3, c).astype(np.float32) for c in lengths]
    with_answer = with_answer or [
      -rng.uniform(0.1, 3, c).astype(np.float32) for c in lengths
    ]
    rollouts = structs.Rollouts(
      prompts=prompts
      or [
        structs.Prompt(str(b), "math", f"q{b}", f"#### {b}") for b in range(B)
      ],
      samples=N,
      prompt_ids=[np.arange(3, dtype=np.int32)] * B,
      completions=[
        structs.Sample(t, p, True) for t, p in zip(tokens, logprobs)
      ],
      texts=[f"text {r}" for r in range(B * N)],
      thoughts=None,
      encode=lambda text: np.frombuffer(text.encode(), np.uint8).astype(
        np.int32
      ),
      chat_prompt=lambda text: np.frombuffer(
        f"<{text}>".encode(), np.uint8
      ).astype(np.int32),
    )
    return inputs_lib.AdvantageInputs(
      rollouts=rollouts,
      reward_BN=reward_BN,
      success_BN=reward_BN if success_BN is None else success_BN,
      logprob=logprobs,
      penalty=[np.zeros(c, np.float32) for c in lengths],
      logprobs={"with_answer": with_answer, "teacher": with_answer},
    )

  return build
