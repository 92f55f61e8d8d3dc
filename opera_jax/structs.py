"""Frozen records that stages pass to each other, with shapes and dtypes.

Shape key: B prompts, N samples of a prompt, R = B * N completions
(prompt-major) or the packed rows of a batch, T tokens of a row, S continuations
of a prefix, G tokens of a continuation, J steps of a thought, C_r tokens of
completion r. Ragged data is numpy on the host; padded data is on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One task of a dataset, as text."""

  id: str
  task: str  # "open_ended" or "math"
  prompt: str
  reference: str  # the reference answer; for maths the true final answer
  columns: dict[str, Any] = dataclasses.field(default_factory=dict)
  set: str = ""  # its data set in config.data.mix; "" without a mix


@dataclasses.dataclass(frozen=True)
class Document:
  """A pretraining document as plain text; encoding adds the think tags."""

  prompt: str
  thought: str
  answer: str
  closed: bool = True  # False: the answer follows without </think>
  after: str = ""  # text that follows the end of the turn


@dataclasses.dataclass(frozen=True)
class Sample:
  """One sampled completion; tokens include the stop token."""

  tokens: np.ndarray  # [T] int32
  logprob: np.ndarray  # [T] float32, untruncated, at sampling temperature
  finished: bool  # ended by a stop token or stop string
  reason: str = ""  # "stop"; "length" or "loop" if it was cut off
  # [T] float32, under the truncated distribution that was sampled from; None
  # if no token was truncated, banned or biased.
  truncated_logprob: np.ndarray | None = None

  def behavior_logprob(self) -> np.ndarray:
    """Log-probability of each token under the sampling distribution, float32
    [T]."""
    if self.truncated_logprob is None:
      return self.logprob
    return self.truncated_logprob


@dataclasses.dataclass(frozen=True)
class Continuation:
  """Tokens to score as a continuation that forks from inside a prefix.

  The context is `prefix[:fork]` and `tokens[:skip]` (a bridge such as
  "</think>"); `tokens[skip:]` is scored.
  """

  prefix: int  # index into the list of prefixes
  fork: int  # prefix tokens in the context, 1 <= fork <= len(prefix)
  tokens: np.ndarray  # [G] int32
  skip: int = 0  # 0 <= skip < G


@dataclasses.dataclass(frozen=True)
class Logprobs:
  """Scored tokens of prefixes and continuations; float32, in nats."""

  prefix_logprob: list[np.ndarray]  # [T_i]; entry 0 is 0: it has no context
  prefix_entropy: list[np.ndarray]  # [T_i]
  continuation_logprob: list[np.ndarray]  # [G_b - skip_b]
  continuation_entropy: list[np.ndarray]  # [G_b - skip_b]
  prefix_tokens: int  # tokens that the model processed as prefixes
  continuation_tokens: int  # tokens that it processed as continuations


@struct.dataclass
class Thoughts:
  """Positions of the steps of each completion.

  Position p of a completion means "after p of its tokens". Entries past `count`
  are 0.
  """

  closed: jax.Array  # [R] bool, there is a <think> ... </think> pair
  start: jax.Array  # [R] int32, position just after the <think> token
  end: jax.Array  # [R] int32, position just before the </think> token
  count: jax.Array  # [R] int32, number of steps, 0 if not closed
  step_end: jax.Array  # [R, J] int32, position where step j ends
  reflective: jax.Array  # [R, J] bool, step j contains a reflection keyword


# A JAX array on devices, a numpy array on the host, a ShapeDtypeStruct in a
# plan.
Leaf = Any


class Batch(struct.PyTreeNode):
  """Packed rows of an RL or SFT update, right-padded.

  If `num_continuations` is 0, a row holds one or several sequences (prompt +
  completion), each with its own segment id.

  Otherwise a row holds one prompt, padded to `prefix_length`, followed by
  `num_continuations` completions of it, padded to equal lengths. Every
  completion attends to the prompt and to itself, not to the others. The prompt
  has segment id 1, the completions 2, 3, ...
  """

  tokens: Leaf  # [R, T] int32
  positions: Leaf  # [R, T] int32, restart at 0 with each segment
  segments: Leaf  # [R, T] int32, 0 is padding
  loss_mask: Leaf  # [R, T] float32, 1 where token t is a target
  advantage: Leaf  # [R, T] float32, zeros in SFT
  old_logprob: Leaf  # [R, T] float32 of token t, zeros in SFT
  ref_logprob: Leaf  # [R, T] float32 of token t, zeros in SFT
  # Read by some losses only, [R, T, ...] by name: "value" and "returns" of a
  # critic, "top_ids" and "top_logprob" of a teacher.
  extra: dict[str, Leaf] = struct.field(default_factory=dict)
  prefix_length: int = struct.field(pytree_node=False, default=0)
  num_continuations: int = struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """N completions of each of B prompts: the input of rewards and advantage
  estimators."""

  prompts: Sequence[Prompt]  # [B]
  samples: int  # N; the R = B * N completions are prompt-major
  prompt_ids: Sequence[np.ndarray]  # [B] int32 tokens of the chat prompts
  completions: Sequence[Sample]  # [R]
  texts: Sequence[str]  # [R] completions without special tokens, tags kept
  thoughts: Thoughts  # [R] host arrays
  encode: Callable[[str], np.ndarray]  # plain text -> int32 tokens
  chat_prompt: Callable[[str], np.ndarray]  # a user turn -> int32 tokens

  def prompt_index(self, completion: int) -> int:
    """The index of a completion's prompt."""
    return completion // self.samples

  def select(self, prompts: Sequence[int]) -> "Rollouts":
    """The rollouts of some of the prompts, given by index."""
    chosen = [
      b * self.samples + n for b in prompts for n in range(self.samples)
    ]
    return dataclasses.replace(
      self,
      prompts=[self.prompts[b] for b in prompts],
      prompt_ids=[self.prompt_ids[b] for b in prompts],
      completions=[self.completions[r] for r in chosen],
      texts=[self.texts[r] for r in chosen],
      thoughts=jax.tree.map(lambda x: x[chosen], self.thoughts),
    )

  def tokens(self) -> tuple[Sequence[np.ndarray], list[np.ndarray]]:
    """Tokens of the B prompts, and of the R completions."""
    return self.prompt_ids, [s.tokens for s in self.completions]

  def lengths(self) -> np.ndarray:
    """Tokens of each completion, stop token included, int64 [B, N]."""
    length_R = np.asarray([len(s.tokens) for s in self.completions])
    return length_R.reshape(len(self.prompts), self.samples)

  def after(self, turns: Sequence[str]) -> list[np.ndarray]:
    """Each completion after another user turn instead of its prompt.

    Args:
      turns: [R] user turns, one per completion.

    Returns:
      [R] int32 tokens of chat prompt + completion.
    """
    return [
      np.concatenate([self.chat_prompt(turn), sample.tokens])
      for turn, sample in zip(turns, self.completions, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class LogprobRequest:
  """What a reward needs scored besides the completions themselves.

  A continuation with `prefix < R` forks from prompt + completion number
  `prefix`; one with `prefix = R + i` forks from `prefixes[i]`.
  """

  prefixes: Sequence[np.ndarray] = ()
  continuations: Sequence[Continuation] = ()
  aux: Any = None  # returned with the result


@dataclasses.dataclass(frozen=True)
class LogprobResult:
  """Log-probabilities in the order of the `LogprobRequest`; float32, nats."""

  completion_logprob: Sequence[np.ndarray]  # [R] of [C_r]
  completion_entropy: Sequence[np.ndarray]  # [R] of [C_r]
  prefix_logprob: Sequence[np.ndarray] = ()
  continuation_logprob: Sequence[np.ndarray] = ()
  aux: Any = None
