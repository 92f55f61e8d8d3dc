"""Efficient Reasoner (arXiv 2502.04463): short among the right ones pays."""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
  config.reward.terms = "verifiable + 0.2*length + 0*opera"
  config.reward.options = {"length": {"kind": "efficient"}}
  config.rl.advantage = "rloo"


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
