"""Samples completions: prefill once a prompt, decode N samples on the device.

The prompt is a trunk, computed once; its samples are branches that share its
keys and values. Decoding is one jitted while loop that ends when every sample
has ended. Each sample draws from its own random key, folded from (prompt id,
sample id, position), so its tokens do not depend on its neighbours.

Shape key: B prompts, S samples a prompt, P prompt tokens, C new tokens,
R = B * S rows, D hidden, V vocabulary.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opera_jax import structs
from opera_jax.models import attention, kv_cache, qwen3
from opera_jax.rollout import sampling
from opera_jax.scoring import trunks as trunks_lib
from opera_jax.sharding import layout
from opera_jax.text import automaton


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to draw: static, so each value set is one compiled program."""

  max_new_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop_ids: tuple[int, ...] = ()

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise ValueError(
        f"max_new_tokens must be at least 1, got {self.max_new_tokens}."
      )
    if not self.stop_ids:
      raise ValueError("Sampling needs at least one stop id (end of turn).")


class Engine:
  """Samples from a policy whose parameters come with every call."""

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    config: qwen3.Config,
    *,
    mesh: jax.sharding.Mesh,
    rows: int = 16,
    prompt_buckets: Sequence[int] = (64, 128, 256, 512),
    cache_dtype: str = "float32",
  ):
    """Compiles nothing yet; one program a (prompt bucket, settings).

    Args:
      graphdef: of the model.
      config: its sizes.
      mesh: prompts are split over its data axes.
      rows: prompts a call, a multiple of the mesh's data axes.
      prompt_buckets: allowed padded prompt lengths, ascending.
      cache_dtype: of keys and values.

    Raises:
      ValueError: rows do not divide over the mesh.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows < 1 or rows % ways:
      raise ValueError(
        f"A call samples {rows} prompts over {ways} data shards, which does "
        "not divide. Make config.engine.rows a multiple."
      )
    self._config = config
    self._mesh = mesh
    self._rows = rows
    self._buckets = tuple(prompt_buckets)
    self._run = program(graphdef, config, cache_dtype)

  def programs(self) -> int:
    """How many programs one setting of sampling can need."""
    return len(self._buckets)

  def sample(
    self,
    params: Any,
    prompts: Sequence[np.ndarray],
    settings: Sampling,
    key: jax.Array,
    *,
    samples: int = 1,
    ids: Sequence[str] | None = None,
    stops: automaton.Automaton | None = None,
    advance: Callable[[int], None] | None = None,
  ) -> list[list[structs.Sample]]:
    """Draws `samples` completions of each prompt.

    Args:
      params: parameters, in the ROLLOUT layout.
      prompts: int32 tokens [P_i] each, at least one token.
      settings: temperature, truncation, length, stop ids.
      key: random key of this call (one a step).
      samples: S, completions a prompt.
      ids: names of the prompts; a sample's randomness is folded from its
        prompt's name, so it does not depend on the order. Default: places.
      stops: automaton of stop strings; a sample ends with the token that
        completes one.
      advance: called with the tokens sampled after each batch of prompts.

    Returns:
      For each prompt its samples, in order.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, a prompt
        beyond the largest bucket.
      FloatingPointError: NaN logits.
    """
    vocab = self._config.vocab_size
    for i, prompt in enumerate(prompts):
      if len(prompt) == 0:
        raise ValueError(f"Prompt {i} has no tokens; give it at least one.")
      if len(prompt) > self._buckets[-1]:
        raise ValueError(
          f"Prompt {i} has {len(prompt)} tokens, the largest prompt bucket "
          f"is {self._buckets[-1]}. Raise config.engine.prompt_buckets or "
          "drop the prompt (config.max_prompt_tokens)."
        )
      if prompt.min() < 0 or prompt.max() >= vocab:
        raise ValueError(
          f"Prompt {i} holds a token id outside [0, {vocab}). Check that "
          "tokenizer and model agree."
        )
    ids = [str(i) for i in range(len(prompts))] if ids is None else ids
    order = sorted(
      range(len(prompts)),
      key=lambda i: (trunks_lib.bucket(len(prompts[i]), self._buckets), i),
    )
    out: list[Any] = [None] * len(prompts)
    for start in range(0, len(order), self._rows):
      group = order[start : start + self._rows]
      results = self._batch(
        params,
        [prompts[i] for i in group],
        [ids[i] for i in group],
        settings,
        key,
        samples,
        stops,
      )
      for i, result in zip(group, results):
        out[i] = result
      if advance is not None:
        advance(sum(len(s.tokens) for r in results for s in r))
    return out

  def _batch(self, params, prompts, ids, settings, key, samples, stops):
    P = trunks_lib.bucket(max(map(len, prompts)), self._buckets)
    prompt_BP = np.zeros((self._rows, P), np.int32)
    length_B = np.ones(self._rows, np.int32)
    live_B = np.zeros(self._rows, bool)
    name_B = np.zeros(self._rows, np.uint32)
    for row, (prompt, name) in enumerate(zip(prompts, ids)):
      prompt_BP[row, : len(prompt)] = prompt
      length_B[row] = len(prompt)
      live_B[row] = True
      name_B[row] = zlib.crc32(name.encode())
    with jax.set_mesh(self._mesh):
      arrays = layout.to_devices(
        (prompt_BP, length_B, live_B, name_B), layout.rows(self._mesh)
      )
      results = self._run(
        params, *arrays, key, stops, settings=settings, samples=samples
      )
    token_BSC, logprob_BSC, length_BS, finished_BS = layout.to_host(results)
    out = []
    for row in range(len(prompts)):
      mine = []
      for s in range(samples):
        size = int(length_BS[row, s])
        logprob = logprob_BSC[row, s, :size]
        if not np.isfinite(logprob).all():
          raise FloatingPointError(
            f"Sampling prompt {ids[row]!r} met logits that are not finite. "
            "The parameters have diverged; lower the learning rate or "
            "resume from an earlier checkpoint."
          )
        mine.append(
          structs.Sample(
            tokens=token_BSC[row, s, :size],
            logprob=logprob,
            finished=bool(finished_BS[row, s]),
          )
        )
      out.append(mine)
    return out


def program(graphdef: nnx.GraphDef, config: qwen3.Config, cache_dtype: str):
  """Prefill and decode, jitted: one compiled program a (shape, settings).

  Returns:
    `f(params, prompt_BP, length_B, live_B, name_B, key, stops, *, settings,
    samples)` -> tokens [B, S, C], their log-probabilities, lengths [B, S] and
    whether each ended by a stop. A row that is not live samples nothing;
    `name_B` (uint32) keys its randomness; `stops` is an automaton or None.
  """
  return jax.jit(
    functools.partial(_generate, graphdef, config, cache_dtype),
    static_argnames=("settings", "samples"),
  )


def _generate(
  graphdef,
  config: qwen3.Config,
  cache_dtype,
  params,
  prompt_BP,
  length_B,
  live_B,
  name_B,
  key,
  stops,
  *,
  settings: Sampling,
  samples: int,
):
  model = nnx.merge(graphdef, params)
  head, transposed = model.head_matrix()
  B, P = prompt_BP.shape
  S, C = samples, settings.max_new_tokens
  sizes = (config.kv_heads, config.head_dim, cache_dtype)

  position_P = jnp.arange(P, dtype=jnp.int32)
  segment_BP = (position_P[None] < length_B[:, None]).astype(jnp.int32)
  hidden_BPD, trunk = model(
    prompt_BP,
    jnp.broadcast_to(position_P[None], (B, P)),
    attention.prefill(segment_BP, implementation=config.attention or None),
    kv_cache.empty_trunk(config.layers, B, P, *sizes),
  )
  last_BD = hidden_BPD[jnp.arange(B), length_B - 1]

  def fold(name, sample):
    return jax.random.fold_in(jax.random.fold_in(key, name), sample)

  key_R = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(
    name_B, jnp.arange(S)
  ).reshape(B * S)
  stop_ids = jnp.asarray(settings.stop_ids, jnp.int32)

  def cond(carry):
    return (carry["step"] < C) & ~jnp.all(carry["done"])

  def body(carry):
    step = carry["step"]
    hidden_RD = carry["hidden"].reshape(B * S, -1)
    logit_RV = jax.lax.dot_general(
      hidden_RD,
      head.astype(hidden_RD.dtype),
      (((1,), (1 if transposed else 0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    draw_R = jax.vmap(jax.random.fold_in, (0, None))(key_R, step)
    token_R, logprob_R = sampling.sample(
      logit_RV,
      draw_R,
      temperature=settings.temperature,
      top_k=settings.top_k,
      top_p=settings.top_p,
    )
    token_BS = token_R.reshape(B, S)
    live_BS = ~carry["done"]
    token_BS = jnp.where(live_BS, token_BS, 0)
    logprob_BS = jnp.where(live_BS, logprob_R.reshape(B, S), 0.0)
    stop_BS = jnp.any(token_BS[..., None] == stop_ids[None, None], axis=-1)
    state_BS = carry["state"]
    if stops is not None:
      state_BS, event_BS = automaton.step(stops, state_BS, token_BS)
      stop_BS = stop_BS | (event_BS > 0)
    stop_BS = stop_BS & live_BS
    place = (0, 0, step)
    hidden_BSD, cache = model(
      token_BS,
      jnp.broadcast_to((length_B + step)[:, None], (B, S)),
      attention.decode(trunk, length_B, step),
      carry["cache"],
    )
    return {
      "step": step + 1,
      "hidden": hidden_BSD,
      "cache": cache,
      "state": state_BS,
      "tokens": jax.lax.dynamic_update_slice(
        carry["tokens"], token_BS[..., None], place
      ),
      "logprob": jax.lax.dynamic_update_slice(
        carry["logprob"], logprob_BS[..., None], place
      ),
      "length": carry["length"] + live_BS,
      "finished": carry["finished"] | stop_BS,
      "done": carry["done"] | stop_BS,
    }

  final = jax.lax.while_loop(
    cond,
    body,
    {
      "step": jnp.int32(0),
      "hidden": jnp.broadcast_to(last_BD[:, None], (B, S, last_BD.shape[-1])),
      "cache": kv_cache.empty_samples(config.layers, B, S, C, *sizes),
      "state": jnp.zeros((B, S), jnp.int32),
      "tokens": jnp.zeros((B, S, C), jnp.int32),
      "logprob": jnp.zeros((B, S, C), jnp.float32),
      "length": jnp.zeros((B, S), jnp.int32),
      "finished": jnp.zeros((B, S), bool),
      "done": jnp.broadcast_to(~live_B[:, None], (B, S)),
    },
  )
  return final["tokens"], final["logprob"], final["length"], final["finished"]
