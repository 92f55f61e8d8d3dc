"""SDPO: the policy taught by its moving mean, shown a success of its group.

The top-logit form: Jensen-Shannon divergence (alpha 0.5) from the teacher's
100 likeliest tokens joins the loss; the sampled-token form is advantage "sdpo"
with divergence_coef 0.
"""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.advantage = "sdpo"
  config.rl.ema = 0.05
  config.rl.divergence_coef = 1.0
  config.rl.kl_coef = 0.0


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
