"""Compiling for absent hardware: no cache, matmuls as in production."""

import jax
import pytest


@pytest.fixture
def nothing_cached():
  """A program for absent hardware can be written to the cache, not read."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, 1e9)
  with jax.default_matmul_precision("default"):
    yield
  jax.config.update(name, before)
