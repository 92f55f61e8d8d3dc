"""Rotary position embedding, with the scalings that published models use.

  angle[p, i] = p / (divisor_i theta^(2 i / H)),   i < H / 2

A scaling is a divisor for every frequency and a factor for cosines and sines:

- linear: divisor = factor.
- llama3: 1 where a wavelength is shorter than original / high_freq_factor,
  `factor` where it is longer than original / low_freq_factor, interpolated
  between (Llama 3.1, arXiv 2407.21783).
- longrope: a searched divisor for each frequency, of which there are two sets,
  for short and for long sequences (arXiv 2402.13753). Switching between them
  would change the keys that a cached prefix holds, so a run uses one set.

Shape key: B rows, T tokens, N heads, H head dimension.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("linear", "llama3", "longrope")
SETS = ("short", "long")


@dataclasses.dataclass(frozen=True)
class Scaling:
  """The rope scaling of a config.json, under its names."""

  kind: str
  factor: float = 0.0  # longrope: 0 is maximum / original positions
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 0  # of llama3 and longrope
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()
  attention_factor: float = 0.0  # longrope: 0 is the formula of its paper

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f"Rope scaling {self.kind!r} is in use; {', '.join(KINDS)} are read."
      )
    if self.kind != "linear" and self.original_max_position_embeddings < 1:
      raise ValueError(
        f"Rope scaling {self.kind!r} knows the positions of before, got "
        "original_max_position_embeddings="
        f"{self.original_max_position_embeddings}. Mend the checkpoint's "
        "config.json."
      )
    if self.kind != "longrope" and self.factor <= 0:
      raise ValueError(
        f"Rope scaling {self.kind!r} divides frequencies by its factor, got "
        f"{self.factor}. Mend the checkpoint's config.json."
      )


def frequencies(
  head_dim: int,
  theta: float,
  scaling: Scaling | None = None,
  factors: str = "short",
) -> jax.Array:
  """Radians per position of every pair of channels, float32 [H / 2].

  Args:
    head_dim: H.
    theta: base of the wavelengths.
    scaling: or None.
    factors: which set of LongRoPE, of `SETS`.

  Raises:
    ValueError: LongRoPE with a number of factors other than H / 2.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  plain = 1.0 / theta**exponent
  if scaling is None:
    return plain
  return plain / _divisors(head_dim, theta, scaling, factors).astype(np.float32)


def _divisors(
  head_dim: int, theta: float, scaling: Scaling, factors: str
) -> np.ndarray:
  """What each of the H / 2 frequencies is divided by."""
  if scaling.kind == "linear":
    return np.full(head_dim // 2, scaling.factor)
  if scaling.kind == "longrope":
    chosen = np.asarray(getattr(scaling, f"{factors}_factor"))
    if len(chosen) != head_dim // 2:
      raise ValueError(
        f"LongRoPE has a factor for each pair of channels, {head_dim // 2} of "
        f"them, got {len(chosen)} {factors} factors. Mend the "
        "checkpoint's config.json."
      )
    return chosen
  wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  original = scaling.original_max_position_embeddings
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = np.clip((original / wavelength - low) / (high - low), 0, 1)
  return 1 / (kept + (1 - kept) / scaling.factor)


def amplitude(scaling: Scaling | None, max_position_embeddings: int) -> float:
  """What cosines and sines are multiplied by.

  LongRoPE: sqrt(1 + ln(maximum / original) / ln(original)).
  """
  if scaling is None or scaling.kind != "longrope":
    return 1.0
  if scaling.attention_factor:
    return scaling.attention_factor
  original = scaling.original_max_position_embeddings
  factor = scaling.factor or max_position_embeddings / original
  return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor, original))


def tables(
  position_BT: jax.Array, frequency: jax.Array, amplitude: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [B, T, 1, H / 2], float32."""
  angle = position_BT[..., None, None].astype(jnp.float32) * frequency.reshape(
    1, 1, 1, -1
  )
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if amplitude == 1:
    return cos, sin
  return cos * amplitude, sin * amplitude


def apply(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates channel i with channel i + H / 2 (the Hugging Face layout)."""
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
    [a * cos - b * sin, b * cos + a * sin], axis=-1
  ).astype(x_BTNH.dtype)
