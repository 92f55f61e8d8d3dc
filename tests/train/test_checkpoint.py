"""Checkpoints come back bit for bit, and damaged ones are passed over."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.train import checkpoint, optimizer
from opera_jax.train import state as train_state

P = jax.sharding.PartitionSpec


def _state(seed=0, width=16):
  generator = np.random.default_rng(seed)
  params = {
    "layers": {"w": jnp.asarray(generator.normal(size=(8, width)), "bfloat16")},
    "norm": jnp.asarray(generator.normal(size=width), jnp.float32),
  }
  return train_state.create(params, optimizer.adamw(1e-3), jax.random.key(seed))


def _bits(tree):
  return [
    np.asarray(
      jax.random.key_data(leaf)
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      else leaf
    ).tobytes()
    for leaf in jax.tree.leaves(tree)
  ]


def _filled(directory, steps=(1, 2, 3)):
  checkpoints = checkpoint.Checkpoints(directory)
  for i in steps:
    assert checkpoints.save(i, _state(i), {"position": i, "ema": 0.1 * i})
  checkpoints.close()


def test_round_trip_is_bit_for_bit(tmp_path):
  _filled(tmp_path)
  step, state, host = checkpoint.Checkpoints(tmp_path).restore(_state())
  assert step == 3
  assert _bits(state) == _bits(_state(3))
  assert host == {"position": 3, "ema": 0.1 * 3}
  assert jax.random.normal(state.key) == jax.random.normal(jax.random.key(3))


def test_a_full_disk_costs_no_earlier_checkpoint(tmp_path, monkeypatch):
  _filled(tmp_path)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(_without_key(_state())))
  usage = shutil.disk_usage(tmp_path)
  checkpoints = checkpoint.Checkpoints(tmp_path)

  def free(count):
    monkeypatch.setattr(
      shutil, "disk_usage", lambda _: usage._replace(free=count)
    )

  free(size - 1)
  with pytest.raises(OSError, match=r"Checkpoint 4 does not fit .* are free"):
    checkpoints.save(4, _state(4), {})
  free(size)
  # Another process takes the room meanwhile.
  with monkeypatch.context() as patch, pytest.raises(OSError, match="is left"):
    patch.setattr(checkpoints._manager, "save", _full)
    checkpoints.save(4, _state(4), {})
  with monkeypatch.context() as patch, pytest.raises(ValueError, match="shape"):
    patch.setattr(checkpoints._manager, "save", _misshapen)
    checkpoints.save(4, _state(4), {})
  assert checkpoints.restore(_state())[0] == 3
  assert checkpoints.save(4, _state(4), {})
  checkpoints.close()
  step, state, _ = checkpoint.Checkpoints(tmp_path).restore(_state())
  assert step == 4 and _bits(state) == _bits(_state(4))


def _without_key(state):
  return dataclasses.replace(state, key=jax.random.key_data(state.key))


def _full(*_, **__):
  raise ValueError("RESOURCE_EXHAUSTED: x: No space left on device [28]")


def _misshapen(*_, **__):
  raise ValueError("another shape")


def test_only_the_newest_are_kept(tmp_path):
  _filled(tmp_path, steps=range(5))
  names = [path.name for path in tmp_path.iterdir() if path.name.isdigit()]
  assert sorted(names) == ["3", "4"]


def test_an_empty_directory_restores_nothing(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / "new")
  assert checkpoints.latest() is None
  assert checkpoints.restore(_state()) is None


def test_saving_a_step_twice_writes_it_once(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert checkpoints.save(1, _state(), {})
  assert not checkpoints.save(1, _state(), {})


@pytest.mark.parametrize("saved,wanted", [(8, 2), (2, 8)])
def test_another_number_of_devices_can_resume(tmp_path, saved, wanted):
  def sharded(count):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:count]), ("fsdp",))
    place = {0: P(), 1: P("fsdp"), 2: P("fsdp", None)}
    return jax.tree.map(
      lambda leaf: jax.device_put(
        leaf, jax.sharding.NamedSharding(mesh, place[leaf.ndim])
      ),
      _state(4),
    )

  checkpoint.Checkpoints(tmp_path).save(1, sharded(saved), {})
  like = sharded(wanted)
  _, state, _ = checkpoint.Checkpoints(tmp_path).restore(like)
  assert _bits(state) == _bits(_state(4))
  same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state, like)
  assert all(jax.tree.leaves(same))


def _newest_files(directory):
  files = [path for path in (directory / "3").rglob("*") if path.is_file()]
  return sorted(path for path in files if path.name != "FILES.json")


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("which", [0, -1])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, which):
  _filled(tmp_path)
  path = _newest_files(tmp_path)[which]
  content = bytearray(path.read_bytes())
  if damage == "missing":
    path.unlink()
  elif damage == "cut":
    path.write_bytes(content[: len(content) // 2])
  else:
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
  with pytest.warns(RuntimeWarning, match="damaged checkpoint 3"):
    checkpoints = checkpoint.Checkpoints(tmp_path)
  step, state, host = checkpoints.restore(_state())
  assert step == 2 and host["position"] == 2
  assert _bits(state) == _bits(_state(2))
  assert checkpoints.save(3, _state(3), {"position": 3})
  step, state, _ = checkpoint.Checkpoints(tmp_path).restore(_state())
  assert step == 3 and _bits(state) == _bits(_state(3))


def test_a_checkpoint_without_its_list_was_not_finished(tmp_path):
  _filled(tmp_path)
  (tmp_path / "3" / "FILES.json").unlink()
  with pytest.warns(RuntimeWarning, match="not finished"):
    assert checkpoint.Checkpoints(tmp_path).latest() == 2


def test_a_temporary_directory_is_removed(tmp_path):
  _filled(tmp_path)
  (tmp_path / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  with pytest.warns(RuntimeWarning, match="half-written checkpoint"):
    checkpoints = checkpoint.Checkpoints(tmp_path)
  assert checkpoints.latest() == 3
  assert not (tmp_path / "4.orbax-checkpoint-tmp").exists()


def test_other_shapes_are_named(tmp_path):
  _filled(tmp_path)
  with pytest.raises(
    checkpoint.MismatchError,
    match=r"params/norm: checkpoint float32\[16\], config float32\[24\]",
  ):
    checkpoint.Checkpoints(tmp_path).restore(_state(width=24))
  other = _state()
  other = other.replace(params=other.params | {"head": jnp.ones(3)})
  with pytest.raises(
    checkpoint.MismatchError, match="params/head: checkpoint none"
  ):
    checkpoint.Checkpoints(tmp_path).restore(other)


def test_one_checkpoint_is_not_enough(tmp_path):
  with pytest.raises(ValueError, match="at least 2 checkpoints, got 1"):
    checkpoint.Checkpoints(tmp_path, keep=1)


def test_sigterm_is_a_flag_and_then_itself_again():
  before = signal.getsignal(signal.SIGTERM)
  with checkpoint.Preemption() as preemption:
    assert not preemption.requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested()
  assert signal.getsignal(signal.SIGTERM) == before
  assert preemption.exit_code() == 143


@pytest.fixture
def foreground():
  """Ctrl-C as in a shell's foreground, wherever the tests are run."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_a_job_in_the_background_ignores_ctrl_c(foreground):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with checkpoint.Preemption() as preemption:
    os.kill(os.getpid(), signal.SIGINT)
    assert not preemption.requested()


def test_ctrl_c_is_a_flag_and_one_line_and_then_the_end(foreground, capfd):
  before = signal.getsignal(signal.SIGINT)
  with checkpoint.Preemption() as preemption:
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.requested() and preemption.exit_code() == 130
    (said,) = capfd.readouterr().err.strip().split("\n")
    assert said.startswith("Ctrl-C: what is finished is saved when")
    assert said.endswith("and the same command goes on from there.")
    # The second one ends the process, whatever it computes.
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    with pytest.raises(SystemExit) as left:
      preemption.exit_if_requested()
    assert left.value.code == 130
  assert signal.getsignal(signal.SIGINT) == before
  with (
    checkpoint.Preemption() as preemption,
    pytest.raises(SystemExit),
    preemption.exit_at_once(),
  ):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
  assert "Ctrl-C: ended; what is finished is saved" in capfd.readouterr().err


LOOP = """
  import sys, time
  import jax.numpy as jnp
  from opera_jax.train import checkpoint
  checkpoints = checkpoint.Checkpoints(sys.argv[1])
  big = {f"w{i}": jnp.ones((256, 256)) for i in range(8)}
  step = checkpoints.latest() or 0
  with checkpoint.Preemption() as preemption:
    while True:
      step += 1
      checkpoints.save(step, {n: step * w for n, w in big.items()}, {"s": step})
      print(step, flush=True)
      if preemption.requested():
        sys.exit(preemption.exit_code())
"""


def _loop(directory):
  return subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", textwrap.dedent(LOOP), directory],
    stdout=subprocess.PIPE,
    text=True,
  )


def _newest(directory):
  like = {f"w{i}": jnp.ones((256, 256)) for i in range(8)}
  step, state, host = checkpoint.Checkpoints(directory).restore(like)
  assert host == {"s": step}
  for leaf in jax.tree.leaves(state):
    np.testing.assert_array_equal(leaf, step)
  return step


@pytest.mark.filterwarnings("ignore:Ignoring")
def test_sigkill_at_any_instant_leaves_an_intact_checkpoint(tmp_path):
  loop = _loop(str(tmp_path))
  while int(loop.stdout.readline()) < 3:
    pass
  loop.kill()
  rest = loop.stdout.read().split()
  loop.wait()
  assert _newest(tmp_path) >= max([3, *map(int, rest)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Ignoring")
def test_sigkill_many_times(tmp_path):
  generator = np.random.default_rng(0)
  newest = 0
  for _ in range(12):
    loop = _loop(str(tmp_path))
    printed = int(loop.stdout.readline())
    assert printed > newest
    for _ in range(generator.integers(0, 4)):
      printed = int(loop.stdout.readline())
    signal.sigtimedwait([], generator.uniform(0, 0.2))
    loop.kill()
    rest = loop.stdout.read().split()
    loop.wait()
    newest = _newest(tmp_path)
    assert newest >= max([printed, *map(int, rest)])


def test_sigterm_saves_and_exits_with_143(tmp_path):
  loop = _loop(str(tmp_path))
  printed = int(loop.stdout.readline())
  loop.terminate()
  rest = loop.stdout.read().split()
  assert loop.wait() == 143
  assert _newest(tmp_path) == int(rest[-1] if rest else printed)
  listing = tmp_path / str(_newest(tmp_path)) / "FILES.json"
  assert "state/manifest.ocdbt" in json.loads(listing.read_text())


WRITER = """
  import pathlib, sys, time
  import jax.numpy as jnp
  from opera_jax.train import checkpoint
  checkpoints = checkpoint.Checkpoints(sys.argv[1])
  checkpoints.save(1, {"w": jnp.ones(4)}, {})
  # As if in the midst of the next one.
  half = pathlib.Path(sys.argv[1]) / "2.orbax-checkpoint-tmp" / "state"
  half.mkdir(parents=True)
  (half / "part").write_text("half")
  print("half", flush=True)
  time.sleep(600)
"""


@pytest.mark.parametrize("write", [True, False])
def test_what_another_process_is_writing_is_left_alone(tmp_path, write):
  writer = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  )
  half = tmp_path / "2.orbax-checkpoint-tmp"
  try:
    assert writer.stdout.readline() == "half\n"
    ours = checkpoint.Checkpoints(tmp_path, write=write)
    assert (half / "state" / "part").read_text() == "half"
    assert ours.latest() == 1
    assert ours.restore({"w": jnp.zeros(4)})[1]["w"].tolist() == [1] * 4
    with pytest.raises(RuntimeError, match="another run writes"):
      ours.save(3, {"w": jnp.ones(4)}, {})
    ours.close()
  finally:
    writer.kill()
    writer.wait()
  # Whoever only reads touches nothing, even where nobody writes.
  assert checkpoint.Checkpoints(tmp_path, write=False).latest() == 1
  assert half.exists()
  with pytest.warns(RuntimeWarning, match="half-written"):
    ours = checkpoint.Checkpoints(tmp_path)
  assert not half.exists()
  assert ours.save(3, {"w": jnp.ones(4)}, {})


def test_to_read_is_to_pass_over_what_is_damaged(tmp_path):
  _filled(tmp_path)
  (tmp_path / "3" / "FILES.json").unlink()
  before = sorted(p.name for p in tmp_path.iterdir())
  step, state, _ = checkpoint.Checkpoints(tmp_path, write=False).restore(
    _state()
  )
  assert step == 2 and _bits(state) == _bits(_state(2))
  assert sorted(p.name for p in tmp_path.iterdir()) == before
  nothing = checkpoint.Checkpoints(tmp_path / "none", write=False)
  assert nothing.restore(_state()) is None
  assert not (tmp_path / "none").exists()


def test_once_told_the_next_call_is_the_last():
  with checkpoint.Preemption() as preemption:
    preemption.exit_if_requested()
    preemption.exit_if_requested_here()
    os.kill(os.getpid(), signal.SIGTERM)
    for leave in (
      preemption.exit_if_requested,
      preemption.exit_if_requested_here,
    ):
      with pytest.raises(SystemExit) as left:
        leave()
      assert left.value.code == 143


def test_at_once_ends_wherever_it_is():
  done = []
  with checkpoint.Preemption() as preemption:
    with pytest.raises(SystemExit) as left, preemption.exit_at_once():
      done.append("begun")
      os.kill(os.getpid(), signal.SIGTERM)
      done.append("gone on")
    assert left.value.code == 143 and done == ["begun"]
    # And does not begin once it was told.
    with pytest.raises(SystemExit), preemption.exit_at_once():
      done.append("begun")
  assert done == ["begun"]
