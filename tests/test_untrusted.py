"""Whatever strangers write, readers answer with the errors they promise.

Seeds are printed on a failure (`--hypothesis-seed=N` runs it again).
"""

import gzip
import json
import lzma
import resource
import time
import warnings

import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opera_jax.configs import tiny
from opera_jax.data import prompts, rows, traces
from opera_jax.evals import probes
from opera_jax.models import tensor_files
from opera_jax.rewards import format as format_lib
from opera_jax.rewards import math_exact, verifiable
from opera_jax.run import partial_results, workdir
from opera_jax.stages import config_check
from opera_jax.synthesis import templates
from opera_jax.text import (
  automaton,
  math_answer,
  thought,
  thought_automaton,
  words,
)
from opera_jax.text import tokenizer as tokenizer_lib
from opera_jax.train import checkpoint, metrics

pytestmark = pytest.mark.slow

EXAMPLES = settings(
  max_examples=2_000,
  deadline=2_000,  # milliseconds each
  print_blob=True,
  suppress_health_check=list(HealthCheck),
)
_MARKS = st.sampled_from(
  ["{", "}", "[", "]", '"', "\\", "\n", "\x00", "####", "<think>", "</think>",
   "\\boxed{", "{prompt}", "\ud800", "\u0301", "\ufeff", "Wait", "But "]
)  # fmt: skip
TEXT = st.lists(
  st.one_of(_MARKS, st.text(max_size=8)), max_size=12
).map("".join)  # fmt: skip
NUMBERS = st.one_of(
  st.integers(), st.floats(), st.sampled_from([10**400, -(2**64), 1e308])
)
VALUES = st.recursive(
  st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
  lambda inner: st.one_of(
    st.lists(inner, max_size=4),
    st.dictionaries(TEXT, inner, max_size=4),
  ),
  max_leaves=12,
)
RECORDS = st.dictionaries(
  st.one_of(st.sampled_from(["id", "task", "prompt", "reference"]), TEXT),
  VALUES,
  max_size=5,
)


@pytest.fixture(autouse=True)
def memory_does_not_grow():
  """A test of 2,000 examples may not leave 300 MB behind."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  yield
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert after - before < 300 * 1024  # KiB


def _line(value) -> bytes:
  return json.dumps(value).encode("utf-8", "surrogatepass") + b"\n"


LINES = st.lists(
  st.one_of(
    RECORDS.map(_line),
    VALUES.map(_line),
    st.binary(max_size=40),
    st.just(b"[" * 3000 + b"\n"),
  ),
  max_size=5,
).map(b"".join)


@EXAMPLES
@given(data=LINES, kind=st.sampled_from(["", ".gz", ".xz"]), cut=st.integers(0))
def test_data_files(tmp_path_factory, data, kind, cut):
  pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[kind]
  packed = bytearray(pack(data))
  if packed and cut % 3 == 1:
    packed = packed[: cut % len(packed)]
  elif packed and cut % 3 == 2:
    packed[cut % len(packed)] ^= 1 << cut % 8
  path = tmp_path_factory.getbasetemp() / f"data.jsonl{kind}"
  path.write_bytes(bytes(packed))
  for field in ("prompts", "rows"):
    try:
      if field == "rows":
        found = list(rows.read(str(path)))
        assert all(isinstance(row, dict) for _, row in found)
        json.dumps([row for _, row in found], allow_nan=False).encode()
      else:
        loaded = prompts.load(
          path, default_task="open_ended", answer_pattern=prompts.GSM8K_ANSWER
        )
        assert all(p.prompt.strip() for p in loaded)
    except ValueError as error:
      assert str(path) in str(error) and len(str(error)) < 2_000


def _fields():
  config = tiny.get_config("smoke").to_dict()

  def walk(tree, prefix=""):
    for name, value in tree.items():
      if isinstance(value, dict) and value and name not in (
        "fields", "task_map", "math_fields", "card", "pool",
      ):  # fmt: skip
        yield from walk(value, f"{prefix}{name}.")
      else:
        yield f"{prefix}{name}"

  return sorted(walk(config))


EVERY = {"synthesize", "select", "sft", "rl", "evaluate", "report"}


@EXAMPLES
@given(
  changes=st.lists(
    st.tuples(st.sampled_from(_fields()), VALUES), min_size=1, max_size=3
  )
)
def test_config_values(changes):
  config = tiny.get_config("smoke").to_dict()
  for field, value in changes:
    *sections, name = field.split(".")
    section = config
    for one in sections:
      section = section[one]
    section[name] = value
  try:
    config_check.check(config, EVERY)
  except config_check.ConfigError as error:
    assert "nothing has been started" in str(error)


@pytest.fixture(scope="module")
def vocabulary():
  tokenizer = tokenizer_lib.Tokenizer.train_bpe(
    ["But wait, the user said so.\n\nHmm. However, let me think."] * 3, 300
  )
  table = thought_automaton.compile(
    thought.KEYWORDS,
    thought.SEPARATOR,
    "word",
    tokenizer.vocab_bytes,
    tokenizer.think_open_id,
    tokenizer.think_close_id,
  )
  return tokenizer, table


@EXAMPLES
@given(ids=st.lists(st.integers(0, 299), min_size=1, max_size=64))
def test_thoughts(vocabulary, ids):
  """The automaton on the device says what the definition says."""
  tokenizer, table = vocabulary
  ids = [i % tokenizer.vocab_size for i in ids]
  tokens = np.zeros((1, 64), np.int32)
  tokens[0, : len(ids)] = ids
  codes = automaton.run(table, tokens, np.asarray([len(ids)], np.int32))
  found = thought.from_codes(codes, 64)
  steps = thought.define(
    ids,
    tokenizer.vocab_bytes,
    tokenizer.think_open_id,
    tokenizer.think_close_id,
  )
  assert int(found.count[0]) == len(steps)
  for place, step in enumerate(steps):
    assert int(found.step_end[0, place]) == step.end
    assert bool(found.reflective[0, place]) == step.reflective


@EXAMPLES
@given(value=TEXT, filled=TEXT)
def test_templates(value, filled):
  try:
    text = templates.load(value, ("prompt",), "config.synthesis.template")
  except (ValueError, FileNotFoundError, OSError) as error:
    assert "synthesis.template" in str(error) or isinstance(error, OSError)
    return
  made = templates.fill(text, {"prompt": filled})
  assert made == text.replace("{prompt}", filled, 1)


@EXAMPLES
@given(text=TEXT, other=TEXT)
def test_words(text, other):
  begin = time.monotonic()
  normal = words.normal(text)
  assert words.normal(normal) == normal
  words.ngrams(words.split(text), 3)
  words.scripts(other)
  assert time.monotonic() - begin < 1.0


@EXAMPLES
@given(raw=st.binary(max_size=80), header=VALUES, length=st.integers(0, 400))
def test_safetensors_headers(tmp_path_factory, raw, header, length):
  folder = tmp_path_factory.getbasetemp() / "weights"
  folder.mkdir(exist_ok=True)
  text = json.dumps(header).encode("utf-8", "surrogatepass")
  size = length if length < 200 else len(text)
  (folder / tensor_files.SINGLE).write_bytes(
    size.to_bytes(8, "little") + text + raw
  )
  try:
    tensor_files.find(folder)
  except ValueError as error:
    assert tensor_files.SINGLE in str(error)


@EXAMPLES
@given(value=VALUES, raw=st.binary(max_size=30))
def test_generation_config(tmp_path_factory, value, raw):
  path = tmp_path_factory.getbasetemp() / "generation_config.json"
  for data in (_line({"eos_token_id": value}), _line(value), raw):
    path.write_bytes(data)
    try:
      ids = tokenizer_lib.end_ids(path)
      assert all(type(i) is int for i in ids)
    except ValueError as error:
      assert str(path) in str(error)


_PIECES = st.sampled_from(
  [
   "\\boxed{", "}", "{", "####", "\n#### ", "The answer is ", "Answer: ", "$",
   "$$", "\\(", "\\)", "\\[", "\\]", "\\frac", "\\frac12", "\\frac{1}{2}",
   "{2}",
   "\\sqrt{", "\\sqrt{16}", "\\text{", "\\text{cm}", "\\left(", "\\right)", "(",
   ")", "[", ",", ", ", "5", "-5", "\u22125", "12", "1,000", "1{,}000", "0.5",
   ".5", "5.", "1/2", "1 1/2", "\u00bd", "\u0665", "1e3", "1e999999999",
   "10^{9}", "^", "9^9", "!", "%", "\\%", "^\\circ", " cm", " m", " dollars",
   " million", "x", "x=", "=", "+", "-", "*", "/", "\\cdot ", "\\pi", "A",
   "(A)",
   "five", "minus ", " or ", " and ", "not ", ".", ". ", "\n", " ", "<think>",
   "</think>", "**", "\\begin{pmatrix}1&2\\end{pmatrix}", "\\int_0^1 x",
   "\\infty", "\\{1,2\\}", "Tuesday", "\ud800", "\x00", "\u0f73",
  ]
)  # fmt: skip
ANSWERS = st.lists(
  st.one_of(
    _PIECES,
    _PIECES,
    st.text(max_size=6),
    st.tuples(_PIECES, st.integers(1, 500)).map(lambda two: two[0] * two[1]),
  ),
  max_size=10,
).map("".join)


@EXAMPLES
@given(text=ANSWERS, reference=ANSWERS)
def test_maths_answers(text, reference):
  begin = time.monotonic()
  math_answer.final_answer(text)
  try:
    truth = math_answer.of_reference(reference)
  except ValueError as error:
    assert "needs a final answer" in str(error) and len(str(error)) < 1_000
  else:
    assert math_exact.right(text, reference) in (True, False, None)
    assert math_exact.same(truth.text, truth.text) is not False
    stated = math_answer.final_answer(f"\\boxed{{{truth.text}}}")
    assert stated is None or math_exact.same(stated.text, stated.text) in (
      True,
      None,
    )
  assert time.monotonic() - begin < 1.0


@settings(EXAMPLES, deadline=None)
@given(text=ANSWERS, reference=ANSWERS)
def test_maths_answers_by_the_library(text, reference):
  limit = 1.0
  begin = time.monotonic()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      (check,) = verifiable.check_many(
        [text], [reference], method="math_verify", timeout=limit, workers=1
      )
  except ValueError as error:
    assert "needs a final answer" in str(error)
  else:
    assert check.right is not None or check.cannot_tell
  # And the start of a process in place of one that was ended.
  assert time.monotonic() - begin < limit + 20.0


@EXAMPLES
@given(text=ANSWERS)
def test_completions(text):
  begin = time.monotonic()
  after = math_answer.after_thought(text)
  assert after is None or "<think>" not in after and "</think>" not in after
  format_lib.well_formed(text)
  probes.read(text)
  words.split(words.normal(text))
  assert time.monotonic() - begin < 1.0


JSON_FILES = st.one_of(
  VALUES.map(_line),
  st.dictionaries(
    st.sampled_from(
      ["format", "settings", "made_from", "sha256", "asked", "prompts", "step"]
    ),
    VALUES,
    max_size=5,
  ).map(_line),
  st.binary(max_size=60),
  st.just(b"[" * 100_000),
)


@EXAMPLES
@given(done=JSON_FILES, begun=JSON_FILES)
def test_records_of_a_stage(tmp_path_factory, done, begun):
  folder = tmp_path_factory.getbasetemp() / "run" / "sft"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "DONE.json").write_bytes(done)
  (folder / "SETTINGS.json").write_bytes(begun)
  for read in (
    lambda: workdir.result(folder.parent, "sft"),
    lambda: workdir.settings(folder.parent, "sft"),
    lambda: workdir.model(folder.parent, "sft"),
    lambda: workdir.Stage(folder.parent, "sft", {"a": 1}).finished(),
  ):
    try:
      read()
    except ValueError as error:
      assert str(folder) in str(error)


@EXAMPLES
@given(
  listing=st.one_of(
    JSON_FILES,
    st.dictionaries(TEXT, st.lists(NUMBERS, max_size=3), max_size=3).map(_line),
  )
)
def test_lists_of_files(tmp_path_factory, listing):
  folder = tmp_path_factory.getbasetemp() / "listed"
  folder.mkdir(exist_ok=True)
  (folder / "FILES.json").write_bytes(listing)
  assert checkpoint._fault(epath.Path(folder))
  assert isinstance(traces.damage(folder), str)


@EXAMPLES
@given(lines=LINES, last=st.one_of(st.none(), st.integers(0, 9)))
def test_metrics_files(tmp_path_factory, lines, last):
  path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
  path.write_bytes(lines)
  try:
    assert all(isinstance(line, dict) for line in metrics.read(path))
    metrics._truncate(path, last)
  except ValueError as error:
    assert str(path) in str(error)


@EXAMPLES
@given(
  row=st.one_of(
    VALUES,
    st.fixed_dictionaries(
      {
        **{n: TEXT for n in ("id", "prompt", "reference", "thought", "answer")},
        "status": TEXT,
        "completion": st.one_of(VALUES, st.lists(NUMBERS, max_size=3)),
        "rounds": st.one_of(VALUES, st.lists(VALUES, max_size=2)),
      }
    ),
  ),
  raw=st.text(max_size=30),
)
def test_traces(row, raw):
  for text in (json.dumps(row) + "\n", raw, "[" * 100_000 + "\n"):
    try:
      traces.from_line("f.jsonl:1:", text)
    except ValueError as error:
      assert "f.jsonl:1:" in str(error)


@EXAMPLES
@given(content=JSON_FILES)
def test_pieces_of_a_stage(tmp_path_factory, content):
  folder = tmp_path_factory.getbasetemp() / "pieces"
  pieces = partial_results.PartialResults(folder)
  (folder / "a.json").write_bytes(content)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    made = pieces.get("a", lambda: 3)
    # Whatever stood there is the piece, or it is made again and kept.
    assert made == 3 or b"piece" in content
    json.dumps(pieces.get("a", lambda: 4))
    if made == 3:
      assert pieces.get("a", lambda: 4) == 3
