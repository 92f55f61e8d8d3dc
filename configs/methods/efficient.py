"""Efficient Reasoner (arXiv 2502.04463): rewards short right answers."""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0.2*length + 0*opera"
  config.reward.options = {"length": {"kind": "efficient"}}
  config.rl.advantage = "rloo"


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
