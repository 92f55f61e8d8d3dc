"""Times every kernel against its reference and against torch.

  python -m benchmarks.kernels

On a CPU: the shapes of the tiny demo, and Qwen3-0.6B's head at a quarter of
its vocabulary. On an accelerator: Qwen3-0.6B's shapes in bfloat16, without
torch. A floor is the larger of FLOPs over the matmul ceiling and bytes over
the bandwidth ceiling, both measured here; FLOPs of a backward pass count no
recomputation, bytes count each input and output once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import harness
from opera_jax.kernels.perplexity_reward import api as perplexity_reward
from opera_jax.kernels.shared_prefix_attention import (
  api as shared_prefix_attention,
)
from opera_jax.kernels.token_logprob import api as token_logprob

NAMES = ("reference", "xla", "pallas_tpu")


def main() -> None:
  on_cpu = jax.default_backend() == "cpu"
  dtype = jnp.float32 if on_cpu else jnp.bfloat16
  ceiling = harness.ceilings(dtype)
  rows = [
    *_token_logprob(ceiling, dtype, on_cpu),
    *_shared_prefix_attention(ceiling, dtype, on_cpu),
    *_perplexity_reward(ceiling, on_cpu),
  ]
  header = (
    "kernel",
    "shape",
    "pass",
    "implementation",
    "median ms",
    "best ms",
    "GFLOP",
    "MB",
    "floor ms",
    "floor / best",
  )
  body = (
    f"`python -m benchmarks.kernels`; {harness.hardware()}; {dtype.__name__}; "
    f"ceilings {ceiling.flops / 1e9:,.0f} GFLOP/s and "
    f"{ceiling.bandwidth / 1e9:,.1f} GB/s; at least 7 warm calls each.\n\n"
    + harness.table(header, rows)
  )
  harness.write_section("kernels", body)
  print(body)


def _measure(ceiling, labels, candidates, arrays, flops, nbytes):
  floor = ceiling.floor(flops, nbytes)
  for name, function in candidates.items():
    taken = harness.seconds(function, *arrays)
    yield (
      *labels,
      name,
      f"{1e3 * taken.median:.2f}",
      f"{1e3 * taken.best:.2f}",
      f"{flops / 1e9:.2f}",
      f"{nbytes / 1e6:.1f}",
      f"{1e3 * floor:.2f}",
      f"{floor / taken.best:.2f}",
    )


def _forward_and_backward(function, arguments, weigh=jnp.sum):
  """Jitted `function`, and jitted value and gradients of its weighed sum."""

  def loss(*arrays):
    return sum(weigh(x) for x in jax.tree.leaves(function(*arrays)))

  return jax.jit(function), jax.jit(jax.value_and_grad(loss, arguments))


def _implementations(on_cpu, whole_fits):
  names = NAMES[:2] if on_cpu else NAMES[:2] + NAMES[2:] * _on_tpu()
  return names if whole_fits else names[1:]


def _on_tpu():
  return jax.default_backend() == "tpu"


def _token_logprob(ceiling, dtype, on_cpu):
  sizes = ((16_384, 128, 800), (1024, 1024, 37_984))
  for M, D, V in sizes if on_cpu else ((32_768, 1024, 151_936),):
    key = jax.random.key(0)
    arrays = (
      jax.random.normal(key, (M, D), dtype),
      jax.random.normal(key, (D, V), dtype) / D**0.5,
      jax.random.randint(key, (M,), 0, V),
    )
    passes = {"forward": {}, "forward + backward": {}}
    for name in _implementations(on_cpu, whole_fits=on_cpu):
      score = functools.partial(
        token_logprob.token_logprob, implementation=name
      )
      pair = _forward_and_backward(score, (0, 1))
      for candidates, function in zip(passes.values(), pair):
        candidates[name] = function
    if on_cpu:
      passes["forward"]["torch log_softmax"] = _torch_score(*arrays)
    nbytes = dtype(0).itemsize * D * (M + V) + 12 * M
    for times, (label, candidates) in zip((1, 3), passes.items()):
      yield from _measure(
        ceiling,
        ("token_logprob", f"M={M} D={D} V={V}", label),
        candidates,
        arrays,
        times * 2 * M * D * V,
        nbytes * (1 if times == 1 else 2),
      )


def _torch_score(hidden_MD, head_DV, target_M):
  hidden, head, target = (
    torch.from_numpy(np.array(x)) for x in (hidden_MD, head_DV, target_M)
  )

  def score(*_):
    with torch.no_grad():
      log_p = torch.log_softmax(hidden @ head, -1)
      picked = log_p.gather(1, target[:, None].long())[:, 0]
      return picked.numpy(), -(log_p.exp() * log_p).sum(-1).numpy()

  return score


def _shared_prefix_attention(ceiling, dtype, on_cpu):
  if on_cpu:
    scoring, decoding = (
      (32, 8, 96, 4, 2, 32, 256, 96),
      (16, 8, 1, 4, 2, 32, 96, 192),
    )
  else:
    scoring = (4, 12, 1024, 16, 8, 128, 4608, 1024)
    decoding = (16, 16, 1, 16, 8, 128, 512, 4096)
  for label, size in (("scoring", scoring), ("decoding", decoding)):
    B, S, G, N, K, H, T, C = size
    arrays = _continuations(*size, dtype)
    prefix_length_BS = np.linspace(T // 4, T, S, dtype=np.int32)[None].repeat(
      B, 0
    )
    offset_BS = np.full((B, S), 0 if G > 1 else C // 2 - 1, np.int32)
    keys = (
      prefix_length_BS[..., None] + offset_BS[..., None] + np.arange(1, G + 1)
    )
    pairs = float(keys.sum())
    own = C if G > 1 else C // 2
    nbytes = dtype(0).itemsize * (
      2 * B * S * G * N * H + 2 * B * K * H * (T + S * own)
    )
    candidates, both = {}, {}
    for name in _implementations(on_cpu, whole_fits=on_cpu):
      attend = functools.partial(
        shared_prefix_attention.shared_prefix_attention,
        prefix_length_BS=jnp.asarray(prefix_length_BS),
        offset_BS=jnp.asarray(offset_BS),
        scale=H**-0.5,
        implementation=name,
      )
      candidates[name], both[name] = _forward_and_backward(attend, range(5))
    if on_cpu:
      candidates["torch, a row a continuation"] = _torch_attend(
        arrays, prefix_length_BS, offset_BS
      )
    shape = f"{label} B={B} S={S} G={G} N={N} K={K} H={H} T={T} C={C}"
    flops = 4 * pairs * N * H
    yield from _measure(
      ceiling,
      ("shared_prefix_attention", shape, "forward"),
      candidates,
      arrays,
      flops,
      nbytes,
    )
    if G > 1:
      yield from _measure(
        ceiling,
        ("shared_prefix_attention", shape, "forward + backward"),
        both,
        arrays,
        3 * flops,
        2 * nbytes,
      )


def _continuations(B, S, G, N, K, H, T, C, dtype):
  shapes = [(B, S, G, N, H), *[(B, T, K, H)] * 2, *[(B, S, C, K, H)] * 2]
  keys = jax.random.split(jax.random.key(0), 5)
  return [jax.random.normal(k, x, dtype) for k, x in zip(keys, shapes)]


def _torch_attend(arrays, prefix_length_BS, offset_BS):
  """Fused attention over [prefix; continuation], copied to one padded row a
  continuation."""
  q, prefix_k, prefix_v, continuation_k, continuation_v = (
    torch.from_numpy(np.array(x)) for x in arrays
  )
  B, S, G, N, H = q.shape
  T, C = prefix_k.shape[1], continuation_k.shape[2]
  seen = (
    torch.arange(T)[None, None] < torch.from_numpy(prefix_length_BS)[..., None]
  )
  own = (
    torch.arange(C)[None, None, None]
    <= torch.from_numpy(offset_BS)[..., None, None]
    + torch.arange(G)[None, None, :, None]
  )
  mask = torch.cat([seen[:, :, None].expand(B, S, G, T), own], -1)
  mask = mask.reshape(B * S, 1, G, T + C)

  def keys(prefix, continuation):
    whole = torch.cat(
      [prefix[:, None].expand(B, S, *prefix.shape[1:]), continuation], 2
    )
    return whole.reshape(B * S, T + C, -1, H).transpose(1, 2)

  def attend(*_):
    with torch.no_grad():
      out = torch.nn.functional.scaled_dot_product_attention(
        q.reshape(B * S, G, N, H).transpose(1, 2),
        keys(prefix_k, continuation_k),
        keys(prefix_v, continuation_v),
        mask,
        enable_gqa=True,
      )
    return out.numpy()

  return attend


def _perplexity_reward(ceiling, on_cpu):
  R, M, S = (64, 24_576, 40) if on_cpu else (1024, 24_576, 40)
  keys = jax.random.split(jax.random.key(0), 3)
  arrays = (
    -jax.random.exponential(keys[0], (R, M)),
    jax.random.randint(keys[1], (R, M), -1, S),
    jax.random.randint(keys[2], (R, S), -1, S),
  )
  candidates = {
    name: jax.jit(
      functools.partial(
        perplexity_reward.perplexity_reward, implementation=name
      )
    )
    for name in _implementations(on_cpu, whole_fits=True)
  }
  yield from _measure(
    ceiling,
    ("perplexity_reward", f"R={R} M={M} S={S}", "forward"),
    candidates,
    arrays,
    2 * R * M,
    8 * R * M + 12 * R * S,
  )


if __name__ == "__main__":
  main()
