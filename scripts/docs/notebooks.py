"""The cells that all notebooks share: the badge, and the one that installs.

  python -m scripts.docs.notebooks

Rewrites both in every notebook of notebooks/; a test compares them. REPOSITORY
is the one place that knows where the project is published.
"""

import json
import pathlib

REPOSITORY = "https://github.com/opera-jax/opera_jax"
FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
# Colab opens notebooks of GitHub by this address.
_COLAB = "https://colab.research.google.com/github/"
_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
BADGE_CELL, INSTALL_CELL = "badge", "install"

_INSTALL = """\
# Installs opera_jax where it is missing. In a checkout there is nothing to do.
# What is installed already stays as it is, if it is new enough.
REPOSITORY = "{repository}"

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys


def versions():
  "Version of every installed package that this session has imported."
  imported = importlib.metadata.packages_distributions()
  names = {{n for m in list(sys.modules) for n in imported.get(m, ())}}
  return {{name: importlib.metadata.version(name) for name in names}}


root = next(
  (p for p in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents)
   if (p / "opera_jax" / "configs").exists()),
  None,
)
if root is not None:  # a checkout
  os.chdir(root)
  sys.path.insert(0, str(root))
elif importlib.util.find_spec("opera_jax") is None:
  before = versions()
  source = os.environ.get("OPERA_SOURCE", f"git+{{REPOSITORY}}")
  done = subprocess.run(
    [sys.executable, "-m", "pip", "install", "--quiet", source], check=False
  )
  if done.returncode:
    raise RuntimeError(f"pip could not install {{source}}; see above.")
  importlib.invalidate_caches()
  changed = {{n: v for n, v in versions().items() if before.get(n, v) != v}}
  if changed:
    raise RuntimeError(
      f"{{changed}} are newer now than what this session has imported. Restart "
      "it (Runtime > Restart session), and run this cell again."
    )
print("opera_jax is ready,", "in", root or "this environment")"""


def badge(name: str) -> str:
  """The Markdown of a notebook's badge."""
  owner = REPOSITORY.removeprefix("https://github.com/")
  address = f"{_COLAB}{owner}/blob/main/notebooks/{name}"
  return f"[![Open in Colab]({_BADGE})]({address})"


def install() -> str:
  """The Python of the cell that installs the package."""
  return _INSTALL.format(repository=REPOSITORY)


def shared(name: str) -> dict[str, str]:
  """Text of the shared cells of a notebook, by the cell's id."""
  return {BADGE_CELL: badge(name), INSTALL_CELL: install()}


def main() -> None:
  """Rewrites the shared cells of all notebooks."""
  for path in sorted(FOLDER.glob("*.ipynb")):
    notebook = json.loads(path.read_text("utf-8"))
    texts = shared(path.name)
    for cell in notebook["cells"]:
      if cell["id"] in texts:
        cell["source"] = texts[cell["id"]].splitlines(keepends=True)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, "utf-8")


if __name__ == "__main__":
  main()
