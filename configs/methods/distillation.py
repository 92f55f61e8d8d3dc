"""On-policy distillation: the teacher's log-ratio on every sampled token.

The teacher is the model of config.rl.teacher, a finished stage's folder; the
SFT model where none is named.
"""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
  config.reward.terms = "0*verifiable + 0*opera"
  config.rl.advantage = "distillation"
  config.rl.kl_coef = 0.0


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
