"""Programs are counted once each, and seconds of the wall once."""

import concurrent.futures
import time

import jax
import numpy as np
import pytest

from opera_jax.sharding import clock, compile_log, layout, mesh, runtime


def _spans(*times):
  return [compile_log.Span("f", "compile", *one) for one in times]


def test_seconds_of_the_wall_are_counted_once():
  # Two threads at once, one inside the other, and a pause.
  assert compile_log.wall_seconds(_spans((0, 4), (1, 2), (3, 6), (8, 9))) == 7
  assert compile_log.wall_seconds([]) == 0


def test_a_program_is_one_compile_whatever_its_other_phases():
  some = [
    compile_log.Span("f", "trace", 0, 1),
    compile_log.Span("f", "lower", 1, 3),
    compile_log.Span("f", "compile", 3, 4),
    compile_log.Span("g", "compile", 4, 10),
    compile_log.Span("f", "compile", 10, 11),
  ]
  assert compile_log.programs(some) == 3
  assert compile_log.by_program(some) == [("g", 1, 6), ("f", 2, 5)]
  assert compile_log.between(some, 3, 10) == some[2:4]


def test_jax_tells_of_all_three_phases_by_the_functions_name():
  spans = compile_log.spans()
  before, counted = len(spans), runtime.compiled()

  @jax.jit
  def seldom_named(x):
    return x * 3.5 + 17.25

  start = time.time()
  seldom_named(np.ones(13, np.float32))
  mine = [s for s in spans[before:] if s.program == "seldom_named"]
  assert [s.phase for s in mine] == ["trace", "lower", "compile"]
  assert all(start <= s.start <= s.end <= time.time() for s in mine)
  assert runtime.compiled() == counted + 1
  seldom_named(np.ones(13, np.float32))  # compiled already
  assert runtime.compiled() == counted + 1


def test_only_the_main_thread_waits():
  def wait():
    with clock.waiting():
      time.sleep(0.05)

  before = clock.waited()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    pool.submit(wait).result()
  assert clock.waited() == before
  with pytest.raises(KeyError), clock.waiting():
    time.sleep(0.05)
    raise KeyError
  assert 0.05 <= clock.waited() - before < 1


def test_fetching_results_is_waiting():
  size = 600
  x = layout.to_devices(
    np.ones((size, size), np.float32),
    layout.replicated(mesh.create(devices=jax.devices()[:1])),
  )

  @jax.jit
  def long(x):
    return jax.lax.fori_loop(0, 50, lambda _, y: x @ y / size, x)

  jax.block_until_ready(long(x))
  before = clock.waited()
  start = time.monotonic()
  layout.to_host(long(x))
  taken = time.monotonic() - start
  assert 0 < clock.waited() - before <= taken
