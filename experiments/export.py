"""Exports a stage's model in the Hugging Face format (transformers, vLLM).

  python -m experiments.export --config=configs/tiny.py --workdir=runs/tiny \
    --stage=rl --output=runs/tiny/export

Reads `<stage>/model` of the workdir and writes safetensors, config.json and the
tokenizer. float32 is exact; bfloat16 is half the size and the dtype of the
published models. It deliberately does not upload anything.

A stage that trained a LoRA adapter (`config.rl.lora`, `config.sft.lora`) has
left the merged model, which is exported as any other. `--adapter` exports the
adapter alone, in peft's format; it goes with the model of the stage before,
whose export `--base_model` names.
"""

from absl import flags, logging
from etils import epy

from opera_jax import commands, config_flag

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  from opera_jax.models import hf_checkpoint, lora, peft_adapter
  from opera_jax.run import setup, workdir
  from opera_jax.sharding import runtime

_CONFIG = config_flag.define("configs/tiny.py")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)
_STAGE = flags.DEFINE_enum(
  "stage", "rl", ["base", "sft", "rl"], "Stage whose model to export."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Directory to write.", required=True
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Dtype of the exported weights."
)
_ADAPTER = flags.DEFINE_bool(
  "adapter", False, "Export the stage's LoRA adapter for peft instead."
)
_BASE_MODEL = flags.DEFINE_string(
  "base_model", "", "Hub id or directory that the adapter's config names."
)


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # orbax logs every file
  config = _CONFIG.value
  workdir.existing(_WORKDIR.value)
  runtime.start(**config.runtime, folder=_WORKDIR.value)
  run = setup.of_workdir(_WORKDIR.value, config, _STAGE.value)
  if _ADAPTER.value:
    export_adapter(run, config)
    return
  hf_checkpoint.save(
    _OUTPUT.value,
    run.load(_STAGE.value),
    run.model,
    run.tokenizer,
    _DTYPE.value,
  )
  print(f"export: wrote the {_STAGE.value} model to {_OUTPUT.value}")


def export_adapter(run: "setup.Run", config) -> None:
  """Writes the adapter of the stage that the flags name.

  Raises:
    ValueError: the stage trains no adapter.
  """
  stage = _STAGE.value
  settings = None
  if stage != "base":
    settings = lora.settings(**config[stage].lora)
  if settings is None:
    raise ValueError(
      f"Stage {stage} trains no LoRA adapter with this config. Give the config "
      "of the run, with lora.rank above 0, or leave --adapter out."
    )
  peft_adapter.save(
    _OUTPUT.value,
    run.with_lora(settings).load_adapter(stage),
    settings,
    family=run.model.family,
    base_model=_BASE_MODEL.value,
  )
  print(f"export: wrote the {stage} adapter to {_OUTPUT.value}")


if __name__ == "__main__":
  commands.run(main, resumes=False)
