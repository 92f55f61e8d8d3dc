"""RLOO (arXiv 2402.14740): leave-one-out baseline, KL in the reward."""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.advantage = "rloo"
  config.rl.kl_in = "reward"
  config.rl.kl_estimator = "k1"


def paper(config):
  """Sets the sizes of the method's paper."""
  config.rl.kl_coef = 0.03


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method, paper)
