"""Every family against transformers, float32, random weights.

The reference runs every sequence alone, whatever rows ours stand in, so that
each layout (padding left or right, several in a row) must not matter.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opera_jax import structs
from opera_jax.losses import cross_entropy, reduce
from opera_jax.models import attention, decoder, hf_checkpoint, kv_cache
from opera_jax.rollout import engine, sampling
from opera_jax.scoring import packed_rows

LENGTHS = (19, 7, 12, 24)
LAYOUTS = ("right", "left", "packed")


def _sequences(vocab: int) -> list[np.ndarray]:
  draw = np.random.default_rng(1)
  return [draw.integers(0, vocab, n).astype(np.int32) for n in LENGTHS]


def _batch(layout: str, vocab: int) -> tuple[structs.Batch, list]:
  """The sequences in rows, and the (row, start) of each; padding is noise."""
  sequences = _sequences(vocab)
  if layout == "packed":
    T = 48
    places = [(0, 0), (0, 19), (0, 26), (1, 3)]
  else:
    T = 32
    places = [
      (row, T - n if layout == "left" else 0) for row, n in enumerate(LENGTHS)
    ]
  R = 1 + max(row for row, _ in places)
  draw = np.random.default_rng(2)
  tokens = draw.integers(0, vocab, (R, T)).astype(np.int32)
  positions = draw.integers(0, T, (R, T)).astype(np.int32)
  segments = np.zeros((R, T), np.int32)
  loss_mask = np.zeros((R, T), np.float32)
  for number, ((row, start), sequence) in enumerate(zip(places, sequences)):
    span = slice(start, start + len(sequence))
    tokens[row, span] = sequence
    positions[row, span] = np.arange(len(sequence))
    segments[row, span] = number + 1
    loss_mask[row, start + 1 : start + len(sequence)] = 1
  zeros = np.zeros((R, T), np.float32)
  batch = structs.Batch(
    tokens, positions, segments, loss_mask, zeros, zeros, zeros
  )
  return jax.tree.map(jnp.asarray, batch), places


def _reference(pair) -> list[np.ndarray]:
  """Logits [T, V] of each sequence alone."""
  import torch

  with torch.no_grad():
    return [
      pair.torch(torch.from_numpy(s).long()[None]).logits[0].numpy()
      for s in _sequences(pair.config.vocab_size)
    ]


def _hidden(graphdef, params, batch):
  model = nnx.merge(graphdef, params)
  hidden, _ = model(
    batch.tokens,
    batch.positions,
    attention.causal(
      batch.segments, implementation=model.config.attention or None
    ),
  )
  return model, hidden


@pytest.mark.parametrize(
  ("layout", "attention_by"),
  [*((layout, "xla") for layout in LAYOUTS), ("packed", "splash")],
)
def test_logits(pair, layout, attention_by):
  config = dataclasses.replace(pair.config, attention=attention_by)
  graphdef, _ = decoder.abstract(config)

  @jax.jit
  def logits(params, batch):
    model, hidden = _hidden(graphdef, params, batch)
    head, transposed = model.head_matrix()
    return hidden @ (head.T if transposed else head)

  batch, places = _batch(layout, pair.config.vocab_size)
  ours = np.asarray(logits(pair.params, batch))
  for (row, start), theirs in zip(places, _reference(pair)):
    np.testing.assert_allclose(
      ours[row, start : start + len(theirs)], theirs, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprob_and_entropy_of_every_token(pair, layout):
  batch, places = _batch(layout, pair.config.vocab_size)
  logprob_RT, entropy_RT = jax.jit(packed_rows.logprob_fn(pair.graphdef))(
    pair.params, batch
  )
  for sequence, (row, start), logits in zip(
    _sequences(pair.config.vocab_size), places, _reference(pair)
  ):
    wide = logits[:-1].astype(np.float64)
    table = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    size = len(sequence)
    span = slice(start + 1, start + size)
    np.testing.assert_allclose(
      logprob_RT[row, span],
      table[np.arange(size - 1), sequence[1:]],
      rtol=1e-5,
    )
    np.testing.assert_allclose(
      entropy_RT[row, span], -(np.exp(table) * table).sum(-1), rtol=1e-5
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_the_sft_loss_in_every_parameter(pair, layout):
  import torch

  batch, _ = _batch(layout, pair.config.vocab_size)
  logprob = packed_rows.logprob_fn(pair.graphdef)

  @jax.jit
  @jax.grad
  def gradient(params, batch):
    weight_RT = reduce.token_weight(
      "token_mean", batch.loss_mask, batch.segments
    )
    loss_RT = cross_entropy.cross_entropy(logprob(params, batch)[0])
    return reduce.weighted_sum(weight_RT, loss_RT)

  ours = dict(
    hf_checkpoint.export_tensors(gradient(pair.params, batch), pair.config)
  )
  pair.torch.zero_grad()
  total = sum(LENGTHS) - len(LENGTHS)
  for sequence in _sequences(pair.config.vocab_size):
    tokens = torch.from_numpy(sequence).long()
    logits = pair.torch(tokens[None]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(
      logits, tokens[1:], reduction="sum"
    )
    (loss / total).backward()
  theirs = {name: p.grad.numpy() for name, p in pair.torch.named_parameters()}
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    scale = np.abs(value).max()
    assert scale > 1e-5, name
    np.testing.assert_allclose(
      ours[name], value, rtol=0, atol=1e-4 * scale, err_msg=name
    )


def test_greedy_tokens(pair, one_device):
  import torch

  sampler = engine.Engine(
    pair.graphdef,
    pair.config,
    mesh=one_device,
    prompt_slots=4,
    prompt_buckets=(32,),
  )
  prompts = _sequences(pair.config.vocab_size)
  samples = sampler.sample(
    pair.params,
    prompts,
    sampling.Sampling(max_new_tokens=64, temperature=0),
    jax.random.key(0),
  )
  for prompt, (sample,) in zip(prompts, samples):
    theirs = pair.torch.generate(
      torch.from_numpy(prompt).long()[None],
      max_new_tokens=64,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
    )
    np.testing.assert_array_equal(sample.tokens, theirs[0, len(prompt) :])
    config = pair.config
    if not (config.embedding_scale and config.tie_word_embeddings):
      assert len(set(sample.tokens.tolist())) > 2  # it has not stuck at once


def test_layer_by_layer(pair):
  """The states after each layer, each through the final norm."""
  import torch

  theirs = []
  hooks = [
    layer.register_forward_hook(lambda *args: theirs.append(args[2]))
    for layer in pair.torch.model.layers
  ]
  sequence = _sequences(pair.config.vocab_size)[-1]
  with torch.no_grad():
    pair.torch(torch.from_numpy(sequence).long()[None])
    theirs = [pair.torch.model.norm(state)[0].numpy() for state in theirs]
  for hook in hooks:
    hook.remove()
  batch, places = _batch("packed", pair.config.vocab_size)
  row, start = places[-1]
  for depth, expected in enumerate(theirs, start=1):
    config = dataclasses.replace(pair.config, num_hidden_layers=depth)
    first = jax.tree_util.tree_map_with_path(
      lambda path, x, d=depth: (
        x[:d] if decoder.path_name(path).startswith("layers/") else x
      ),
      pair.params,
    )
    run = jax.jit(functools.partial(_hidden, decoder.abstract(config)[0]))
    ours = run(first, batch)[1][row, start : start + len(sequence)]
    np.testing.assert_allclose(
      ours, expected, rtol=0, atol=1e-5, err_msg=f"layer {depth}"
    )


def test_keys_and_values_of_every_layer(pair):
  import torch

  config = pair.config
  sequence = _sequences(config.vocab_size)[0]
  size, P = len(sequence), 32
  tokens = np.zeros((1, P), np.int32)
  tokens[0, :size] = sequence
  segments = (np.arange(P) < size).astype(np.int32)[None]

  @jax.jit
  def fill(params):
    model = nnx.merge(pair.graphdef, params)
    return model(
      jnp.asarray(tokens),
      jnp.arange(P)[None],
      attention.prefill(jnp.asarray(segments)),
      kv_cache.empty_prefix_cache(
        layers=config.num_hidden_layers,
        prompt_slots=1,
        length=P,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype="float32",
      ),
    )[1]

  prefix = fill(pair.params)
  with torch.no_grad():
    cache = pair.torch(
      torch.from_numpy(sequence).long()[None], use_cache=True
    ).past_key_values
  for layer, theirs in enumerate(cache.layers):
    for ours, value in ((prefix.k, theirs.keys), (prefix.v, theirs.values)):
      held = value.shape[2]  # with a window, theirs drops the first ones
      np.testing.assert_allclose(
        ours[layer, 0, :, size - held : size],
        value[0].numpy(),
        rtol=0,
        atol=1e-5,
        err_msg=f"layer {layer}",
      )
