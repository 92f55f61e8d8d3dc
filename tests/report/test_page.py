"""The page shows what models wrote as text, and needs nothing but itself."""

import dataclasses
import html.parser
import re

import numpy as np
import pytest

from opera_jax.evals import table
from opera_jax.report import page, views

ATTACK = '<script>alert(1)</script>"onmouseover="alert(2)\'&<img src=x>'


class _Reader(html.parser.HTMLParser):
  """Collects tags, attributes, and text outside of the style sheet."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.open = [], [], []
    self.text = ""
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in ("meta", "br", "hr"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, f"</{tag}> closes another element"

  def handle_data(self, data):
    if "style" not in self.open:
      self.text += data


def _page(text="words"):
  values = np.random.default_rng(0).normal(2, 1, 50)
  rows = table.assemble(
    {text: {"facts": values}, "rl": {"facts": values + 1}},
    [table.Measure("facts", text, unit=text)],
  )
  steps = [
    views.StepView(text, 0.5, True),
    views.StepView(text, -0.25, True),
    views.StepView(text, 0.1, False),
    views.StepView(text, None, False),
    views.StepView(text, float("nan"), True),
    views.StepView(text, 0.0, True),
  ]
  card = views.PromptCard(
    text,
    text,
    [
      views.CompletionView(text, steps, text, {text: 0.5}, note=text),
      views.CompletionView("rl", [], text),
    ],
  )
  series = views.Series(text, [1, 2, 3], [0.1, None, 0.3])
  return views.Page(
    title=text,
    summary=text,
    config={text: text},
    captions={"prompts": text},
    charts={
      text: [views.Chart(text, [series], x_label=text, unit=text, note=text)]
    },
    constants={text: {text: 1.0}},
    histograms={
      text: [views.Histogram(text, {text: [1.0, 2.0]}, unit=text, note=text)]
    },
    rows=rows,
    cards=[card],
  )


def test_model_text_is_shown_and_never_obeyed():
  plain = _Reader(page.render(_page("words")))
  attacked = _Reader(page.render(_page(ATTACK)))
  assert attacked.tags == plain.tags
  assert "script" not in attacked.tags and "img" not in attacked.tags
  names = {name for name, _ in attacked.attributes}
  assert not [name for name in names if name.startswith("on")]
  assert attacked.text.count(ATTACK) == plain.text.count("words") > 20


def test_every_element_is_closed():
  reader = _Reader(page.render(_page()))
  assert reader.open == []


def test_the_page_is_self_contained():
  text = page.render(_page())
  assert not re.search(r"https?://|//|@import|<link|<script|src=", text)
  linked = re.findall(r'href="(.*?)"', text)
  assert len(linked) == 5
  assert set(linked) == {f"#{id_}" for id_ in re.findall(r' id="([^"]+)"', text)
                         if id_ != "tip"}  # fmt: skip
  assert set(re.findall(r"url\((.*?)\)", text)) == {"#tip"}
  assert "default-src 'none'" in text


def test_steps_carry_sign_strength_number_and_mark():
  text = page.render(_page())
  steps = re.findall(
    r'<li class="step (\w+)"(?: style="--a:([\d.]+)")?>(.*?)</li>', text
  )
  assert [kind for kind, _, _ in steps] == [
    "up",
    "down",
    "up",
    "unscored",
    "unscored",
    "flat",
  ]
  strengths = [float(strength) for _, strength, _ in steps if strength]
  assert strengths[0] == 1.0 and strengths[0] > strengths[1] > strengths[2] > 0
  assert strengths[3] == 0
  assert "+0.500" in steps[0][2] and "-0.250" in steps[1][2]
  badges = ["reflective" in content for _, _, content in steps]
  assert badges == [True, True, False, False, True, True]
  counted = ["counts" in content for _, _, content in steps]
  assert counted == [True, False, False, False, False, False]


def test_one_outlier_does_not_pale_the_rest():
  steps = [views.StepView("s", 0.1 * (-1) ** i, False) for i in range(99)]
  steps.append(views.StepView("s", 50.0, False))
  card = views.PromptCard("p", "r", [views.CompletionView("rl", steps, "a")])
  assert page.colour_scale([card]) == pytest.approx(0.1)
  assert page.colour_scale([]) == 0.01


def test_curves_come_before_the_prompts_and_models_stand_side_by_side():
  text = page.render(_page())
  titles = re.findall(r"<h2>(.*?)</h2>", text)
  assert titles == [
    "Before and after",
    "Curves",
    "Distributions",
    "Prompts",
    "Config",
  ]
  (card,) = re.findall(r'<article class="card">.*?</article>', text)
  assert card.count('<div class="completion">') == 2


def test_known_terms_are_explained_and_a_users_own_is_shown_by_name():
  terms = {"r_self": 0.5, "my<term>": 2.0}
  completion = views.CompletionView("rl", [], "a", terms)
  card = views.PromptCard("p", "r", [completion])
  reader = _Reader(page.render(views.Page(title="t", cards=[card])))
  assert "tanh(reflections that count / tau)" in reader.text
  assert "R_self 0.5" in reader.text and "my<term> 2" in reader.text


def test_verdicts_and_intervals_are_on_the_page():
  text = page.render(_page("facts kept"))
  assert "facts kept rose" in text
  assert "95%" in text and "50 held-out prompts" in text
  assert "change +1.00 [+1.00, +1.00]" in text


def test_an_empty_page_is_a_page():
  text = page.render(views.Page(title="nothing yet"))
  reader = _Reader(text)
  assert reader.open == [] and "nothing yet" in reader.text
  assert "section" not in reader.tags


def test_truncated_thoughts_say_so():
  card = views.PromptCard("p", "r", [views.CompletionView("rl", [], "cut")])
  text = page.render(views.Page(title="t", cards=[card]))
  assert "No closed thought, so no steps." in text


def test_write_replaces_whole_and_takes_any_text(tmp_path):
  path = tmp_path / "deep" / "report.html"
  page.write(path, _page("half a pair \ud800 and Zoë 詩"))
  first = path.read_text("utf-8")
  assert "half a pair ? and Zoë 詩" in first
  page.write(path, _page())
  assert path.read_text("utf-8") != first
  assert [child.name for child in path.parent.iterdir()] == ["report.html"]


def test_a_caption_for_no_stage_is_refused():
  with pytest.raises(ValueError, match="No stage of the chain is called 'rl'"):
    page.render(views.Page(title="t", captions={"rl": "x"}))


def test_a_changed_result_cannot_act_through_a_number():
  """DONE.json is a file: where a count should be, anything may stand."""
  made = _page()
  row = made.rows[0]
  cells = [
    dataclasses.replace(
      cell, value=dataclasses.replace(cell.value, count=ATTACK)
    )
    for cell in row.cells
  ]
  row = dataclasses.replace(row, cells=cells)
  read = _Reader(page.render(dataclasses.replace(made, rows=[row])))
  assert "script" not in read.tags and "img" not in read.tags
  assert ATTACK in read.text


def test_the_policy_forbids_scripts_forms_frames_and_another_base():
  named = _Reader(page.document("t", "")).attributes
  policy = next(
    value for name, value in named if name == "content" and "-src" in value
  )
  for rule in (
    "default-src 'none'", "form-action 'none'", "frame-src 'none'",
    "object-src 'none'", "base-uri 'none'",
  ):  # fmt: skip
    assert rule in policy.split("; ")


@pytest.mark.parametrize(
  "act",
  ['<META http-equiv="refresh" content="0;url=http://h">', "<form>", "<iframe>",
   "<base href=x>", "<script>"],
)  # fmt: skip
def test_what_could_act_is_never_written(act):
  with pytest.raises(ValueError, match="Escape it"):
    page.document("t", f"<p>{act}</p>")
