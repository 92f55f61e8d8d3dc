"""Checks whether a run fits on a TPU slice, a GPU or a CPU, without it.

  python -m experiments.plan --config=configs/qwen3_8b.py:v5p_4x4x4 \
    --topology=v5p:4x4x4 --json=docs/plans/qwen3_8b_v5p_4x4x4.json
  python -m experiments.plan --config=configs/qwen3_0_6b.py:l4 \
    --topology=l4 --solve
  python -m experiments.plan --page=docs/plans
  python -m experiments.plan --all=docs/plans

The first command compiles, with libtpu on this machine's CPU, the programs that
`experiments.opera_rl` would run with that config. It prints memory per device,
FLOPs, collective bytes and compile seconds; if a program does not fit, it
prints which settings to lower and exits with status 1. A plan of an 8B model
takes some minutes on 2 cores; `--programs` selects programs, and the others are
kept from the file if it has them. The file is written after every program: what
is killed leaves a plan that says it is partial. A plan contains no measured
times.

The second command estimates a GPU's memory (t4, l4, a100-40, a100-80, h100)
from shapes in a second, without compiling; `cpu` is this machine's available
memory, `cpu:16GiB` another's. If the run does not fit, it prints values with
which it does. `--solve` prints the largest setting that fits, as flags; the
order in which it gives way is in opera_jax/plan/solve.py. The third command
writes the page of all saved plans. The fourth makes every plan of the folder
anew, one after the other, and the page after each; `make plans` runs it.
"""

import json
import os
import pathlib
import subprocess
import sys

# Set before importing JAX: compiling needs no TPU, so libtpu must not look for
# one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from absl import app, flags
from etils import epy
from ml_collections import config_flags

from opera_jax import commands, config_flag

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  from opera_jax import atomic_file
  from opera_jax.plan import hardware, programs, render, solve, whole
  from opera_jax.run import model_config, sizes

_CONFIG = config_flag.define("configs/qwen3_8b.py")
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "E.g. v5p:4x4x4, l4, cpu or cpu:16GiB."
)
_SOLVE = flags.DEFINE_bool(
  "solve", False, "Propose the largest setting that fits on a GPU or CPU."
)
_JSON = flags.DEFINE_string("json", None, "File to write the plan to.")
_PAGE = flags.DEFINE_string(
  "page", None, "Folder of saved plans; writes their page."
)
_ALL = flags.DEFINE_string(
  "all", None, "Folder of saved plans; makes all of them anew, and their page."
)
_PROGRAMS = flags.DEFINE_list(
  "programs", [], "Programs to compile; empty means all."
)


def main(_) -> None:
  if _PAGE.value:
    _write_page(pathlib.Path(_PAGE.value))
    return
  if _ALL.value:
    _make_all(pathlib.Path(_ALL.value))
    return
  if not _TOPOLOGY.value:
    raise app.UsageError("Name a device: --topology=v5p:4x4x4, or l4, or cpu.")
  given = _CONFIG.value
  config = sizes.derive(given)
  path = pathlib.Path(_JSON.value) if _JSON.value else None
  before = json.loads(path.read_text()) if path and path.exists() else None
  # SFT need not fit where the run has none.
  skipped = set() if "sft" in config.stages.split(",") else {"sft"}
  names = tuple(
    _PROGRAMS.value or [n for n in programs.NAMES if n not in skipped]
  )

  def save(plan) -> None:
    if path:
      path.parent.mkdir(parents=True, exist_ok=True)
      with atomic_file.replacing(path) as file:
        file.write(json.dumps(plan, indent=1) + "\n")

  try:
    model = model_config.resolve(config.model, config.checkpoint, offline=True)
    card = hardware.card(_TOPOLOGY.value)
    if _SOLVE.value and card is None:
      raise ValueError(
        "--solve tries many settings, which only the estimate of one GPU or "
        "CPU is fast enough for. Leave it out for a TPU, whose plan says what "
        "to lower."
      )
    sections = {section: config[section] for section in whole.SECTIONS}
    plan = whole.make(
      _TOPOLOGY.value,
      config.mesh,
      sections | {"model": vars(model)},
      name=config_flags.get_config_filename(flags.FLAGS["config"]),
      names=names,
      before=before,
      save=save,
    )
    print(render.text(plan))
    fits = all(p["fits"] for p in plan["programs"])
    if card is not None and (_SOLVE.value or not fits):
      solver = solve.Solver(card, given.to_dict(), vars(model), names)
      print(f"\n{_advice(solver, grow=_SOLVE.value)}")
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  except KeyboardInterrupt:
    kept = f"{path} has the programs so far" if path else "nothing is saved"
    sys.exit(f"\nplan: interrupted; {kept}.")
  if not fits:
    sys.exit(1)


def _write_page(folder: pathlib.Path) -> None:
  plans = [json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))]
  (folder / "README.md").write_text(render.markdown(plans))


def _make_all(folder: pathlib.Path) -> None:
  """Makes the plans of a folder anew, each in a process of its own.

  A process has one config. What is interrupted leaves the plans made so far,
  and of the current one the programs made so far.
  """
  paths = sorted(folder.glob("*.json"))
  failed = []
  for number, path in enumerate(paths, start=1):
    plan = json.loads(path.read_text())
    config, topology = plan["config"], plan["topology"]
    print(f"plan: {number} of {len(paths)}: {config} on {topology}", flush=True)
    command = [
      *(sys.executable, "-m", "experiments.plan", f"--config={config}"),
      *(f"--topology={topology}", f"--json={path}"),
      f"--programs={','.join(_PROGRAMS.value)}",
    ]
    if subprocess.run(command, check=False).returncode:
      failed.append(path.name)
    _write_page(folder)
  if failed:
    sys.exit(f"plan: not made, or does not fit: {', '.join(failed)}")


def _advice(solver: "solve.Solver", *, grow: bool) -> str:
  """Says with which values the run fits, and grown to the largest."""
  needed = solver.fit()
  if needed is None:
    return (
      "No setting makes it fit: with one prompt at once, LoRA of rank 4 and "
      f"completions of {solve.SHORTEST} tokens it is still too large. Take a "
      "larger device or a smaller model."
    )
  lines = []
  if needed:
    lines.append(f"It fits with {solve.flags(needed)}")
  if grow:
    largest = solver.grow(needed)
    lines.append(
      f"The largest setting that fits: {solve.flags(largest)}"
      if largest
      else "The largest setting that fits is the one that you gave."
    )
  return "\n".join(lines)


if __name__ == "__main__":
  commands.run(main, resumes=False)
