"""Builds the prompt pool of the cold start from the tasks of a config.

  python -m experiments.pool --config=configs/open_ended.py \
    --config.data.path=FILE --config.pool.size=2000 --workdir=runs/pool

Reads `config.data.path` and `config.data.math_path` (files, Hugging Face or
TFDS data sets), filters the prompts by `config.pool`, clusters embeddings of
the rest and samples the clusters by size. Writes to the workdir

  pool/prompts.jsonl   a run reads it with --config.data.path
  pool/rejected.jsonl  every other prompt and why
  pool/clusters.html   counts, the clusters, their nearest prompts

`config.pool.embedder` names a sentence-transformers model. "policy" means the
mean hidden state of the base model, which is loaded or trained if the workdir
has none. "" means BGE-M3 if sentence-transformers is installed, otherwise
"policy".
"""

import importlib.util

from absl import flags, logging
from etils import epy

from opera_jax import commands, config_flag

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  from opera_jax.run import setup, sizes, tasks
  from opera_jax.scoring import embed
  from opera_jax.sharding import runtime
  from opera_jax.stages import pool as pool_stage
  from opera_jax.stages import supervised
  from opera_jax.synthesis import embedding
  from opera_jax.train import checkpoint

_CONFIG = config_flag.define("configs/open_ended.py")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)
DEFAULT = "BAAI/bge-m3"  # the paper's embedder


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  runtime.start(**config.runtime, folder=_WORKDIR.value)
  with checkpoint.Preemption() as preemption:
    make(sizes.derive(config), _WORKDIR.value, preemption)


def make(config, folder: str, preemption: "checkpoint.Preemption") -> None:
  """Builds the pool in the run's folder."""
  settings = config.pool.to_dict()
  if not settings["embedder"]:
    known = importlib.util.find_spec("sentence_transformers")
    settings["embedder"] = DEFAULT if known else "policy"
    print(f"pool: embeddings by {settings['embedder']}", flush=True)
  settings = pool_stage.Settings(**settings)
  with preemption.exit_at_once():
    prompts = tasks.read(**{name: config.data[name] for name in tasks.FILES})[0]
  pool_stage.build(
    folder,
    prompts,
    settings,
    seed=config.seed,
    embedder=lambda: (
      policy(config, folder, preemption)
      if settings.embedder == "policy"
      else embedding.sentence_transformer(settings.embedder)
    ),
    preemption=preemption,
  )


def policy(
  config, folder: str, preemption: "checkpoint.Preemption"
) -> "embedding.Embed":
  """Returns an embedder that uses the base model of the run."""
  sections = {name: config[name] for name in setup.SECTIONS}
  # No other stage runs here, so their numbers of tasks do not matter.
  sections["data"] = {
    **config.data, "synthesis": 0, "rl": 0, "held_out": 0,
  }  # fmt: skip
  with preemption.exit_at_once():
    run = setup.setup(
      folder, temperature=config.rollout.temperature, **sections
    )
  supervised.base(
    run,
    supervised.Recipe(**config.base),
    preemption,
    path=config.checkpoint,
  )
  params = run.load("base")
  embedder = embed.Embedder(
    run.graphdef,
    mesh=run.mesh,
    rows=config.scoring.batch_size,
    length_buckets=config.scoring.prefix_buckets,
  )
  return lambda texts: embedder.embed(params, run.tokenizer.encode_many(texts))


if __name__ == "__main__":
  commands.run(main)
