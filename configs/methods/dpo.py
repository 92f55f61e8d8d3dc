"""DPO (arXiv 2305.18290) on the best and the worst sample of each group."""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "opera + verifiable"
  config.rl.advantage = "pairs"
  config.rl.loss = "dpo"
  config.rl.beta = 0.1


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
