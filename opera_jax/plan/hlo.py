"""Counts the bytes that the collectives of a compiled program send, from its
HLO.

A scanned body appears once and runs many times, so each computation is
multiplied by the trip counts of the `while` loops around it. A loop that may
end early counts with its bound. An asynchronous collective appears several
times (start, overlapped work, done) and is counted at its start.
"""

import collections
import math
import re

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8": 1,
          "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(
  r"^\s*(?:ROOT )?%[\w.\-]+ = (.*?) (" + "|".join(KINDS) + r")(-start)?\("
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(
  r"(?:calls|to_apply|called_computations|branch_computations|"
  r"true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_SHAPE = re.compile(r"\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")
_CONSTANT = re.compile(r" s32\[\][^=]* constant\((\d+)\)")
_KNOWN = re.compile(r'known_trip_count":\{"n":"(\d+)"')


def collective_bytes(text: str) -> dict[str, float]:
  """Bytes that a device sends, per kind of collective.

  With groups of n devices and a full array of b bytes (after gathering, or
  before scattering): all-gather, reduce-scatter and all-to-all send b (n - 1) /
  n, all-reduce twice that, collective-permute b.

  Args:
    text: optimised HLO of one program.

  Returns:
    Kind -> bytes per device, for the kinds that occur.
  """
  computations, entry = _computations(text)
  runs = _runs(computations, entry)
  total: dict[str, float] = collections.defaultdict(float)
  for name, lines in computations.items():
    if not runs[name] or _started_elsewhere(name, lines):
      continue
    for line in lines:
      match = _OP.match(line)
      if match is None:
        continue
      kind, size = match.group(2), _result_bytes(match.group(1), match[3])
      n = _group(line)
      if kind == "reduce-scatter":
        size *= n
      # A TPU implements reduce-scatter as all-reduce and slice in one fusion.
      if name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
      total[kind] += runs[name] * size * _sent_fraction(kind, n)
  return dict(total)


def _started_elsewhere(name: str, lines: list[str]) -> bool:
  """Whether the collectives in this computation were started elsewhere."""
  return name.startswith("async_collective_fusion") or any(
    '"AsyncCollectiveDone"' in line for line in lines
  )


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Splits the text into lines per computation; returns them and the entry's
  name."""
  computations: dict[str, list[str]] = {}
  entry, current = "", None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head is not None:
      current = computations.setdefault(head.group(2), [])
      entry = head.group(2) if head.group(1) else entry
    elif current is not None:
      current.append(line)
  if not entry:
    raise ValueError(
      "The HLO text has no ENTRY computation; pass a whole optimised module."
    )
  return computations, entry


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
  """How many times each computation runs per run of the entry."""
  callees: dict[str, list[tuple[str, int]]] = {}
  for name, lines in computations.items():
    called = []
    for line in lines:
      loop = _WHILE.search(line)
      if loop is not None:
        called.append((loop[2], _trips(line, computations, loop[1])))
        continue
      for group in _CALLED.findall(line):
        called += [(c, 1) for c in re.findall(r"[\w.\-]+", group)]
    callees[name] = [(c, n) for c, n in called if c in computations]
  runs = dict.fromkeys(computations, 0)

  def visit(name: str, times: int) -> None:
    runs[name] += times
    for callee, trips in callees[name]:
      visit(callee, times * trips)

  visit(entry, 1)
  return runs


def _trips(
  line: str, computations: dict[str, list[str]], condition: str
) -> int:
  """Trip count of a loop: the known one, or the bound in its condition."""
  known = _KNOWN.search(line)
  if known is not None:
    return int(known.group(1))
  bounds = [
    int(value)
    for text in computations.get(condition, ())
    for value in _CONSTANT.findall(text)
  ]
  return max(bounds, default=1)


def _sent_fraction(kind: str, n: int) -> float:
  """Bytes that each of n devices sends per byte of the full array."""
  if kind == "collective-permute":
    return 1.0
  return (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _result_bytes(result: str, start: str | None) -> float:
  """Bytes of a collective's result, one array or a tuple.

  The tuple of a `-start` also has its operand and counters; the largest element
  is the result.
  """
  sizes = [_size(*shape) for shape in _SHAPE.findall(result)]
  return max(sizes) if start else sum(sizes)


def _size(dtype: str, dims: str) -> float:
  width = _BYTES.get(dtype, 0)
  return width * math.prod(int(d) for d in dims.split(",") if d)


def _group(line: str) -> int:
  """Number of devices in a group of the collective."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
  if mesh is not None:
    axes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
    joined = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
    return math.prod(int(part or axes[name]) for name, part in joined)
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
  if iota is not None:
    return int(iota.group(1))
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  return listed.group(1).count(",") + 1 if listed is not None else 1
