"""One fingerprint for the same bits, another for any other bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.train import fingerprint

P = jax.sharding.PartitionSpec


def _tree(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "w": jnp.asarray(rng.normal(size=(8, 24)), jnp.float32),
    "b": {"x": jnp.asarray(rng.normal(size=40), jnp.bfloat16)},
    "one": jnp.float32(3.0),
  }


def test_the_layout_does_not_matter():
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("d",))
  want = fingerprint.fingerprint(_tree())
  for specs in ((P("d"), P("d")), (P(None, "d"), P())):
    tree = _tree()
    tree["w"] = jax.device_put(
      tree["w"], jax.sharding.NamedSharding(mesh, specs[0])
    )
    tree["b"]["x"] = jax.device_put(
      tree["b"]["x"], jax.sharding.NamedSharding(mesh, specs[1])
    )
    assert fingerprint.fingerprint(tree) == want
  assert len(want) == 64


def _flip(tree):
  bits = np.asarray(tree["w"]).view(np.uint32).copy()
  bits[5, 7] ^= 1
  return tree | {"w": jnp.asarray(bits.view(np.float32))}


CHANGES = {
  "one bit": _flip,
  "two places exchanged": lambda t: t | {"w": t["w"].at[0].set(t["w"][1])},
  "rows exchanged": lambda t: t | {"w": t["w"][::-1]},
  "a shape": lambda t: t | {"w": t["w"].reshape(24, 8)},
  "a name": lambda t: {("v" if k == "w" else k): v for k, v in t.items()},
  "a type": lambda t: t | {"one": jnp.int32(3)},
  "zero's sign": lambda t: t | {"one": jnp.float32(-3.0)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_shows(name):
  before = fingerprint.fingerprint(_tree())
  assert fingerprint.fingerprint(CHANGES[name](_tree())) != before
