"""OPERA (arXiv 2606.25757): GRPO on the policy's log-probability of the
reference.

  python -m experiments.opera_rl --config=configs/methods/opera.py:smoke \
    --workdir=runs/opera

Each ablation of the paper changes one value: config.reward.mode (r_self, r_ppl,
one_hot), .match (substring, any), .compare, .bridge, or config.rl.tasks.
"""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "opera + verifiable"
  config.rl.advantage = "grpo"


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
