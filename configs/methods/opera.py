"""OPERA (arXiv 2606.25757): GRPO on the policy's log-probability of the
reference.

  python -m experiments.opera_rl --config=configs/methods/opera.py:smoke \
    --workdir=runs/opera

The paper's ablations are one value away: config.reward.mode (r_self, r_ppl,
one_hot), .match (substring, any), .compare, .bridge, and config.rl.tasks.
"""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
  config.reward.terms = "opera + verifiable"
  config.rl.advantage = "grpo"


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
