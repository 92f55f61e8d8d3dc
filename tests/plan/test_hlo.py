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


def test_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.collective_bytes("HloModule m")
