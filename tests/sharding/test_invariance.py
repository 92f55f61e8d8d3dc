"""One device or eight: the same scores, gradients and updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from opera_jax import structs
from opera_jax.models import decoder
from opera_jax.scoring import packed_rows
from opera_jax.sharding import layout, rules
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.stages import training_loop
from opera_jax.train import optimizer, step
from opera_jax.train import state as train_state

# Every axis of it divides by 8, and none of the sizes is another's.
CONFIG = decoder.Config(
  vocab_size=304,
  hidden_size=48,
  num_hidden_layers=2,
  num_attention_heads=16,
  num_key_value_heads=8,
  head_dim=6,
  intermediate_size=80,
  rope_theta=5_000.0,
  tie_word_embeddings=False,
)
MESHES = {
  "fsdp8": {"fsdp": 8},
  "fsdp4_tensor2": {"fsdp": 4, "tensor": 2},
  "fsdp2_tensor4": {"fsdp": 2, "tensor": 4},
  "tensor8": {"fsdp": 1, "tensor": 8},
  "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
  "fsdp2_sequence2_tensor2": {"fsdp": 2, "sequence": 2, "tensor": 2},
  "fsdp4_sequence2": {"fsdp": 4, "sequence": 2},
  "fsdp1_sequence8": {"fsdp": 1, "sequence": 8},
  "sequence4_tensor2": {"fsdp": 1, "sequence": 4, "tensor": 2},
}
# Each takes seconds to compile.
FAST = ("fsdp2_sequence2_tensor2",)
LEARNING_RATE = 1e-3
B1 = 0.9
STEPS = 2


def _batch(seed: int) -> structs.Batch:
  """Eight rows of 24: two segments each, then padding."""
  draw = np.random.default_rng(seed)
  R, T = 8, 24
  segments = np.zeros((R, T), np.int32)
  positions = np.zeros((R, T), np.int32)
  for row in range(R):
    first, second = draw.integers(4, 13, 2)
    segments[row, :first] = 1
    segments[row, first : first + second] = 2
    positions[row, :first] = np.arange(first)
    positions[row, first : first + second] = np.arange(second)
  zeros = np.zeros((R, T), np.float32)
  return structs.Batch(
    tokens=draw.integers(0, CONFIG.vocab_size, (R, T)).astype(np.int32),
    positions=positions,
    segments=segments,
    loss_mask=((segments > 0) & (positions > 0)).astype(np.float32),
    advantage=zeros,
    old_logprob=zeros,
    ref_logprob=zeros,
  )


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a mesh computes; trees on the host, leaves by name."""

  logprob: np.ndarray
  entropy: np.ndarray
  grads: dict  # of the first update, clipped
  params: dict  # after the last update
  metrics: dict  # of the first update


def _adamw(moment_dtype="float32"):
  return optimizer.adamw(
    LEARNING_RATE, b1=B1, max_grad_norm=1.0, moment_dtype=moment_dtype
  )


def _by_name(tree) -> dict:
  return {
    decoder.path_name(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _state(config, mesh, moment_dtype="float32") -> train_state.TrainState:
  params = jax.tree.map(lambda x: x * 1.5, decoder.create(config, seed=0)[1])
  params = layout.move(params, decoder.logical_axes(params), mesh, rules.TRAIN)
  return training_loop.place(
    train_state.create(params, _adamw(moment_dtype), jax.random.key(0)), mesh
  )


def _outcome(mesh, *, micro_batches=1, **changes) -> Outcome:
  config = dataclasses.replace(CONFIG, **changes)
  logprob_fn = packed_rows.logprob_fn(decoder.abstract(config)[0])
  update = step.make_sft_update(
    logprob_fn, _adamw(), micro_batches=micro_batches
  )
  state = _state(config, mesh)
  rows = layout.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    batch = jax.device_put(_batch(0), rows)
    logprobs = jax.jit(logprob_fn)(state.params, batch)
    state, metrics = update(state, batch)
    # After one update the first moment is (1 - b1) times the gradient.
    grads = {
      name: value / (1 - B1)
      for name, value in _by_name(_moments(state)[0]).items()
    }
    for i in range(1, STEPS):
      state, _ = update(state, jax.device_put(_batch(i), rows))
  _assert_like_parameters(state)
  layouts = rules.shardings(
    decoder.logical_axes(state.params), mesh, rules.TRAIN
  )
  jax.tree.map(_assert_lies, state.params, layouts)
  # A segment's first token has no log-probability; what stands there is noise.
  real_RT = _batch(0).loss_mask > 0
  return Outcome(
    *(np.asarray(score_RT) * real_RT for score_RT in logprobs),
    grads,
    _by_name(state.params),
    {name: float(value) for name, value in metrics.items()},
  )


def _moments(state: train_state.TrainState) -> list:
  """The first and second moments, trees like the parameters."""
  shape = jax.tree.structure(state.params)
  found = []

  def visit(node):
    if jax.tree.structure(node) == shape:
      found.append(node)
      return True
    return False

  jax.tree.leaves(state.opt_state, is_leaf=visit)
  return found


def _assert_lies(array: jax.Array, sharding: NamedSharding) -> None:
  assert array.sharding.is_equivalent_to(sharding, array.ndim)


def _assert_like_parameters(state: train_state.TrainState) -> None:
  moments = _moments(state)
  assert len(moments) == 2
  for tree in moments:
    for moment, parameter in zip(
      jax.tree.leaves(tree), jax.tree.leaves(state.params)
    ):
      assert isinstance(moment.sharding, NamedSharding)
      _assert_lies(moment, parameter.sharding)


def _assert_close(ours: dict, theirs: dict, tolerance: float) -> None:
  """Each array to `tolerance` of its largest entry."""
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    scale = np.abs(value).max()
    np.testing.assert_allclose(
      ours[name], value, rtol=0, atol=tolerance * scale, err_msg=name
    )


def _assert_same(ours: Outcome, theirs: Outcome) -> None:
  np.testing.assert_allclose(ours.logprob, theirs.logprob, rtol=1e-5)
  np.testing.assert_allclose(ours.entropy, theirs.entropy, rtol=1e-5)
  _assert_close(ours.grads, theirs.grads, 1e-5)
  # Adam divides a gradient by its own size, so that where one is next to 0 its
  # rounding shows in the parameter: to 1e-5 as it is, not of the largest.
  assert ours.params.keys() == theirs.params.keys()
  for name, value in theirs.params.items():
    np.testing.assert_allclose(
      ours.params[name], value, rtol=0, atol=1e-5, err_msg=name
    )
  assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-5)


@pytest.fixture(scope="module")
def alone(one_device) -> Outcome:
  return _outcome(one_device)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
    for name in MESHES
  ],
)
def test_a_mesh_computes_what_one_device_does(alone, name):
  _assert_same(_outcome(mesh_lib.create(MESHES[name])), alone)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
@pytest.mark.parametrize("name", ["fsdp8", "fsdp2_sequence2_tensor2"])
def test_remat_and_micro_batches_change_nothing(alone, name, remat):
  mesh = mesh_lib.create(MESHES[name])
  micro_batches = 1 if name == "fsdp8" else 4
  ours = _outcome(mesh, micro_batches=micro_batches, remat=remat)
  _assert_same(ours, alone)


@pytest.mark.parametrize(
  "name", ["tensor8", "data2_fsdp2_tensor2", "fsdp2_sequence2_tensor2"]
)
@pytest.mark.parametrize("moment_dtype", optimizer.MOMENT_DTYPES)
def test_the_optimizer_state_lies_where_its_parameters_do(name, moment_dtype):
  mesh = mesh_lib.create(MESHES[name])
  state = _state(CONFIG, mesh, moment_dtype)
  _assert_like_parameters(state)
  ways = mesh.size // mesh.shape["data"]
  for tree in (state.params, *_moments(state)):
    gate = tree["layers"]["mlp"]["gate"][...]
    assert gate.addressable_shards[0].data.size == gate.size // ways


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_every_optimizers_state_stays_where_it_starts(name):
  """Else a resumed run would start from another layout than a straight one."""
  config = dataclasses.replace(
    CONFIG, num_hidden_layers=1, hidden_size=128, intermediate_size=160
  )
  mesh = mesh_lib.create(MESHES["fsdp2_sequence2_tensor2"])
  shapes = decoder.abstract(config)[1]
  params = jax.device_put(
    jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes),
    rules.shardings(decoder.logical_axes(shapes), mesh, rules.TRAIN),
  )
  transformation = optimizer.build(name, 0.1, matrices=decoder.matrix_axes)
  state = training_loop.place(
    train_state.create(params, transformation, jax.random.key(0)), mesh
  ).opt_state
  starts = jax.tree.map(lambda x: x.sharding, state)
  split = [x for x in jax.tree.leaves(starts) if not x.is_fully_replicated]
  assert len(split) >= 7  # a leaf of each matrix at least
  with jax.set_mesh(mesh):
    _, state = jax.jit(transformation.update)(params, state, params)
  jax.tree.map(_assert_lies, state, starts)


def test_the_update_moves_every_parameter(alone):
  start = _by_name(
    jax.tree.map(lambda x: x * 1.5, decoder.create(CONFIG, seed=0)[1])
  )
  for name, value in alone.params.items():
    moved = np.abs(value - start[name]).max()
    assert moved > LEARNING_RATE, name
  assert jnp.isfinite(alone.metrics["sft/loss"])
