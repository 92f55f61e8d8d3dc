"""Logits to a token.

Shape key: R rows, V vocabulary, W recent tokens.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from opera_jax.kernels import target
from opera_jax.text import tokenizer as tokenizer_lib

FEW = 64  # of the largest, up to which a CPU looks for one after the other


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to draw: static, so each value set is one compiled program.

  Attributes:
    max_new_tokens: longest completion, its stop token included.
    stop_ids: tokens that end a completion; none leaves that to the length
      and to stop strings.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens that reaches p.
    min_p: keep tokens at least min_p times as likely as the most likely.
    min_new_tokens: no stop token is drawn, and no stop string ends a
      completion, among the first ones.
    banned_ids: tokens that are never drawn.
    vocab_size: ids from here on are rows of the head that pad the vocabulary,
      and are never drawn; 0 where the head has none.
    logit_bias: (token, what is added to its logit) pairs.
    loop_period: ends a completion whose last `loop_tokens` tokens repeat
      with a period of at most this; 0 never does.
    loop_tokens: at least twice the period, where there is one.
  """

  max_new_tokens: int
  stop_ids: tuple[int, ...] = ()
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  min_new_tokens: int = 0
  banned_ids: tuple[int, ...] = ()
  logit_bias: tuple[tuple[int, float], ...] = ()
  loop_period: int = 0
  loop_tokens: int = 0
  vocab_size: int = 0

  def __post_init__(self):
    # A config may say lists; a static argument must be hashable.
    bias = tuple(map(tuple, self.logit_bias))
    if not all(
      len(pair) == 2 and isinstance(pair[0], int) and math.isfinite(pair[1])
      for pair in bias
    ):
      raise ValueError(
        f"logit_bias is {self.logit_bias}; it holds (token id, finite number "
        "added to its logit) pairs. Use banned_ids for tokens that are never "
        "drawn."
      )
    object.__setattr__(self, "logit_bias", bias)
    for name in ("stop_ids", "banned_ids"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if self.max_new_tokens < 1:
      raise ValueError(
        f"max_new_tokens must be at least 1, got {self.max_new_tokens}."
      )
    if self.temperature < 0:
      raise ValueError(
        f"The temperature must be >= 0, got {self.temperature}. Use 0 for "
        "greedy."
      )
    if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
      raise ValueError(
        f"Sampling needs top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1, got "
        f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}."
      )
    if not 0 <= self.min_new_tokens <= self.max_new_tokens:
      raise ValueError(
        f"min_new_tokens={self.min_new_tokens} must lie in [0, "
        f"max_new_tokens={self.max_new_tokens}]."
      )
    if self.loop_period < 0 or (
      self.loop_period and self.loop_tokens < 2 * self.loop_period
    ):
      raise ValueError(
        f"A loop is seen when it has come twice: loop_tokens="
        f"{self.loop_tokens} must be at least 2 x loop_period="
        f"{self.loop_period}."
      )

  def truncates(self) -> bool:
    """Whether tokens that the model may say are left out for being unlikely."""
    return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

  def reshapes(self) -> bool:
    """Whether tokens are drawn from another distribution than the model's."""
    bars = self.banned_ids or self.logit_bias or self.vocab_size
    late = self.min_new_tokens and self.stop_ids
    return self.temperature > 0 and bool(self.truncates() or bars or late)

  def check(self, rows: int) -> None:
    """Refuses token ids that the model does not have.

    Args:
      rows: of the model's head.

    Raises:
      ValueError: an id outside the vocabulary, a vocabulary beyond the head,
        or every token banned.
    """
    if not 0 <= self.vocab_size <= rows:
      raise ValueError(
        f"The vocabulary has {self.vocab_size} ids and the model's head {rows} "
        "rows; every id needs one. Check that tokenizer and model agree."
      )
    vocab_size = self.vocab_size or rows
    biased = [token for token, _ in self.logit_bias]
    for name, ids in (
      ("stop_ids", self.stop_ids),
      ("banned_ids", self.banned_ids),
      ("logit_bias", biased),
    ):
      wrong = [i for i in ids if not 0 <= i < vocab_size]
      if wrong:
        raise ValueError(
          f"{name} holds {wrong}, token ids lie in [0, {vocab_size}). Check "
          "that tokenizer and model agree."
        )
    if len(set(self.banned_ids)) >= vocab_size:
      raise ValueError(
        f"All {vocab_size} tokens are banned; leave at least one."
      )


def for_tokenizer(
  settings: Sampling, tokenizer: tokenizer_lib.Tokenizer, rows: int
) -> Sampling:
  """Settings by which every draw is a token, and every end id ends.

  Args:
    settings: its stop ids and banned ids stay.
    tokenizer: of the policy. Its end ids stop a completion, too; ids that it
      does not use are never drawn.
    rows: of the model's head, which may pad the vocabulary.
  """
  stops = (*tokenizer.end_ids, *settings.stop_ids)
  banned = (*tokenizer.unused_ids, *settings.banned_ids)
  padded = tokenizer.vocab_size < rows
  return dataclasses.replace(
    settings,
    stop_ids=tuple(dict.fromkeys(stops)),
    banned_ids=tuple(dict.fromkeys(banned)),
    vocab_size=tokenizer.vocab_size if padded else 0,
  )


def truncate(
  logit_RV: jax.Array,
  *,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
) -> jax.Array:
  """Sets logits outside the top k, then outside the nucleus, to -inf.

  Args:
    logit_RV: float32, already divided by the temperature.
    top_k: keep the k largest (ties with the k-th stay); 0 keeps all.
    top_p: of what is left, keep the smallest set of largest tokens whose
      probability reaches p; the most likely token always stays, ties with
      the last one stay. 1 keeps all.
    min_p: of what is left, keep tokens with at least min_p times the
      probability of the most likely; 0 keeps all.

  Returns:
    float32 logits [R, V].
  """
  V = logit_RV.shape[-1]
  some = 0 < top_k < V
  if some or top_p < 1:
    # Dear on a CPU, so once: what top k leaves is sorted already.
    sorted_RK = _largest(logit_RV, top_k if some else V)
  if some:
    logit_RV = jnp.where(logit_RV < sorted_RK[:, -1:], -jnp.inf, logit_RV)
  if top_p < 1:
    likely_RK = jnp.exp(sorted_RK - sorted_RK[:, :1])
    probability_RK = likely_RK / _sum(likely_RK)[:, None]
    before_RK = jnp.cumsum(probability_RK, axis=-1) - probability_RK
    count_R1 = jnp.sum(before_RK < top_p, axis=-1, keepdims=True)
    last_R1 = jnp.take_along_axis(sorted_RK, count_R1 - 1, axis=-1)
    logit_RV = jnp.where(logit_RV < last_R1, -jnp.inf, logit_RV)
  if min_p > 0:
    least_R1 = jnp.max(logit_RV, axis=-1, keepdims=True) + jnp.log(min_p)
    logit_RV = jnp.where(logit_RV < least_R1, -jnp.inf, logit_RV)
  return logit_RV


def _largest(x_RV: jax.Array, count: int) -> jax.Array:
  """The `count` largest of each row, descending.

  A few are found one after the other on a CPU: in a loop of tokens it knows no
  top k but a sort of everything, which costs as much as the layers do.
  """

  def sort(x_RV):
    return jax.lax.top_k(x_RV, count)[0]

  if count > FEW or target.platform() != "cpu":
    return sort(x_RV)

  def following(i, found):
    last_R1, largest_RK = found
    below_RV = jnp.where(x_RV < last_R1, x_RV, -jnp.inf)
    last_R1 = jnp.max(below_RV, axis=-1, keepdims=True)
    return last_R1, jax.lax.dynamic_update_slice(largest_RK, last_R1, (0, i))

  R = x_RV.shape[0]
  start = jnp.full((R, 1), jnp.inf), jnp.zeros((R, count), x_RV.dtype)
  last_R1, largest_RK = jax.lax.fori_loop(0, count, following, start)
  # Equal ones were found once; where there are some, sort after all.
  apart = jnp.all(jnp.sum(x_RV >= last_R1, axis=-1) == count)
  return jax.lax.cond(apart, lambda _: largest_RK, sort, x_RV)


def sample(
  logit_RV: jax.Array,
  key_R: jax.Array,
  settings: Sampling,
  drawn_R: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws one token a row.

  Args:
    logit_RV: float32 logits of the head.
    key_R: one random key a row, the same for all its tokens, so that a row's
      draw does not depend on its neighbours.
    settings: see `Sampling`; bias and bans come before the temperature.
    drawn_R: int32 tokens that a row has drawn before; None is none.

  Returns:
    Tokens [R] int32; their log-probability [R] float32 under the model's own
    distribution, without bias, bans or truncation, at this temperature (at
    temperature 1 if greedy), which is what the trainer computes; and that
    under the distribution they were drawn from. Where the two distributions
    are one, so is the array; see `Sampling.reshapes`.
  """
  R, V = logit_RV.shape
  drawn_R = jnp.zeros(R, jnp.int32) if drawn_R is None else drawn_R
  temperature = settings.temperature or 1.0
  kept_RV = logit_RV
  if settings.logit_bias or settings.banned_ids:
    kept_RV = kept_RV + _bias(settings, V)[None]
  if settings.vocab_size and settings.vocab_size < V:
    place_RV = jax.lax.broadcasted_iota(jnp.int32, (R, V), 1)
    kept_RV = jnp.where(place_RV < settings.vocab_size, kept_RV, -jnp.inf)
  kept_RV = kept_RV / temperature
  if settings.min_new_tokens and settings.stop_ids:
    stops_V = jnp.zeros(V, bool).at[jnp.asarray(settings.stop_ids)].set(True)
    early_R = drawn_R + 1 < settings.min_new_tokens
    kept_RV = jnp.where(early_R[:, None] & stops_V[None], -jnp.inf, kept_RV)
  if settings.temperature > 0:
    kept_RV = truncate(
      kept_RV,
      top_k=settings.top_k,
      top_p=settings.top_p,
      min_p=settings.min_p,
    )
    token_R = _first_to_come(kept_RV, key_R, drawn_R)
  else:
    token_R = _argmax(kept_RV)
  own_R = logprob(logit_RV, token_R, temperature)
  if not settings.reshapes():
    return token_R, own_R, own_R
  return token_R, own_R, logprob(kept_RV, token_R)


def logprob(
  logit_RV: jax.Array, token_R: jax.Array, temperature: float = 1.0
) -> jax.Array:
  """Log-probability of one token a row.

  Args:
    logit_RV: float32 logits of the head.
    token_R: int32.
    temperature: divides the logits.

  Returns:
    float32 [R].
  """
  own_RV = logit_RV / temperature
  most_R1 = jnp.max(own_RV, axis=-1, keepdims=True)
  total_R = _sum(jnp.exp(own_RV - most_R1))
  chosen_R1 = jnp.take_along_axis(own_RV, token_R[:, None], axis=-1)
  return (chosen_R1 - most_R1)[:, 0] - jnp.log(total_R)


def _sum(x_RV: jax.Array) -> jax.Array:
  """Sums of the rows, in an order that goes by their length alone.

  On a CPU, XLA's own goes by how many rows there are, too.
  """
  if target.platform() != "cpu":
    return jnp.sum(x_RV, axis=-1)
  odd = []
  while x_RV.shape[-1] > 1:
    half = x_RV.shape[-1] // 2
    odd.extend([x_RV[:, -1]] * (x_RV.shape[-1] % 2))
    x_RV = x_RV[:, :half] + x_RV[:, half : 2 * half]
  return functools.reduce(operator.add, odd, x_RV[:, 0])


def _first_to_come(
  logit_RV: jax.Array, key_R: jax.Array, drawn_R: jax.Array
) -> jax.Array:
  """Draws from softmax(logit): of waiting times E_v / p_v the shortest.

  The Gumbel trick with one logarithm a token in place of two, the other half
  being the softmax that a token's log-probability needs anyway. Other ways to
  draw that need less (a uniform number against running sums) would change a
  token with the last bit of a logit far more often.
  """
  most_R1 = jnp.max(logit_RV, axis=-1, keepdims=True)
  rate_RV = jnp.exp(logit_RV - most_R1)
  bits_RV = _bits(key_R, drawn_R, logit_RV.shape[-1])
  # The open interval (0, 1), finest near 0, where the shortest times are; the
  # last few values round to 1, which gives an infinite time.
  uniform_RV = (bits_RV.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
  return _argmax(rate_RV / -jnp.log1p(-uniform_RV))


def _argmax(x_RV: jax.Array) -> jax.Array:
  """The first place of the largest value: two plain reductions.

  On a CPU they are many times faster than one over pairs.
  """
  V = x_RV.shape[-1]
  place_RV = jax.lax.broadcasted_iota(jnp.int32, x_RV.shape, 1)
  most_R1 = jnp.max(x_RV, axis=-1, keepdims=True)
  # NaN equals nothing; the engine refuses its log-probability.
  return jnp.min(jnp.where(x_RV == most_R1, place_RV, V - 1), axis=-1)


def _bits(key_R: jax.Array, drawn_R: jax.Array, V: int) -> jax.Array:
  """Random bits [R, V] uint32 of (key, tokens drawn before, token).

  Threefry-2x32 with 13 rounds, the fewest that pass BigCrush (Salmon et al.,
  SC 2011), written out in one expression: `jax.random.bits` with a key folded
  for every token runs as loops over arrays in memory, ten times slower.
  """
  key_R2 = jax.random.key_data(key_R)[:, :2]
  words = [key_R2[:, :1], key_R2[:, 1:]]
  words.append(words[0] ^ words[1] ^ jnp.uint32(0x1BD11BDA))
  shape = (key_R2.shape[0], V)
  x = jax.lax.broadcasted_iota(jnp.uint32, shape, 1) + words[0]
  y = jnp.broadcast_to(drawn_R[:, None].astype(jnp.uint32) + words[1], shape)
  for number in range(13):
    x = x + y
    turn = ((13, 15, 26, 6), (17, 29, 16, 24))[number // 4 % 2][number % 4]
    y = x ^ ((y << turn) | (y >> (32 - turn)))
    if number % 4 == 3:
      more = number // 4 + 1
      x = x + words[more % 3]
      y = y + words[(more + 1) % 3] + jnp.uint32(more)
  return x ^ y


def _bias(settings: Sampling, V: int) -> jax.Array:
  bias_V = np.zeros(V, np.float32)
  for token, bias in settings.logit_bias:
    bias_V[token] += bias
  bias_V[list(settings.banned_ids)] = -np.inf
  return jnp.asarray(bias_V)


def loops(recent_RW: jax.Array, period: int) -> jax.Array:
  """Whether the recent tokens repeat with a period of at most `period`.

  Args:
    recent_RW: int32, oldest first; -1 where none has been drawn yet.
    period: longest period looked for, at most W / 2.

  Returns:
    bool [R].
  """
  W = recent_RW.shape[1]
  full_R = recent_RW[:, 0] >= 0
  found_R = jnp.zeros(recent_RW.shape[0], bool)
  for p in range(1, period + 1):
    found_R |= jnp.all(recent_RW[:, p:] == recent_RW[:, : W - p], axis=1)
  return found_R & full_R
