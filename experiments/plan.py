"""Checks whether a run fits on a TPU slice, without the slice.

  python -m experiments.plan --config=configs/qwen3_8b.py:v5p_4x4x4 \
    --topology=v5p:4x4x4 --json=docs/plans/qwen3_8b_v5p_4x4x4.json
  python -m experiments.plan --page=docs/plans

The first command compiles, with libtpu on this machine's CPU, the programs that
`experiments.opera_rl` would run with that config. It prints memory per device,
FLOPs, collective bytes and compile seconds; if a program does not fit, it
prints which settings to lower and exits with status 1. The second command
writes the page of all saved plans. A plan of an 8B model takes some minutes on
2 cores; `--programs` selects programs, and the others are kept from the file if
it has them. A plan contains no measured times.
"""

import json
import os
import pathlib
import sys

# Set before importing JAX: compiling needs no TPU, so libtpu must not look for
# one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from absl import app, flags
from etils import epy
from ml_collections import config_flags

from opera_jax import config_flag

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  from opera_jax.plan import programs, render, whole
  from opera_jax.run import model_config, sizes

_CONFIG = config_flag.define("configs/qwen3_8b.py")
_TOPOLOGY = flags.DEFINE_string("topology", None, "E.g. v5p:4x4x4.")
_JSON = flags.DEFINE_string("json", None, "File to write the plan to.")
_PAGE = flags.DEFINE_string(
  "page", None, "Folder of saved plans; writes their page."
)
_PROGRAMS = flags.DEFINE_list(
  "programs", [], "Programs to compile; empty means all."
)


def main(_) -> None:
  if _PAGE.value:
    folder = pathlib.Path(_PAGE.value)
    plans = [json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))]
    (folder / "README.md").write_text(render.markdown(plans))
    return
  if not _TOPOLOGY.value:
    raise app.UsageError("Name a slice: --topology=v5p:4x4x4.")
  config = sizes.derive(_CONFIG.value)
  path = pathlib.Path(_JSON.value) if _JSON.value else None
  before = json.loads(path.read_text()) if path and path.exists() else None
  try:
    model = model_config.resolve(config.model, config.checkpoint, offline=True)
    sections = {section: config[section] for section in whole.SECTIONS}
    plan = whole.make(
      _TOPOLOGY.value,
      config.mesh,
      sections | {"model": vars(model)},
      name=config_flags.get_config_filename(flags.FLAGS["config"]),
      names=tuple(_PROGRAMS.value or list(programs.NAMES)),
      before=before,
    )
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  print(render.text(plan))
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan, indent=1) + "\n")
  if not all(p["fits"] for p in plan["programs"]):
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
