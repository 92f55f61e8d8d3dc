"""Formats a plan as a text table, and all plans as a Markdown page."""

from collections.abc import Sequence
from typing import Any

GIB = 1 << 30
WORKLOAD = (
  "Scoring is counted by packing completions of a stated length: a prompt of a "
  "twelfth of the longest, a thought of two fifths and an answer of a tenth of "
  "the longest response, a reference of a quarter of the longest continuation "
  "(512, 4,096, 1,024 and 1,024 tokens at the paper's lengths), scored at the "
  "24 positions around 12 reflective steps of 32, and at the end."
)
ANCHORS = (
  "Published, to compare with: MaxText trains Llama-3.1-8B on v6e at 7,000 to "
  "7,200 tokens a second and chip, 44 to 46 % MFU; sglang-jax samples from "
  "Qwen3-8B on v6e-4 at 1,324 (64 streams) and 1,893 (256 streams) tokens a "
  "second and chip."
)
COLUMNS = {
  "program": "",
  "calls": "in one RL step; SFT is another stage",
  "argument": "GiB a device",
  "temporary": "GiB a device",
  "output": "GiB a device, without what takes its argument's place",
  "beside": "GiB a device that the run holds and the program is not given",
  "total": "GiB a device: all of these and the program's code",
  "HBM": "share of a device's memory",
  "TFLOP": "of one call, all devices: forward + backward + recomputed",
  "peak s": "seconds of a call at stated peak bf16 FLOP/s",
  "HBM s": "seconds of a call to read weights and caches at stated bandwidth",
  "moved": "GiB that the compiled program moves through HBM in a call",
  "moved s": "seconds of a call to move them at stated bandwidth",
  "sent": "GiB a device sends in a call's collectives",
  "ICI s": "seconds of a call to send them over the links in use",
  "serial s": "seconds of a call without overlap: peak, moved and ICI in turn",
  "MFU": "forward and backward FLOPs, without recomputation, over peak in that "
  "time",
  "compile s": "seconds to trace and compile on this CPU",
}


def rows(plan: dict[str, Any]) -> list[list[str]]:
  """Cells of the columns COLUMNS, one row per program."""
  limit = plan["hbm_bytes"]
  return [
    [
      p["name"],
      str(p["calls"]),
      *(
        _gib(p[f"{part}_bytes"])
        for part in ("argument", "temporary", "output", "beside", "total")
      ),
      f"{p['total_bytes'] / limit:.0%}" + ("" if p["fits"] else " NO"),
      _number(
        (p["forward_flops"] + p["backward_flops"] + p["recompute_flops"]) / 1e12
      ),
      _number(p["flops_seconds"]),
      _number(p["stream_seconds"]),
      _gib(p["moved_bytes"]),
      _number(p["moved_seconds"]),
      _gib(_sum(p["collective_bytes"])),
      _number(p["collective_seconds"]),
      _number(p["serial_seconds"]),
      _share(_mfu(plan, p)),
      _whole(p["compile_seconds"]),
    ]
    for p in plan["programs"]
  ]


def text(plan: dict[str, Any]) -> str:
  """Formats a plan as an aligned text table."""
  cells = [list(COLUMNS), *rows(plan)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
  lines = [_head(plan), ""]
  for row in cells:
    first, *rest = (cell.rjust(w) for cell, w in zip(row, widths))
    lines.append("  ".join([row[0].ljust(len(first)), *rest]))
  lines += ["", *(f"{p['name']}: {p['shape']}" for p in plan["programs"])]
  lines += ["", *_foot(plan)]
  return "\n".join(lines)


def markdown(plans: Sequence[dict[str, Any]]) -> str:
  """Formats all saved plans as a Markdown page."""
  parts = [
    "# Plans of the shipped configs",
    "",
    "Written by `make plans`, which makes every plan anew; each table comes "
    "from the `.json` beside it. The programs of TPUs were compiled by libtpu "
    "for devices that were not there; those of GPUs were not compiled, and "
    "their memory is estimated from shapes. No time below was measured. A call "
    "takes between the largest of the seconds at peak, of HBM and of ICI, and "
    "`serial s`, at the chip's stated figures. Where a TPU's column is not "
    "available, the program was compiled before the column was counted.",
    "",
    WORKLOAD,
    "",
    ANCHORS,
    "",
    *(f"- **{name}**: {what}" for name, what in COLUMNS.items() if what),
  ]
  for plan in plans:
    parts += ["", f"## `{plan['config']}` on {plan['topology']}", ""]
    parts += [_head(plan), "", "| " + " | ".join(COLUMNS) + " |"]
    parts.append("|---|" + "---:|" * (len(COLUMNS) - 1))
    parts += ["| " + " | ".join(row) + " |" for row in rows(plan)]
    parts += ["", *(f"- {p['name']}: {p['shape']}" for p in plan["programs"])]
    parts += ["", *_foot(plan)]
  return "\n".join(parts) + "\n"


def _head(plan: dict[str, Any]) -> str:
  mesh = " x ".join(f"{k} {v}" for k, v in plan["mesh"].items() if v > 1)
  return (
    f"{plan['parameters'] / 1e9:.2f}B parameters on {plan['topology']}: "
    f"{plan['devices']} devices ({plan['chips']} chips) of "
    f"{plan['hbm_bytes'] / GIB:.2f} GiB, mesh {mesh or 'of 1'}; "
    f"{plan['versions']}."
  )


def _foot(plan: dict[str, Any]) -> list[str]:
  lines = [
    f"A sample's keys and values at the longest response: "
    f"{plan['slot_bytes'] / GIB:.3f} GiB over all devices that share it.",
  ]
  if plan["step_parts"]:
    last = ""
    if set(plan["serial_parts"]) == set(plan["step_parts"]):
      last = (
        f" to {plan['serial_seconds']:,.0f} s (no overlap: "
        f"{_parts(plan, 'serial')})"
      )
    lines += [
      "",
      "One RL step at the longest prompts and responses takes "
      f"{plan['step_seconds']:,.0f} s (the floors: {_parts(plan, 'step')})"
      f"{last}: {plan['step_tokens']:,} tokens in rows.",
    ]
  for p in plan["programs"]:
    if p["useful"] is not None and p["calls"]:
      lines += [
        "",
        f"{p['name']}: the packer makes {p['calls']:,} calls of the stated "
        f"workload, worth {p['work']:,.1f} of the largest shape; "
        f"{p['useful']:.0%} of their FLOPs are useful.",
      ]
    if p["tokens"] and p["seconds"]:
      least, most = (
        p["tokens"] / p[part] / plan["chips"]
        for part in ("serial_seconds", "seconds")
      )
      lines += [
        "",
        f"{p['name']}: {least:,.0f} (no overlap) to {most:,.0f} (floor) tokens "
        "a second and chip.",
      ]
    if p["read_once"]:
      lines += [
        "",
        f"{p['name']}: the operands of {', '.join(p['read_once'])} count once "
        "in what it moves; these kernels may read them several times.",
      ]
  if plan.get("missing"):
    lacking = ", ".join(plan["missing"])
    lines += ["", f"This plan is partial: it lacks {lacking}."]
  counts = plan["most_programs"]
  lines += [
    "",
    f"An RL run compiles at most {sum(counts.values())} programs: "
    + ", ".join(f"{count} to {what}" for what, count in counts.items())
    + ".",
  ]
  for p in plan["programs"]:
    if not p["fits"]:
      lines += [
        "",
        f"{p['name']} does not fit: {p['total_bytes'] / GIB:.2f} GiB of "
        f"{plan['hbm_bytes'] / GIB:.2f}. Turn: "
        + "; ".join(p["remedies"])
        + ".",
      ]
  return lines


def _parts(plan: dict[str, Any], which: str) -> str:
  return ", ".join(f"{k} {v:,.0f}" for k, v in plan[f"{which}_parts"].items())


def _mfu(plan: dict[str, Any], program: dict[str, Any]) -> float | None:
  """Model FLOPs over peak without overlap; None where nothing is trained."""
  seconds, peak = program["serial_seconds"], plan["peak_flops"]
  if not program["backward_flops"] or not seconds or not peak:
    return None
  done = program["forward_flops"] + program["backward_flops"]
  return float(done / (seconds * peak))


def _share(value: float | None) -> str:
  return "" if value is None else f"{value:.0%}"


def _sum(parts: dict[str, float] | None) -> float | None:
  return None if parts is None else sum(parts.values())


def _gib(value: float | None) -> str:
  return "not available" if value is None else f"{value / GIB:.2f}"


def _whole(value: float | None) -> str:
  return "not available" if value is None else f"{value:.0f}"


def _number(value: float | None) -> str:
  if value is None:
    return "not available"
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
