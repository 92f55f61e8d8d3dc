"""REINFORCE (Williams, 1992) with the batch mean as baseline."""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.advantage = "reinforce"
  config.rl.kl_coef = 0.0


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
