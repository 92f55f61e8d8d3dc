"""Divergence from a teacher on its top-K tokens, per position.

Shape key: R rows, T tokens of a row, K teacher's top tokens.
"""

import jax
import jax.numpy as jnp

_SMALLEST = 1e-7


def top_k_jensen_shannon(
  logprob_RTK: jax.Array, teacher_RTK: jax.Array, *, alpha: float = 0.5
) -> jax.Array:
  """Jensen-Shannon divergence on the teacher's top tokens and the rest.

      M = alpha T + (1 - alpha) S
      JS = alpha KL(T || M) + (1 - alpha) KL(S || M)

  over K + 1 events: the K tokens, and all others together. SDPO's release uses
  this form with K = 100 and alpha = 0.5.

  Args:
    logprob_RTK: float32, the student's log-probability of those tokens.
    teacher_RTK: float32, the teacher's, no gradient.
    alpha: weight of the teacher, inside (0, 1).

  Returns:
    float32 [R, T], nats, 0 where both agree.

  Raises:
    ValueError: alpha outside (0, 1), or shapes that differ.
  """
  if not 0 < alpha < 1:
    raise ValueError(f"alpha lies inside (0, 1), got {alpha}. 0.5 is usual.")
  if logprob_RTK.shape != teacher_RTK.shape:
    raise ValueError(
      f"Student and teacher score the same tokens, got {logprob_RTK.shape} "
      f"and {teacher_RTK.shape}."
    )
  student = _with_rest(logprob_RTK)
  teacher = jax.lax.stop_gradient(_with_rest(teacher_RTK))
  middle = jnp.logaddexp(teacher + jnp.log(alpha), student + jnp.log1p(-alpha))

  def divergence(p: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(p) * (p - middle), axis=-1)

  return alpha * divergence(teacher) + (1 - alpha) * divergence(student)


def _with_rest(logprob_RTK: jax.Array) -> jax.Array:
  """Appends the log-probability of all other tokens as a last event."""
  rest_RT1 = 1.0 - jnp.sum(jnp.exp(logprob_RTK), axis=-1, keepdims=True)
  rest_RT1 = jnp.log(jnp.maximum(rest_RT1, _SMALLEST))
  return jnp.concatenate([logprob_RTK, rest_RT1], axis=-1)
