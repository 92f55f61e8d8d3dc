"""Streaming scores equal the definition, torch, and finite differences.

Shape key: M tokens, D features, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from opera_jax.kernels.token_logprob import api, pallas_tpu

M, D, V = 23, 16, 37


def _inputs(dtype=jnp.float32, m=M, d=D, v=V, scale=1.0):
  rng = np.random.default_rng(0)
  hidden_MD = jnp.asarray(rng.normal(size=(m, d)) * scale, dtype)
  head_DV = jnp.asarray(rng.normal(size=(d, v)), dtype)
  target_M = jnp.asarray(rng.integers(v, size=m), jnp.int32)
  return hidden_MD, head_DV, target_M


def _weighted(implementation, *arrays, **settings):
  """A scalar in which every output has its own weight, and its gradients."""

  def loss(hidden_MD, head, target_M):
    logprob_M, entropy_M = api.token_logprob(
      hidden_MD, head, target_M, implementation=implementation, **settings
    )
    weight_M = jnp.cos(jnp.arange(logprob_M.size, dtype=jnp.float32))
    total = jnp.sum(weight_M * logprob_M) + jnp.sum(weight_M[::-1] * entropy_M)
    return total, (logprob_M, entropy_M)

  (_, outputs), gradients = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  )(*arrays)
  return outputs, gradients


def _close(got, want, tolerance):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(
      x, y, rtol=tolerance, atol=tolerance * max(1.0, np.abs(y).max())
    )


def test_reference_is_torch_log_softmax():
  hidden_MD, head_DV, target_M = _inputs()
  outputs, gradients = _weighted(
    "reference", hidden_MD, head_DV, target_M, temperature=0.7
  )
  hidden = torch.tensor(np.asarray(hidden_MD), dtype=torch.float64)
  head = torch.tensor(np.asarray(head_DV), dtype=torch.float64)
  hidden.requires_grad_(), head.requires_grad_()
  log_p = torch.log_softmax(hidden @ head / 0.7, -1)
  index = torch.tensor(np.asarray(target_M), dtype=torch.int64)
  logprob = log_p.gather(1, index[:, None])[:, 0]
  entropy = -(log_p.exp() * log_p).sum(-1)
  weight = torch.cos(torch.arange(M, dtype=torch.float64))
  (weight @ logprob + weight.flip(0) @ entropy).backward()
  _close(outputs, (logprob.detach(), entropy.detach()), 1e-5)
  _close(gradients, (hidden.grad, head.grad), 1e-5)


@pytest.mark.parametrize(
  "block_tokens,block_vocab,transposed",
  [(8, 16, False), (23, 37, True), (4, 36, True), (100, 100, False)],
)
def test_streaming_equals_the_reference(block_tokens, block_vocab, transposed):
  hidden_MD, head, target_M = _inputs()
  head = head.T if transposed else head
  settings = {"temperature": 1.3, "transposed": transposed}
  got = _weighted(
    "xla",
    hidden_MD,
    head,
    target_M,
    block_tokens=block_tokens,
    block_vocab=block_vocab,
    **settings,
  )
  _close(
    got, _weighted("reference", hidden_MD, head, target_M, **settings), 1e-5
  )


def test_bfloat16_inputs_keep_float32_statistics():
  arrays = _inputs(jnp.bfloat16)
  got, gradients = _weighted("xla", *arrays, block_tokens=8, block_vocab=16)
  exact = [x.astype(jnp.float32) for x in arrays[:2]]
  want, want_gradients = _weighted("reference", *exact, arrays[2])
  assert got[0].dtype == got[1].dtype == jnp.float32
  assert [x.dtype for x in gradients] == [jnp.bfloat16] * 2
  _close(got, want, 1e-5)
  _close(gradients, want_gradients, 2e-2)


@pytest.mark.parametrize(
  "m,v,transposed,dtype,tolerance",
  [
    (32, 256, False, jnp.float32, 1e-5),
    (39, 300, True, jnp.float32, 1e-5),
    (39, 300, False, jnp.bfloat16, 2e-2),
  ],
  ids=["aligned", "ragged-transposed", "ragged-bfloat16"],
)
def test_tpu_kernel_equals_the_reference(
  interpreted, monkeypatch, m, v, transposed, dtype, tolerance
):
  monkeypatch.setattr(
    pallas_tpu, "_fitting_blocks", lambda D, itemsize: [(16, 128)]
  )
  hidden_MD, head, target_M = _inputs(dtype, m=m, v=v)
  head = head.T if transposed else head
  settings = {"temperature": 0.7, "transposed": transposed}
  got, gradients = _weighted(
    "pallas_tpu", hidden_MD, head, target_M, **settings
  )
  exact = [x.astype(jnp.float32) for x in (hidden_MD, head)]
  want, want_gradients = _weighted("reference", *exact, target_M, **settings)
  _close(got, want, 1e-5)
  _close(gradients, want_gradients, tolerance)


def test_tpu_kernel_says_where_it_does_not_apply():
  hidden_MD, head_DV, target_M = _inputs(jnp.float16)
  with pytest.raises(NotImplementedError, match="float16"):
    api.token_logprob(hidden_MD, head_DV, target_M, implementation="pallas_tpu")


def test_gradient_is_a_finite_difference():
  arrays = _inputs()
  _, (d_hidden_MD, d_head_DV) = _weighted(
    "xla", *arrays, block_tokens=8, block_vocab=16
  )
  rng = np.random.default_rng(1)
  hidden, head = (np.asarray(x, np.float64) for x in arrays[:2])
  step_MD, step_DV = rng.normal(size=(M, D)), rng.normal(size=(D, V))
  weight = np.cos(np.arange(M))

  def loss(by):
    logit = (hidden + by * step_MD) @ (head + by * step_DV)
    log_p = logit - np.log(np.exp(logit).sum(-1, keepdims=True))
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    picked = log_p[np.arange(M), np.asarray(arrays[2])]
    return weight @ picked + weight[::-1] @ entropy

  slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
  got = np.sum(step_MD * d_hidden_MD) + np.sum(step_DV * d_head_DV)
  np.testing.assert_allclose(got, slope, rtol=1e-4)


def test_huge_logits_stay_finite_and_exact():
  hidden_MD, head_DV, target_M = _inputs(scale=300.0)
  got = api.token_logprob(
    hidden_MD, head_DV, target_M, block_tokens=8, block_vocab=16
  )
  logit = np.asarray(hidden_MD, np.float64) @ np.asarray(head_DV, np.float64)
  log_p = np.asarray(torch.log_softmax(torch.tensor(logit), -1))
  assert np.abs(logit).max() > 1e3
  _close(got[0], log_p[np.arange(M), target_M], 1e-5)
  np.testing.assert_allclose(
    got[1], -(np.exp(log_p) * log_p).sum(-1), atol=1e-3
  )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_token_outside_the_vocabulary_is_nan_and_moves_nothing(
  implementation,
):
  hidden_MD, head_DV, target_M = _inputs()
  bad_M = target_M.at[3].set(V).at[5].set(-1)

  def total(hidden_MD):
    logprob_M, _ = api.token_logprob(
      hidden_MD, head_DV, bad_M, implementation=implementation, block_vocab=16
    )
    return jnp.nansum(logprob_M), logprob_M

  d_hidden_MD, logprob_M = jax.grad(total, has_aux=True)(hidden_MD)
  assert np.flatnonzero(np.isnan(logprob_M)).tolist() == [3, 5]
  assert np.flatnonzero(~np.any(d_hidden_MD, axis=1)).tolist() == [3, 5]


def test_forward_stays_under_a_gibibyte_at_qwen_size():
  """The logits alone would be 18.5 GiB; most of the rest is the float32 copy
  of a bfloat16 head that the CPU compiler makes."""
  arrays = (
    jax.ShapeDtypeStruct((32_768, 1024), jnp.bfloat16),
    jax.ShapeDtypeStruct((1024, 151_936), jnp.bfloat16),
    jax.ShapeDtypeStruct((32_768,), jnp.int32),
  )
  logprob = functools.partial(api.token_logprob, implementation="xla")
  memory = jax.jit(logprob).lower(*arrays).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 1 << 30


@pytest.mark.parametrize(
  "change,message",
  [
    ({"temperature": 0.0}, "above 0, got 0.0"),
    ({"transposed": True}, "16 features and the head 37"),
    ({"implementation": "triton"}, "got 'triton'"),
    ({"block_vocab": 0}, "block_vocab=0"),
    ({"target_M": jnp.zeros(M)}, "got float32"),
    ({"target_M": jnp.zeros(3, jnp.int32)}, "got 23 and 3"),
  ],
)
def test_bad_input_names_the_value(change, message):
  hidden_MD, head_DV, target_M = _inputs()
  change = {"target_M": target_M} | change
  with pytest.raises(ValueError, match=message):
    api.token_logprob(hidden_MD, head_DV, **change)
