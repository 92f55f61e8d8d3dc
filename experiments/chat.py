"""Tries a checkpoint by hand: type a prompt, read the thought as it comes.

  python -m experiments.chat --config=configs/tiny.py --workdir=runs/tiny \
    --stage=rl [--prompt="..."]

Without --prompt it asks for one, again and again, until an empty line. Left
out on purpose: a conversation; every prompt stands alone, as in training.
"""

import sys

from absl import app, flags, logging
from etils import epy

from opera_jax import config_flag

# Read when first used: --help and a mistyped flag need none of them.
with epy.lazy_imports():
  import jax

  from opera_jax.rollout import text
  from opera_jax.run import setup
  from opera_jax.text import terminal

_CONFIG = config_flag.define("configs/tiny.py")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)
_STAGE = flags.DEFINE_enum(
  "stage", "rl", ["base", "sft", "rl"], "Whose model to talk to."
)
_PROMPT = flags.DEFINE_string("prompt", None, "Answer this and leave.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Answers a prompt.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_STOP = flags.DEFINE_multi_string("stop", [], "Strings that end an answer.")


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # orbax narrates every file
  config = _CONFIG.value
  run = setup.setup(
    _WORKDIR.value,
    temperature=config.rollout.temperature,
    **{name: config[name] for name in setup.SECTIONS},
  )
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


def _prompts():
  """The one prompt of the command line, or those that are typed."""
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
  app.run(main)
