"""The table of allowed imports in docs/architecture.md.

  python -m scripts.docs.arrows

The table `ALLOWED` of tests/test_arrows.py decides; this script writes it
between two marks of the page, and a test compares the two.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
RULES = ROOT / "tests" / "test_arrows.py"
BEGIN, END = "<!-- begin arrows -->", "<!-- end arrows -->"


def allowed(source: str) -> dict[str, set[str]]:
  """`ALLOWED` of a test file: package -> packages that it may import.

  Args:
    source: the text of the file.

  Raises:
    ValueError: the file has no such table.
  """
  constants: dict[str, str] = {}
  for node in ast.parse(source).body:
    if not isinstance(node, ast.Assign):
      continue
    name = ast.unparse(node.targets[0])
    if name == "ALLOWED":
      return {
        ast.literal_eval(key): _names(value, constants)
        for key, value in zip(node.value.keys, node.value.values)
      }
    if isinstance(node.value, ast.Constant):
      constants[name] = node.value.value
  raise ValueError(
    f"{RULES.name} has no table ALLOWED. Name the table of allowed imports so."
  )


def table(rules: dict[str, set[str]]) -> str:
  """The rules as a table, in the order of the test file."""
  lines = ["| package | may import, of ours |", "|---|---|"]
  for name, imports in rules.items():
    listed = ", ".join(f"`{other}`" for other in sorted(imports))
    lines.append(f"| `{name}` | {listed or 'nothing'} |")
  return "\n".join(lines)


def written(page: str) -> str:
  """The table that stands in a page, between the marks."""
  return page.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
  """Writes the table into the page."""
  page = PAGE.read_text("utf-8")
  head, _, rest = page.partition(BEGIN)
  tail = rest.partition(END)[2]
  made = table(allowed(RULES.read_text("utf-8")))
  PAGE.write_text(f"{head}{BEGIN}\n{made}\n{END}{tail}", "utf-8")


def _names(node: ast.expr, constants: dict[str, str]) -> set[str]:
  """The strings of a set display, or of `set()`."""
  if isinstance(node, ast.Call):
    return set()
  return {
    constants[item.id] if isinstance(item, ast.Name) else ast.literal_eval(item)
    for item in node.elts
  }


if __name__ == "__main__":
  main()
