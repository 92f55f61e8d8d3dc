"""Loads and saves checkpoints in Hugging Face's format; loads GGUF files.

Hugging Face stores one tensor [out, in] per layer, with heads and their
channels merged. Ours are [in, out], with an axis of heads, and stacked over
layers. `families` has one table that maps the two, and both directions read it.
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

from opera_jax import gguf_header
from opera_jax.models import (
  decoder,
  gguf_file,
  grow_embedding,
  hf_config,
  tensor_files,
)
from opera_jax.models.families import family, table
from opera_jax.sharding import layout
from opera_jax.sharding import rules as rules_lib

DTYPES = ("float32", "bfloat16")
FILE_BYTES = 5 * 10**9
_BLOCK_BYTES = 64 << 20  # read from disk at a time

config_from_hf = hf_config.read


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class _Source:
  """Rows of a checkpoint's tensor that hold one of our arrays."""

  name: str  # of the tensor
  part: family.Part
  first: int  # row of the tensor
  layer: int | None


def _tensors(config: decoder.Config) -> dict[str, tuple[_Source, ...]]:
  """All tensors of a checkpoint by their name, in the order of the file."""
  outside = dict(family.OUTSIDE)
  if config.tie_word_embeddings:
    del outside[_HEAD]
  sizes = _sizes(config)

  def sources(name: str, parts: Any, layer: int | None) -> tuple[_Source, ...]:
    out, first = [], 0
    for part in parts:
      out.append(_Source(name, part, first, layer))
      first += _shape(part, sizes)[0]
    return tuple(out)

  tensors = {name: sources(name, p, None) for name, p in outside.items()}
  layer_tensors = table.FAMILIES[config.family].layer
  for index in range(config.num_hidden_layers):
    for suffix, parts in layer_tensors.items():
      name = f"model.layers.{index}.{suffix}"
      tensors[name] = sources(name, parts, index)
  return tensors


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


def _shape(part: family.Part, sizes: dict[str, int]) -> tuple[int, ...]:
  """Shape of a part's rows, as the checkpoint has them."""
  return tuple(math.prod(sizes[c] for c in group) for group in part.theirs)


def _their_shape(
  sources: tuple[_Source, ...], sizes: dict[str, int]
) -> tuple[int, ...]:
  """Shape of a whole tensor."""
  shapes = [_shape(source.part, sizes) for source in sources]
  return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def load(
  path_or_hub_id: str | os.PathLike,
  config: decoder.Config,
  mesh: Mesh,
  rules: dict[str, Any],
  dtype: str = "float32",
  advance: Callable[[], None] | None = None,
  trained_ids: int | None = None,
) -> Any:
  """Streams a checkpoint's weights into sharded arrays.

  Each host reads one tensor at a time, in blocks of 64 MiB, and keeps only the
  shards of its own devices. Beside the parameters a host holds one tensor of
  the checkpoint (of one layer, or the embedding) and one block, never a stack
  of layers.

  Args:
    path_or_hub_id: directory of safetensors, one file or several; a GGUF file
      or a directory with one; or the id of a model on the Hugging Face hub.
    config: the model's sizes; see `config_from_hf`.
    mesh: the parameters are sharded over it.
    rules: TRAIN or ROLLOUT of `opera_jax.sharding.rules`.
    dtype: of the parameters, "float32" or "bfloat16".
    advance: progress callback, called before each tensor is read.
    trained_ids: ids that the checkpoint's tokenizer has, if the run's has
      tokens besides: their rows are the mean of the others', and the embedding
      grows to `config.vocab_size`. None changes no row.

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
  place, stored = _find(path_or_hub_id)
  if trained_ids is None or _EMBEDDING not in stored:
    _check(place, stored, config)
  else:
    rows = stored[_EMBEDDING].shape[0]
    _check(place, stored, dataclasses.replace(config, vocab_size=rows))
    for name in {_EMBEDDING, _HEAD} & stored.keys():
      stored[name] = grow_embedding.GrownTensor(
        stored[name], trained_ids, config.vocab_size
      )
  shapes = decoder.abstract(config)[1]
  axes = decoder.logical_axes(shapes)
  layout.check(shapes, axes, mesh, rules)

  sizes = _sizes(config)
  sources: dict[str, list[_Source]] = {}
  for parts in _tensors(config).values():
    for source in parts:
      sources.setdefault(source.part.ours, []).append(source)

  def read(source: _Source, sharding: NamedSharding) -> jax.Array:
    if advance is not None:
      advance()
    return _read(source, stored[source.name], sizes, sharding, dtype)

  def load_parameter(
    path: Any, shape: jax.ShapeDtypeStruct, sharding: NamedSharding
  ) -> jax.Array:
    tensors = sources[decoder.path_name(path)]
    if tensors[0].layer is None:
      return read(tensors[0], sharding)
    stack = jax.jit(
      functools.partial(jnp.zeros, shape.shape, dtype), out_shardings=sharding
    )()
    put = jax.jit(_put, donate_argnums=0, out_shardings=sharding)
    layer_sharding = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
    for source in tensors:
      array = read(source, layer_sharding)
      # Wait, so that the host holds one layer instead of a queue of them.
      stack = jax.block_until_ready(put(stack, array, source.layer))
    return stack

  return jax.tree_util.tree_map_with_path(
    load_parameter, shapes, rules_lib.shardings(axes, mesh, rules)
  )


def _put(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def _read(
  source: _Source,
  tensor: tensor_files.Tensor,
  sizes: dict[str, int],
  sharding: NamedSharding,
  dtype: str,
) -> jax.Array:
  """Reads an array into our layout; each host reads every block once."""
  part = source.part
  shape = tuple(sizes[c] for c in part.axes)

  def bounds(index: Any) -> tuple[tuple[int, int], ...]:
    """(start, stop) of every axis of a shard."""
    limits = [axis.indices(size) for axis, size in zip(index, shape)]
    return tuple((start, stop) for start, stop, _ in limits)

  local = sharding.addressable_devices_indices_map(shape).values()
  shards = {
    key: np.empty([stop - start for start, stop in key], dtype)
    for key in map(bounds, local)
  }
  letters = "".join(part.theirs)
  order = [letters.index(c) for c in part.axes]
  outer = part.axes.index(letters[0])
  rest = [sizes[c] for c in letters[1:]]
  # File rows per index of their first axis: H for q_proj, 1 for most tensors.
  rows = math.prod(sizes[c] for c in part.theirs[0][1:])
  first = min(key[outer][0] for key in shards)
  last = max(key[outer][1] for key in shards)
  step = max(1, _BLOCK_BYTES // (4 * math.prod(rest)))
  for start in range(first, last, step):
    stop = min(start + step, last)
    low, high = source.first + start * rows, source.first + stop * rows
    block = tensor.rows(low, high)
    if not np.isfinite(block).all():
      raise ValueError(
        f"{tensor.file}: {source.name} holds a weight that is not finite, in "
        f"rows {low} to {high}. The checkpoint is damaged or its "
        "training diverged: download it again, or take an earlier one."
      )
    block = block.reshape(stop - start, *rest).transpose(order)
    for key, shard in shards.items():
      begin, end = max(start, key[outer][0]), min(stop, key[outer][1])
      if begin >= end:
        continue
      origin = [slice(*pair) for pair in key]
      target = [slice(None)] * len(key)
      origin[outer] = slice(begin - start, end - start)
      target[outer] = slice(begin - key[outer][0], end - key[outer][0])
      shard[tuple(target)] = block[tuple(origin)]
  return jax.make_array_from_callback(
    shape, sharding, lambda index: shards[bounds(index)]
  )


def _find(path_or_hub_id: str | os.PathLike) -> tuple[pathlib.Path, Any]:
  """Where a checkpoint is, and its tensors by Hugging Face's names."""
  path = pathlib.Path(path_or_hub_id)
  if gguf_header.is_gguf(path):
    gguf = gguf_file.read(path)
    return gguf.file, dict(gguf.tensors)
  folder = hf_config.folder(path_or_hub_id, ("*.safetensors", "*.json"))
  return folder, dict(tensor_files.find(folder))


def _check(
  place: pathlib.Path,
  stored: dict[str, tensor_files.Tensor],
  config: decoder.Config,
) -> None:
  """Raises one error with every mismatch of checkpoint and model."""
  wrong = []
  if place.is_file() or (place / "config.json").exists():
    stated = config_from_hf(place)
    wrong += [
      f"{f.name}: {getattr(stated, f.name)} in config.json, "
      f"{getattr(config, f.name)} given"
      for f in dataclasses.fields(config)
      if f.name not in hf_config.FREE
      and getattr(stated, f.name) != getattr(config, f.name)
    ]
  sizes, wanted = _sizes(config), _tensors(config)
  for name, sources in wanted.items():
    shape = _their_shape(sources, sizes)
    if name not in stored:
      wrong.append(f"missing: {name} {list(shape)}")
    elif stored[name].shape != shape:
      found = list(stored[name].shape)
      wrong.append(f"shape: {name} is {found}, must be {list(shape)}")
    elif isinstance(
      stored[name], tensor_files.Tensor
    ) and not tensor_files.readable(stored[name].dtype):
      wrong.append(f"type: {name} is {stored[name].dtype}")
  # A tied checkpoint may also store its head, which equals the embedding.
  known = wanted.keys() | {_HEAD}
  wrong += [f"unexpected: {name}" for name in stored if name not in known]
  if config.tie_word_embeddings and not wrong and _HEAD in stored:
    wrong += _untied(stored[_EMBEDDING], stored[_HEAD])
  if wrong:
    raise ValueError(
      f"The weights in {place} are not those of the model; make the model's "
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
        "so the model is not tied; set tie_word_embeddings to false in its "
        "config.json"
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

  def part(source: _Source) -> np.ndarray:
    array = ours[source.part.ours]
    if source.layer is not None:
      array = _layer(array, source.layer)
    if not array.is_fully_addressable:
      from jax.experimental import multihost_utils

      array = multihost_utils.process_allgather(array, tiled=True)
    letters = "".join(source.part.theirs)
    order = [source.part.axes.index(c) for c in letters]
    array = np.asarray(array).transpose(order)
    return array.reshape(_shape(source.part, sizes))

  for name, sources in _tensors(config).items():
    parts = [part(source) for source in sources]
    yield name, parts[0] if len(parts) == 1 else np.concatenate(parts)


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
    (name, _their_shape(sources, sizes))
    for name, sources in _tensors(config).items()
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
