"""Formats a plan as a text table, and all plans as a Markdown page."""

from collections.abc import Sequence
from typing import Any

GIB = 1 << 30
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
  "sent": "GiB a device sends in a call's collectives",
  "ICI s": "seconds of a call to send them at stated bandwidth",
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
      _gib(_sum(p["collective_bytes"])),
      _number(p["collective_seconds"]),
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
    "Written by `python -m experiments.plan --page=docs/plans`; each table "
    "comes from the `.json` beside it. The programs of TPUs were compiled by "
    "libtpu for devices that were not there; those of GPUs were not compiled, "
    "and their memory is estimated from shapes. No time below was measured. "
    "Seconds are floors: what the work costs at the chip's stated peak.",
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
    lines += [
      "",
      f"One RL step at the longest prompts and responses takes at least "
      f"{plan['step_seconds']:,.0f} s ("
      + ", ".join(f"{k} {v:,.0f}" for k, v in plan["step_parts"].items())
      + f"): {plan['step_tokens']:,} tokens in rows.",
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
