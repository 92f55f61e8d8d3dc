"""What crosses a stage: frozen records, shape and dtype beside every field.

Shape key: B prompts, N samples a prompt, R = B * N rows, T tokens of a row,
S continuations of a row, G tokens of a continuation, J steps of a thought.
Ragged things live on the host as numpy; what is padded lives on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One task of a data set, as text."""

  id: str
  task: str  # "open_ended" or "math"
  prompt: str
  reference: str  # the reference answer, or the true final answer of maths
  columns: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Document:
  """A pretraining document, as plain text; tags are added when encoded."""

  prompt: str
  thought: str
  answer: str
  closed: bool = True  # False: the answer follows without </think>
  after: str = ""  # text after the end of the turn


@dataclasses.dataclass(frozen=True)
class Sample:
  """One completion as it was sampled; tokens include the stop token."""

  tokens: np.ndarray  # [T] int32
  logprob: np.ndarray  # [T] float32, untruncated, at sampling temperature
  finished: bool  # ended by a stop token or string
  reason: str = ""  # "stop", or "length" or "loop" where it was cut off
  # [T] float32, under the truncated distribution that it was drawn from; None
  # where nothing was truncated, banned or biased.
  truncated_logprob: np.ndarray | None = None

  def behavior_logprob(self) -> np.ndarray:
    """Log-probability of each token as it was drawn, float32 [T]."""
    if self.truncated_logprob is None:
      return self.logprob
    return self.truncated_logprob


@dataclasses.dataclass(frozen=True)
class Continuation:
  """Tokens to be scored as the continuation of a prefix of a prefix.

  Context is `prefix[:fork]`; `tokens[:skip]` is context too (a bridge such as
  "</think>"), `tokens[skip:]` is scored.
  """

  prefix: int  # index into the list of prefixes
  fork: int  # number of prefix tokens seen, 1 <= fork <= len(prefix)
  tokens: np.ndarray  # [G] int32
  skip: int = 0  # 0 <= skip < G


@dataclasses.dataclass(frozen=True)
class Logprobs:
  """Token scores of prefixes and continuations; float32, natural log."""

  prefix_logprob: list[np.ndarray]  # [T_i]; entry 0 of each is 0 (no context)
  prefix_entropy: list[np.ndarray]  # [T_i]
  continuation_logprob: list[np.ndarray]  # [G_b - skip_b]
  continuation_entropy: list[np.ndarray]  # [G_b - skip_b]
  prefix_tokens: int  # tokens pushed through the model as prefix
  continuation_tokens: int  # tokens pushed through the model as continuations


@struct.dataclass
class Thoughts:
  """Where the steps of each completion lie, in completion token positions.

  Position p of a completion means "after p of its tokens". Slots past
  `count` hold zeros.
  """

  closed: jax.Array  # [R] bool, a <think> ... </think> pair exists
  start: jax.Array  # [R] int32, position just after the <think> token
  end: jax.Array  # [R] int32, position just before the </think> token
  count: jax.Array  # [R] int32, number of steps, 0 when not closed
  step_end: jax.Array  # [R, J] int32, position where step j is complete
  reflective: jax.Array  # [R, J] bool, step j holds a reflection keyword


# An array of JAX on devices, of numpy on a host, its shape alone in a plan.
Leaf = Any


class Batch(struct.PyTreeNode):
  """Rows of an RL or SFT update, right-padded; a row is prompt + completion.

  Where `continuations` is not 0, a row is a prompt of `prefix` places, padding
  included, and then so many completions of equal places each, which all go on
  from the end of the prompt and do not see one another; segment 1 is the
  prompt, each completion has its own.
  """

  tokens: Leaf  # [R, T] int32
  positions: Leaf  # [R, T] int32, restart at 0 with each segment
  segments: Leaf  # [R, T] int32, 0 is padding
  loss_mask: Leaf  # [R, T] float32, 1 where token t is a target
  advantage: Leaf  # [R, T] float32, zeros in SFT
  old_logprob: Leaf  # [R, T] float32 of token t, zeros in SFT
  ref_logprob: Leaf  # [R, T] float32 of token t, zeros in SFT
  # What only some losses read, [R, T, ...] by name: "value" and "returns" of
  # a critic, "top_ids" and "top_logprob" of a teacher.
  extra: dict[str, Leaf] = struct.field(default_factory=dict)
  prefix: int = struct.field(pytree_node=False, default=0)
  continuations: int = struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """N samples of each of B prompts, as rewards and advantage estimators read
  them."""

  prompts: Sequence[Prompt]  # [B]
  samples: int  # N; rows R = B * N are prompt-major
  prompt_ids: Sequence[np.ndarray]  # [B] int32 tokens of the chat prompts
  completions: Sequence[Sample]  # [R]
  texts: Sequence[str]  # [R] completions without special tokens, tags kept
  thoughts: Thoughts  # [R] host arrays
  encode: Callable[[str], np.ndarray]  # plain text -> int32 tokens
  chat_prompt: Callable[[str], np.ndarray]  # a user's turn -> int32 tokens

  def owner(self, row: int) -> int:
    """The prompt of a row."""
    return row // self.samples

  def of(self, kept: Sequence[int]) -> "Rollouts":
    """The samples of some of the prompts."""
    rows = [b * self.samples + n for b in kept for n in range(self.samples)]
    return dataclasses.replace(
      self,
      prompts=[self.prompts[b] for b in kept],
      prompt_ids=[self.prompt_ids[b] for b in kept],
      completions=[self.completions[r] for r in rows],
      texts=[self.texts[r] for r in rows],
      thoughts=jax.tree.map(lambda x: x[rows], self.thoughts),
    )

  def tokens(self) -> tuple[Sequence[np.ndarray], list[np.ndarray]]:
    """Of the prompts, and of their completions, prompt-major."""
    return self.prompt_ids, [s.tokens for s in self.completions]

  def lengths(self) -> np.ndarray:
    """Tokens of each completion, stop token included, int64 [B, N]."""
    length_R = np.asarray([len(s.tokens) for s in self.completions])
    return length_R.reshape(len(self.prompts), self.samples)

  def after(self, turns: Sequence[str]) -> list[np.ndarray]:
    """Each completion as a prefix after another user's turn, one a row."""
    return [
      np.concatenate([self.chat_prompt(turn), sample.tokens])
      for turn, sample in zip(turns, self.completions, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class LogprobRequest:
  """What a reward or an advantage estimator wants scored, besides the rows.

  A continuation with `prefix < R` forks from that row (prompt + completion);
  one with `prefix = R + i` forks from `prefixes[i]`.
  """

  prefixes: Sequence[np.ndarray] = ()
  continuations: Sequence[Continuation] = ()
  aux: Any = None  # comes back with the result


@dataclasses.dataclass(frozen=True)
class LogprobResult:
  """Log-probabilities in the order of the `LogprobRequest`; float32, natural
  log."""

  row_logprob: Sequence[np.ndarray]  # [R] of [C_r], completion tokens alone
  row_entropy: Sequence[np.ndarray]  # [R] of [C_r]
  prefix_logprob: Sequence[np.ndarray] = ()
  continuation_logprob: Sequence[np.ndarray] = ()
  aux: Any = None
