"""Data sets are read whole or refused with the place named."""

import contextlib
import gzip
import json
import lzma
import time

import growth
import pytest

from opera_jax import structs
from opera_jax.configs import common
from opera_jax.data import prompts
from opera_jax.text import tokenizer

GOOD = {"id": "a", "task": "math", "prompt": "1 + 1?", "reference": "2"}


def write(path, rows):
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  data = ("\n".join(lines) + "\n").encode()
  opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
  with opener(path, "wb") as file:
    file.write(data)
  return path


@pytest.fixture(scope="module")
def small():
  return tokenizer.Tokenizer.train_bpe(["some text"], 261)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz"])
def test_jsonl(tmp_path, suffix):
  second = {"prompt": "Héllo", "reference": "x", "task": "chat", "score": 0.5}
  path = write(tmp_path / f"a{suffix}", [GOOD, "", second])
  loaded = prompts.load(
    path, task_map={"math": "math", "*": "open_ended"}, default_task=None
  )
  assert loaded == [
    structs.Prompt("a", "math", "1 + 1?", "2"),
    structs.Prompt("line-3", "open_ended", "Héllo", "x", {"score": 0.5}),
  ]
  assert len(prompts.load(path, limit=1)) == 1


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  table = pyarrow.table({"q": ["1?", "2?"], "a": ["1", "2"], "n": [7, 8]})
  parquet.write_table(table, tmp_path / "a.parquet")
  loaded = prompts.load(
    tmp_path / "a.parquet",
    fields={"prompt": "q", "reference": "a", "id": "n"},
    default_task="math",
  )
  assert loaded[1] == structs.Prompt("8", "math", "2?", "2")


def test_parquet_that_is_none(tmp_path):
  path = write(tmp_path / "a.parquet", [GOOD])
  with pytest.raises(ValueError, match="cannot be read as Parquet"):
    prompts.load(path)


def test_the_open_ended_tasks(shared_data):
  loaded = prompts.load(
    shared_data / "open_ended" / "train.jsonl",
    task_map={"*": "open_ended"},
  )
  assert len(loaded) == 438
  assert {prompt.task for prompt in loaded} == {"open_ended"}
  assert set(loaded[0].columns) == {"category", "reference_model"}


def test_gsm8k(shared_data):
  loaded = prompts.load(
    shared_data / "gsm8k" / "train.jsonl",
    fields={"prompt": "question", "reference": "answer"},
    default_task="math",
    answer_pattern=prompts.GSM8K_ANSWER,
  )
  assert len(loaded) == 7_473
  assert loaded[0].id == "line-1" and loaded[0].reference == "72"
  assert all("#" not in prompt.reference for prompt in loaded)
  assert all("####" in prompt.columns["solution"] for prompt in loaded)


@pytest.mark.parametrize(
  "row,rule",
  [
    ("{nonsense", r"a.jsonl:2: .*not a line of JSON"),
    ('{"prompt": "\\ud8"}', r"a.jsonl:2: "),
    (GOOD | {"prompt": "\ud83d"}, r":2: 'prompt' .* UTF-8 can write"),
    ("[1]", r"a.jsonl:2: .*no JSON object"),
    ({"prompt": "x", "task": "math"}, r":2: no column 'reference'"),
    (GOOD | {"reference": " \n"}, r":2: 'reference' is empty"),
    (GOOD | {"prompt": None}, r":2: 'prompt' is None; .* must be text"),
    (GOOD | {"reference": 2}, r":2: 'reference' is 2; .* must be text"),
    (GOOD | {"id": "b", "task": "poem"}, r":2: task is 'poem'.*task_map"),
    (GOOD | {"id": "b", "task": None}, r":2: task is None.*default_task"),
    (GOOD | {"id": True}, r":2: id is True"),
    (GOOD, r":2: id 'a' was given on line 1"),
  ],
)
def test_bad_rows(tmp_path, row, rule):
  path = write(tmp_path / "a.jsonl", [GOOD, row])
  with pytest.raises(ValueError, match=rule):
    prompts.load(path)


def test_all_problems_of_a_file_come_at_once(tmp_path):
  """With counts by reason, the places of the first, and nothing unbounded."""
  lines = [GOOD, "{nonsense", "[1]"]
  lines += [GOOD | {"id": f"e{i}", "prompt": " "} for i in range(500)]
  lines += [GOOD, GOOD | {"id": "c", "task": "poem"}, {"prompt": "x" * 4_000}]
  path = write(tmp_path / "a.jsonl", lines)
  with pytest.raises(ValueError) as error:
    prompts.load(path)
  said = str(error.value)
  assert said.startswith(f"{path}: 505 rows cannot be used:")
  for expected in (
    f"500 x the prompt is empty: {path}:4: 'prompt' is empty",
    f"also {path}:5, {path}:6 and 497 more",
    f"1 x not a line of JSON: {path}:2:",
    f"1 x no JSON object: {path}:3:",
    f"1 x an id that another row has: {path}:504: id 'a' was given on line 1",
    f"1 x unknown task: {path}:505: task is 'poem'",
    f"1 x no column for the reference: {path}:506:",
  ):
    assert expected in said, expected
  assert len(said.splitlines()) < 12 and len(said) < 3_000


def test_a_file_without_the_column_of_tasks_is_open_ended(tmp_path):
  rows = [{"prompt": f"{i}?", "reference": "#### 1"} for i in range(3)]
  path = write(tmp_path / "a.jsonl", rows)
  assert {p.task for p in prompts.load(path)} == {"open_ended"}
  assert {p.task for p in prompts.load(path, default_task="math")} == {"math"}
  # Beside rows that have one, what a row without means is anybody's guess.
  write(path, [*rows, GOOD, rows[0]])
  with pytest.raises(ValueError) as error:
    prompts.load(path)
  assert "4 x no task, which other rows have: " in str(error.value)
  assert f"{path}:1: task is None" in str(error.value)


@pytest.mark.parametrize(
  "reference", ["x ####  ", "$", ".", r"\boxed{}", "####", "...", r"\text{}"]
)
def test_a_maths_reference_without_an_answer(tmp_path, reference):
  row = GOOD | {"id": "b", "reference": reference}
  path = write(tmp_path / "a.jsonl", [GOOD, row])
  with pytest.raises(ValueError, match=r"a.jsonl:2: .*needs a final answer"):
    prompts.load(path)
  write(path, [GOOD, row | {"task": "open_ended"}])
  assert prompts.load(path)[1].reference == reference


HOSTILE = [" ", "#### ", "####x", "#", "#### \n", "x ", "####\n\n"]


@pytest.mark.parametrize("unit", HOSTILE)
def test_no_reference_takes_long_to_search(tmp_path, unit):
  def make(size):
    row = GOOD | {"reference": "####" + unit * (size // len(unit)) + "x\n"}
    return write(tmp_path / f"{size}.jsonl", [row])

  def call(path):
    with contextlib.suppress(ValueError):
      prompts.load(path, answer_pattern=prompts.GSM8K_ANSWER)

  assert growth.twice_doubled(call, make, 50_000) < growth.LINEAR


@pytest.mark.parametrize(
  "pattern,reference",
  [
    (r"####\s*(.+?)\s*$", "####" + " " * 20_000 + "x\ny"),
    (r"((?:a|aa)+)$", "a" * 60 + "b"),
  ],
)
def test_a_pattern_that_tries_many_ways_is_stopped(
  tmp_path, pattern, reference
):
  path = write(tmp_path / "a.jsonl", [GOOD | {"reference": reference}])
  begin = time.monotonic()
  with pytest.raises(ValueError, match=r"a.jsonl:1: .* longer than 1 s"):
    prompts.load(path, answer_pattern=pattern)
  assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
  "pattern,said",
  [
    ("(", "is no regular expression"),
    ("", "has no group"),
    ("####", "no group"),
  ],
)
def test_a_pattern_that_is_none(tmp_path, pattern, said):
  path = write(tmp_path / "a.jsonl", [GOOD])
  with pytest.raises(ValueError, match=f"{said}.*config.data.math_answer"):
    prompts.load(path, answer_pattern=pattern)


def test_a_group_that_took_no_part(tmp_path):
  path = write(tmp_path / "a.jsonl", [GOOD])
  with pytest.raises(ValueError, match=":1: reference '2' holds no answer"):
    prompts.load(path, answer_pattern="(5)?")


def test_the_default_is_the_pattern_of_gsm8k():
  default = common.get_config().data.math_answer
  assert default == prompts.GSM8K_ANSWER


def test_a_pattern_that_finds_no_answer(tmp_path):
  row = GOOD | {"reference": "1 + 1\n#### $"}
  path = write(tmp_path / "a.jsonl", [row])
  with pytest.raises(ValueError, match=r"a.jsonl:1: .*reference '\$'"):
    prompts.load(path, answer_pattern=prompts.GSM8K_ANSWER)


def test_bad_bytes(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe{}\n")
  with pytest.raises(ValueError, match="a.jsonl:2: .* UTF-8"):
    prompts.load(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.xz"])
def test_a_file_that_breaks_off(tmp_path, suffix):
  path = write(tmp_path / f"a{suffix}", [GOOD])
  path.write_bytes(path.read_bytes()[:-12])
  with pytest.raises(ValueError, match="breaks off"):
    prompts.load(path)


def test_answer_pattern(tmp_path):
  path = write(tmp_path / "a.jsonl", [GOOD])
  with pytest.raises(ValueError, match=":1: reference '2' holds no answer"):
    prompts.load(path, answer_pattern=prompts.GSM8K_ANSWER)


def test_the_solution_stays_beside_the_answer(tmp_path):
  row = GOOD | {"reference": "1 + 1 = 2.\n#### 2"}
  path = write(tmp_path / "a.jsonl", [row])
  pattern = prompts.GSM8K_ANSWER
  (loaded,) = prompts.load(path, answer_pattern=pattern)
  assert loaded.reference == "2"
  assert loaded.columns == {"solution": row["reference"]}


def test_bad_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    prompts.load(tmp_path / "none.jsonl")
  with pytest.raises(ValueError, match="unknown kind of file"):
    prompts.load(write(tmp_path / "a.csv", [GOOD]))
  with pytest.raises(ValueError, match="no rows read"):
    prompts.load(write(tmp_path / "b.jsonl", [""]))
  path = write(tmp_path / "c.jsonl", [GOOD])
  with pytest.raises(ValueError, match="keys must be among"):
    prompts.load(path, fields={"prompt": "prompt", "answer": "reference"})


def test_what_is_too_long_is_counted(small):
  made = [
    structs.Prompt(str(i), "open_ended", "x" * n, "y" * m)
    for i, (n, m) in enumerate([(1, 1), (50, 1), (1, 50), (50, 50), (2, 2)])
  ]
  limit = len(small.chat_prompt("xx"))
  sizes = prompts.token_lengths(made, small)
  kept, counts = prompts.filter_by_length(made, sizes, limit, 2)
  assert [prompt.id for prompt in kept] == ["0", "4"]
  assert counts == {"kept": 2, "prompt_too_long": 2, "reference_too_long": 1}
  with pytest.raises(ValueError, match="to 69 tokens, .* to 50. Raise the lim"):
    prompts.filter_by_length(made, sizes, 3, 2)
  empty = [structs.Prompt("e", "open_ended", "x", "")]
  with pytest.raises(ValueError, match="'e': .* zero tokens"):
    lengths = prompts.token_lengths(empty, small)
    prompts.filter_by_length(empty, lengths, limit, 2)


def test_split_is_disjoint_and_knows_only_the_text():
  made = [
    structs.Prompt(str(i), "math", f"text {i % 40}", "r") for i in range(60)
  ]
  train, held = prompts.split(made, 13, seed=0)
  assert len(held) == 13 and len(train) == 47
  texts = {prompt.prompt for prompt in train}
  assert texts.isdisjoint(prompt.prompt for prompt in held)
  again = prompts.split(made[::-1], 13, seed=0)[1]
  assert {p.id for p in again} == {p.id for p in held}
  assert {p.id for p in prompts.split(made, 13, seed=1)[1]} != {
    p.id for p in held
  }
  with pytest.raises(ValueError, match="leave one to train on"):
    prompts.split(made, 60, seed=0)
  same = ["What is it?", "what is it? ", "  What\n is it?", "WHAT IS IT?"]
  others = [f"other {i}" for i in range(8)]
  for seed in range(8):
    mixed = [
      structs.Prompt(str(i), "math", text, "r")
      for i, text in enumerate([*same, *others])
    ]
    train, held = prompts.split(mixed, 6, seed=seed)
    sides = [sum(p.prompt in same for p in side) for side in (train, held)]
    assert sorted(sides) == [0, 4]
  named = ["a", "b"] * 6
  train, held = prompts.split(mixed, 6, seed=0, groups=named)
  assert len({named[int(p.id)] for p in held}) == 1
  twins = [structs.Prompt(str(i), "math", "same", "r") for i in range(3)]
  with pytest.raises(ValueError, match="cannot be held out whole"):
    prompts.split(twins, 2, seed=0)


def test_the_default_stands_for_tasks_that_the_map_lacks(tmp_path):
  rows = [
    {"prompt": "a?", "reference": "1", "task": task}
    for task in ("poem", "math", None)
  ]
  path = write(tmp_path / "a.jsonl", rows)
  ours = {"math": "math"}
  loaded = prompts.load(path, task_map=ours, default_task="open_ended")
  assert [p.task for p in loaded] == ["open_ended", "math", "open_ended"]
  with pytest.raises(
    ValueError, match=r"'poem'.*\{'math': 'math'\}.*default_task=open_ended"
  ):
    prompts.load(path, task_map=ours)
