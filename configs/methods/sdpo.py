"""SDPO: self-distillation from the policy's EMA, which sees a successful
sample.

This is the top-logit form: the loss adds the Jensen-Shannon divergence (alpha
0.5) from the teacher on its top 100 tokens. For the sampled-token form set
divergence_coef to 0; the advantage "sdpo" stays.
"""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.advantage = "sdpo"
  config.rl.ema = 0.05
  config.rl.divergence_coef = 1.0
  config.rl.kl_coef = 0.0


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
