"""Each way to attend against a float32 einsum, values and gradients.

Shape key: B rows, T tokens, N query heads, K key/value heads, H head
dimension, G query heads of a key head.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from opera_jax import structs
from opera_jax.models import (
  decoder,
  self_attention,
  sliding_window,
  windowed_attention,
)
from opera_jax.scoring import packed_rows
from opera_jax.sharding import layout, rules
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.train import optimizer, step
from opera_jax.train import state as train_state

# Compiling needs no chip, so two processes may load libtpu at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
LAYOUTS = ("right", "left", "packed")


def _segments(layout: str, B: int, T: int) -> np.ndarray:
  """Rows of one segment, padded on a side, or of three and some padding."""
  draw = np.random.default_rng(B + T)
  segment_BT = np.zeros((B, T), np.int32)
  for row in range(B):
    cuts = np.sort(draw.choice(np.arange(1, T), 3, replace=False))
    if layout == "right":
      segment_BT[row, : cuts[2]] = 1
    elif layout == "left":
      segment_BT[row, cuts[0] :] = 1
    else:
      segment_BT[row, : cuts[2]] = 1 + np.searchsorted(
        cuts[:2], np.arange(cuts[2]), side="right"
      )
  return segment_BT


def _arrays(B, T, N, K, H, dtype=jnp.float32):
  draw = np.random.default_rng(0)
  shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
  return [jnp.asarray(2 * draw.normal(size=s), dtype) for s in shapes]


def _einsum(q_BTNH, k_BTKH, v_BTKH, segment_BT, window=None):
  """The definition, in float32, with the scores whole."""
  B, T, N, H = q_BTNH.shape
  K = k_BTKH.shape[2]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  score = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BTKH) / H**0.5
  same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
  seen_BTT = same_BTT & np.tril(np.ones((T, T), bool))[None]
  if window is not None:
    seen_BTT &= ~np.tril(np.ones((T, T), bool), -window)[None]
  score = jnp.where(seen_BTT[:, None, None], score, -jnp.inf)
  out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(score), v_BTKH)
  return out.reshape(B, T, N, H)


def _value_and_gradients(attend, arrays, segment_BT):
  """Outputs of real tokens, and gradients of a sum that weighs each its own."""
  real_BT11 = jnp.asarray(segment_BT > 0)[:, :, None, None]

  def loss(arrays):
    out_BTNH = jnp.where(real_BT11, attend(*arrays, segment_BT), 0)
    weight = jnp.cos(jnp.arange(out_BTNH.size)).reshape(out_BTNH.shape)
    return jnp.sum(weight * out_BTNH), out_BTNH

  (_, out_BTNH), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
  return out_BTNH, *grads


def _assert_close(ours, theirs, tolerance=1e-5):
  for got, want in zip(ours, theirs, strict=True):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


def _check(implementation, layout, sizes):
  arrays = _arrays(*sizes)
  segment_BT = _segments(layout, *sizes[:2])
  attend = functools.partial(
    self_attention.self_attention, implementation=implementation
  )
  _assert_close(
    _value_and_gradients(attend, arrays, segment_BT),
    _value_and_gradients(_einsum, arrays, segment_BT),
  )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
  "sizes",
  [(2, 37, 4, 1, 16), (2, 64, 3, 3, 8), (2, 650, 4, 1, 8)],
  ids=["grouped", "ungrouped", "in_chunks"],
)
def test_xla(layout, sizes):
  _check("xla", layout, sizes)


@pytest.mark.parametrize(
  "implementation,sizes,size,chunks,slides",
  [
    ("xla", (2, 37, 4, 2, 8), 5, 8, True),
    ("xla", (2, 37, 4, 2, 8), 5, 8, "a flag"),
    ("xla", (2, 37, 4, 2, 8), 5, 8, "an unset flag"),
    ("xla", (2, 650, 4, 1, 8), 40, 8, True),
    ("xla", (1, 1100, 2, 1, 4), 300, 1, True),  # scanned
    ("splash", (1, 200, 2, 1, 8), 30, 8, True),
    ("splash", (1, 200, 2, 1, 8), 30, 8, "a flag"),
  ],
)
def test_a_sliding_window(
  implementation, sizes, size, chunks, slides, monkeypatch
):
  monkeypatch.setattr(windowed_attention, "CHUNKS", chunks)
  arrays = _arrays(*sizes)
  segment_BT = _segments("packed", *sizes[:2])
  flag = slides if slides is True else jnp.asarray(slides == "a flag")

  def attend(*arrays):
    return self_attention.self_attention(
      *arrays,
      window=sliding_window.SlidingWindow(size, flag),
      implementation=implementation,
    )

  seen = None if slides == "an unset flag" else size
  _assert_close(
    _value_and_gradients(attend, arrays, segment_BT),
    _value_and_gradients(
      functools.partial(_einsum, window=seen), arrays, segment_BT
    ),
  )


@pytest.mark.slow
def test_windows_hold_segments_of_every_length():
  """One row each of short, middling and long segments, and all at once."""
  T = 1100
  rows = [np.repeat(np.arange(1, T), size)[:T] for size in (40, 290, T)]
  rows.append(np.repeat([1, 2, 3, 4, 0], [600, 5, 95, 300, 100]))
  arrays = _arrays(1, T, 4, 2, 8)
  for row in rows:
    segment_BT = row[None].astype(np.int32)
    _assert_close(
      _value_and_gradients(self_attention.self_attention, arrays, segment_BT),
      _value_and_gradients(_einsum, arrays, segment_BT),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
  "sizes",
  [
    (2, 200, 4, 1, 16),
    pytest.param((1, 128, 2, 2, 128), marks=pytest.mark.slow),
  ],
  ids=["grouped_ragged", "ungrouped"],
)
def test_splash(layout, sizes):
  _check("splash", layout, sizes)


@pytest.mark.parametrize(
  "shape",
  [
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 1, "tensor": 8}, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("implementation", ["splash", "xla"])
def test_over_a_mesh(implementation, shape):
  sizes = (4, 515, 4, 2, 8)
  arrays = _arrays(*sizes)
  segment_BT = _segments("packed", *sizes[:2])
  attend = functools.partial(
    self_attention.self_attention, implementation=implementation
  )
  want = _value_and_gradients(_einsum, arrays, segment_BT)
  mesh = mesh_lib.create(shape)
  with jax.set_mesh(mesh):
    placed = jax.device_put(arrays, layout.batch_sharding(mesh))
    got = _value_and_gradients(attend, placed, segment_BT)
    _assert_close(jax.device_get(got), want)


def test_no_score_is_kept_for_the_backward_pass():
  T, N = 8192, 2
  q_BTNH, k_BTKH, v_BTKH = (
    jax.ShapeDtypeStruct((1, T, heads, 8), jnp.float32) for heads in (N, 1, 1)
  )
  segment_BT = jax.ShapeDtypeStruct((1, T), jnp.int32)

  def loss(*arrays):
    return jnp.sum(self_attention.self_attention(*arrays))

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  memory = gradient.lower(q_BTNH, k_BTKH, v_BTKH, segment_BT).compile()
  # Half of the scores of one row, of which several kinds are needed at once.
  assert memory.memory_analysis().temp_size_in_bytes < N * T * T * 4 / 2


def test_bfloat16_keeps_a_float32_softmax():
  sizes = (2, 96, 4, 2, 16)
  segment_BT = _segments("right", 2, 96)
  arrays = _arrays(*sizes, jnp.bfloat16)
  ours = self_attention.self_attention(*arrays, segment_BT)
  assert ours.dtype == jnp.bfloat16
  theirs = _einsum(*(x.astype(jnp.float32) for x in arrays), segment_BT)
  np.testing.assert_allclose(
    ours.astype(jnp.float32), theirs, rtol=0, atol=2e-2 * np.abs(theirs).max()
  )


def test_cudnn_is_refused_where_it_would_drop_segments():
  arrays = _arrays(1, 8, 2, 1, 8, jnp.bfloat16)
  segment_BT = np.asarray([[1, 1, 1, 2, 2, 2, 0, 0]])
  with pytest.raises(NotImplementedError, match="not segments"):
    self_attention.self_attention(*arrays, segment_BT, implementation="cudnn")
  arrays = _arrays(1, 8, 2, 1, 8)
  with pytest.raises(NotImplementedError, match="half precision"):
    self_attention.self_attention(
      *arrays, segment_BT, right_padded=True, implementation="cudnn"
    )


def test_an_unknown_implementation_is_refused():
  arrays = _arrays(1, 8, 2, 1, 8)
  with pytest.raises(ValueError, match="flash.*config.model.attention"):
    self_attention.self_attention(
      *arrays, np.ones((1, 8)), implementation="flash"
    )


@pytest.fixture
def nothing_cached():
  """A program for absent hardware can be written to the cache, not read."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, 1e9)
  yield
  jax.config.update(name, before)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("shape", "head_dim"),
  [
    ({"fsdp": 2, "tensor": 2}, 128),
    ({"fsdp": 2, "sequence": 2}, 64),
    ({"fsdp": 4}, 80),
  ],
)
def test_an_update_compiles_for_absent_tpus(nothing_cached, shape, head_dim):
  devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
  mesh = mesh_lib.create(shape, devices)
  config = decoder.Config(
    vocab_size=768,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=head_dim,
    intermediate_size=512,
    dtype="bfloat16",
    remat="attention",
  )
  graphdef, shapes = decoder.abstract(config)
  adamw = optimizer.adamw(1e-3)
  update = step.make_sft_update(packed_rows.logprob_fn(graphdef), adamw)
  shardings = rules.shardings(decoder.logical_axes(shapes), mesh, rules.TRAIN)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )
  batch = structs.Batch(
    *[
      jax.ShapeDtypeStruct(
        (4, 640), dtype, sharding=layout.batch_sharding(mesh)
      )
      for dtype in [jnp.int32] * 3 + [jnp.float32] * 4
    ]
  )
  with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
    state = jax.eval_shape(
      lambda p: train_state.create(p, adamw, jax.random.key(0)), params
    )
    lowered = update.lower(state.replace(params=params), batch)
    # The forward pass, its two gradients, and the head's kernels.
    assert lowered.as_text().count("splash_mha") >= 3
    compiled = lowered.compile().as_text()
  # Weights are float32 where they lie, and gathered in the compute dtype.
  gathered = {
    kind
    for kind, size in re.findall(r"= \(?(\w+)\[(\S+)\]\S* all-gather", compiled)
    if re.fullmatch("1,256,512|1,512,256|1,256,256", size)
  }
  assert gathered == {"bf16"}
  if "sequence" in shape:
    return
  # Nor does any device sum the whole gradient of the embedding in float32.
  assert not re.findall(r"f32\[(?:768|384),256\]\S* all-reduce", compiled)
