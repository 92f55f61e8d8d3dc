"""The kernels, each device on its own part of the arrays.

The partitioner cannot split a Pallas call, and would gather a head that is
sharded over the vocabulary; so over a mesh of more than one device each call
is a `jax.shard_map`: rows over the batch axes, heads and vocabulary over the
tensor axis. What an axis does not divide stays whole on it. Without a mesh, or
on one device, the kernel is called as it is.

Shape key: B rows, S branches, G queries of a branch, N query heads, K
key-value heads, H head features, T trunk tokens, C branch keys, D hidden, V
vocabulary.
"""

import functools

import jax
from jax.sharding import PartitionSpec

from kernels.branch_attention import api as branch_attention_api
from kernels.token_logprob import api as token_logprob_api
from opera_jax.sharding import rules


def branch_attention(
  q_BSGNH: jax.Array,
  trunk_k_BTKH: jax.Array,
  trunk_v_BTKH: jax.Array,
  branch_k_BSCKH: jax.Array,
  branch_v_BSCKH: jax.Array,
  limit_BS: jax.Array,
  offset_BS: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """`kernels.branch_attention` over the mesh in force.

  Args, returns and errors are the kernel's.
  """
  attend = functools.partial(branch_attention_api.branch_attention, scale=scale)
  arrays = (
    q_BSGNH,
    trunk_k_BTKH,
    trunk_v_BTKH,
    branch_k_BSCKH,
    branch_v_BSCKH,
    limit_BS,
    offset_BS,
  )
  if rules.alone():
    return attend(*arrays)
  batch = rules.activation_axis("batch", q_BSGNH.shape[0])
  heads = rules.activation_axis("heads", trunk_k_BTKH.shape[2])
  query = PartitionSpec(batch, None, None, heads)
  trunk = PartitionSpec(batch, None, heads)
  row = PartitionSpec(batch)
  return jax.shard_map(
    attend,
    in_specs=(query, trunk, trunk, query, query, row, row),
    out_specs=query,
  )(*arrays)


def token_logprob(
  hidden_BTD: jax.Array,
  head: jax.Array,
  target_BT: jax.Array,
  *,
  temperature: float,
  transposed: bool,
) -> tuple[jax.Array, jax.Array]:
  """`kernels.token_logprob` of [B, T] tokens over the mesh in force.

  Args:
    hidden_BTD: final hidden states.
    head: [D, V], or [V, D] where `transposed`.
    target_BT: int32 token ids.
    temperature: divides the logits.
    transposed: whether the head is [V, D].

  Returns:
    logprob [B, T] and entropy [B, T], float32, in nats.
  """

  def price(hidden_BTD, head, target_BT, axis_name=None):
    B, T, D = hidden_BTD.shape
    prices = token_logprob_api.token_logprob(
      hidden_BTD.reshape(B * T, D),
      head,
      target_BT.reshape(B * T),
      temperature=temperature,
      transposed=transposed,
      axis_name=axis_name,
    )
    return tuple(x.reshape(B, T) for x in prices)

  if rules.alone():
    return price(hidden_BTD, head, target_BT)
  B, T, _ = hidden_BTD.shape
  rows = PartitionSpec(
    rules.activation_axis("batch", B), rules.activation_axis("length", T)
  )
  vocab = rules.activation_axis("vocab", head.shape[0 if transposed else 1])
  return jax.shard_map(
    functools.partial(price, axis_name=vocab),
    in_specs=(
      rows,
      PartitionSpec(vocab, None) if transposed else PartitionSpec(None, vocab),
      rows,
    ),
    out_specs=(rows, rows),
  )(hidden_BTD, head, target_BT)
