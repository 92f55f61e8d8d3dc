"""What the reward costs: the released way, torch, and ours, on the same
weights.

  python -m benchmarks.reward

Every completion needs log P(y_ref | prefix) after each step's prefix.

  separate  one row for each prefix of every step and for the whole, sorted
            into length buckets, head on the reference's tokens only, jitted:
            the released code's work, as fast as plain JAX allows
  torch     the same rows padded to their batch's longest, transformers' Qwen3
  ours      one pass over each completion, with the reference as continuations
            at the reflective steps, their predecessors, and the end

Workloads are the full ones divided by SCALE on a CPU. Each method takes the
rows a call, of ROWS, that serve it best, and runs in a process of its own, so
that its peak memory is its own; the parent checks that all give the same
numbers. Ours also scores the completions' own tokens, which the update needs
as those of the old policy; the others are not asked to. Tokens and FLOPs are
counted exactly: a floor is the FLOPs at the measured speed of a large matmul.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from absl import app, flags

from benchmarks import harness

_METHOD = flags.DEFINE_string("method", None, "Run one method, for the parent.")
_FOLDER = flags.DEFINE_string("folder", None, "The parent's folder.")
_WORKLOAD = flags.DEFINE_string("workload", None, "LONG or SHORT.")
_ROWS = flags.DEFINE_integer("rows", 1, "Rows a call.")

METHODS = ("separate", "torch", "ours")
COMPLETIONS = 2
ROWS = (1, 8)  # rows a call, each method's own best


@dataclasses.dataclass(frozen=True)
class Workload:
  """Tokens of one completion and its reference."""

  prompt: int
  thought: int
  steps: int
  reflective: int
  answer: int
  reference: int


FULL = {
  "LONG": Workload(512, 4096, 32, 12, 1024, 1024),
  "SHORT": Workload(512, 4096, 32, 12, 1024, 128),
}


def scaled(workload: Workload, scale: int) -> Workload:
  """Lengths divided; the numbers of steps stay."""
  return dataclasses.replace(
    workload,
    prompt=workload.prompt // scale,
    thought=workload.thought // scale,
    answer=workload.answer // scale,
    reference=workload.reference // scale,
  )


def problem(workload: Workload, vocab: int):
  """Random tokens, and the steps that reflect; the same for every method."""
  rng = np.random.default_rng(0)
  prefix = workload.prompt + workload.thought + workload.answer
  prefixes = rng.integers(0, vocab, (COMPLETIONS, prefix)).astype(np.int32)
  references = rng.integers(0, vocab, (COMPLETIONS, workload.reference))
  ends = workload.prompt + (
    np.arange(workload.steps + 1) * workload.thought // workload.steps
  )
  # Every third step of the later ones reflects, so predecessors are their own.
  reflective = [
    np.sort(
      rng.choice(
        np.arange(1, workload.steps + 1), workload.reflective, replace=False
      )
    )
    for _ in range(COMPLETIONS)
  ]
  return prefixes, references.astype(np.int32), ends, reflective


def main(_) -> None:
  if _METHOD.value:
    _run_one(_METHOD.value, _FOLDER.value, _WORKLOAD.value, _ROWS.value)
    return
  import jax

  from opera_jax.models import decoder, hf_checkpoint

  on_cpu = jax.default_backend() == "cpu"
  scale = 8 if on_cpu else 1
  config = model_config(on_cpu)
  speed = harness.ceilings(config.dtype).flops
  blocks = []
  with tempfile.TemporaryDirectory() as folder:
    _, params = decoder.create(config, 0)
    hf_checkpoint.save(folder, params, config)
    for name, full in FULL.items():
      workload = scaled(full, scale)
      results = {}
      for method in METHODS if on_cpu else ("separate", "ours"):
        runs = [_child(folder, name, method, rows) for rows in ROWS]
        results[method] = min(runs, key=lambda run: run["seconds"])
      blocks.append(_block(name, workload, results, speed))
  body = (
    f"`python -m benchmarks.reward`; {harness.hardware()}; {config.dtype}; a "
    f"Qwen3 of {decoder.parameter_count(params):,} parameters "
    f"({config.num_hidden_layers} layers, width {config.hidden_size}, "
    f"vocabulary {config.vocab_size:,}); {COMPLETIONS} completions; lengths "
    f"are the full ones / {scale}; median of 5, warm; large matmul "
    f"{speed / 1e9:,.0f} GFLOP/s; peak memory is the "
    "process's, model and libraries included.\n\n" + "\n\n".join(blocks)
  )
  harness.write_section("reward", body)
  print(body)


def model_config(on_cpu: bool):
  """The model that every method runs."""
  from opera_jax.models import decoder, presets

  if not on_cpu:
    return dataclasses.replace(
      presets.PRESETS["Qwen/Qwen3-0.6B"], dtype="bfloat16"
    )
  # As Qwen3-8B: the head 9% of the layers, attention 15% of their FLOPs.
  return decoder.Config(
    vocab_size=2176,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=1536,
  )


def _child(folder, name, method, rows) -> dict:
  """What one method measured in its own process."""
  print(f"{name}: {method}, {rows} rows a call ...", flush=True)
  subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.reward"),
      *(f"--method={method}", f"--folder={folder}"),
      *(f"--workload={name}", f"--rows={rows}"),
    ],
    check=True,
  )
  return json.loads((pathlib.Path(folder) / f"{method}.json").read_text())


def _block(name, workload, results, speed) -> str:
  logprobs = [np.asarray(r["scores"]) for r in results.values()]
  worst = max(np.nanmax(np.abs(p - logprobs[-1])) for p in logprobs)
  ours, baseline = results["ours"], results["separate"]
  rows = []
  for method, result in results.items():
    floor = result["flops"] / speed
    rows.append(
      (
        method,
        result["rows"],
        f"{result['tokens']:,}",
        f"{result['flops'] / 1e9:,.0f}",
        f"{result['seconds']:.2f}",
        f"{floor / result['seconds']:.2f}",
        f"{result['peak_mib']:,.0f}",
        f"{baseline['tokens'] / result['tokens']:.2f}",
        f"{baseline['seconds'] / result['seconds']:.2f}",
      )
    )
  fewer = baseline["tokens"] / ours["tokens"]
  faster = baseline["seconds"] / ours["seconds"]
  return (
    f"**{name}**: prompt {workload.prompt}, thought {workload.thought} in "
    f"{workload.steps} steps of which {workload.reflective} reflect, answer "
    f"{workload.answer}, reference {workload.reference}.\n\n"
    + harness.table(
      (
        *("method", "rows", "tokens", "GFLOP", "s", "floor / s", "peak MiB"),
        *("fewer tokens", "faster"),
      ),
      rows,
    )
    + f"\n\nTokens must fall {fewer:.2f}-fold; time falls {faster:.2f}-fold, "
    f"{faster / fewer:.2f} of it. Largest difference between methods "
    f"{worst:.1e} nats."
  )


def _flops(config, spans, scored: int) -> float:
  """Of a forward pass: (context, tokens) spans, and `scored` tokens' heads."""
  D, N, K, H = (
    config.hidden_size,
    config.num_attention_heads,
    config.num_key_value_heads,
    config.head_dim,
  )
  weights = 2 * D * H * (N + K) + 3 * D * config.intermediate_size
  tokens = sum(size for _, size in spans)
  pairs = sum(size * seen + size * (size + 1) / 2 for seen, size in spans)
  layer = 2 * weights * tokens + 4 * N * H * pairs
  return config.num_hidden_layers * layer + 2 * D * config.vocab_size * scored


def _run_one(method: str, folder: str, name: str, size: int) -> None:
  import jax

  on_cpu = jax.default_backend() == "cpu"
  workload = scaled(FULL[name], 8 if on_cpu else 1)
  config = model_config(on_cpu)
  prefixes, references, ends, reflective = problem(workload, config.vocab_size)
  if method == "ours":
    call, spans, scored = _ours(
      folder, config, prefixes, references, ends, reflective, size
    )
  else:
    rows, places = _rows(prefixes, references, ends)
    spans, scored = [(0, len(r)) for r in rows], len(rows) * references.shape[1]
    make = _separate if method == "separate" else _torch
    means = make(folder, config, rows, references.shape[1], size)

    def call():
      table = np.full((COMPLETIONS, len(ends) + 1), np.nan)
      for (row, slot), mean in zip(places, means()):
        table[row, slot] = mean
      return table

  logprobs = call()
  taken = harness.seconds(lambda: call(), repeats=5)
  # What the reward compares: P_j where steps reflect, and before, and L.
  keep = np.zeros(logprobs.shape, bool)
  for row, steps in enumerate(reflective):
    keep[row, steps] = keep[row, steps - 1] = True
  keep[:, -1] = True
  result = {
    "rows": size,
    "seconds": taken.median,
    "tokens": int(sum(tokens for _, tokens in spans)),
    "flops": _flops(config, spans, scored),
    "peak_mib": harness.peak_mib(),
    "scores": np.where(keep, logprobs, 0.0).tolist(),
  }
  (pathlib.Path(folder) / f"{method}.json").write_text(json.dumps(result))


def _rows(prefixes, references, ends):
  """One row for each prefix of each completion, and one for the whole."""
  rows, places = [], []
  for row, (prefix, reference) in enumerate(zip(prefixes, references)):
    for slot, end in enumerate([*ends, len(prefix)]):
      rows.append(np.concatenate([prefix[:end], reference]))
      places.append((row, slot))
  return rows, places


def _separate(folder, config, rows, size, at_once):
  """Rows sorted into buckets of 64 tokens, only what is asked for scored."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from opera_jax.kernels.token_logprob import api as token_logprob
  from opera_jax.models import attention

  graphdef, params = _load(folder, config)

  @jax.jit
  def run(params, token_BT, length_B):
    model = nnx.merge(graphdef, params)
    B, T = token_BT.shape
    position_T = jnp.arange(T)
    segment_BT = (position_T[None] < length_B[:, None]).astype(jnp.int32)
    hidden_BTD, _ = model(
      token_BT,
      jnp.broadcast_to(position_T[None], (B, T)),
      attention.causal(segment_BT),
    )
    at_BG = length_B[:, None] - size + jnp.arange(size)[None]
    hidden_BGD = jnp.take_along_axis(hidden_BTD, at_BG[..., None] - 1, axis=1)
    head, transposed = model.head_matrix()
    logprob_M, _ = token_logprob.token_logprob(
      hidden_BGD.reshape(B * size, -1),
      head.astype(hidden_BGD.dtype),
      jnp.take_along_axis(token_BT, at_BG, axis=1).reshape(-1),
      transposed=transposed,
    )
    return logprob_M.reshape(B, size).mean(axis=1)

  step = 64
  order = sorted(range(len(rows)), key=lambda i: len(rows[i]))

  def means():
    waiting, out = [], np.zeros(len(rows))
    for start in range(0, len(order), at_once):
      group = order[start : start + at_once]
      width = -(-max(len(rows[i]) for i in group) // step) * step
      token_BT = np.zeros((at_once, width), np.int32)
      length_B = np.full(at_once, size + 1, np.int32)
      for place, i in enumerate(group):
        token_BT[place, : len(rows[i])] = rows[i]
        length_B[place] = len(rows[i])
      waiting.append((group, run(params, token_BT, length_B)))
    for group, result in waiting:
      out[group] = np.asarray(result)[: len(group)]
    return out

  return means


def _torch(folder, config, rows, size, at_once):
  """Batches of sorted rows, padded to the longest, in transformers."""
  import torch
  import transformers

  del config
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()
  order = sorted(range(len(rows)), key=lambda i: len(rows[i]))

  def means():
    out = np.zeros(len(rows))
    for start in range(0, len(order), at_once):
      group = order[start : start + at_once]
      width = max(len(rows[i]) for i in group)
      tokens = torch.zeros((len(group), width), dtype=torch.long)
      mask = torch.zeros((len(group), width), dtype=torch.long)
      for place, i in enumerate(group):
        tokens[place, : len(rows[i])] = torch.from_numpy(rows[i])
        mask[place, : len(rows[i])] = 1
      with torch.no_grad():
        hidden = model.model(tokens, attention_mask=mask).last_hidden_state
        for place, i in enumerate(group):
          at = torch.arange(len(rows[i]) - size, len(rows[i]))
          logits = model.lm_head(hidden[place, at - 1])
          logprob = torch.log_softmax(logits, -1)
          picked = logprob.gather(1, tokens[place, at][:, None])
          out[i] = picked.mean().item()
    return out

  return means


def _ours(folder, config, prefixes, references, ends, reflective, at_once):
  """Prefixes with continuations, through the scoring engine of the library."""
  import jax

  from opera_jax import structs
  from opera_jax.scoring import logprob_scorer as scorer_lib
  from opera_jax.sharding import mesh

  graphdef, params = _load(folder, config)
  continuations, places = [], []
  for row, (prefix, reference) in enumerate(zip(prefixes, references)):
    slots = sorted({s for j in reflective[row] for s in (j - 1, j)})
    for slot in [*slots, len(ends)]:
      fork = len(prefix) if slot == len(ends) else int(ends[slot])
      continuations.append(structs.Continuation(row, fork, reference))
      places.append((row, slot))
  counts = np.bincount([row for row, _ in places])
  scorer = scorer_lib.LogprobScorer(
    graphdef,
    vocab_size=config.vocab_size,
    mesh=mesh.create(devices=jax.devices()[:1]),
    batch_size=min(at_once, len(prefixes)),
    prefix_buckets=(prefixes.shape[1],),
    slot_buckets=tuple(range(2, int(counts.max()) + 2, 2)),
    continuation_buckets=(references.shape[1],),
  )

  def call():
    logprobs = scorer.score(params, list(prefixes), continuations)
    table = np.full((len(prefixes), len(ends) + 1), np.nan)
    for (row, slot), logprob in zip(places, logprobs.continuation_logprob):
      table[row, slot] = logprob.mean()
    return table

  spans = [(0, len(prefix)) for prefix in prefixes]
  spans += [(b.fork, len(b.tokens)) for b in continuations]
  return call, spans, sum(size for _, size in spans)


def _load(folder, config):
  import jax

  from opera_jax.models import decoder, hf_checkpoint
  from opera_jax.sharding import mesh, rules

  one = mesh.create(devices=jax.devices()[:1])
  params = hf_checkpoint.load(folder, config, one, rules.TRAIN)
  return decoder.abstract(config)[0], params


if __name__ == "__main__":
  app.run(main)
