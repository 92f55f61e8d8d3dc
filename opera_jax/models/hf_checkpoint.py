"""Loads and saves Qwen3 checkpoints in Hugging Face's format.

Hugging Face stores one tensor [out, in] per layer, with heads and their
channels merged. Ours are [in, out], with an axis of heads, and stacked over
layers. One table maps the two, and both directions read it.

Letters: V vocabulary, D hidden, N query heads, K key/value heads, H head
dimension, F feed-forward.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opera_jax.models import decoder, hf_config, tensor_files
from opera_jax.sharding import layout
from opera_jax.sharding import rules as rules_lib

DTYPES = ("float32", "bfloat16")
FILE_BYTES = 5 * 10**9
_BLOCK_BYTES = 64 << 20  # read from disk at a time

config_from_hf = hf_config.read


@dataclasses.dataclass(frozen=True)
class _Entry:
  """One tensor of a checkpoint and where it goes in our parameters."""

  ours: str  # key of decoder.AXES
  theirs: tuple[str, ...]  # axes of their tensor; "NH" is N and H merged
  axes: str  # axes of our array, without the layer axis
  layer: int | None = None


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTSIDE = {
  _EMBEDDING: _Entry("embed", ("V", "D"), "VD"),
  "model.norm.weight": _Entry("final_norm", ("D",), "D"),
  _HEAD: _Entry("head", ("V", "D"), "DV"),
}
_INSIDE = {
  "input_layernorm": _Entry("layers/input_norm", ("D",), "D"),
  "self_attn.q_proj": _Entry("layers/attention/q", ("NH", "D"), "DNH"),
  "self_attn.k_proj": _Entry("layers/attention/k", ("KH", "D"), "DKH"),
  "self_attn.v_proj": _Entry("layers/attention/v", ("KH", "D"), "DKH"),
  "self_attn.o_proj": _Entry("layers/attention/o", ("D", "NH"), "NHD"),
  "self_attn.q_norm": _Entry("layers/attention/q_norm", ("H",), "H"),
  "self_attn.k_norm": _Entry("layers/attention/k_norm", ("H",), "H"),
  "post_attention_layernorm": _Entry("layers/post_norm", ("D",), "D"),
  "mlp.gate_proj": _Entry("layers/mlp/gate", ("F", "D"), "DF"),
  "mlp.up_proj": _Entry("layers/mlp/up", ("F", "D"), "DF"),
  "mlp.down_proj": _Entry("layers/mlp/down", ("D", "F"), "FD"),
}


def _entries(config: decoder.Config) -> dict[str, _Entry]:
  """All tensors of a checkpoint by their name, in the order of the file."""
  outside = dict(_OUTSIDE)
  if config.tie_word_embeddings:
    del outside[_HEAD]
  inside = {
    f"model.layers.{i}.{name}.weight": dataclasses.replace(entry, layer=i)
    for i in range(config.num_hidden_layers)
    for name, entry in _INSIDE.items()
  }
  return outside | inside


def _sizes(config: decoder.Config) -> dict[str, int]:
  """The size of each axis letter."""
  return {
    "V": config.vocab_size,
    "D": config.hidden_size,
    "N": config.num_attention_heads,
    "K": config.num_key_value_heads,
    "H": config.head_dim,
    "F": config.intermediate_size,
  }


def _their_shape(entry: _Entry, sizes: dict[str, int]) -> tuple[int, ...]:
  return tuple(math.prod(sizes[c] for c in group) for group in entry.theirs)


def load(
  path_or_hub_id: str | os.PathLike,
  config: decoder.Config,
  mesh: Mesh,
  rules: dict[str, Any],
  dtype: str = "float32",
  advance: Callable[[], None] | None = None,
) -> Any:
  """Streams a checkpoint's weights into sharded arrays.

  Each host reads one tensor at a time, in blocks of 64 MiB, and keeps only the
  shards of its own devices. Beside the parameters a host holds one tensor of
  the checkpoint (of one layer, or the embedding) and one block, never a stack
  of layers.

  Args:
    path_or_hub_id: directory of safetensors, one file or several, or the id
      of a model on the Hugging Face hub.
    config: the model's sizes; see `config_from_hf`.
    mesh: the parameters are sharded over it.
    rules: TRAIN or ROLLOUT of `opera_jax.sharding.rules`.
    dtype: of the parameters, "float32" or "bfloat16".
    advance: progress callback, called before each tensor is read.

  Returns:
    The params tree of `decoder.create`, in `dtype`, sharded by `rules`.

  Raises:
    FileNotFoundError: no such checkpoint, or one of its files is missing.
    ValueError: missing or unexpected tensors, tensors of another shape or an
      unsupported type, sizes that differ from config.json, a stored head of a
      tied model that differs from its embedding (one error lists all of these);
      a weight that is not finite; sizes that the mesh does not divide; an
      unknown dtype.
  """
  if dtype not in DTYPES:
    raise ValueError(f"Parameters are one of {DTYPES}, got dtype={dtype!r}.")
  folder = hf_config.folder(path_or_hub_id, ("*.safetensors", "*.json"))
  stored = tensor_files.find(folder)
  _check(folder, stored, config)
  shapes = decoder.abstract(config)[1]
  axes = decoder.logical_axes(shapes)
  layout.check(shapes, axes, mesh, rules)

  sizes = _sizes(config)
  sources: dict[str, list[tuple[str, _Entry]]] = {}
  for name, entry in _entries(config).items():
    sources.setdefault(entry.ours, []).append((name, entry))

  def read(name: str, entry: _Entry, sharding: NamedSharding) -> jax.Array:
    if advance is not None:
      advance()
    return _read(name, stored[name], entry, sizes, sharding, dtype)

  def load_parameter(
    path: Any, shape: jax.ShapeDtypeStruct, sharding: NamedSharding
  ) -> jax.Array:
    tensors = sources[decoder.path_name(path)]
    if tensors[0][1].layer is None:
      return read(*tensors[0], sharding)
    stack = jax.jit(
      functools.partial(jnp.zeros, shape.shape, dtype), out_shardings=sharding
    )()
    put = jax.jit(_put, donate_argnums=0, out_shardings=sharding)
    layer_sharding = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
    for name, entry in tensors:
      array = read(name, entry, layer_sharding)
      # Wait, so that the host holds one layer instead of a queue of them.
      stack = jax.block_until_ready(put(stack, array, entry.layer))
    return stack

  return jax.tree_util.tree_map_with_path(
    load_parameter, shapes, rules_lib.shardings(axes, mesh, rules)
  )


def _put(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def _read(
  name: str,
  tensor: tensor_files.Tensor,
  entry: _Entry,
  sizes: dict[str, int],
  sharding: NamedSharding,
  dtype: str,
) -> jax.Array:
  """Reads one tensor into our layout; each host reads every block once."""
  shape = tuple(sizes[c] for c in entry.axes)

  def bounds(index: Any) -> tuple[tuple[int, int], ...]:
    """(start, stop) of every axis of a shard."""
    limits = [axis.indices(size) for axis, size in zip(index, shape)]
    return tuple((start, stop) for start, stop, _ in limits)

  local = sharding.addressable_devices_indices_map(shape).values()
  shards = {
    key: np.empty([stop - start for start, stop in key], dtype)
    for key in map(bounds, local)
  }
  letters = "".join(entry.theirs)
  order = [letters.index(c) for c in entry.axes]
  outer = entry.axes.index(letters[0])
  rest = [sizes[c] for c in letters[1:]]
  # File rows per index of their first axis: H for q_proj, 1 for most tensors.
  rows = math.prod(sizes[c] for c in entry.theirs[0][1:])
  first = min(key[outer][0] for key in shards)
  last = max(key[outer][1] for key in shards)
  step = max(1, _BLOCK_BYTES // (4 * math.prod(rest)))
  for start in range(first, last, step):
    stop = min(start + step, last)
    block = tensor.rows(start * rows, stop * rows)
    if not np.isfinite(block).all():
      raise ValueError(
        f"{tensor.file}: {name} holds a weight that is not finite, in rows "
        f"{start * rows} to {stop * rows}. The checkpoint is damaged or its "
        "training diverged: download it again, or take an earlier one."
      )
    block = block.reshape(stop - start, *rest).transpose(order)
    for key, shard in shards.items():
      low, high = max(start, key[outer][0]), min(stop, key[outer][1])
      if low >= high:
        continue
      source = [slice(*pair) for pair in key]
      target = [slice(None)] * len(key)
      source[outer] = slice(low - start, high - start)
      target[outer] = slice(low - key[outer][0], high - key[outer][0])
      shard[tuple(target)] = block[tuple(source)]
  return jax.make_array_from_callback(
    shape, sharding, lambda index: shards[bounds(index)]
  )


def _check(
  folder: pathlib.Path,
  stored: dict[str, tensor_files.Tensor],
  config: decoder.Config,
) -> None:
  """Raises one error with every mismatch of checkpoint and model."""
  wrong = []
  if (folder / "config.json").exists():
    stated = config_from_hf(folder)
    wrong += [
      f"{f.name}: {getattr(stated, f.name)} in config.json, "
      f"{getattr(config, f.name)} given"
      for f in dataclasses.fields(config)
      if f.name not in ("dtype", "remat")
      and getattr(stated, f.name) != getattr(config, f.name)
    ]
  sizes, wanted = _sizes(config), _entries(config)
  for name, entry in wanted.items():
    shape = _their_shape(entry, sizes)
    if name not in stored:
      wrong.append(f"missing: {name} {list(shape)}")
    elif stored[name].shape != shape:
      found = list(stored[name].shape)
      wrong.append(f"shape: {name} is {found}, must be {list(shape)}")
    elif not tensor_files.readable(stored[name].dtype):
      wrong.append(f"type: {name} is {stored[name].dtype}")
  # A tied checkpoint may also store its head, which equals the embedding.
  known = wanted.keys() | {_HEAD}
  wrong += [f"unexpected: {name}" for name in stored if name not in known]
  if config.tie_word_embeddings and not wrong and _HEAD in stored:
    wrong += _untied(stored[_EMBEDDING], stored[_HEAD])
  if wrong:
    raise ValueError(
      f"The weights in {folder} are not those of the model; make the model's "
      "sizes those of its config.json (hf_checkpoint.config_from_hf). "
      f"{len(wrong)} mismatches:\n  " + "\n  ".join(wrong)
    )


def _untied(
  embedding: tensor_files.Tensor, head: tensor_files.Tensor
) -> list[str]:
  """Mismatches of the stored head of a tied model and its embedding."""
  if head.shape != embedding.shape:
    return [
      f"tied: {_HEAD} is {list(head.shape)}, {_EMBEDDING} is "
      f"{list(embedding.shape)}"
    ]
  rows = max(1, _BLOCK_BYTES // (4 * math.prod(head.shape[1:])))
  for start in range(0, head.shape[0], rows):
    stop = min(start + rows, head.shape[0])
    if not np.array_equal(head.rows(start, stop), embedding.rows(start, stop)):
      return [
        f"tied: {_HEAD} differs from {_EMBEDDING} in rows {start} to {stop}, "
        "so the model is not tied; set config.model.tie_word_embeddings=False "
        "and tie_word_embeddings in config.json"
      ]
  return []


def export_tensors(
  params: Any, config: decoder.Config
) -> Iterator[tuple[str, np.ndarray]]:
  """Converts parameters to the checkpoint's tensors, one at a time.

  On several hosts every process must iterate over all of them, because each
  tensor is all-gathered.

  Args:
    params: a tree like that of `decoder.create`, e.g. gradients.
    config: its sizes.

  Yields:
    The checkpoint's name of the tensor, and its host array in our dtype.
  """
  ours = {
    decoder.path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  sizes = _sizes(config)
  for name, entry in _entries(config).items():
    array = ours[entry.ours]
    if entry.layer is not None:
      array = _layer(array, entry.layer)
    if not array.is_fully_addressable:
      from jax.experimental import multihost_utils

      array = multihost_utils.process_allgather(array, tiled=True)
    order = [entry.axes.index(c) for c in "".join(entry.theirs)]
    array = np.asarray(array).transpose(order)
    yield name, array.reshape(_their_shape(entry, sizes))


@jax.jit
def _layer(stack: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def save(
  path: str | os.PathLike,
  params: Any,
  config: decoder.Config,
  tokenizer: Any = None,
  dtype: str | None = None,
  file_bytes: int = FILE_BYTES,
) -> None:
  """Writes a directory that transformers, vLLM and lm-eval can load.

  Every process of a run must call it; the first one writes. A host holds one
  tensor at a time.

  Args:
    path: directory without safetensors; created if it does not exist.
    params: the tree of `decoder.create`, on any mesh.
    config: its sizes.
    tokenizer: an `opera_jax.text.tokenizer.Tokenizer` to save with the
      weights, or None.
    dtype: "float32" or "bfloat16"; None means that of the parameters.
    file_bytes: most bytes of one file.

  Raises:
    FileExistsError: the directory holds safetensors already.
    ValueError: an unknown dtype.
  """
  dtype = str(jax.tree.leaves(params)[0].dtype) if dtype is None else dtype
  if dtype not in DTYPES:
    raise ValueError(f"Weights are written as {DTYPES}, got dtype={dtype!r}.")
  arrays = (array for _, array in export_tensors(params, config))
  if jax.process_index():
    for _ in arrays:
      pass
    return
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  sizes = _sizes(config)
  plan = [
    (name, _their_shape(entry, sizes))
    for name, entry in _entries(config).items()
  ]
  writer = tensor_files.Writer(folder, plan, jnp.dtype(dtype), file_bytes)
  writer.write(arrays)
  files = {"config.json": hf_config.contents(config, dtype)}
  if tokenizer is not None:
    tokenizer.save(folder)
    ends = tokenizer.generation_config()
    files["config.json"] |= ends
    files["generation_config.json"] = ends
  for name, value in files.items():
    (folder / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")
