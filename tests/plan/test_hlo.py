"""Collective bytes of small programs whose collectives are known by hand."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from opera_jax.plan import analyse, hardware, hlo

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
LAYERS, SIZE = 6, 1024


@pytest.mark.parametrize(
  "topology, devices", [("v5e:2x2", 4), ("tpu7x:2x2x1", 8)]
)
def test_a_scanned_body_counts_once_a_layer(topology, devices, nothing_cached):
  """FSDP by hand: each pass gathers the weights, the second reduces theirs."""
  mesh = jax.sharding.Mesh(hardware.devices(topology), ("x",))

  def place(shape, *spec):
    sharding = jax.NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

  def loss(weight, x):
    def layer(x, w):
      y = jax.lax.with_sharding_constraint(
        jnp.tanh(x @ w), jax.NamedSharding(mesh, P("x"))
      )
      return y, None

    return jnp.sum(jax.lax.scan(layer, x, weight)[0])

  lowered = jax.jit(jax.grad(loss)).lower(
    place((LAYERS, SIZE, SIZE), None, "x"), place((SIZE, SIZE), "x")
  )
  text = analyse._compile(lowered)[1]
  one = 2 * SIZE * SIZE * (devices - 1) / devices
  assert hlo.collective_bytes(text) == {
    "all-gather": 2 * LAYERS * one,
    "all-reduce": 2 * LAYERS * one,
  }


def test_groups_kinds_and_loops_from_text():
  text = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %call = f32[8] custom-call(%a), backend_config="multi
}
line"
  %b = f32[2]{0} reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(10)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (q: f32[16]) -> f32[4] {
  %r = (f32[16]{0}, bf16[16]{0}) all-reduce(%q, %z), replica_groups={{0,1,2,3}}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %f = f32[4] fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  %s = (f32[6], f32[6], u32[]) collective-permute-start(%x)
  %d = f32[6] collective-permute-done(%s)
  %g = f32[4] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}
}
"""
  assert hlo.collective_bytes(text) == {
    "all-gather": 10 * 32 * 3 / 4,
    "reduce-scatter": 10 * 32 * 3 / 4 + (64 + 32) * 3 / 4,
    "collective-permute": 24,
    "all-reduce": 2 * 16 * 3 / 4,
  }


def _loop(dtype, start, bound, direction, step, *, fused="", element=""):
  """A module whose loop counts from `start` by `step` up to `bound`."""
  condition = f"""
  %n = {dtype}[] constant({bound})
  %i = {dtype}[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction={direction}"""
  if fused:
    condition = f"""
  %n = {dtype}[] constant({bound})
  %i = {dtype}[] get-tuple-element(%p), index=1
  %c = {dtype}[] copy(%i)
  ROOT %lt = pred[] fusion(%n, %c), kind=kLoop, calls=%compared"""
  if element:  # the bound is an element of the tuple
    condition = f"""
  %n = {dtype}[] get-tuple-element(%p), index=2
  %i = {dtype}[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction={direction}"""
  return f"""HloModule m

%compared (a: {dtype}[], b: {dtype}[]) -> pred[] {{
  %a = {dtype}[] parameter(0)
  %b = {dtype}[] parameter(1)
  ROOT %fc = pred[] compare(%b, %a), direction={direction}
}}

%body (p: (f32[8], {dtype}[], {dtype}[])) -> (f32[8], {dtype}[], {dtype}[]) {{
  %p = (f32[8], {dtype}[], {dtype}[]) parameter(0)
  %x = f32[8] get-tuple-element(%p), index=0
  %i = {dtype}[] get-tuple-element(%p), index=1
  %m = {dtype}[] get-tuple-element(%p), index=2
  %one = {dtype}[] constant({step})
  %next = {dtype}[] add(%one, %i)
  %a = f32[8] all-gather(%x), replica_groups={{{{0,1}}}}, dimensions={{0}}
  ROOT %out = (f32[8], {dtype}[], {dtype}[]) tuple(%a, %next, %m)
}}

%cond (p: (f32[8], {dtype}[], {dtype}[])) -> pred[] {{
  %p = (f32[8], {dtype}[], {dtype}[]) parameter(0)
  %far = {dtype}[] constant(99){condition}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8] parameter(0)
  %first = {dtype}[] constant({start})
  %end = {dtype}[] constant({bound})
  %s = {dtype}[] copy(%first)
  %t = (f32[8], {dtype}[], {dtype}[]) tuple(%x, %s, %end)
  %w = (f32[8], {dtype}[], {dtype}[]) while(%t), condition=%cond, body=%body
}}
"""


@pytest.mark.parametrize(
  ("loop", "trips"),
  [
    (("s32", 0, 10, "LT", 1), 10),
    (("u32", 0, 8, "LT", 2), 4),  # a windowed einsum, two partial products
    (("s64", 3, 10, "LE", 1), 8),
    (("u8", 0, 7, "NE", 1), 7),
    (("s16", 9, 0, "GT", -2), 5),
    (("s32", 9, 0, "GE", -3), 4),
    (("s32", 5, 5, "LT", 1), 0),
  ],
)
@pytest.mark.parametrize("how", [{}, {"fused": "yes"}, {"element": "yes"}])
def test_loops_count_whatever_their_type_and_direction(loop, trips, how):
  text = _loop(*loop, **how)
  sent = hlo.collective_bytes(text).get("all-gather", 0)
  assert sent == trips * 32 / 2


def test_a_counter_may_stand_on_the_right_and_count_down():
  text = _loop("s32", 0, 10, "LT", 1)
  right = text.replace(
    "compare(%i, %n), direction=LT", "compare(%n, %i), direction=GT"
  )
  assert right != text
  assert hlo.collective_bytes(right) == {"all-gather": 10 * 16}
  down = _loop("s32", 9, 0, "GT", 3).replace(
    "add(%one, %i)", "subtract(%i, %one)"
  )
  assert hlo.collective_bytes(down) == {"all-gather": 3 * 16}


def test_a_loop_that_may_end_early_counts_with_its_bound():
  """A counter and a flag; the compiler's own count comes first."""
  text = _loop("s32", 0, 10, "LT", 1).replace(
    "ROOT %lt = pred[] compare(%i, %n), direction=LT",
    "%lt = pred[] compare(%i, %n), direction=LT\n"
    "  ROOT %both = pred[] and(%lt, %going)",
  )
  assert hlo.collective_bytes(text) == {"all-gather": 10 * 16}
  known = text.replace(
    "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"6"}}'
  )
  assert hlo.collective_bytes(known) == {"all-gather": 6 * 16}


def test_start_and_done_count_once_and_tuples_by_their_results():
  text = """HloModule m

%gathered (q: f32[4]) -> f32[8] {
  %q = f32[4] parameter(0)
  ROOT %ag = f32[8] all-gather(%q), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[4] parameter(0)
  %y = f32[2] parameter(1)
  %s = ((f32[4], f32[2]), (f32[8], f32[4])) all-gather-start(%x, %y), GROUPS
  %d = (f32[8], f32[4]) all-gather-done(%s), replica_groups={{0,1}}
  %r = (f32[4], f32[2]) all-reduce-start(%x, %y), replica_groups={{0,1}}
  %e = (f32[4], f32[2]) all-reduce-done(%r)
  %a = ((f32[4]), f32[8], u32[]) async-start(%x), calls=%gathered
  %u = ((f32[4]), f32[8], u32[]) async-update(%a), calls=%gathered
  %z = f32[8] async-done(%u), calls=%gathered
}
"""
  text = text.replace("GROUPS", "replica_groups={{0,1}}")
  assert hlo.collective_bytes(text) == {
    "all-gather": (32 + 16) / 2 + 32 / 2,
    "all-reduce": 2 * 24 / 2,
  }


def test_groups_are_the_devices_that_the_text_names():
  def group(attribute):
    text = f"""ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8] parameter(0)
  %a = f32[8] all-reduce(%x), {attribute}, to_apply=%add
}}
"""
    [collective] = hlo.collectives(text)
    return collective.group

  assert group("replica_groups={{0,2},{1,3}}") == (0, 2)
  assert group("replica_groups=[2,4]<=[8]") == (0, 1, 2, 3)
  assert group("replica_groups=[4,2]<=[2,4]T(1,0)") == (0, 4)
  mesh = "replica_groups=mesh['a'=2,'b'=4] "
  assert group(mesh + "{'b'}") == (0, 1, 2, 3)
  assert group(mesh + "{'a'}") == (0, 4)
  assert group(mesh + "{'b','a'}") == (0, 4, 1, 5, 2, 6, 3, 7)
  assert group(mesh + "{'b':(2)2}") == (0, 1)
  assert group(mesh + "{'b':(1)2}") == (0, 2)


def test_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.collective_bytes("HloModule m")
