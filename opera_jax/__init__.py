"""Perplexity-reward reinforcement learning of open-ended reasoning in JAX.

`kernels`, `configs` and `experiments` lie at the root of the repository and are
links here. Every module has one name, `opera_jax.kernels` and so on; only
`python -m experiments.NAME` in a checkout names a driver without it.
"""

__version__ = "0.1.0"
