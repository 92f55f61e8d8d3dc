"""Token log-probability and entropy, streamed over tokens and vocabulary.

The backward pass recomputes each tile of logits. `online` has the equations.

Block j of n holds the tokens j, j + n, j + 2n, ..., so that every block has
tokens on every device if the tokens are sharded in contiguous runs.

Shape key: M tokens, D features, V vocabulary, n blocks of b tokens, v columns
of one vocabulary tile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opera_jax.kernels import manual_axes
from opera_jax.kernels.token_logprob import online


def token_logprob(
  hidden_MD: jax.Array,
  head: jax.Array,
  target_M: jax.Array,
  *,
  temperature: float,
  transposed: bool,
  axis_name: str | None,
  block_tokens: int,
  block_vocab: int,
) -> tuple[jax.Array, jax.Array]:
  """Computes `api.token_logprob`; the largest array is a tile of logits."""
  settings = _Settings(
    temperature=temperature,
    transposed=transposed,
    axis_name=axis_name,
    block_tokens=block_tokens,
    block_vocab=block_vocab,
  )
  return _token_logprob(settings, hidden_MD, head, target_M)


class _Settings(NamedTuple):
  """The static arguments of `token_logprob`."""

  temperature: float
  transposed: bool
  axis_name: str | None
  block_tokens: int
  block_vocab: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprob(
  settings: _Settings,
  hidden_MD: jax.Array,
  head: jax.Array,
  target_M: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  return _forward_rule(settings, hidden_MD, head, target_M)[0]


def _forward_rule(
  settings: _Settings,
  hidden_MD: jax.Array,
  head: jax.Array,
  target_M: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  temperature, transposed, axis_name, block_tokens, block_vocab = settings
  V = _columns(head, transposed)
  local_M = online.local_target(target_M, V, axis_name)
  hidden_bnD, target_bn1 = _split(block_tokens, hidden_MD, local_M[:, None])

  def block(j: jax.Array) -> online.Statistics:
    hidden_bD, target_b1 = hidden_bnD[:, j], target_bn1[:, j]

    def tile(start: Any, size: int) -> online.Statistics:
      head_tile = _slice(head, start, size, transposed)
      logit_bv = _matmul(hidden_bD, head_tile, transposed) / temperature
      return online.statistics(logit_bv, target_b1 - start)

    return _over_tiles(tile, V, block_vocab)

  statistics_nb1 = jax.lax.map(block, jnp.arange(hidden_bnD.shape[1]))
  m, s, w, t = (_join(x, target_M.shape[0])[:, 0] for x in statistics_nb1)
  logprob_M, entropy_M, normaliser_M = online.finish(
    m, s, w, t, axis_name=axis_name
  )
  residuals = (hidden_MD, head, local_M, normaliser_M, entropy_M)
  return (logprob_M, entropy_M), residuals


def _backward_rule(
  settings: _Settings, residuals: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
  temperature, transposed, _, block_tokens, block_vocab = settings
  hidden_MD, head, local_M, normaliser_M, entropy_M = residuals
  per_token = (local_M, normaliser_M, entropy_M, *cotangents)
  hidden_bnD, *per_token_bn1 = _split(
    block_tokens, hidden_MD, *(x_M[:, None] for x_M in per_token)
  )
  b, n, D = hidden_bnD.shape
  V = _columns(head, transposed)
  vocab_axis = 0 if transposed else 1
  dtype = jnp.result_type(hidden_MD, head)

  def zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return manual_axes.varying_like(
      jnp.zeros(shape, dtype), hidden_MD, head, *per_token
    )

  def tile(start: Any, size: int) -> tuple[jax.Array, jax.Array]:
    head_tile = _slice(head, start, size, transposed).astype(dtype)

    def block(
      d_head_tile: jax.Array, j: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
      hidden_bD = hidden_bnD[:, j].astype(dtype)
      target_b1, *rest_b1 = (x_bn1[:, j] for x_bn1 in per_token_bn1)
      logit_bv = _matmul(hidden_bD, head_tile, transposed) / temperature
      d_logit_bv = online.logit_cotangent(logit_bv, target_b1 - start, *rest_b1)
      d_logit_bv = (d_logit_bv / temperature).astype(dtype)
      operands = (hidden_bD, d_logit_bv)
      if transposed:
        operands = (d_logit_bv, hidden_bD)
      d_head_tile = d_head_tile + _contract_tokens(*operands)
      return d_head_tile, _matmul(d_logit_bv, head_tile, not transposed)

    shape = (size, D) if transposed else (D, size)
    return jax.lax.scan(block, zeros(shape), jnp.arange(n))

  def add_tile(
    total: tuple[jax.Array, jax.Array], start: Any, size: int
  ) -> tuple[jax.Array, jax.Array]:
    d_hidden_nbD, d_head = total
    d_head_tile, more_nbD = tile(start, size)
    d_head = jax.lax.dynamic_update_slice_in_dim(
      d_head, d_head_tile.astype(head.dtype), start, vocab_axis
    )
    return d_hidden_nbD + more_nbD, d_head

  if V <= block_vocab:  # noqa: SIM300
    d_head, d_hidden_nbD = tile(0, V)
  else:
    whole_tiles = V // block_vocab
    total = jax.lax.fori_loop(
      0,
      whole_tiles,
      lambda i, total: add_tile(total, i * block_vocab, block_vocab),
      (zeros((n, b, D)), zeros(head.shape, head.dtype)),
    )
    if V % block_vocab:
      total = add_tile(total, whole_tiles * block_vocab, V % block_vocab)
    d_hidden_nbD, d_head = total

  d_hidden_MD = _join(d_hidden_nbD, hidden_MD.shape[0])
  return (
    manual_axes.reduce_like(d_hidden_MD, hidden_MD).astype(hidden_MD.dtype),
    manual_axes.reduce_like(d_head.astype(head.dtype), head),
    None,
  )


_token_logprob.defvjp(_forward_rule, _backward_rule)


def _split(block_tokens: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Cuts [M, ...] into interleaved blocks [b, n, ...], padded with zeros."""
  M = arrays[0].shape[0]
  n = -(-M // block_tokens)
  b = -(-M // n)
  return tuple(
    jnp.pad(x, ((0, b * n - M), (0, 0))).reshape(b, n, x.shape[1])
    for x in arrays
  )


def _join(x_nbK: jax.Array, M: int) -> jax.Array:
  """Inverse of `_split` for the stacked outputs of a loop over blocks."""
  return jnp.swapaxes(x_nbK, 0, 1).reshape(-1, x_nbK.shape[2])[:M]


def _over_tiles(
  tile: Callable[[Any, int], online.Statistics], V: int, block_vocab: int
) -> online.Statistics:
  """Merges the whole tiles in a loop, then the ragged last one."""
  total = tile(0, min(V, block_vocab))
  whole_tiles = V // block_vocab
  if whole_tiles > 1:
    total = jax.lax.fori_loop(
      1,
      whole_tiles,
      lambda i, total: online.merge(total, tile(i * block_vocab, block_vocab)),
      total,
    )
  if whole_tiles and V % block_vocab:
    last = tile(whole_tiles * block_vocab, V % block_vocab)
    total = online.merge(total, last)
  return total


def _matmul(x_bK: jax.Array, y: jax.Array, transposed: bool) -> jax.Array:
  """x @ y, or x @ y.T if y is transposed; float32."""
  dtype = jnp.result_type(x_bK, y)
  return jax.lax.dot_general(
    x_bK.astype(dtype),
    y.astype(dtype),
    (((1,), (1 if transposed else 0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _contract_tokens(x_bK: jax.Array, y_bL: jax.Array) -> jax.Array:
  """x.T @ y; float32."""
  return jax.lax.dot_general(
    x_bK, y_bL, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )


def _slice(
  head: jax.Array, start: Any, size: int, transposed: bool
) -> jax.Array:
  """`size` vocabulary entries of the head."""
  axis = 0 if transposed else 1
  if size == head.shape[axis]:
    return head
  return jax.lax.dynamic_slice_in_dim(head, start, size, axis)


def _columns(head: jax.Array, transposed: bool) -> int:
  return head.shape[0 if transposed else 1]
