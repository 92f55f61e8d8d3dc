"""Draws the pictures of the docs as SVG files.

  python -m scripts.docs.pictures

Every number in a picture is computed here from the toy values at its head by
the method's own formulas, so that the pictures agree with the text. A test
compares the files with what this script draws.
"""

import html
import math
import pathlib
import statistics

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "docs" / "pictures"
INK, GREY, PALE, LINE = "#20262e", "#6b7480", "#f4f6f8", "#c5ccd3"
BLUE, GREEN, RED, AMBER = "#2f6db3", "#2e8b57", "#c0392b", "#b7791f"

# A thought: text of each step, whether it is reflective, and P after it.
STEPS = (
  ("Anna finds a key.", False, -0.52),
  ("The key is silver.", False, -0.58),
  ("Wait, it was golden.", True, -0.44),
  ("But it may rain.", True, -0.47),
  ("Hmm, she has a dog.", True, -0.36),
)
START = -0.55  # P before the first step
# Four samples of a prompt: productive reflections, L in nats a token.
GROUP = ((2, -0.31), (1, -0.42), (0, -0.38), (3, -0.55))
ALPHA, TAU = 0.3, 2.0
CANDIDATES = (
  ("Wait, the key was golden.", 5.8),
  ("Wait, who is Anna?", 7.9),
  ("Wait, a longer opening?", 6.6),
  ("Wait, keys are metal.", 6.1),
)

# From the top down; atomic_file and hub are single files on the ground.
LAYERS = (
  ("to start with", ("experiments", "configs")),
  ("whole stages", ("stages", "plan")),
  ("what a run is made of", ("run",)),
  ("one RL step", ("rl",)),
  (
    "parts of a method",
    ("rollout", "synthesis", "evals", "report", "train"),
  ),
  (
    "pieces of a step",
    ("scoring", "rewards", "advantages", "losses", "data", "text"),
  ),
  ("ground", ("models", "sharding", "structs", "kernels")),
)


def text(
  x: float,
  y: float,
  words: str,
  *,
  size: int = 13,
  fill: str = INK,
  anchor: str = "start",
  weight: str = "normal",
) -> str:
  """One line of text."""
  return (
    f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" '
    f'text-anchor="{anchor}" font-weight="{weight}">'
    f"{html.escape(words)}</text>"
  )


def box(
  x: float,
  y: float,
  width: float,
  height: float,
  *,
  fill: str = "#ffffff",
  stroke: str = LINE,
) -> str:
  """A rectangle with round corners."""
  return (
    f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" '
    f'fill="{fill}" stroke="{stroke}" stroke-width="1.2"/>'
  )


def line(
  points: list[tuple[float, float]],
  *,
  stroke: str = GREY,
  width: float = 1.4,
  arrow: bool = False,
  dashed: bool = False,
) -> str:
  """A polyline; with an arrow head at its end if asked for."""
  joined = " ".join(f"{x:g},{y:g}" for x, y in points)
  end = ' marker-end="url(#head)"' if arrow else ""
  dash = ' stroke-dasharray="4 3"' if dashed else ""
  return (
    f'<polyline points="{joined}" fill="none" stroke="{stroke}" '
    f'stroke-width="{width:g}"{dash}{end}/>'
  )


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
  """An SVG document on a white card, readable on a dark page too."""
  return "\n".join(
    [
      f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
      f'height="{height}" viewBox="0 0 {width} {height}" role="img" '
      f'font-family="Helvetica, Arial, sans-serif">',
      f"<title>{html.escape(title)}</title>",
      '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" '
      'markerWidth="7" markerHeight="7" orient="auto">'
      f'<path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker></defs>',
      f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
      *parts,
      "</svg>\n",
    ]
  )


def chain() -> str:
  """The stages of a run, and the parts of an RL step."""
  stages = (
    ("prompts", "text + reference"),
    ("base model", "loaded or pretrained"),
    ("synthesis", "stop, fork, keep best"),
    ("selection", "filters, counted"),
    ("SFT", "on kept traces"),
    ("RL", "N samples a prompt"),
    ("evaluation", "held-out prompts"),
  )
  inside = (
    ("rollout", "sample N completions"),
    ("score", "log P(y_ref) after each step"),
    ("reward", "0.7 R_self + 0.3 R_ppl"),
    ("advantage", "relative to the group"),
    ("update", "clipped, KL to SFT"),
  )
  parts = []
  width, gap, top = 124, 14, 24
  for i, (name, detail) in enumerate(stages):
    x = 16 + i * (width + gap)
    fill = "#e8f0fa" if name == "RL" else PALE
    parts.append(box(x, top, width, 52, fill=fill))
    middle = x + width / 2
    parts.append(text(middle, top + 22, name, anchor="middle", weight="bold"))
    parts.append(
      text(middle, top + 40, detail, size=10, fill=GREY, anchor="middle")
    )
    if i:
      parts.append(line([(x - gap, 50), (x - 1, 50)], arrow=True))
  rl = 16 + 5 * (width + gap)
  wide, lower = 166, 142
  parts.append(box(16, 112, 958, 106, fill="#f7fafd", stroke=BLUE))
  parts.append(line([(rl + 62, 76), (rl + 62, 111)], stroke=BLUE))
  parts.append(
    text(28, 130, "one RL step, repeated", size=11, fill=BLUE, weight="bold")
  )
  for i, (name, detail) in enumerate(inside):
    x = 32 + i * (wide + 24)
    parts.append(box(x, lower, wide, 52))
    middle = x + wide / 2
    parts.append(text(middle, lower + 22, name, anchor="middle", weight="bold"))
    parts.append(
      text(middle, lower + 40, detail, size=10, fill=GREY, anchor="middle")
    )
    if i:
      parts.append(line([(x - 24, 168), (x - 1, 168)], arrow=True))
  return picture(990, 234, "The stages of a run and of an RL step", parts)


def prefix() -> str:
  """One completion as a prefix, and copies of the reference that fork."""
  parts = [text(16, 26, "one completion = one prefix, computed once", size=12)]
  pieces = [("prompt", 96, "#dde3e9"), ("<think>", 58, "#eef1f4")]
  pieces += [(f"s{j}", 92, "#ffffff") for j in range(1, len(STEPS) + 1)]
  pieces += [("</think>", 64, "#eef1f4"), ("answer", 104, "#dde3e9")]
  x, ends = 16, []
  for name, width, fill in pieces:
    j = int(name[1:]) if name[1:].isdigit() else 0
    reflective = bool(j) and STEPS[j - 1][1]
    stroke = AMBER if reflective else LINE
    parts.append(
      box(x, 40, width, 34, fill="#fff7e6" if reflective else fill,
          stroke=stroke)
    )  # fmt: skip
    label = f"★ {name}" if reflective else name
    parts.append(text(x + width / 2, 62, label, anchor="middle"))
    x += width
    ends.append(x)
  # P_0 after <think>, P_j after step j, L after the answer.
  forks = {0: ends[1]} | {j: ends[1 + j] for j in range(1, len(STEPS) + 1)}
  needed = {
    j
    for k, (_, reflective, _) in enumerate(STEPS, 1)
    if reflective
    for j in (k - 1, k)
  }
  for j, at in forks.items():
    if j not in needed:
      parts.append(line([(at, 76), (at, 96)], stroke=LINE, dashed=True))
      parts.append(
        text(at, 110, f"P{j} unused", size=10, fill=GREY, anchor="middle")
      )
      continue
    parts.append(line([(at, 76), (at, 118)], stroke=BLUE, arrow=True))
    parts.append(box(at - 33, 120, 66, 26, fill="#e8f0fa", stroke=BLUE))
    parts.append(text(at, 137, "y_ref", size=12, anchor="middle"))
    value = START if j == 0 else STEPS[j - 1][2]
    parts.append(
      text(at, 163, f"P{j} = {value:.2f}", size=11, fill=BLUE, anchor="middle")
    )
  parts.append(line([(ends[-1], 76), (ends[-1], 118)], stroke=GREEN,
                    arrow=True))  # fmt: skip
  parts.append(box(ends[-1] - 33, 120, 66, 26, fill="#e6f4ec", stroke=GREEN))
  parts.append(text(ends[-1], 137, "y_ref", size=12, anchor="middle"))
  parts.append(text(ends[-1], 163, "L", size=11, fill=GREEN, anchor="middle"))
  parts.append(
    text(
      16,
      192,
      "★ reflective step (holds But, Wait, Hmm, ...). Only these and the steps "
      "before them need a P; L forks after the whole completion.",
      size=11,
      fill=GREY,
    )
  )
  return picture(850, 206, "A prefix and its continuations", parts)


def steps() -> str:
  """P_j over the steps of a thought, and which reflections count."""
  left, right, top, bottom = 60, 470, 30, 190
  values = [START, *(p for _, _, p in STEPS)]
  low, high = -0.62, -0.32

  def place(j: int) -> tuple[float, float]:
    x = left + j * (right - left) / (len(values) - 1)
    return x, bottom - (values[j] - low) / (high - low) * (bottom - top)

  parts = [line([(left, top - 8), (left, bottom), (right + 14, bottom)])]
  for tick in (-0.6, -0.5, -0.4):
    y = bottom - (tick - low) / (high - low) * (bottom - top)
    parts.append(line([(left - 4, y), (right + 14, y)], stroke="#e5e9ed"))
    parts.append(text(left - 8, y + 4, f"{tick:.1f}", size=11, fill=GREY,
                      anchor="end"))  # fmt: skip
  count = 0
  for j in range(1, len(values)):
    rises, reflective = values[j] > values[j - 1], STEPS[j - 1][1]
    count += rises and reflective
    stroke = GREEN if rises else RED
    parts.append(line([place(j - 1), place(j)], stroke=stroke, width=2.4))
  for j in range(len(values)):
    x, y = place(j)
    parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{INK}"/>')
    if j and STEPS[j - 1][1]:
      parts.append(text(x, y - 9, "★", fill=AMBER, size=16, anchor="middle"))
    parts.append(text(x, bottom + 18, f"P{j}", size=11, anchor="middle"))
  parts.append(text(left, 18, "P_j, nats a token", size=11, fill=GREY))
  y = 44
  for j, (words, reflective, value) in enumerate(STEPS, 1):
    change = value - values[j - 1]
    colour = GREEN if change > 0 else RED
    pays = reflective and change > 0
    parts.append(text(510, y, f"{change:+.2f}", fill=colour, weight="bold"))
    star = "★ " if reflective else ""
    parts.append(text(562, y, f"{star}{words}"))
    parts.append(text(748, y, "counts" if pays else "", fill=GREEN, size=12))
    y += 26
  parts.append(
    text(510, y + 14, f"R_raw = {count},   R_self = tanh({count}/2) = "
         f"{math.tanh(count / TAU):.2f}", weight="bold")
  )  # fmt: skip
  return picture(820, 220, "The reference's log-probability, step by step",
                 parts)  # fmt: skip


def rewards() -> list[tuple[float, float, float]]:
  """(R_self, R_ppl, R) of each sample of GROUP."""
  out = []
  for count, score in GROUP:
    rank = sum(other < score for _, other in GROUP) / (len(GROUP) - 1)
    self_reward = math.tanh(count / TAU)
    out.append((self_reward, rank, ALPHA * rank + (1 - ALPHA) * self_reward))
  return out


def group() -> str:
  """From counts and ranks of four samples to rewards and advantages."""
  scored = rewards()
  total = [r for _, _, r in scored]
  mean, deviation = statistics.mean(total), statistics.stdev(total)
  heads = ("sample", "R_raw", "R_self", "L", "R_ppl", "R", "advantage A")
  columns = (24, 100, 166, 240, 310, 384, 620)
  parts = [
    text(x, 28, head, size=12, fill=GREY, weight="bold")
    for x, head in zip(columns, heads)
  ]
  parts.append(line([(16, 38), (804, 38)], stroke=LINE))
  zero = 690
  for i, ((count, score), (own, rank, reward)) in enumerate(zip(GROUP, scored)):
    y = 64 + i * 32
    cells = (i, count, f"{own:.2f}", f"{score:.2f}", f"{rank:.2f}")
    parts += [text(x, y, str(c)) for x, c in zip(columns, cells)]
    width = 150 * (1 - ALPHA) * own
    parts.append(
      f'<rect x="384" y="{y - 13}" width="{width:.1f}" height="16" '
      f'fill="{BLUE}"/>'
    )
    parts.append(
      f'<rect x="{384 + width:.1f}" y="{y - 13}" '
      f'width="{150 * ALPHA * rank:.1f}" height="16" fill="#e39a3b"/>'
    )
    parts.append(text(544, y, f"{reward:.2f}"))
    advantage = (reward - mean) / (deviation + 1e-6)
    size = 50 * advantage
    parts.append(
      f'<rect x="{min(zero, zero + size):.1f}" y="{y - 13}" '
      f'width="{abs(size):.1f}" height="16" '
      f'fill="{GREEN if size > 0 else RED}"/>'
    )
    at = zero + size + (6 if size > 0 else -6)
    anchor = "start" if size > 0 else "end"
    parts.append(text(at, y, f"{advantage:+.2f}", size=12, anchor=anchor))
  parts.append(line([(zero, 44), (zero, 176)], stroke=GREY))
  parts.append(f'<rect x="384" y="186" width="10" height="10" fill="{BLUE}"/>')
  parts.append(text(399, 195, "0.7 R_self", size=11, fill=GREY))
  parts.append('<rect x="470" y="186" width="10" height="10" fill="#e39a3b"/>')
  parts.append(text(485, 195, "0.3 R_ppl", size=11, fill=GREY))
  return picture(820, 208, "Reward and advantage of a group of four", parts)


def search() -> str:
  """One turn of the cold start's search."""
  parts = [
    text(16, 26, "prompt + thought so far = the prefix", size=12),
    box(16, 38, 96, 34, fill="#dde3e9"),
    text(64, 60, "prompt", anchor="middle"),
    box(112, 38, 190, 34),
    text(207, 60, "Anna finds a silver key.", anchor="middle"),
    box(302, 38, 62, 34, fill="#fff7e6", stroke=AMBER),
    text(333, 60, "Wait", anchor="middle", weight="bold"),
    text(333, 92, "1. stop at a", size=11, fill=AMBER, anchor="middle"),
    text(333, 106, "reflection word", size=11, fill=AMBER, anchor="middle"),
    text(452, 26, "2. fork: sample k = 4 candidates", size=12),
    text(706, 26, "3. perplexity of the whole", size=12),
  ]
  best = min(perplexity for _, perplexity in CANDIDATES)
  for i, (words, perplexity) in enumerate(CANDIDATES):
    y, kept = 38 + i * 42, perplexity == best
    stroke = GREEN if kept else LINE
    parts.append(
      line([(364, 55), (404, 55), (404, y + 17), (450, y + 17)], arrow=True)
    )
    parts.append(
      box(452, y, 236, 34, fill="#e6f4ec" if kept else "#ffffff",
          stroke=stroke)
    )  # fmt: skip
    parts.append(text(464, y + 22, words))
    colour, weight = (GREEN, "bold") if kept else (GREY, "normal")
    parts.append(
      text(706, y + 22, f"PPL {perplexity:.1f}", fill=colour, weight=weight)
    )
    if kept:
      parts.append(text(782, y + 22, "4. keep", fill=GREEN, weight="bold"))
  parts.append(
    text(
      16,
      212,
      "Repeat with the kept candidate as part of the prefix, until </think>; "
      "then sample the answer.",
      size=11,
      fill=GREY,
    )
  )
  return picture(860, 226, "One turn of the cold start's search", parts)


def rooms() -> str:
  """The packages in layers; none imports from a layer above its own."""
  parts, y = [], 16
  for name, packages in LAYERS:
    parts.append(box(16, y, 788, 44, fill=PALE))
    parts.append(text(30, y + 27, name, size=12, fill=GREY))
    x = 196
    for package in packages:
      width = 26 + 7.4 * len(package)
      parts.append(box(x, y + 8, width, 28))
      parts.append(
        text(x + width / 2, y + 27, package, size=12, anchor="middle")
      )
      x += width + 10
    y += 52
  return picture(820, y + 8, "The packages, in layers", parts)


PICTURES = {
  "chain.svg": chain,
  "prefix.svg": prefix,
  "steps.svg": steps,
  "group.svg": group,
  "search.svg": search,
  "rooms.svg": rooms,
}


def main() -> None:
  """Writes every picture."""
  FOLDER.mkdir(exist_ok=True)
  for name, draw in PICTURES.items():
    (FOLDER / name).write_text(draw(), "utf-8")


if __name__ == "__main__":
  main()
