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
class CompletionView:
  """One model's completion of a prompt, its thought step by step."""

  stage: str  # the model that generated it: "base", "sft", "rl"
  steps: Sequence[StepView]
  answer: str
  terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
  note: str = ""  # e.g. "truncated"


@dataclasses.dataclass(frozen=True)
class PromptCard:
  """One prompt with the completions of several models, side by side."""

  prompt: str
  reference: str
  completions: Sequence[CompletionView]


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
  note: str = ""  # one sentence that says what is drawn


@dataclasses.dataclass(frozen=True)
class Histogram:
  """Distributions of one quantity, drawn over each other."""

  title: str
  values: Mapping[str, Sequence[float]]  # by label
  unit: str = ""
  note: str = ""  # one sentence that says what is drawn


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
  constants: Mapping[str, Mapping[str, float]] = dataclasses.field(
    default_factory=dict
  )  # section -> metrics that never changed, which have no chart
  histograms: Mapping[str, Sequence[Histogram]] = dataclasses.field(
    default_factory=dict
  )  # section -> its histograms
  rows: Sequence[table.Row] = ()
  cards: Sequence[PromptCard] = ()
