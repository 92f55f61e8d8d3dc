"""The README's picture: one thought of a run's report, as a PNG.

  python -m scripts.docs.viewer runs/tiny/report.html \
    docs/pictures/thought_viewer.png

Takes the report's own style and the thought of the RL model that gained most
reflections, and has headless chromium draw them.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

WIDTH = 900


def excerpt(report: str, stage: str = "rl") -> str:
  """A page with the report's style and one thought of a stage.

  Args:
    report: the report's HTML.
    stage: a model that the report shows.

  Raises:
    ValueError: the report shows no closed thought of that model.
  """
  style = "".join(re.findall(r"<style.*?</style>", report, re.DOTALL))
  scale = re.search(r'<div class="scale">.*?</i>.*?</div>', report, re.DOTALL)
  thoughts = []
  for card in re.findall(r'<article class="card">.*?</article>', report, re.S):
    asked, *columns = card.split('<div class="completion">')
    column = next((c for c in columns if c.startswith(f"<h3>{stage}")), "")
    if 'class="steps"' in column:
      # The last column ends with the tags of the grid and the card.
      column = column.removesuffix("</div></article>")
      thoughts.append(
        f'{asked}<div class="completion">{column}</div></article>'
      )
  if not thoughts or scale is None:
    raise ValueError(
      f"The report shows no closed thought of the {stage} model. Take the "
      "report of a finished run."
    )
  best = max(thoughts, key=lambda thought: thought.count("badge"))
  return (
    f"<!doctype html><meta charset=utf-8>{style}"
    f"<body style='margin:16px'>{scale[0]}{best}</body>"
  )


def draw(page: str, picture: pathlib.Path) -> None:
  """Has chromium draw a page, as tall as it is.

  Raises:
    FileNotFoundError: no chromium is installed.
  """
  browser = shutil.which("chromium") or shutil.which("google-chrome")
  if browser is None:
    raise FileNotFoundError(
      "Drawing the picture needs chromium: apt-get install chromium."
    )
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, "page.html")
    source.write_text(page, "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu"]
    title = page + (
      "<script>document.title=document.documentElement.scrollHeight</script>"
    )
    source.with_name("tall.html").write_text(title, "utf-8")
    size = f"--window-size={WIDTH},100"
    tall = source.with_name("tall.html").as_uri()
    printed = subprocess.run(
      [browser, *flags, size, "--dump-dom", tall],
      check=True,
      capture_output=True,
      text=True,
    ).stdout
    height = int(re.search(r"<title>(\d+)</title>", printed)[1])
    subprocess.run(
      [
        *(browser, *flags, f"--window-size={WIDTH},{height}"),
        *(f"--screenshot={picture.resolve()}", source.as_uri()),
      ],
      check=True,
      capture_output=True,
    )


if __name__ == "__main__":
  draw(
    excerpt(pathlib.Path(sys.argv[1]).read_text("utf-8")),
    pathlib.Path(sys.argv[2]),
  )
