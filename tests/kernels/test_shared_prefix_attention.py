"""Shared-prefix attention equals attention of separate rows.

Shape key: B rows, S continuations, G queries of a continuation, N query heads,
K key-value heads, H head features, T prefix length, C continuation length.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from opera_jax.kernels.shared_prefix_attention import api, limited_plan

SCALE = 0.3


def _inputs(B=2, S=3, G=5, N=4, K=2, H=8, T=13, C=5, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = [(B, S, G, N, H), *[(B, T, K, H)] * 2, *[(B, S, C, K, H)] * 2]
  arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
  prefix_length_BS = rng.integers(0, T + 1, size=(B, S))
  prefix_length_BS[0, :3] = (0, T, 1)[:S]
  return arrays, jnp.asarray(prefix_length_BS, jnp.int32)


def _run(implementation, arrays, prefix_length_BS, offset_BS=None, **blocks):
  """Output and all five gradients of a scalar that weighs every entry."""

  def loss(*arrays):
    out = api.shared_prefix_attention(
      *arrays,
      prefix_length_BS,
      offset_BS,
      scale=SCALE,
      implementation=implementation,
      **blocks,
    )
    weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
    return jnp.sum(weight * out.ravel().astype(jnp.float32)), out

  (_, out), gradients = jax.jit(
    jax.value_and_grad(loss, argnums=range(5), has_aux=True)
  )(*arrays)
  return [out, *gradients]


def _close(got, want, tolerance):
  for x, y in zip(got, want, strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(
      x, y, rtol=tolerance, atol=tolerance * max(1.0, np.abs(y).max())
    )


@pytest.mark.parametrize("window", [None, 1, 4, 12])
def test_reference_is_torch_attention_over_separate_rows(window):
  arrays, prefix_length_BS = _inputs(C=9)
  offset_BS = jnp.asarray([[0, 4, 2], [1, 0, 3]], jnp.int32)
  got = _run("reference", arrays, prefix_length_BS, offset_BS, window=window)
  q, prefix_k, prefix_v, own_k, own_v = tensors = [
    torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
    for x in arrays
  ]
  B, S, G, N, H = q.shape
  rows = []
  for b in range(B):
    for s in range(S):
      prefix_length, offset = int(prefix_length_BS[b, s]), int(offset_BS[b, s])
      k = torch.cat([prefix_k[b, :prefix_length], own_k[b, s]]).transpose(0, 1)
      v = torch.cat([prefix_v[b, :prefix_length], own_v[b, s]]).transpose(0, 1)
      own = torch.ones(G, own_k.shape[2], dtype=torch.bool).tril(offset)
      mask = torch.cat([torch.ones(G, prefix_length, dtype=torch.bool), own], 1)
      if window is not None:
        mask = mask.triu(prefix_length + offset - window + 1)
      out = torch.nn.functional.scaled_dot_product_attention(
        q[b, s].transpose(0, 1), k, v, mask, scale=SCALE, enable_gqa=True
      )
      rows.append(out.transpose(0, 1))
  out = torch.stack(rows).reshape(B, S, G, N, H)
  weight = torch.cos(torch.arange(out.numel(), dtype=torch.float64))
  (weight @ out.flatten()).backward()
  _close(got, [out.detach(), *[x.grad for x in tensors]], 1e-5)


@pytest.mark.parametrize(
  "shape,blocks",
  [
    ({}, {}),
    ({"T": 13, "C": 11}, {"block_keys": 4}),
    ({"S": 4, "G": 5}, {"block_keys": 8, "block_scores": 320}),
    ({"S": 3, "G": 5}, {"block_keys": 4, "block_scores": 32}),
    ({"K": 4}, {"block_keys": 3}),
  ],
  ids=[
    "whole",
    "key-blocks",
    "continuation-chunks",
    "query-chunks",
    "ungrouped",
  ],
)
def test_streaming_equals_the_reference(shape, blocks):
  arrays, prefix_length_BS = _inputs(**shape)
  got = _run("xla", arrays, prefix_length_BS, **blocks)
  _close(got, _run("reference", arrays, prefix_length_BS), 1e-5)


@pytest.mark.parametrize(
  "shape",
  [{}, {"T": 300, "G": 290, "C": 290, "B": 1}, {"K": 4, "S": 1}],
  ids=["whole", "query-chunks", "ungrouped"],
)
def test_continuation_by_continuation_equals_the_reference(shape):
  arrays, prefix_length_BS = _inputs(**shape)
  got = _run("xla_rows", arrays, prefix_length_BS)
  _close(got, _run("reference", arrays, prefix_length_BS), 1e-5)


def test_continuation_by_continuation_with_earlier_keys_of_its_own():
  arrays, prefix_length_BS = _inputs(C=11)
  offset_BS = jnp.asarray([[0, 4, 6], [3, -1, 2]], jnp.int32)
  got = _run("xla_rows", arrays, prefix_length_BS, offset_BS)
  _close(
    got,
    _run("reference", arrays, prefix_length_BS, jnp.maximum(offset_BS, 0)),
    1e-5,
  )


@pytest.mark.parametrize("window", [1, 3, 9, 40])
@pytest.mark.parametrize(
  "implementation,blocks",
  [
    ("xla", {}),
    ("xla", {"block_keys": 4}),
    ("xla", {"block_keys": 4, "block_scores": 32}),
    ("xla_rows", {}),
    ("pallas_tpu", {}),
  ],
)
def test_a_sliding_window_counts_positions(
  implementation, blocks, window, request, monkeypatch
):
  if implementation == "pallas_tpu":
    if window != 3:
      pytest.skip("one window shows the kernels, which are slow to interpret")
    request.getfixturevalue("interpreted")
    monkeypatch.setattr(limited_plan, "BLOCK_KEYS", 8)
  arrays, prefix_length_BS = _inputs(B=1, S=2, C=9)
  offset_BS = jnp.asarray([[0, 4]], jnp.int32)
  bounds = (prefix_length_BS, offset_BS)
  got = _run(
    implementation, arrays, *bounds, window=jnp.int32(window), **blocks
  )
  _close(got, _run("reference", arrays, *bounds, window=window), 1e-5)


@pytest.mark.parametrize("block_keys", [512, 4])
def test_decoding_over_a_part_filled_cache(block_keys):
  arrays, prefix_length_BS = _inputs(G=1, C=11)
  offset_BS = jnp.asarray([[0, 4, 10], [7, 1, 2]], jnp.int32)
  got = _run("xla", arrays, prefix_length_BS, offset_BS, block_keys=block_keys)
  _close(got, _run("reference", arrays, prefix_length_BS, offset_BS), 1e-5)


def test_bfloat16_inputs_keep_float32_sums():
  arrays, prefix_length_BS = _inputs(dtype=jnp.bfloat16)
  exact = [x.astype(jnp.float32) for x in arrays]
  want = _run("reference", exact, prefix_length_BS)
  for implementation in ("xla", "xla_rows"):
    got = _run(implementation, arrays, prefix_length_BS, block_keys=4)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    _close(got, want, 2e-2)


@pytest.mark.parametrize(
  "shape,offset,few,dtype,tolerance",
  [
    pytest.param(
      *({"S": 2, "G": 8, "C": 8, "T": 16}, 0, 0, jnp.float32, 1e-5),
      marks=pytest.mark.slow,
    ),
    ({"S": 2, "G": 11, "C": 11, "T": 21}, 0, 0, jnp.bfloat16, 2e-2),
    ({"S": 2, "G": 1, "C": 11, "T": 13}, 9, 64, jnp.float32, 1e-5),
  ],
  ids=["aligned", "ragged-bfloat16", "decoding"],
)
def test_tpu_kernel_equals_the_reference(
  interpreted, monkeypatch, shape, offset, few, dtype, tolerance
):
  monkeypatch.setattr(limited_plan, "BLOCK_QUERIES", 16)
  monkeypatch.setattr(limited_plan, "BLOCK_KEYS", 8)
  monkeypatch.setattr(limited_plan, "MAX_QUERIES_ALL_HEADS", few)
  arrays, prefix_length_BS = _inputs(B=1, dtype=dtype, **shape)
  S = prefix_length_BS.shape[1]
  offset_BS = offset * jnp.arange(S, dtype=jnp.int32)[None]
  got = _run("pallas_tpu", arrays, prefix_length_BS, offset_BS)
  exact = [x.astype(jnp.float32) for x in arrays]
  assert {x.dtype for x in got} == {jnp.dtype(dtype)}
  _close(got, _run("reference", exact, prefix_length_BS, offset_BS), tolerance)


def test_tpu_kernel_computes_nothing_beyond_the_limit(interpreted, monkeypatch):
  monkeypatch.setattr(limited_plan, "BLOCK_KEYS", 8)
  arrays, prefix_length_BS = _inputs(B=1, S=2, T=24)
  prefix_length_BS = jnp.full_like(prefix_length_BS, 8)
  unread = jnp.arange(24)[None, :, None, None] >= 8
  dirty = [jnp.where(unread, jnp.nan, x) for x in arrays[1:3]]
  got = _run("pallas_tpu", [arrays[0], *dirty, *arrays[3:]], prefix_length_BS)
  _close(got, _run("reference", arrays, prefix_length_BS), 1e-5)


def test_tpu_kernel_fetches_no_block_that_nothing_needs(monkeypatch):
  monkeypatch.setattr(limited_plan, "BLOCK_QUERIES", 2)
  monkeypatch.setattr(limited_plan, "BLOCK_KEYS", 8)
  q_BKSQH = jax.ShapeDtypeStruct((1, 2, 1, 100, 4), jnp.float32)
  k_BSKTH = jax.ShapeDtypeStruct((1, 1, 2, 32, 4), jnp.float32)
  plan = limited_plan.Plan(q_BKSQH, k_BSKTH)
  seen_BSQ = jnp.tile(jnp.asarray([[[0, 0, 3, 9, 16, 8, 0, 32]]]), 13)
  needed = plan.needed(seen_BSQ[:, :, :100])
  assert needed[:4].tolist() == [0, 2, 2, 4]
  for block in range(4):
    needs = int(needed[block])
    keys = [int(plan.key_needed(0, 0, block, j, needed)) for j in range(4)]
    assert keys == [min(j, max(needs - 1, 0)) for j in range(4)]
  queries = [
    int(plan.query_needed(0, 0, 2, i, needed, plan.first(needed)))
    for i in range(8)
  ]
  assert queries == [3, 3, 3, 3, 3, 3, 3, 7]


def test_tpu_kernel_says_where_it_does_not_apply():
  arrays, prefix_length_BS = _inputs()
  arrays[0] = arrays[0].astype(jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="bfloat16.*float32"):
    _run("pallas_tpu", arrays, prefix_length_BS)


def test_nothing_beyond_the_limit_or_the_query_is_read():
  arrays, prefix_length_BS = _inputs(C=9)
  q, prefix_k, prefix_v, own_k, own_v = arrays
  poison_BT = jnp.arange(13)[None] >= jnp.max(prefix_length_BS, axis=1)[:, None]
  poison_BT11 = poison_BT[:, :, None, None]
  prefix_length_BS = prefix_length_BS.at[0].set(3)
  poison_BT11 = poison_BT11.at[0].set((jnp.arange(13) >= 3)[:, None, None])
  dirty = [
    q,
    jnp.where(poison_BT11, 1e6, prefix_k),
    jnp.where(poison_BT11, 1e6, prefix_v),
    own_k.at[:, :, 5:].set(1e6),
    own_v.at[:, :, 5:].set(1e6),
  ]
  for blocks in ({}, {"block_keys": 4}):
    got = _run("xla", dirty, prefix_length_BS, **blocks)
    clean = _run("xla", arrays, prefix_length_BS, **blocks)
    np.testing.assert_array_equal(got[0], clean[0])
    assert not np.any(np.where(poison_BT11, got[2], 0.0))
    assert not np.any(got[4][:, :, 5:])


@pytest.mark.parametrize(
  "change,message",
  [
    ({"heads": 3}, "4 is not a multiple of 3"),
    ({"C": 4}, "5 queries and 4 keys"),
    ({"limit": jnp.zeros((2, 3))}, "prefix length .* float32"),
    ({"offset": jnp.zeros((2, 2), jnp.int32)}, r"offset .* int32 \(2, 2\)"),
    ({"implementation": "cuda"}, "got 'cuda'"),
    ({"block_keys": 0}, "block_keys=0"),
    ({"window": 0}, "own position, got 0"),
    ({"window": jnp.ones(2)}, "one integer, got float32"),
  ],
)
def test_bad_input_names_the_value(change, message):
  change = dict(change)
  arrays, prefix_length_BS = _inputs(
    K=change.pop("heads", 2), C=change.pop("C", 5)
  )
  prefix_length_BS = change.pop("limit", prefix_length_BS)
  offset_BS = change.pop("offset", None)
  with pytest.raises(ValueError, match=message):
    api.shared_prefix_attention(
      *arrays, prefix_length_BS, offset_BS, scale=SCALE, **change
    )


def _caches(keys, layers=3, layer=1):
  """Prefix and continuations as decoding keeps them: heads first, layers
  stacked."""
  own = [jnp.swapaxes(x, -3, -2) for x in keys]
  if not layers:
    return own
  return [
    jnp.stack([x if i == layer else -x - i for i in range(layers)]) for x in own
  ]


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
  "sizes",
  [
    {"S": 3, "T": 13, "C": 9},
    pytest.param(  # whole blocks
      {"S": 3, "T": 16, "C": 12}, marks=pytest.mark.slow
    ),
    {"S": 6, "N": 8, "T": 16, "C": 8},  # many queries on a prefix
  ],
)
def test_decoding_is_one_query_of_one_layer(
  implementation, window, sizes, request
):
  if implementation == "pallas_tpu":
    request.getfixturevalue("interpreted")
  arrays, prefix_length_BS = _inputs(G=1, **sizes)
  rng = np.random.default_rng(1)
  offset_BS = jnp.asarray(rng.integers(sizes["C"], size=prefix_length_BS.shape))
  q, *keys = arrays
  want = api.shared_prefix_attention(
    *arrays,
    prefix_length_BS,
    offset_BS,
    scale=SCALE,
    window=window,
    implementation="reference",
  )[:, :, 0]

  @jax.jit
  def attend(caches, layer):
    return api.decode_attention(
      q[:, :, 0],
      *caches,
      prefix_length_BS,
      offset_BS,
      layer,
      scale=SCALE,
      window=window,
      implementation=implementation,
      block_keys=4,
    )

  _close([attend(_caches(keys), jnp.int32(1))], [want], 1e-5)
  _close([attend(_caches(keys, layers=0), None)], [want], 1e-5)


@pytest.mark.slow
def test_decoding_does_not_change_with_the_caches_lengths():
  """Longer caches, the same bits: neighbours may need them."""
  arrays, _ = _inputs(G=1, S=2, T=512, C=512)
  q, *keys = arrays
  prefix_length_BS = jnp.asarray([[3, 70], [100, 0]])
  offset_BS = jnp.asarray([[120, 0], [63, 64]])

  def attend(length, **layers):
    caches = _caches([x[..., :length, :, :] for x in keys], **layers)
    layer = jnp.int32(1) if layers.get("layers", 3) else None
    return jax.jit(api.decode_attention, static_argnames="scale")(
      q[:, :, 0], *caches, prefix_length_BS, offset_BS, layer, scale=SCALE
    )

  for layers in ({}, {"layers": 0}):
    short = attend(128, **layers)
    for length in (256, 512):
      np.testing.assert_array_equal(attend(length, **layers), short)


def test_decoding_refuses_caches_that_do_not_match():
  arrays, prefix_length_BS = _inputs(G=1)
  q, *keys = arrays
  caches = _caches(keys, layers=0)
  caches[1] = caches[1][:, :, :-1]
  with pytest.raises(ValueError, match="Prefix values have shape"):
    api.decode_attention(
      q[:, :, 0], *caches, prefix_length_BS, prefix_length_BS, None, scale=SCALE
    )
