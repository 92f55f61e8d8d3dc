"""TPU kernels on a CPU: interpreted, with races looked for."""

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture
def interpreted():
  """Interprets TPU kernels; memory starts as NaN and a race fails the test."""
  params = pltpu.InterpretParams(detect_races=True)
  with pltpu.force_tpu_interpret_mode(params):
    yield
  jax.effects_barrier()
  assert not interpret_pallas_call.races.races_found
