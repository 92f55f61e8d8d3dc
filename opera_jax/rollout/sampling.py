"""Samples a token from logits: truncation, the draw, log-probabilities.

Shape key: R rows (one token is sampled for each), V vocabulary, K largest
logits, W recent tokens.
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

MAX_ITERATIVE_TOP_K = 64  # a CPU finds so many with one max each; see `_top_k`


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample. Static: each set of values is one compiled program.

  Attributes:
    max_new_tokens: most tokens of a completion, its stop token included.
    stop_ids: tokens that end a completion. Without any, only the length and
      stop strings do.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability
      reaches p.
    min_p: keep tokens at least min_p times as likely as the most likely one.
    min_new_tokens: before so many tokens no stop token is sampled and no stop
      string ends a completion.
    banned_ids: tokens that are never sampled.
    vocab_size: ids from here on pad the model's head and are never sampled; 0
      if the head has no padding.
    logit_bias: (token, number added to its logit) pairs.
    loop_period: ends a completion whose last `loop_tokens` tokens repeat with a
      period of at most this; 0 means never.
    loop_tokens: at least twice the period, if there is one.
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
    # Configs have lists; a static argument must be hashable.
    bias = tuple(map(tuple, self.logit_bias))
    if not all(
      len(pair) == 2 and isinstance(pair[0], int) and math.isfinite(pair[1])
      for pair in bias
    ):
      raise ValueError(
        f"logit_bias is {self.logit_bias}; it holds (token id, finite number "
        "added to its logit) pairs. Use banned_ids for tokens that are never "
        "sampled."
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
    """Whether unlikely tokens are left out."""
    return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

  def reshapes(self) -> bool:
    """Whether tokens are sampled from another distribution than the model's."""
    edits = self.banned_ids or self.logit_bias or self.vocab_size
    delays_stop = self.min_new_tokens and self.stop_ids
    return self.temperature > 0 and bool(
      self.truncates() or edits or delays_stop
    )

  def check(self, padded_vocab_size: int) -> None:
    """Checks that the model has all token ids named here.

    Args:
      padded_vocab_size: size of the model's head.

    Raises:
      ValueError: an id outside the vocabulary, a vocabulary larger than the
        head, or every token banned.
    """
    if not 0 <= self.vocab_size <= padded_vocab_size:
      raise ValueError(
        f"The vocabulary has {self.vocab_size} ids and the model's head "
        f"{padded_vocab_size} rows; every id needs one. Check that tokenizer "
        "and model agree."
      )
    vocab_size = self.vocab_size or padded_vocab_size
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
  settings: Sampling,
  tokenizer: tokenizer_lib.Tokenizer,
  padded_vocab_size: int,
) -> Sampling:
  """Settings that sample only ids of the tokenizer and stop at its end ids.

  Args:
    settings: its stop ids and banned ids stay.
    tokenizer: of the policy.
    padded_vocab_size: size of the model's head.
  """
  stops = (*tokenizer.end_ids, *settings.stop_ids)
  banned = (*tokenizer.unused_ids, *settings.banned_ids)
  padded = tokenizer.vocab_size < padded_vocab_size
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
    top_p: of the tokens left, keep the smallest set of most likely ones whose
      probability reaches p. The most likely token and ties with the last one
      stay. 1 keeps all.
    min_p: of the tokens left, keep those at least min_p times as likely as the
      most likely one; 0 keeps all.

  Returns:
    float32 logits [R, V].
  """
  V = logit_RV.shape[-1]
  limits = 0 < top_k < V
  if limits or top_p < 1:
    # Sorting is expensive on a CPU; sort once, for both.
    sorted_RK = _top_k(logit_RV, top_k if limits else V)
  if limits:
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


def _top_k(x_RV: jax.Array, count: int) -> jax.Array:
  """The `count` largest values of each row, descending.

  A CPU finds a small number with one `max` each. Inside a decode loop XLA
  implements its own top-k there as a sort of the whole row, which takes as long
  as the layers do.
  """

  def sort(x_RV: jax.Array) -> jax.Array:
    return jax.lax.top_k(x_RV, count)[0]

  if count > MAX_ITERATIVE_TOP_K or target.platform() != "cpu":
    return sort(x_RV)

  def append_next(
    i: jax.Array, found: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    last_R1, largest_RK = found
    below_RV = jnp.where(x_RV < last_R1, x_RV, -jnp.inf)
    last_R1 = jnp.max(below_RV, axis=-1, keepdims=True)
    return last_R1, jax.lax.dynamic_update_slice(largest_RK, last_R1, (0, i))

  R = x_RV.shape[0]
  start = jnp.full((R, 1), jnp.inf), jnp.zeros((R, count), x_RV.dtype)
  last_R1, largest_RK = jax.lax.fori_loop(0, count, append_next, start)
  # The loop finds equal values once. If there were any, sort after all.
  distinct = jnp.all(jnp.sum(x_RV >= last_R1, axis=-1) == count)
  return jax.lax.cond(distinct, lambda _: largest_RK, sort, x_RV)


def sample(
  logit_RV: jax.Array,
  key_R: jax.Array,
  settings: Sampling,
  num_sampled_R: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Samples one token for each row.

  Args:
    logit_RV: float32 logits of the head.
    key_R: a random key per row, the same for all tokens of a sample, so that a
      sample does not depend on its neighbours.
    settings: see `Sampling`; bias and bans come before the temperature.
    num_sampled_R: int32, tokens that a row has sampled before; None means 0.

  Returns:
    Three arrays [R]: the tokens, int32; their log-probability under the model's
    own distribution, without bias, bans or truncation, at this temperature (at
    temperature 1 if greedy), float32, which the trainer computes too; and their
    log-probability under the distribution that they were sampled from. If the
    two distributions are equal, the same array is returned twice; see
    `Sampling.reshapes`.
  """
  R, V = logit_RV.shape
  if num_sampled_R is None:
    num_sampled_R = jnp.zeros(R, jnp.int32)
  temperature = settings.temperature or 1.0
  kept_RV = logit_RV
  if settings.logit_bias or settings.banned_ids:
    kept_RV = kept_RV + _bias(settings, V)[None]
  if settings.vocab_size and settings.vocab_size < V:
    token_RV = jax.lax.broadcasted_iota(jnp.int32, (R, V), 1)
    kept_RV = jnp.where(token_RV < settings.vocab_size, kept_RV, -jnp.inf)
  kept_RV = kept_RV / temperature
  if settings.min_new_tokens and settings.stop_ids:
    stops_V = jnp.zeros(V, bool).at[jnp.asarray(settings.stop_ids)].set(True)
    early_R = num_sampled_R + 1 < settings.min_new_tokens
    kept_RV = jnp.where(early_R[:, None] & stops_V[None], -jnp.inf, kept_RV)
  if settings.temperature > 0:
    kept_RV = truncate(
      kept_RV,
      top_k=settings.top_k,
      top_p=settings.top_p,
      min_p=settings.min_p,
    )
    token_R = _exponential_race(kept_RV, key_R, num_sampled_R)
  else:
    token_R = _argmax(kept_RV)
  own_R = logprob(logit_RV, token_R, temperature)
  if not settings.reshapes():
    return token_R, own_R, own_R
  return token_R, own_R, logprob(kept_RV, token_R)


def logprob(
  logit_RV: jax.Array, token_R: jax.Array, temperature: float = 1.0
) -> jax.Array:
  """Log-probability of one token of each row.

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
  """Sums of the rows, in an order that depends on V alone.

  On a CPU, XLA's own order also depends on the number of rows.
  """
  if target.platform() != "cpu":
    return jnp.sum(x_RV, axis=-1)
  remainders = []
  while x_RV.shape[-1] > 1:
    half = x_RV.shape[-1] // 2
    remainders.extend([x_RV[:, -1]] * (x_RV.shape[-1] % 2))
    x_RV = x_RV[:, :half] + x_RV[:, half : 2 * half]
  return functools.reduce(operator.add, remainders, x_RV[:, 0])


def _exponential_race(
  logit_RV: jax.Array, key_R: jax.Array, num_sampled_R: jax.Array
) -> jax.Array:
  """Samples from softmax(logit) by an exponential race, tokens [R].

  With E_v exponentially distributed, argmin_v E_v / p_v is a sample from p.
  This is the Gumbel-max trick with one logarithm per token instead of two: the
  other one is replaced by the exponential that the token's log-probability
  needs anyway. Cheaper methods (one uniform number against cumulative sums)
  would change a token with the last bit of a logit far more often.
  """
  most_R1 = jnp.max(logit_RV, axis=-1, keepdims=True)
  rate_RV = jnp.exp(logit_RV - most_R1)
  bits_RV = _random_bits(key_R, num_sampled_R, logit_RV.shape[-1])
  # Uniform in (0, 1), with the finest steps near 0, where the shortest times
  # are. The last few values round to 1, which gives an infinite time.
  uniform_RV = (bits_RV.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
  return _argmax(rate_RV / -jnp.log1p(-uniform_RV))


def _argmax(x_RV: jax.Array) -> jax.Array:
  """The first index of the largest value, by two plain reductions.

  On a CPU they are many times faster than argmax's reduction of pairs.
  """
  V = x_RV.shape[-1]
  index_RV = jax.lax.broadcasted_iota(jnp.int32, x_RV.shape, 1)
  most_R1 = jnp.max(x_RV, axis=-1, keepdims=True)
  # NaN equals nothing; the host raises when it sees its log-probability.
  return jnp.min(jnp.where(x_RV == most_R1, index_RV, V - 1), axis=-1)


def _random_bits(
  key_R: jax.Array, num_sampled_R: jax.Array, V: int
) -> jax.Array:
  """Random bits [R, V] uint32 of (key, number of sampled tokens, token).

  Threefry-2x32 with 13 rounds, the fewest that pass BigCrush (Salmon et al.,
  SC 2011), written in one expression, which XLA fuses. `jax.random.bits` with a
  key folded for every token runs as loops over arrays in memory and takes ten
  times as long.
  """
  key_R2 = jax.random.key_data(key_R)[:, :2]
  words = [key_R2[:, :1], key_R2[:, 1:]]
  words.append(words[0] ^ words[1] ^ jnp.uint32(0x1BD11BDA))
  shape = (key_R2.shape[0], V)
  x = jax.lax.broadcasted_iota(jnp.uint32, shape, 1) + words[0]
  counter_R1 = num_sampled_R[:, None].astype(jnp.uint32)
  y = jnp.broadcast_to(counter_R1 + words[1], shape)
  for number in range(13):
    x = x + y
    rotation = ((13, 15, 26, 6), (17, 29, 16, 24))[number // 4 % 2][number % 4]
    y = x ^ ((y << rotation) | (y >> (32 - rotation)))
    if number % 4 == 3:
      injection = number // 4 + 1
      x = x + words[injection % 3]
      y = y + words[(injection + 1) % 3] + jnp.uint32(injection)
  return x ^ y


def _bias(settings: Sampling, V: int) -> jax.Array:
  """What is added to the logits, [V] float32; -inf for banned tokens."""
  bias_V = np.zeros(V, np.float32)
  for token, bias in settings.logit_bias:
    bias_V[token] += bias
  bias_V[list(settings.banned_ids)] = -np.inf
  return jnp.asarray(bias_V)


def loops(recent_RW: jax.Array, period: int) -> jax.Array:
  """Whether the recent tokens repeat with a period of at most `period`.

  Args:
    recent_RW: int32, oldest first; -1 where none has been sampled yet.
    period: longest period to detect, at most W / 2.

  Returns:
    bool [R].
  """
  W = recent_RW.shape[1]
  full_R = recent_RW[:, 0] >= 0
  found_R = jnp.zeros(recent_RW.shape[0], bool)
  for p in range(1, period + 1):
    found_R |= jnp.all(recent_RW[:, p:] == recent_RW[:, : W - p], axis=1)
  return found_R & full_R
