"""Evaluates the three models of a run on held-out prompts, and writes the
report.

  python -m experiments.evaluate --config=configs/tiny.py --workdir=runs/tiny

Reads `base/model`, `sft/model` and `rl/model`; writes `evaluate/` and
`report.html`.
"""

from absl import app, flags, logging
from etils import epy

from opera_jax import config_flag

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  from opera_jax.run import setup, sizes, workdir
  from opera_jax.sharding import runtime
  from opera_jax.stages import config_check, evaluate, reporting
  from opera_jax.train import checkpoint

_CONFIG = config_flag.define("configs/tiny.py")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  runtime.start(**config.runtime, folder=_WORKDIR.value)
  config_check.check(config.to_dict(), {"evaluate", "report"}, _WORKDIR.value)
  config = sizes.derive(config)
  with checkpoint.Preemption() as preemption:
    with preemption.exit_at_once():
      run = setup.setup(
        _WORKDIR.value,
        temperature=config.rollout.temperature,
        needs={"held_out": 1},
        **{name: config[name] for name in setup.SECTIONS},
      )
    evaluate.evaluate(
      run,
      evaluate.Settings(
        max_new_tokens=config.rollout.max_new_tokens, **config.evaluate
      ),
      preemption,
    )
    reporting.write(run, config.to_dict(), preemption)
  workdir.redone(_WORKDIR.value)


if __name__ == "__main__":
  app.run(main)
