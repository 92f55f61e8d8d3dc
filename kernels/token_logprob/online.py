"""Online softmax statistics of tiles of logits, for the streaming versions.

Four numbers per token are enough, and those of two tiles can be merged:

  m = max_v l_v             s = sum_v exp(l_v - m)
  w = sum_v exp(l_v - m) (l_v - m)          t = l_target
  log p = t - m - log s     entropy = log s - w / s

With p = exp(l - logsumexp), the backward pass needs no further sum:

  d l_v = d_logprob (1[v = target] - p_v) - d_entropy p_v (log p_v + entropy)

Shape key: b tokens, v columns of one tile; 1 is an axis of size 1.
"""

from typing import Any

import jax
import jax.numpy as jnp

Statistics = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def statistics(logit_bv: jax.Array, target_b1: jax.Array) -> Statistics:
  """m, s, w, t of one tile, each [b, 1] float32.

  Args:
    logit_bv: [b, v] float32.
    target_b1: [b, 1] int32, relative to the tile's first column; a target
      outside of the tile contributes 0 to t.
  """
  m_b1 = jnp.max(logit_bv, axis=-1, keepdims=True)
  shifted_bv = logit_bv - m_b1
  e_bv = jnp.exp(shifted_bv)
  return (
    m_b1,
    jnp.sum(e_bv, axis=-1, keepdims=True),
    jnp.sum(e_bv * shifted_bv, axis=-1, keepdims=True),
    jnp.sum(
      jnp.where(_hits(logit_bv, target_b1), logit_bv, 0.0),
      axis=-1,
      keepdims=True,
    ),
  )


def merge(one: Statistics, two: Statistics) -> Statistics:
  """Merges the statistics of two disjoint sets of columns."""
  m = jnp.maximum(one[0], two[0])
  s: Any = 0.0
  w: Any = 0.0
  for m_i, s_i, w_i, _ in (one, two):
    scale = jnp.exp(m_i - m)
    s = s + scale * s_i
    w = w + scale * (w_i + (m_i - m) * s_i)
  return m, s, w, one[3] + two[3]


def finish(
  m: jax.Array,
  s: jax.Array,
  w: jax.Array,
  t: jax.Array,
  *,
  axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Log-probability, entropy and logsumexp over the columns of all devices."""
  if axis_name is not None:
    m_all = jax.lax.pmax(m, axis_name)
    scale = jnp.exp(m - m_all)
    w = jax.lax.psum(scale * (w + (m - m_all) * s), axis_name)
    s = jax.lax.psum(scale * s, axis_name)
    t = jax.lax.psum(t, axis_name)
    m = m_all
  log_s = jnp.log(s)
  return t - m - log_s, log_s - w / s, m + log_s


def logit_cotangent(
  logit_bv: jax.Array,
  target_b1: jax.Array,
  normaliser_b1: jax.Array,
  entropy_b1: jax.Array,
  d_logprob_b1: jax.Array,
  d_entropy_b1: jax.Array,
) -> jax.Array:
  """d l_v of one tile (see the module's docstring), [b, v] float32."""
  log_p_bv = logit_bv - normaliser_b1
  slope_bv = d_logprob_b1 + d_entropy_b1 * (log_p_bv + entropy_b1)
  hit_bv = _hits(logit_bv, target_b1)
  return jnp.where(hit_bv, d_logprob_b1, 0.0) - jnp.exp(log_p_bv) * slope_bv


def local_target(
  target_M: jax.Array, columns: int, axis_name: str | None
) -> jax.Array:
  """Targets relative to this device's first column; -1 if on another one."""
  if axis_name is not None:
    target_M = target_M - jax.lax.axis_index(axis_name) * columns
  return jnp.where((target_M >= 0) & (target_M < columns), target_M, -1)


def _hits(logit_bv: jax.Array, target_b1: jax.Array) -> jax.Array:
  """True at the target's column, [b, v]."""
  column_bv = jax.lax.broadcasted_iota(jnp.int32, logit_bv.shape, 1)
  return column_bv == target_b1
