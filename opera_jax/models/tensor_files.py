"""Reads rows of safetensors from disk, and writes them tensor by tensor.

A file is eight bytes with the header's length, a JSON header, then the tensors'
bytes. Plain reads instead of a memory map keep only the requested rows in
memory. The writer computes the header from the shapes alone, so that it never
holds more than one tensor.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
_MAX_HEADER_BYTES = 100 * 2**20  # the safetensors library's limit
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor's file, type, shape and offset."""

  file: pathlib.Path
  dtype: str  # as the header spells it, e.g. BF16
  shape: tuple[int, ...]
  offset: int  # bytes from the start of the file

  def bytes(self) -> int:
    """Size of the whole tensor; 0 for a type that is not supported."""
    if not readable(self.dtype):
      return 0
    return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads entries [start, stop) of the first axis, [stop - start, ...].

    Raises:
      ValueError: a type other than F32, F16 and BF16.
    """
    if self.dtype not in _DTYPES:
      raise ValueError(
        f"{self.file} stores {self.dtype}; weights are read from "
        f"{', '.join(_DTYPES)}. Convert the checkpoint first."
      )
    dtype = _DTYPES[self.dtype]
    rest = self.shape[1:]
    width = math.prod(rest)
    flat = np.fromfile(
      self.file,
      dtype,
      count=(stop - start) * width,
      offset=self.offset + start * width * dtype.itemsize,
    )
    return flat.reshape(stop - start, *rest)


def readable(dtype: str) -> bool:
  """Whether `Tensor.rows` supports the type."""
  return dtype in _DTYPES


def find(folder: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of a checkpoint folder by name; reads headers only.

  Args:
    folder: with model.safetensors, or with model.safetensors.index.json and the
      files that it names.

  Raises:
    FileNotFoundError: neither exists, or a file of the index is missing.
    ValueError: a file shorter than its header says (a broken download), an
      invalid header or index, a tensor that is stored twice.
  """
  if (folder / SINGLE).exists():
    names = [SINGLE]
  elif (folder / INDEX).exists():
    names = _indexed(folder / INDEX)
  else:
    raise FileNotFoundError(
      f"{folder} holds neither {SINGLE} nor {INDEX}. Name the directory of a "
      "Hugging Face model in safetensors format."
    )
  missing = [name for name in names if not (folder / name).exists()]
  if missing:
    raise FileNotFoundError(
      f"{folder / INDEX} names {', '.join(missing)}, which are not there. "
      "Download the checkpoint again."
    )
  tensors: dict[str, Any] = {}
  for name in names:
    found = _header(folder / name)
    twice = sorted(found.keys() & tensors.keys())
    if twice:
      raise ValueError(
        f"{folder / name} holds {twice[0]}, and so does "
        f"{tensors[twice[0]].file}. Download the checkpoint again."
      )
    tensors |= found
  return tensors


def _indexed(file: pathlib.Path) -> list[str]:
  """The files that an index names; all must be in the index's folder."""
  try:
    table = json.loads(file.read_text("utf-8"))["weight_map"]
    names = sorted(set(table.values()))
    inside = [n == pathlib.PurePath(n).name and n != ".." for n in names]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{file} is no index of safetensors ({type(error).__name__}: {error}). "
      "Download it again."
    ) from error
  if not names or not all(inside):
    raise ValueError(
      f"{file} names {names[:3]}; an index names files of its own folder, and "
      "nothing outside of it. Do not load this checkpoint."
    )
  return names


def _header(file: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of one file by name, checked against the file's size."""
  size = file.stat().st_size
  with open(file, "rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    text = stream.read(length) if length < min(size, _MAX_HEADER_BYTES) else b""
  if len(text) < length or size < 8:
    raise ValueError(
      f"{file} has {size} bytes, and its header should have {length} (at most "
      f"{_MAX_HEADER_BYTES}). Download it again."
    )
  try:
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    tensors = {
      name: _tensor(file, name, entry, 8 + length, size)
      for name, entry in entries.items()
    }
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{file} has a header that cannot be read ({type(error).__name__}: "
      f"{error}). Download it again."
    ) from error
  spans = sorted(
    (t.offset, t.offset + t.bytes(), n) for n, t in tensors.items()
  )
  for (_, end, before), (begin, _, name) in zip(spans, spans[1:]):
    if begin < end:
      raise ValueError(
        f"{file}: the bytes of {name} overlap those of {before}. Download it "
        "again."
      )
  return tensors


def _tensor(
  file: pathlib.Path, name: str, entry: dict[str, Any], start: int, size: int
) -> Tensor:
  """Checks one entry of a header: its bytes are in the file, its shape fits.

  Args:
    file: of the tensor.
    name: of the tensor.
    entry: of the header.
    start: where the tensors' bytes start in the file.
    size: of the file, bytes.
  """
  begin, end = entry["data_offsets"]
  shape = tuple(entry["shape"])
  whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
  if not whole or not isinstance(entry["dtype"], str):
    raise ValueError(f"{name} is described as {str(entry)[:200]}")
  if start + end > size:
    raise ValueError(
      f"the file has {size} bytes, but {name} ends at byte {start + end}"
    )
  tensor = Tensor(file, entry["dtype"], shape, start + begin)
  if readable(tensor.dtype) and end - begin != tensor.bytes():
    raise ValueError(
      f"{name} takes {end - begin} bytes, and {tensor.dtype}{list(shape)} has "
      f"{tensor.bytes()}"
    )
  return tensor


class Writer:
  """Writes a checkpoint folder tensor by tensor, in a fixed order."""

  def __init__(
    self,
    folder: pathlib.Path,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    file_bytes: int,
  ):
    """Assigns the tensors to files; writes nothing yet.

    Args:
      folder: an existing directory.
      tensors: name and shape of each, in the order of `write`.
      dtype: of all tensors: float32, float16 or bfloat16.
      file_bytes: most bytes of one file, unless a single tensor is larger.

    Raises:
      FileExistsError: the folder holds safetensors already.
      ValueError: another dtype.
    """
    old = sorted(file.name for file in folder.glob("*.safetensors*"))
    if old:
      raise FileExistsError(
        f"{folder} holds {', '.join(old)} already, and a mixture of two "
        "checkpoints would load. Delete them, or name another directory."
      )
    if np.dtype(dtype) not in _NAMES:
      raise ValueError(
        f"Weights are written as {', '.join(map(str, _NAMES))}, got {dtype}."
      )
    self._folder = folder
    self._dtype = np.dtype(dtype)
    self._shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, shape in tensors:
      size = math.prod(shape) * self._dtype.itemsize
      if self._shards[-1] and held + size > file_bytes:
        self._shards.append([])
        held = 0
      self._shards[-1].append((name, shape))
      held += size

  def write(self, arrays: Iterable[np.ndarray]) -> None:
    """Writes the arrays, in the order of `tensors`.

    Raises:
      ValueError: a shape other than that of `tensors`.
    """
    arrays = iter(arrays)
    count = len(self._shards)
    file_of, total = {}, 0
    for number, shard in enumerate(self._shards, start=1):
      file = f"model-{number:05d}-of-{count:05d}.safetensors"
      file = SINGLE if count == 1 else file
      with open(self._folder / file, "wb") as stream:
        stream.write(self._header(shard))
        for name, shape in shard:
          array = np.ascontiguousarray(next(arrays), self._dtype)
          if array.shape != shape:
            raise ValueError(
              f"{name} has shape {array.shape}, but was planned as {shape}. "
              "Pass the arrays in the order of `tensors`."
            )
          stream.write(array.reshape(-1).view(np.uint8).data)
          file_of[name] = file
          total += array.nbytes
    if count > 1:
      index = {"metadata": {"total_size": total}, "weight_map": file_of}
      (self._folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")

  def _header(self, shard: Sequence[tuple[str, tuple[int, ...]]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard:
      size = math.prod(shape) * self._dtype.itemsize
      header[name] = {
        "dtype": _NAMES[self._dtype],
        "shape": list(shape),
        "data_offsets": [offset, offset + size],
      }
      offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
