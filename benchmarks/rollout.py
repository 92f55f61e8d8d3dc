"""Sampling: ours, transformers' generate, and tunix's sampler, same weights.

  .venv-bench/bin/python -m benchmarks.rollout

(benchmarks/requirements.txt says how .venv-bench is made.)

  UNIFORM  every completion runs to the same length
  TAIL     lengths with a median of a quarter of the longest: completions end
           by one of many stop ids; peers sample in batches, ours refills as
           many slots; each method at the better of two sizes
  GROUP    16 samples of each long prompt; peers repeat the prompt

Random weights and prompts, temperature 1, no truncation, float32. Each method
makes the tokens that it draws itself, so what is compared is tokens a second;
a warm call is repeated, and the median kept. Each method has a process of its
own for each workload, so that its peak memory is its own, and the methods run
one right after the other, since a machine's speed drifts.
"""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from absl import app, flags

from benchmarks import harness, peers

_METHOD = flags.DEFINE_string("method", None, "Run one method, for the parent.")
_WORKLOAD = flags.DEFINE_string("workload", None, "Its task, likewise.")
_FOLDER = flags.DEFINE_string("folder", None, "The parent's folder.")

METHODS = ("transformers", "tunix", "ours")
REPEATS, LEAST_SECONDS = 5, 8.0


@dataclasses.dataclass(frozen=True)
class Workload:
  """Sizes of one task; `stops` of the vocabulary's ids end a completion.

  `batches` are prompts in flight; every method keeps its best.
  """

  prompts: int
  samples: int
  prompt_tokens: int
  new_tokens: int
  stops: int
  batches: tuple[int, ...]


WORKLOADS = {
  "UNIFORM": Workload(16, 1, 64, 64, 0, (16,)),
  "TAIL": Workload(160, 1, 64, 128, 98, (16, 32)),
  "GROUP": Workload(2, 16, 512, 32, 0, (2,)),
}


def model_config():
  """The model that every method runs."""
  from opera_jax.models import decoder

  return decoder.Config(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=768,
    tie_word_embeddings=True,
  )


def problem(workload: Workload):
  """Prompts, the same for every method, and the ids that stop."""
  rng = np.random.default_rng(0)
  vocab = model_config().vocab_size
  shape = (workload.prompts, workload.prompt_tokens)
  prompts = rng.integers(workload.stops + 2, vocab, shape).astype(np.int32)
  return prompts, tuple(range(2, 2 + workload.stops))


def main(_) -> None:
  if _METHOD.value:
    _run_one(_METHOD.value, _WORKLOAD.value, _FOLDER.value)
    return
  from opera_jax.models import decoder, hf_checkpoint

  config = model_config()
  results = {name: {} for name in WORKLOADS}
  with tempfile.TemporaryDirectory() as folder:
    _, params = decoder.create(config, 0)
    hf_checkpoint.save(folder, params, config)
    for name, method in itertools.product(WORKLOADS, METHODS):
      print(f"{name}: {method} ...", flush=True)
      subprocess.run(
        [
          *(sys.executable, "-m", "benchmarks.rollout", f"--method={method}"),
          *(f"--workload={name}", f"--folder={folder}"),
        ],
        check=True,
      )
      path = pathlib.Path(folder) / f"{name}-{method}.json"
      results[name][method] = json.loads(path.read_text())
  blocks = [_block(name, results[name]) for name in WORKLOADS]
  body = (
    f"`python -m benchmarks.rollout`; {harness.hardware()}; float32; a Qwen3 "
    f"of {decoder.parameter_count(params):,} parameters "
    f"({config.num_hidden_layers} layers, width {config.hidden_size}, "
    f"vocabulary {config.vocab_size:,}); median of {REPEATS} or more, "
    f"{LEAST_SECONDS:.0f} s at least, warm.\n\n" + "\n\n".join(blocks)
  )
  harness.write_section("rollout", body)
  print(body)


def _block(name, results) -> str:
  w = WORKLOADS[name]
  ours = results["ours"]
  best = max(r["rate"] for m, r in results.items() if m != "ours")
  rows = [
    (
      method,
      result["batch"],
      f"{result['tokens']:,.0f}",
      f"{result['seconds']:.2f}",
      f"{result['rate']:,.0f}",
      f"{ours['rate'] / result['rate']:.2f}",
      f"{result['peak_mib']:,.0f}",
    )
    for method, result in results.items()
  ]
  return (
    f"**{name}**: {w.prompts} prompts x {w.samples} samples, prompt "
    f"{w.prompt_tokens}, at most {w.new_tokens} new, median length "
    f"{ours['median_length']:.0f}.\n\n"
    + harness.table(
      (
        "method",
        "at once",
        "tokens",
        "s",
        "tokens/s",
        "ours is faster",
        "peak MiB",
      ),
      rows,
    )
    + f"\n\nOurs against the better peer: {ours['rate'] / best:.2f}."
  )


def _run_one(method: str, name: str, folder: str) -> None:
  make = {"ours": _ours, "transformers": _torch, "tunix": _tunix}[method]
  workload = WORKLOADS[name]
  prompts, stops = problem(workload)
  tried = []
  for batch in workload.batches:
    call = make(folder, workload, prompts, stops, batch)
    lengths = []
    taken = harness.seconds(
      lambda: lengths.append(call()),  # noqa: B023
      repeats=REPEATS,
      least=LEAST_SECONDS,
    )
    tokens = float(np.mean([sum(one) for one in lengths[1:]]))
    tried.append(
      {
        "batch": batch * workload.samples,
        "seconds": taken.median,
        "tokens": tokens,
        "rate": tokens / taken.median,
        "median_length": float(np.median(np.concatenate(lengths))),
      }
    )
  result = max(tried, key=lambda one: one["rate"])
  result["peak_mib"] = harness.peak_mib()
  path = pathlib.Path(folder) / f"{name}-{method}.json"
  path.write_text(json.dumps(result))


def _ours(folder, workload, prompts, stops, batch):
  import jax

  from opera_jax.models import decoder, hf_checkpoint
  from opera_jax.rollout import engine, sampling
  from opera_jax.sharding import mesh, rules

  config = model_config()
  one = mesh.create(devices=jax.devices()[:1])
  params = hf_checkpoint.load(folder, config, one, rules.ROLLOUT)
  sampler = engine.Engine(
    decoder.abstract(config)[0],
    config,
    mesh=one,
    prompt_slots=batch,
    slots=workload.samples,
    prompt_buckets=(workload.prompt_tokens,),
    cache_buckets=(128,),
  )
  settings = sampling.Sampling(workload.new_tokens, stop_ids=stops)
  seeds = itertools.count()

  def call():
    groups = sampler.sample(
      params,
      list(prompts),
      settings,
      jax.random.key(next(seeds)),
      samples=workload.samples,
    )
    return [len(s.tokens) for group in groups for s in group]

  return call


def _torch(folder, workload, prompts, stops, batch):
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()
  every = torch.from_numpy(np.repeat(prompts, workload.samples, 0)).long()
  batch *= workload.samples
  settings = transformers.GenerationConfig(
    do_sample=True,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_new_tokens=workload.new_tokens,
    eos_token_id=list(stops) or None,
    pad_token_id=0,
  )

  def call():
    lengths = []
    for part in every.split(batch):
      with torch.no_grad():
        out = model.generate(
          part,
          attention_mask=torch.ones_like(part),
          generation_config=settings,
        )
      lengths += _lengths(out[:, part.shape[1] :].numpy(), stops)
    return lengths

  return call


def _lengths(tokens, stops) -> list[int]:
  """Tokens of each row up to and with its first stop."""
  ended = np.isin(tokens, stops)
  first = np.where(ended.any(1), ended.argmax(1) + 1, tokens.shape[1])
  return first.tolist()


def _tunix(folder, workload, prompts, stops, batch):
  from tunix.generate import sampler as tunix_sampler

  config = model_config()
  transformer = peers.tunix_model(folder, config)
  sampler = tunix_sampler.Sampler(
    transformer,
    peers.Numbers(),
    tunix_sampler.CacheConfig(
      cache_size=workload.prompt_tokens + workload.new_tokens,
      num_layers=config.num_hidden_layers,
      num_kv_heads=config.num_key_value_heads,
      head_dim=config.head_dim,
    ),
  )
  every = [
    " ".join(map(str, row)) for row in np.repeat(prompts, workload.samples, 0)
  ]
  batch *= workload.samples
  seeds = itertools.count()

  def call():
    lengths = []
    for start in range(0, len(every), batch):
      out = sampler(
        every[start : start + batch],
        max_generation_steps=workload.new_tokens,
        max_prompt_length=workload.prompt_tokens,
        eos_tokens=stops or (-1,),
        temperature=1.0,
        top_p=1.0,
        seed=next(seeds),
      )
      # It leaves out the stop id itself.
      lengths += [
        min(len(tokens) + 1, workload.new_tokens) for tokens in out.tokens
      ]
    return lengths

  return call


if __name__ == "__main__":
  app.run(main)
