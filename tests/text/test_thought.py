"""The device finds the very steps that the string definition names."""

import re

import numpy as np
import pytest

from opera_jax.text import automaton, thought, thought_automaton

LENGTH, STEPS = 64, 48


def table(
  tokenizer,
  match="word",
  separator="\n\n",
  keywords=thought.KEYWORDS,
  opened=False,
):
  return thought_automaton.compile(
    keywords,
    separator,
    match,
    tokenizer.vocab_bytes,
    tokenizer.think_open,
    tokenizer.think_close,
    opened=opened,
  )


def pad(rows, length=LENGTH):
  tokens = np.zeros((len(rows), length), np.int32)
  for row, values in zip(tokens, rows):
    row[: len(values)] = values
  return tokens, np.asarray([len(values) for values in rows], np.int32)


def assert_equal_to_definition(
  tokenizer,
  rows,
  match,
  separator="\n\n",
  keywords=thought.KEYWORDS,
  opened=False,
):
  tokens, length = pad(rows)
  compiled = table(tokenizer, match, separator, keywords, opened)
  found = thought.find(tokens, length, compiled, STEPS)
  count, end = np.asarray(found.count), np.asarray(found.step_end)
  reflective = np.asarray(found.reflective)
  kinds = [0, 0]
  for i, row in enumerate(rows):
    steps = thought.define(
      row,
      tokenizer.vocab_bytes,
      tokenizer.think_open,
      tokenizer.think_close,
      keywords,
      separator=separator,
      match=match,
      opened=opened,
    )
    n = len(steps)
    spelled = tokenizer.decode(row)
    assert count[i] == n, spelled
    assert reflective[i, :n].tolist() == [s.reflective for s in steps], spelled
    assert end[i, :n].tolist() == [s.end for s in steps], spelled
    assert not reflective[i, n:].any() and not end[i, n:].any()
    for step in steps:
      kinds[step.reflective] += 1
  return kinds


@pytest.mark.slow
def test_ten_thousand_sequences_of_qwens_vocabulary(qwen, hard_rows):
  rng = np.random.default_rng(0)
  rows = hard_rows(rng, qwen, 10_000, LENGTH)
  plain, reflective = assert_equal_to_definition(qwen, rows, "word")
  assert min(plain, reflective) > 4_000
  assert_equal_to_definition(qwen, rows, "substring")
  assert_equal_to_definition(qwen, rows[:2_000], "word", separator="\n")


def test_sequences_of_a_small_vocabulary(small, hard_rows):
  rng = np.random.default_rng(1)
  rows = hard_rows(rng, small, 2_000, LENGTH)
  assert_equal_to_definition(small, rows, "word")


class Pieces:
  """A vocabulary whose tokens hold whole steps."""

  think_open, think_close = 0, 1
  vocab_bytes = (
    *(None, None, None, b"", b"a", b" ", b"\n", b"but", b"B"),
    *(b"\n\n", b"ut", b"x\n\nbut\n\ny\n\nwait", b"\n\n\n\n", b"but\n\n\n"),
    *(b"\n\nz\n\n", b"\n\n\n\nq\n\n\n\nwait!\n\nhmm", b"but\n\n \n\nbutter"),
  )
  vocab_size = len(vocab_bytes)

  @staticmethod
  def decode(row):
    return str(list(row))


@pytest.mark.parametrize("match", ["word", "substring"])
@pytest.mark.parametrize("separator", ["\n\n", "\n", " \n"])
def test_tokens_that_hold_whole_steps(match, separator):
  rng = np.random.default_rng(2)
  rows = []
  for _ in range(1_000):
    body = rng.integers(2, Pieces.vocab_size, int(rng.integers(0, 9)))
    rows.append([0, *body.tolist(), 1])
  assert_equal_to_definition(Pieces, rows, match, separator)


class Strings:
  """A vocabulary that spells the tags over several tokens, or within one."""

  think_open, think_close = "<think>", "</think>"
  vocab_bytes = (
    *(None, b"<think>", b"<", b"<th", b"ink", b">", b">\n", b"a<think>but"),
    *(b"</think>", b"</", b".</", b"think", b"think>", b">\n\nwait", b"<<"),
    *(b"a", b" ", b"\n", b"\n\n", b"but", b" wait", b"b", b"ut", b"\n\n</"),
    *(b"x\n\nbut</think>\n\ny", b"\n\nhmm\n\n</think>", b">but\n\nc\n\nwait"),
    *(b"<think>a\n\nbut\n\nb</think>c", b"but</th", b"/think>", b"\n\nq<"),
  )
  vocab_size = len(vocab_bytes)

  @staticmethod
  def decode(row):
    return str([Strings.vocab_bytes[i] for i in row])


def rows_of_strings(rng, count):
  """Rows of random tokens in which most thoughts open and close."""
  spell = [[1], [3, 4, 5], [2, 11, 5], [7], [3, 4, 6], [3, 4, 26]]
  close = [[8], [9, 12], [9, 11, 13], [10, 11, 5], [14, 29], [23, 12], [30, 29]]
  rows = []
  for _ in range(count):
    parts = []
    for tags in (spell, close, close):
      parts += rng.integers(0, Strings.vocab_size, rng.integers(0, 7)).tolist()
      if rng.random() < 0.8:
        parts += tags[rng.integers(len(tags))]
    rows.append(parts)
  return rows


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("match", ["word", "substring"])
@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_tags_over_several_tokens(match, separator, opened):
  rows = rows_of_strings(np.random.default_rng(5), 2_000)
  # "think" is a part of the tags, "<b" begins as they do.
  keywords = ("But", "wait", "think", "<b", "k>")
  plain, reflective = assert_equal_to_definition(
    Strings, rows, match, separator, keywords, opened
  )
  assert min(plain, reflective) > 300
  for row in rows:
    text, _ = automaton.spell(row, Strings.vocab_bytes)
    opens = rb"\A" if opened else b"<think>"
    found = re.search(opens + b"(.*?)</think>", text, re.DOTALL)
    pieces = found[1].split(separator.encode()) if found else []
    steps = thought.define(
      row,
      Strings.vocab_bytes,
      *("<think>", "</think>", keywords, separator, match),
      opened=opened,
    )
    assert [s.text for s in steps] == [p.strip() for p in pieces if p.strip()]


def test_positions_of_tags_over_several_tokens():
  # "<th" "ink" ">\n" "a" "\n\n" "but" ".</" "think" ">" "b"
  row = [3, 4, 6, 15, 18, 19, 10, 11, 5, 21]
  tokens, length = pad([row])
  found = thought.find(tokens, length, table(Strings), STEPS)
  assert bool(found.closed[0])
  assert (int(found.start[0]), int(found.end[0])) == (3, 6)
  assert found.step_end[0, :3].tolist() == [5, 6, 0]
  tokens, length = pad([row[3:]])
  found = thought.find(tokens, length, table(Strings, opened=True), STEPS)
  assert (int(found.start[0]), int(found.end[0])) == (0, 3)
  assert found.step_end[0, :2].tolist() == [2, 3]


def test_a_thought_that_the_prompt_opened(small, hard_rows):
  rows = hard_rows(np.random.default_rng(6), small, 1_000, LENGTH)
  opens = [row[row != small.think_open_id] for row in rows]
  plain, reflective = assert_equal_to_definition(
    small, opens, "word", opened=True
  )
  assert min(plain, reflective) > 300
  inner = (small.vocab_bytes, small.think_open_id, small.think_close_id)
  for row in opens[:200]:
    here = thought.define(row, *inner, opened=True)
    there = thought.define([small.think_open_id, *row], *inner)
    assert [(s.text, s.reflective) for s in here] == [
      (s.text, s.reflective) for s in there
    ]
    assert [s.end + 1 for s in here] == [s.end for s in there]
  # A second <think> does not open it again.
  assert_equal_to_definition(small, rows, "word", opened=True)


def test_step_ends_token_by_token(qwen, hard_rows):
  """Position p completes step j once the text of p tokens cuts it off."""
  rng = np.random.default_rng(3)
  rows = hard_rows(rng, qwen, 400, LENGTH)
  tokens, length = pad(rows)
  found = thought.find(tokens, length, table(qwen), STEPS)
  for i, row in enumerate(rows):
    if not found.closed[i]:
      continue
    start, stop = int(found.start[i]), int(found.end[i])
    assert row[start - 1] == qwen.think_open_id
    assert row[stop] == qwen.think_close_id
    ends = []
    for p in range(start, stop + 1):
      pieces = [
        b"\xff"
        if t >= qwen.vocab_size or qwen.vocab_bytes[t] is None
        else qwen.vocab_bytes[t]
        for t in row[start:p]
      ]
      cut = b"".join(pieces).split(b"\n\n")
      done = cut if p == stop else cut[:-1]
      complete = sum(bool(piece.strip()) for piece in done)
      ends += [p] * (complete - len(ends))
    assert np.asarray(found.step_end)[i, : len(ends)].tolist() == ends
    assert int(found.count[i]) == len(ends)


def test_a_worked_example(small):
  text = "Plan.\n\nBut wait.\n\n \n\nAttribute.\n\nhowever"
  row = np.concatenate(
    [
      small.encode_template(f"<think>\n{text}\n</think>\n\nBut no."),
    ]
  )
  found = thought.find(*pad([row]), table(small), 8)
  assert int(found.count[0]) == 4
  assert found.reflective[0, :4].tolist() == [False, True, False, True]
  for j, prefix in enumerate(["Plan.\n\n", "Plan.\n\nBut wait.\n\n"]):
    spelled = small.decode(row[: int(found.step_end[0, j])])
    assert spelled.startswith(f"<think>\n{prefix}".rstrip("\n"))
  assert int(found.step_end[0, 3]) == int(found.end[0])


@pytest.mark.parametrize(
  "text",
  ["no tags", "<think>a\n\nBut", "a</think>But", "</think>But<think>a", ""],
)
def test_no_closed_thought_no_steps(small, text):
  row = small.encode_template(text)
  found = thought.find(*pad([row]), table(small), 4)
  assert not found.closed[0] and int(found.count[0]) == 0
  assert not np.asarray(found.step_end).any()


def test_padding_is_ignored(small):
  row = small.encode_template("<think>a\n\nBut</think>x")
  tokens, length = pad([row, row])
  tokens[1] = small.encode("But\n\n")[0]
  tokens[1, : len(row)] = row
  found = thought.find(tokens, length, table(small), 4)
  for leaf in (found.count, found.step_end, found.reflective, found.end):
    assert np.array_equal(leaf[0], leaf[1])
  found = thought.find(tokens, length - 2, table(small), 4)
  assert not found.closed.any()


def test_more_steps_than_are_kept_is_refused(small):
  row = small.encode_template("<think>a\n\nBut\n\nc\n\nwait</think>")
  tokens, length = pad([row])
  found = thought.find(tokens, length, table(small), 2)
  assert int(found.count[0]) == 2
  assert found.reflective[0].tolist() == [False, True]
  codes = automaton.run(table(small), tokens, length)
  total = thought.total_steps(codes)
  assert total.tolist() == [4]
  thought.check_total(total, 4)
  with pytest.raises(ValueError, match="completion 0 has 4. Raise max_steps"):
    thought.check_total(total, 2)


def test_match_modes():
  assert thought.is_reflective(b"But no") and thought.is_reflective(b"(bUT)")
  assert not thought.is_reflective(b"attribute")
  assert thought.is_reflective(b"attribute", match="substring")
  assert thought.is_reflective("ébut".encode())
  assert not thought.is_reflective(b"but_1 9wait")
  assert not thought.is_reflective(b"but", keywords=())
