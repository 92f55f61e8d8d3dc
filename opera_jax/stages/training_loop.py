"""The training loop of pretraining and SFT: next-token loss on batches."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import layout
from opera_jax.train import checkpoint, metrics
from opera_jax.train import progress as progress_lib
from opera_jax.train import state as train_state
from opera_jax.train import step as step_lib


def place(
  state: train_state.TrainState, mesh: jax.sharding.Mesh
) -> train_state.TrainState:
  """Lays out a new state on the mesh: moments like their parameters, leaves
  without a NamedSharding (counters, keys) replicated on every device."""
  whole = layout.replicated(mesh)
  state = jax.tree.map(
    lambda x: (
      x
      if isinstance(x.sharding, jax.sharding.NamedSharding)
      else layout.to_devices(x, whole)
    ),
    state,
  )
  wanted = train_state.shardings(state.opt_state, state.params, whole)
  return state.replace(
    opt_state=jax.tree.map(
      lambda x, place: (
        x
        if x.sharding.is_equivalent_to(place, x.ndim)
        else jax.device_put(x, place)
      ),
      state.opt_state,
      wanted,
    )
  )


def fit(
  stage: workdir_lib.Stage,
  state: train_state.TrainState,
  update: step_lib.Update,
  batches: Callable[[int, np.ndarray], structs.Batch],
  *,
  mesh: jax.sharding.Mesh,
  batch_size: int,
  steps: int,
  checkpoint_every: int,
  preemption: checkpoint.Preemption,
  frozen: Any = None,
  validate: Callable[[Any], jax.Array] | None = None,
  validate_every: int = 1,
  log_to: Sequence[str] = ("jsonl", "tensorboard"),
) -> Any:
  """Runs updates up to `steps`, resuming from the newest checkpoint.

  The next step is dispatched before the last one's metrics are fetched, so
  the device never waits for the host.

  Args:
    stage: its folder takes checkpoints and metrics.
    state: the state before the first update.
    update: from `train.step.make_sft_update`.
    batches: `batches(step, rows)` returns these rows of the step's batch; each
      process calls it with its own rows. A pure function of both.
    batch_size: rows per batch.
    mesh: rows are split over its data axes.
    steps: total number of updates.
    checkpoint_every: updates between checkpoints.
    preemption: checked after every step; if requested, saves and exits.
    frozen: parameters that `update` takes and no checkpoint holds.
    validate: from the trained parameters to the loss of held-out batches,
      logged as `<name of the stage>/validation_loss`; None logs none.
    validate_every: updates between two validations; the last update is
      followed by one as well.
    log_to: where metrics go, see `trackers.parse`.

  Returns:
    The trained parameters after the last update.

  Raises:
    NonFiniteError: a loss or gradient is not finite.
  """
  saves = checkpoint.Checkpoints(stage.path / "checkpoints")
  state = place(state, mesh)
  start = 0
  restored = saves.restore(state)
  if restored is not None:
    start, state, _ = restored
    print(f"{stage.name}: resuming after step {start}", flush=True)
  log = metrics.Metrics(
    stage.path,
    "metrics",
    last_step=None if restored is None else start,
    log=log_to,
  )
  mine = layout.local_rows(mesh, batch_size)

  def record(at: int, values: Any) -> None:
    values = layout.to_host(values)
    step_lib.check_finite(values, at)
    log.write(at, values)

  pending = None
  with (
    jax.set_mesh(mesh),
    progress_lib.Progress(steps, stage.name, done=start) as progress,
  ):
    for i in range(start, steps):
      batch = batches(i, mine)
      tokens = int((batch.segments > 0).sum())
      state, values = update(
        state, layout.from_local_rows(batch, mesh, batch_size), frozen
      )
      if validate is not None and (
        (i + 1) % validate_every == 0 or i + 1 == steps
      ):
        values |= {f"{stage.name}/validation_loss": validate(state.params)}
      if pending is not None:
        record(*pending)
      pending = (i + 1, values)
      progress.update(tokens=tokens)
      stop = preemption.requested()
      if stop or (i + 1) % checkpoint_every == 0 or i + 1 == steps:
        record(*pending)
        pending = None
        stage.begin()
        saves.save(i + 1, state, {})
      if stop:
        raise SystemExit(preemption.exit_code())
  log.close()
  saves.close()
  return state.params
