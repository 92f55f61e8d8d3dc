"""GSPO (arXiv 2507.18071): one importance ratio per sequence."""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.loss = "gspo"
  config.rl.clip_low, config.rl.clip_high = 3e-4, 4e-4
  config.rl.dual_clip = 0.0
  config.rl.kl_coef = 0.0
  config.rl.reduction = "sequence_mean"


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
