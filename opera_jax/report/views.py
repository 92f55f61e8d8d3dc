"""What a report shows, as plain records; text is raw, the page escapes it."""

import dataclasses
from collections.abc import Mapping, Sequence

from opera_jax.evals import table


@dataclasses.dataclass(frozen=True)
class StepView:
  """One step of a thought."""

  text: str
  delta: float | None  # P_j - P_{j-1}, nats a token; None or NaN: not scored
  reflective: bool


@dataclasses.dataclass(frozen=True)
class ThoughtView:
  """One completion whose thought is shown step by step."""

  stage: str  # the model that wrote it: "base", "sft", "rl"
  prompt: str
  reference: str
  steps: Sequence[StepView]
  answer: str
  terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
  note: str = ""  # "truncated", say


@dataclasses.dataclass(frozen=True)
class AnswerView:
  """One stage's completion of a prompt."""

  stage: str
  thought: str
  answer: str
  terms: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SampleView:
  """One prompt with the completions of several stages, side by side."""

  prompt: str
  reference: str
  answers: Sequence[AnswerView]


@dataclasses.dataclass(frozen=True)
class Series:
  """One line of a chart; y is None where nothing was measured."""

  label: str
  x: Sequence[float]
  y: Sequence[float | None]


@dataclasses.dataclass(frozen=True)
class Chart:
  """Lines over one axis of steps."""

  title: str
  series: Sequence[Series]
  x_label: str = "step"
  unit: str = ""
  folded: bool = False  # shown on demand


@dataclasses.dataclass(frozen=True)
class Page:
  """The whole report."""

  title: str
  summary: str = ""  # one paragraph: what was run, on what
  config: Mapping[str, object] = dataclasses.field(default_factory=dict)
  captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  charts: Mapping[str, Sequence[Chart]] = dataclasses.field(
    default_factory=dict
  )  # section -> its charts
  rows: Sequence[table.Row] = ()
  samples: Sequence[SampleView] = ()
  thoughts: Sequence[ThoughtView] = ()
