"""Logits to a token.

Shape key: R rows, V vocabulary, W recent tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp


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

  def __post_init__(self):
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

  def check(self, vocab_size: int) -> None:
    """Refuses token ids that the model does not have.

    Raises:
      ValueError: an id outside [0, vocab_size), or every token banned.
    """
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
  if 0 < top_k < V:
    kth_R1 = jax.lax.top_k(logit_RV, top_k)[0][:, -1:]
    logit_RV = jnp.where(logit_RV < kth_R1, -jnp.inf, logit_RV)
  if top_p < 1:
    width = top_k if 0 < top_k < V else V
    sorted_RK = jax.lax.top_k(logit_RV, width)[0]
    probability_RK = jax.nn.softmax(sorted_RK, axis=-1)
    before_RK = jnp.cumsum(probability_RK, axis=-1) - probability_RK
    count_R1 = jnp.sum(before_RK < top_p, axis=-1, keepdims=True)
    last_R1 = jnp.take_along_axis(sorted_RK, count_R1 - 1, axis=-1)
    logit_RV = jnp.where(logit_RV < last_R1, -jnp.inf, logit_RV)
  if min_p > 0:
    least_R1 = jnp.max(logit_RV, axis=-1, keepdims=True) + jnp.log(min_p)
    logit_RV = jnp.where(logit_RV < least_R1, -jnp.inf, logit_RV)
  return logit_RV


def sample(
  logit_RV: jax.Array,
  key_R: jax.Array,
  settings: Sampling,
  drawn_R: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token a row.

  Args:
    logit_RV: float32 logits of the head.
    key_R: one random key a row, so that a row's draw does not depend on its
      neighbours.
    settings: see `Sampling`; bias and bans come before the temperature.
    drawn_R: int32 tokens that a row has drawn before; None is none.

  Returns:
    Tokens [R] int32, and their log-probability [R] float32 under the model's
    own distribution, without bias, bans or truncation, at this temperature
    (at temperature 1 if greedy), which is what the trainer computes.
  """
  R, V = logit_RV.shape
  temperature = settings.temperature or 1.0
  kept_RV = (logit_RV + _bias(settings, V)[None]) / temperature
  if settings.min_new_tokens and settings.stop_ids:
    drawn_R = jnp.zeros(R, jnp.int32) if drawn_R is None else drawn_R
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
    kept_RV = kept_RV + jax.vmap(
      lambda key: jax.random.gumbel(key, (V,), jnp.float32)
    )(key_R)
  token_R = jnp.argmax(kept_RV, axis=-1).astype(jnp.int32)
  return token_R, logprob(logit_RV, token_R, temperature)


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
  chosen_R = jnp.take_along_axis(own_RV, token_R[:, None], axis=-1)[:, 0]
  return chosen_R - jax.nn.logsumexp(own_RV, axis=-1)


def _bias(settings: Sampling, V: int) -> jax.Array:
  bias_V = jnp.zeros(V, jnp.float32)
  for token, bias in settings.logit_bias:
    bias_V = bias_V.at[token].add(bias)
  if settings.banned_ids:
    bias_V = bias_V.at[jnp.asarray(settings.banned_ids)].set(-jnp.inf)
  return bias_V


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
