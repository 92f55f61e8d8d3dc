"""How long a newcomer waits: for a sample, for the demo, for the tests.

  python -m benchmarks.time_to_first [--config=configs/tiny.py]
  python -m benchmarks.time_to_first --tests [-- PYTEST OPTIONS]
  python -m benchmarks.time_to_first --real_sizes

The first runs `experiments.opera_rl` in a process of its own, with an empty
cache of compiled programs, and takes each stage apart: seconds in all, of which
compiling (some thread traces, lowers or compiles), of which running (the rest),
of which waiting (the main thread fetches results or waits for the threads that
sample; see `opera_jax.sharding.clock`), and the floor: what the arithmetic of
its tokens takes at this machine's large matmul.

The second does the same for the fast tests by file; the third compiles the 8B
config's programs for an absent TPU slice, at its depth and at half of it.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

# Before JAX: nothing here needs a chip, nor asks anybody for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from benchmarks import compile_plugin, harness
from opera_jax.data import traces
from opera_jax.plan import cost, hardware, programs
from opera_jax.run import model_config, sizes, workdir
from opera_jax.sharding import mesh as mesh_lib
from opera_jax.stages import stage_times
from opera_jax.train import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIRST = "first sample of"
DEAREST = 5
SLOW = 60.0  # seconds from which a shipped program is listed

_CONFIG = config_flags.DEFINE_config_file("config", "configs/tiny.py")
_TESTS = flags.DEFINE_bool("tests", False, "Measure the fast tests.")
_REAL = flags.DEFINE_bool("real_sizes", False, "Compile the 8B config.")
_SLICES = flags.DEFINE_list("slices", ["v5p_4x4x4"], "Of the 8B config.")
_KEEP = flags.DEFINE_string("keep", "", "Folder that takes the run; else none.")


def main(rest: list[str]) -> None:
  if _TESTS.value:
    _tests(rest[1:])
  elif _REAL.value:
    _real_sizes()
  else:
    with tempfile.TemporaryDirectory() as folder:
      _demo(pathlib.Path(_KEEP.value or folder))


def _demo(folder: pathlib.Path) -> None:
  """Runs the method with an empty cache; writes section time_to_first."""
  name = flags.FLAGS["config"].config_filename
  cache = folder / "programs"
  cache.mkdir(mode=0o700, parents=True)
  before = harness.ceilings(jnp.float32).flops
  start = time.monotonic()
  first, last = None, {}
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "experiments.opera_rl", f"--config={name}"),
      f"--workdir={folder / 'run'}",
      f"--config.runtime.compile_cache={cache}",
      f"--config.seed={_CONFIG.value.seed}",
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  for line in process.stdout:
    print(line, end="", flush=True)
    stage, _, words = line.partition(": ")
    if FIRST in words and first is None:
      first = time.monotonic() - start
    if " tokens/s, " in words:
      last[stage] = words
  total = time.monotonic() - start
  if process.wait():
    raise SystemExit(f"The run has failed with {process.returncode}.")
  rate = max(before, harness.ceilings(jnp.float32).flops)
  work = _work(folder / "run", _CONFIG.value, last)
  stages = stage_times.read(folder / "run")
  body = (
    f"`python -m benchmarks.time_to_first`; {harness.hardware()}; `{name}`, an "
    f"empty cache of programs; large matmul {rate / 1e9:.0f} GFLOP/s. "
    f"{total:.0f} s in all; the first sample was shown after "
    f"{'no' if first is None else f'{first:.0f}'} s.\n\n"
    + _stage_table(stages, work, rate)
    + "\n\nFLOPs: 2 a parameter of a layer's matrices and of the head for each "
    "token, and 4 x heads x head size x layers for each (query, key) pair; "
    "three times that where there is a backward pass. Floor: FLOPs at the "
    "large matmul's speed; off: running / floor.\n\nThe dearest programs "
    "(seconds of all phases, times compiled):\n\n"
    + "\n".join(
      f"- {s.name}: "
      + ", ".join(f"{n} {t:.1f} ({c})" for n, c, t in s.dearest[:DEAREST])
      for s in stages
      if s.programs
    )
  )
  harness.write_section("time_to_first", body)
  print(body)


def _stage_table(
  stages: list[stage_times.StageTime],
  work: dict[str, tuple[float, float]],
  rate: float,
) -> str:
  rows = []
  for s in stages:
    running = s.seconds - s.compiling
    tokens, flops = work.get(s.name, (0.0, 0.0))
    floor = flops / rate
    rows.append(
      (
        *(s.name, f"{s.seconds:.1f}", f"{s.compiling:.1f}", f"{running:.1f}"),
        *(f"{s.waiting:.1f}", s.programs, f"{tokens:,.0f}"),
        *(f"{flops / 1e9:,.0f}", f"{floor:.1f}"),
        f"{running / floor:.1f}" if floor else "",
      )
    )
  total = [sum(getattr(s, n) for s in stages) for n in _SUMMED]
  rows.append(
    (
      *("in all", f"{total[0]:.1f}", f"{total[1]:.1f}"),
      *(f"{total[0] - total[1]:.1f}", f"{total[2]:.1f}", total[3]),
      *("", "", "", ""),
    )
  )
  header = ("stage", "s", "compiling", "running", "waiting", "programs")
  return harness.table((*header, "tokens", "GFLOP", "floor s", "off"), rows)


_SUMMED = ("seconds", "compiling", "waiting", "programs")


def _work(
  folder: pathlib.Path, config: Any, last: dict[str, str]
) -> dict[str, tuple[float, float]]:
  """(tokens trained, sampled or scored, FLOPs that they need) by stage.

  Args:
    folder: of the finished run.
    config: of the run.
    last: the last line of progress of each stage; evaluation's tokens are
      known from it alone.
  """
  done = {s: workdir.result(folder, s) for s in ("base", "sft")}
  model = model_config.resolve(
    config.model, vocab_size=config.tokenizer.bpe_size
  )
  token = cost.layer_flops(model) + cost.head_flops(model)

  def forward(tokens: float, keys: float) -> float:
    return tokens * token + cost.attention_flops(model, tokens * keys)

  out = {}
  for stage in ("base", "sft"):
    tokens = done[stage]["tokens"] * config[stage].epochs
    mean = done[stage]["tokens"] / done[stage]["kept"]
    out[stage] = tokens, 3 * forward(tokens, mean / 2)
  base = done["base"]
  prompt = (base["tokens"] - base["target_tokens"]) / base["kept"]
  sampled = count = 0
  for trace in traces.read(folder / "synthesize" / "traces"):
    count += 1
    sampled += len(trace.completion)
    for round_ in trace.rounds:
      kept = round_.candidates[round_.kept].tokens
      sampled += sum(c.tokens for c in round_.candidates) - kept
  length = sampled / max(count, 1)
  out["synthesize"] = (
    sampled + count * prompt,
    forward(sampled, prompt + length / 2) + forward(count * prompt, prompt / 2),
  )
  tokens, flops = 0.0, 0.0
  for line in metrics.read(folder / "rl" / "metrics.jsonl"):
    samples, mean = line["rollout/tokens"], line["completions/mean_length"]
    prefixes, continuations = (
      line["scoring/prefix_tokens"],
      line["scoring/continuation_tokens"],
    )
    keys = prompt + mean / 2
    shared = (
      config.rl.prompts
      * config.rl.samples
      / config.rl.completions_per_row
      * prompt
    )
    passes = 1 + bool(config.rl.kl_coef)  # the policy, and its reference
    tokens += samples + passes * prefixes + continuations + samples + shared
    flops += forward(samples, keys)
    flops += forward(passes * prefixes, keys) + forward(
      continuations, prompt + mean
    )
    flops += 3 * (forward(samples, keys) + forward(shared, prompt / 2))
  out["rl"] = tokens, flops
  evaluated = _tokens(last.get("evaluate", ""))
  out["evaluate"] = evaluated, forward(evaluated, prompt)
  return out


def _tokens(line: str) -> float:
  """Tokens of a stage, from the speed and the seconds of its last line."""
  speed = seconds = 0.0
  for part in line.strip().split(", "):
    if part.endswith(" tokens/s"):
      speed = float(part.removesuffix(" tokens/s").replace(",", ""))
    elif part.endswith(" s"):
      seconds = float(part.removesuffix(" s"))
  return speed * seconds


def _tests(options: list[str]) -> None:
  """Runs the fast tests; writes section time_of_tests."""
  with tempfile.TemporaryDirectory() as folder:
    start = time.monotonic()
    code = subprocess.run(
      [
        *(sys.executable, "-m", "pytest", "-m", "not slow"),
        *("-p", "benchmarks.compile_plugin", "--durations=10", *options),
      ],
      cwd=ROOT,
      env=os.environ | {compile_plugin.FOLDER: folder},
    ).returncode
    total = time.monotonic() - start
    files: dict[str, list[float]] = {}
    workers = sorted(pathlib.Path(folder).glob("*.json"))
    for report in workers:
      for name, (seconds, count) in json.loads(report.read_text()).items():
        file = files.setdefault(name, [0.0, 0])
        file[0] += seconds
        file[1] += count
  dearest = sorted(files.items(), key=lambda item: -item[1][0])[:10]
  body = (
    f"`python -m benchmarks.time_to_first --tests {' '.join(options)}`; "
    f"{harness.hardware()}; exit code {code}; {total:.0f} s of the wall, "
    f"{len(workers)} processes. They compiled "
    f"{sum(int(f[1]) for f in files.values()):,} programs (or read them from "
    f"the persistent cache) in {sum(f[0] for f in files.values()):.0f} s of "
    "their own; by file of tests, the dearest ten:\n\n"
    + harness.table(
      ("file", "compiling s", "programs"),
      [(name, f"{s:.1f}", int(n)) for name, (s, n) in dearest],
    )
  )
  harness.write_section("time_of_tests", body)
  print(body)


def _real_sizes() -> None:
  """Compiles the 8B config's programs; writes section compile_real_sizes."""
  from opera_jax.configs import qwen3_8b

  rows = []
  for name in _SLICES.value:
    config = sizes.derive(qwen3_8b.get_config(name))
    topology = name.replace("_", ":", 1)
    laid_out = mesh_lib.create(dict(config.mesh), hardware.devices(topology))
    model = model_config.resolve(config.model, config.checkpoint, offline=True)
    depth = model.num_hidden_layers
    for layers in (depth // 2, depth):
      for program in programs.build(
        laid_out,
        model=vars(model) | {"num_hidden_layers": layers},
        **{s: config[s] for s in ("engine", "rollout", "scoring", "sft", "rl")},
        names=("prefill", "decode", "update"),
      ):
        seconds = _compile(program, laid_out)
        rows.append(
          (topology, program.name, program.shape, layers)
          + tuple(f"{s:.1f}" for s in seconds)
        )
        print(rows[-1], flush=True)
  slow = [
    (plan["config"], p["name"], p["shape"], f"{p['compile_seconds']:.0f}")
    for plan in map(
      lambda path: json.loads(path.read_text()),
      sorted((ROOT / "docs" / "plans").glob("*.json")),
    )
    for p in plan["programs"]
    if p["compile_seconds"] > SLOW
  ]
  body = (
    f"`python -m benchmarks.time_to_first --real_sizes`; {harness.hardware()}; "
    "Qwen3-8B as `configs/qwen3_8b.py` has it, compiled by libtpu on this "
    "machine for slices that are not there, at half its depth and at all of "
    "it.\n\n"
    + harness.table(
      ("slice", "program", "shape", "layers", "trace + lower s", "compile s"),
      rows,
    )
    + f"\n\nOf the shipped plans (`docs/plans`), programs that took more than "
    f"{SLOW:.0f} s: "
    + ("none." if not slow else "\n\n")
    + (harness.table(("config", "program", "shape", "s"), slow) if slow else "")
  )
  harness.write_section("compile_real_sizes", body)
  print(body)


def _compile(program: programs.Program, mesh: Any) -> tuple[float, float]:
  """Seconds to trace and lower, and to compile."""
  jax.config.update("jax_enable_compilation_cache", False)
  start = time.monotonic()
  with jax.set_mesh(mesh):
    lowered = program.jitted.lower(*program.arguments, **program.static)
  half = time.monotonic()
  lowered.compile()
  return half - start, time.monotonic() - half


if __name__ == "__main__":
  app.run(main)
