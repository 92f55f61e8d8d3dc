"""Shapes and shardings of the arrays that a run would hold.

Shape key: B rows, T tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from opera_jax import structs
from opera_jax.models import decoder, lora
from opera_jax.rollout import slots as slots_lib
from opera_jax.sharding import layout, rules
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.train import state as train_state


class Values:
  """The abstract values of one run: trees of ShapeDtypeStructs."""

  def __init__(self, mesh: jax.sharding.Mesh, config: decoder.Config):
    """Lays out the parameters.

    With LoRA, `params` holds the frozen weights in their dtype, and the
    adapter; only the adapter is trained.

    Args:
      mesh: of real or absent devices.
      config: of the model.

    Raises:
      ValueError: the mesh does not divide an axis.
    """
    self._mesh, self._config = mesh, config
    self._num_data_shards = mesh_lib.num_data_shards(mesh)
    self.graphdef, shapes = decoder.abstract(config)
    layout.check(shapes, decoder.logical_axes(shapes), mesh, rules.TRAIN)
    self.trained: Any = self._laid_out(shapes, rules.TRAIN)
    self.frozen: Any = None
    self.params = self.trained
    if config.lora is not None:
      self.trained, frozen = lora.split(self.params)
      self.frozen = _cast(frozen, config.lora.base_dtype)
      self.params = lora.combine(self.trained, self.frozen)

  def rollout_params(self) -> Any:
    """The parameters in the sharding and dtype of decoding, an adapter
    merged."""
    _, weights = lora.split(self.params)
    return self._laid_out(_cast(weights, self._config.dtype), rules.ROLLOUT)

  def slots(
    self, rows: int, slots: int, prefix: int, capacity: int, dtype: str
  ) -> slots_lib.Slots:
    """The engine's slots; see `slots.empty`."""
    self.rows("engine.prompt_slots", (rows,), jnp.int32)
    with jax.set_mesh(self._mesh):  # cache layouts depend on the devices
      shapes = jax.eval_shape(
        functools.partial(
          slots_lib.empty,
          *(self._config, rows, slots, prefix, capacity),
          recent=0,
          dtype=dtype,
        )
      )
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      shapes,
      slots_lib.shardings(shapes, self._mesh),
    )

  def _laid_out(self, shapes: Any, table: dict[str, Any]) -> Any:
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      rules.shardings(decoder.logical_axes(shapes), self._mesh, table),
    )

  def whole(self, leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array, replicated on every device."""
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=layout.replicated(self._mesh)
    )

  def rows(
    self, name: str, shape: tuple[int, ...], dtype: Any
  ) -> jax.ShapeDtypeStruct:
    """An array whose first axis is split over the data axes.

    Raises:
      ValueError: the axis does not divide; the message names the config field
        `name`.
    """
    if shape[0] % self._num_data_shards:
      raise ValueError(
        f"config.{name} gives {shape[0]} rows, which do not divide over "
        f"{self._num_data_shards} data shards. Change it, or config.mesh."
      )
    return jax.ShapeDtypeStruct(
      shape, dtype, sharding=layout.batch_sharding(self._mesh)
    )

  def batch(
    self,
    name: str,
    B: int,
    T: int,
    prefix_length: int = 0,
    num_continuations: int = 0,
  ) -> structs.Batch:
    """A batch of B rows of T tokens; `rows` explains `name`, `Batch` the
    others."""
    whole, real = (
      self.rows(name, (B, T), dtype) for dtype in (jnp.int32, jnp.float32)
    )
    return structs.Batch(
      tokens=whole,
      positions=whole,
      segments=whole,
      loss_mask=real,
      advantage=real,
      old_logprob=real,
      ref_logprob=real,
      prefix_length=prefix_length,
      num_continuations=num_continuations,
    )

  def state(
    self, optimizer: optax.GradientTransformation
  ) -> train_state.TrainState:
    """The training state; moments are sharded like the trained parameters."""
    state = jax.eval_shape(
      lambda params: train_state.create(params, optimizer, jax.random.key(0)),
      self.trained,
    )
    opt_state = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
      ),
      state.opt_state,
      train_state.shardings(
        state.opt_state, self.trained, layout.replicated(self._mesh)
      ),
    )
    return train_state.TrainState(
      step=self.whole(state.step),
      params=self.trained,
      opt_state=opt_state,
      key=self.whole(state.key),
    )


def _cast(shapes: Any, dtype: str) -> Any:
  """The same shapes and shardings in another dtype."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, jnp.dtype(dtype), sharding=x.sharding
    ),
    shapes,
  )
