"""On-policy distillation: the advantage of each token is the teacher's
log-ratio.

config.rl.teacher names the finished stage whose model is the teacher; "" means
the SFT model.
"""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "0*verifiable + 0*opera"
  config.rl.advantage = "distillation"
  config.rl.kl_coef = 0.0


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
