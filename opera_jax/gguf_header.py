"""Reads the header of a GGUF file: its metadata and its table of tensors.

GGUF is llama.cpp's format: one file with the model's sizes, its tokenizer and
its (often quantised) weights. A header comes from strangers, and `gguf`'s own
reader trusts it: counts, lengths and offsets go straight into allocations. So
it is read here, with every number checked against the file's size, and `gguf`
supplies the format's constants and turns blocks into floats. Only the header
is read; models/gguf_file.py and text/gguf_tokenizer.py make use of it.
"""

import dataclasses
import math
import mmap
import pathlib
import re
import struct
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # 1 has 32-bit lengths; llama.cpp itself reads it no more
_SPLIT_NAME = re.compile(r".*-\d{5}-of-\d{5}\.gguf")
_MOST_AXES = 4  # GGML's own limit
_MOST_ALIGNMENT = 2**20
_MOST_KEY_BYTES = 2**16  # the format's limit of a key; names are far shorter
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
# struct's format of each scalar type, by the number that stands in the file.
_SCALARS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  _FLOAT32: "f",
  _BOOL: "?",
  10: "Q",
  11: "q",
  12: "d",
}

# Where a file names no end of turn, llama.cpp goes by these spellings; files
# of instruction-tuned Gemma, for one, name <eos> alone.
_ENDS = frozenset(
  (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
  )
)
TOKENS = "tokenizer.ggml.tokens"
TYPES = "tokenizer.ggml.token_type"
CONTROL = 3  # in TYPES: a token that no text spells

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One line of the table of tensors."""

  type: str  # as GGML spells it, e.g. Q4_K
  shape: tuple[int, ...]  # rows first, as NumPy and PyTorch have it
  offset: int  # bytes from the start of the file
  size: int  # bytes


@dataclasses.dataclass(frozen=True)
class Header:
  """All that a GGUF file says before its weights.

  Attributes:
    file: it was read from.
    metadata: values by key: int, float, bool, str, a list of str, or a NumPy
      array of numbers.
    tensors: by GGUF's own names, e.g. blk.0.attn_q.weight.
  """

  file: pathlib.Path
  metadata: Mapping[str, Any]
  tensors: Mapping[str, Tensor]

  def get(self, key: str, kind: type[T], default: T | None = None) -> T:
    """The value of a key.

    Args:
      key: of the metadata.
      kind: type that the value must have.
      default: where the key is missing; None means that it must not be.

    Raises:
      ValueError: no such key, or a value of another type.
    """
    value = self.metadata.get(key, default)
    if value is None:
      raise ValueError(
        f"{self.file} lacks {key}. Convert the model again with a current "
        "convert_hf_to_gguf.py of llama.cpp."
      )
    if type(value) is not kind:
      raise ValueError(
        f"{self.file}: {key} is {str(value)[:80]!r} ({type(value).__name__}), "
        f"must be of type {kind.__name__}. Convert the model again."
      )
    return value


def library() -> ModuleType:
  """The package `gguf`, which only GGUF files need.

  Raises:
    ImportError: it is not installed.
  """
  try:
    import gguf
  except ModuleNotFoundError as error:
    raise ImportError(
      "A GGUF checkpoint is read by the package `gguf`, which is not "
      "installed. Run `pip install gguf` or `pip install opera-jax[gguf]`."
    ) from error
  return gguf


def is_gguf(path: str | pathlib.Path) -> bool:
  """Whether a path is a GGUF checkpoint.

  True for a file that starts with GGUF's magic bytes, and for a directory with
  a .gguf file and no safetensors.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
  if not path.is_file():
    return False
  with open(path, "rb") as stream:
    return stream.read(len(_MAGIC)) == _MAGIC


def find(path: str | pathlib.Path) -> pathlib.Path:
  """The GGUF file that a path names: itself, or the only one of a directory.

  Raises:
    FileNotFoundError: no such file, or none in the directory.
    ValueError: several files, a part of a split file, or no GGUF file.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    files = sorted(path.glob("*.gguf"))
    if not files:
      raise FileNotFoundError(f"{path} holds no .gguf file. Name one.")
    if len(files) > 1 and not _SPLIT_NAME.fullmatch(files[0].name):
      raise ValueError(
        f"{path} holds {len(files)} GGUF files: "
        f"{', '.join(f.name for f in files)}. Name one of them."
      )
    path = files[0]
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there. Name a .gguf file.")
  if _SPLIT_NAME.fullmatch(path.name):
    raise ValueError(_split(path))
  if not is_gguf(path):
    raise ValueError(
      f"{path} does not start with the bytes {_MAGIC.decode()}, so it is no "
      "GGUF file. Name one, or download it again."
    )
  return path


def _split(file: pathlib.Path) -> str:
  return (
    f"{file} is one part of a split GGUF, and a checkpoint is read from one "
    "file. Merge the parts with llama.cpp's `llama-gguf-split --merge`."
  )


def read(path: str | pathlib.Path) -> Header:
  """Reads and checks the header of a GGUF file.

  Args:
    path: the file, or a directory that holds no other.

  Raises:
    FileNotFoundError: no such file.
    ImportError: the package `gguf` is not installed.
    ValueError: not a GGUF file of version 2 or 3; a truncated file; a count,
      length, shape or offset that the file's size contradicts; a name that
      stands twice; tensors that overlap; one part of a split file.
  """
  file = find(path)
  with (
    open(file, "rb") as stream,
    mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
  ):
    cursor = _Cursor(file, data)
    cursor.take(len(_MAGIC), "the magic bytes")
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
      big = version & 0xFFFF == 0
      raise ValueError(
        f"{file} has version {version}"
        f"{' (it is big-endian)' if big else ''}, and versions "
        f"{' and '.join(map(str, _VERSIONS))}, little-endian, are read. "
        "Convert the model again with a current llama.cpp."
      )
    num_tensors = cursor.number("Q", "the number of tensors")
    num_keys = cursor.number("Q", "the number of metadata keys")
    # The least that an entry takes: a length and a type (and, of a tensor, a
    # name's byte, axes and an offset).
    cursor.fits(13 * num_keys + 25 * num_tensors, "so many keys and tensors")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
      key = cursor.text("a metadata key", _MOST_KEY_BYTES)
      if key in metadata:
        raise cursor.broken(f"the metadata key {key!r} stands twice")
      metadata[key] = cursor.value(cursor.number("I", f"{key}'s type"), key)
    count = metadata.get("split.count", 1)
    if type(count) is not int or count > 1:
      raise ValueError(_split(file))
    table: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(num_tensors):
      name, line = cursor.tensor()
      if name in table:
        raise cursor.broken(f"the tensor {name!r} stands twice")
      table[name] = line
    start = cursor.position
    size = len(data)
  alignment = metadata.get("general.alignment", 32)
  valid = type(alignment) is int and 8 <= alignment <= _MOST_ALIGNMENT
  if not valid or alignment & (alignment - 1):
    raise cursor.broken(
      f"general.alignment is {str(alignment)[:40]}, must be a power of two "
      f"from 8 to {_MOST_ALIGNMENT}"
    )
  start += -start % alignment
  tensors = {
    name: _tensor(cursor, name, line, start, size)
    for name, line in table.items()
  }
  spans = sorted((t.offset, t.offset + t.size, n) for n, t in tensors.items())
  for (_, end, before), (begin, _, name) in zip(spans, spans[1:]):
    if begin < end:
      raise cursor.broken(f"the bytes of {name} overlap those of {before}")
  return Header(file, metadata, tensors)


def end_ids(header: Header) -> tuple[int, ...]:
  """Every id that ends a completion, the end of text first.

  These are the ids that the metadata names (end of text, of turn, of message),
  and control tokens that are spelled like an end, as in llama.cpp.

  Raises:
    ValueError: an id without a token.
  """
  tokens = header.get(TOKENS, list)
  named = [
    header.get(f"tokenizer.ggml.{name}_token_id", int)
    for name in ("eos", "eot", "eom")
    if f"tokenizer.ggml.{name}_token_id" in header.metadata
  ]
  beyond = [index for index in named if not 0 <= index < len(tokens)]
  if beyond:
    raise ValueError(
      f"{header.file} names {beyond} as ends of text, and has tokens 0 to "
      f"{len(tokens) - 1}. Convert the model again."
    )
  types = header.get(TYPES, np.ndarray, np.zeros(0, np.int32))
  spelled = [
    index
    for index, (token, kind) in enumerate(zip(tokens, types))
    if kind == CONTROL and token in _ENDS
  ]
  return tuple(dict.fromkeys((*named, *spelled)))


def _tensor(
  cursor: "_Cursor",
  name: str,
  line: tuple[int, tuple[int, ...], int],
  start: int,
  size: int,
) -> Tensor:
  """Checks one line of the table: its bytes are in the file.

  Args:
    cursor: of the file.
    name: of the tensor.
    line: number of the type, shape, offset from `start`.
    start: where the tensors' bytes start.
    size: of the file.
  """
  number, shape, offset = line
  gguf = library()
  try:
    kind = gguf.GGMLQuantizationType(number)
  except ValueError:
    # A type that is newer than the library: the reader of weights refuses it
    # by name, with all others that it does not support.
    return Tensor(f"type {number}", shape, start + offset, 0)
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  if shape[-1] % block:
    raise cursor.broken(
      f"rows of {name} have {shape[-1]} numbers, and {kind.name} takes them "
      f"in blocks of {block}"
    )
  taken = math.prod(shape) // block * block_bytes
  if start + offset + taken > size:
    raise cursor.broken(
      f"the file has {size} bytes, but {name} ({kind.name}{list(shape)}) ends "
      f"at byte {start + offset + taken}"
    )
  return Tensor(kind.name, shape, start + offset, taken)


class _Cursor:
  """Reads a header front to back, and never beyond the file's end."""

  def __init__(self, file: pathlib.Path, data: mmap.mmap):
    self._file = file
    self._data = data
    self._size = len(data)
    self.position = 0

  def broken(self, what: str) -> ValueError:
    return ValueError(
      f"{self._file} is damaged: {what}. Download or convert it again."
    )

  def fits(self, size: int, what: str) -> None:
    """Raises an error unless `size` bytes are left."""
    left = self._size - self.position
    if size > left:
      raise self.broken(
        f"{what} would take at least {size} bytes at byte {self.position}, "
        f"and the file ends after {left}"
      )

  def take(self, size: int, what: str) -> bytes:
    self.fits(size, what)
    self.position += size
    return self._data[self.position - size : self.position]

  def number(self, letter: str, what: str) -> Any:
    """One number of a format of `struct`."""
    (value,) = struct.unpack(
      f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what)
    )
    return value

  def text(self, what: str, most: int | None = None) -> str:
    length = self.number("Q", what)
    if most is not None and length > most:
      raise self.broken(f"{what} has {length} bytes, and {most} are allowed")
    try:
      return self.take(length, what).decode("utf-8")
    except UnicodeDecodeError as error:
      raise self.broken(f"{what} is no UTF-8 ({error})") from error

  def value(self, kind: int, key: str) -> Any:
    """One value of the metadata."""
    if kind == _STRING:
      return self.text(key)
    if kind == _ARRAY:
      return self._array(key)
    if kind not in _SCALARS:
      raise self.broken(f"{key} has the unknown type {kind}")
    value = self.number(_SCALARS[kind], key)
    # 1e-5 of a config.json comes as the float32 9.99999974e-06; the shortest
    # decimal that names this float32 is what the model's authors wrote.
    return float(str(np.float32(value))) if kind == _FLOAT32 else value

  def _array(self, key: str) -> Any:
    kind = self.number("I", key)
    count = self.number("Q", key)
    if kind == _STRING:
      self.fits(8 * count, f"{count} strings of {key}")
      return [self.text(key) for _ in range(count)]
    if kind not in _SCALARS:
      raise self.broken(f"{key} is an array of the unsupported type {kind}")
    dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
    return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)

  def tensor(self) -> tuple[str, tuple[int, tuple[int, ...], int]]:
    """The next line of the table: name, then type, shape and offset."""
    name = self.text("a tensor's name", _MOST_KEY_BYTES)
    axes = self.number("I", f"axes of {name}")
    if not 1 <= axes <= _MOST_AXES:
      raise self.broken(f"{name} has {axes} axes, must have 1 to {_MOST_AXES}")
    # The fastest axis comes first in the file.
    shape = tuple(self.number("Q", name) for _ in range(axes))[::-1]
    if not all(shape):
      raise self.broken(f"{name} has an empty shape, {list(shape)}")
    kind = self.number("I", name)
    return name, (kind, shape, self.number("Q", name))
