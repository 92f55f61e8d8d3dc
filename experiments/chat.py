"""Chat with a checkpoint: type a prompt, and read the thought as it streams.

  python -m experiments.chat --config=configs/tiny.py --workdir=runs/tiny \
    --stage=rl [--prompt="..."]

Without --prompt it asks for prompts until an empty line. There is deliberately
no multi-turn conversation: every prompt is independent, as in training.
"""

import sys
from collections.abc import Iterator

from absl import flags, logging
from etils import epy

from opera_jax import commands, config_flag

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  import jax

  from opera_jax.rollout import text
  from opera_jax.run import setup, workdir
  from opera_jax.text import terminal

_CONFIG = config_flag.define("configs/tiny.py")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)
_STAGE = flags.DEFINE_enum(
  "stage", "rl", ["base", "sft", "rl"], "Stage whose model to use."
)
_PROMPT = flags.DEFINE_string("prompt", None, "Answer this prompt and exit.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Answers per prompt.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_STOP = flags.DEFINE_multi_string("stop", [], "Strings that end an answer.")


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # orbax logs every file
  config = _CONFIG.value
  workdir.existing(_WORKDIR.value)
  run = setup.of_workdir(_WORKDIR.value, config, _STAGE.value)
  params = run.for_rollout(run.load(_STAGE.value))
  settings = run.sampling(**config.rollout.to_dict())
  for turn, prompt in enumerate(_prompts()):
    answers = text.complete(
      run.engine,
      run.tokenizer,
      params,
      [prompt],
      settings,
      jax.random.fold_in(jax.random.key(_SEED.value), turn),
      samples=_SAMPLES.value,
      stop=_STOP.value,
      on_text=_show if _SAMPLES.value == 1 else None,
    )[0]
    for number, answer in enumerate(answers, 1):
      if len(answers) > 1:
        print(f"--- {number} of {len(answers)}")
        _show(turn, number, answer.text)
      sample = answer.sample
      print(f"\n[{len(sample.tokens)} tokens, ended by {sample.reason}]")


def _prompts() -> Iterator[str]:
  """Yields the prompt of the command line, or those that are typed."""
  if _PROMPT.value is not None:
    yield _PROMPT.value
    return
  while True:
    try:
      prompt = input("prompt> ").strip()
    except EOFError:
      return
    if not prompt:
      return
    yield prompt


def _show(prompt: int, sample: int, more: str) -> None:
  del prompt, sample
  sys.stdout.write(terminal.visible(more))
  sys.stdout.flush()


if __name__ == "__main__":
  commands.run(main, resumes=False)
