"""The data of a report as plain records, with raw text; the page escapes it."""

import dataclasses
from collections.abc import Mapping, Sequence

from opera_jax.evals import table


@dataclasses.dataclass(frozen=True)
class StepView:
  """One step of a thought."""

  text: str
  delta: (
    float | None
  )  # P_j - P_{j-1}, nats per token; None or NaN if not scored
  reflective: bool


@dataclasses.dataclass(frozen=True)
class ThoughtView:
  """One completion whose thought is shown step by step."""

  stage: str  # the model that generated it: "base", "sft", "rl"
  prompt: str
  reference: str
  steps: Sequence[StepView]
  answer: str
  terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
  note: str = ""  # e.g. "truncated"


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
  """One line of a chart; y is None for missing values."""

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
  folded: bool = False  # collapsed at first


@dataclasses.dataclass(frozen=True)
class Page:
  """The whole report."""

  title: str
  summary: str = ""  # one paragraph about the run
  config: Mapping[str, object] = dataclasses.field(default_factory=dict)
  captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  charts: Mapping[str, Sequence[Chart]] = dataclasses.field(
    default_factory=dict
  )  # section -> its charts
  rows: Sequence[table.Row] = ()
  samples: Sequence[SampleView] = ()
  thoughts: Sequence[ThoughtView] = ()
