"""Loads the tasks of a run, and the pretraining documents of its base model."""

import dataclasses
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from opera_jax import structs
from opera_jax.data import digest, drafts, mixture, rows, storyworld, sums
from opera_jax.data import prompts as prompts_lib
from opera_jax.sharding import exchange
from opera_jax.synthesis import dedup
from opera_jax.text import words

# Arguments of `read` and `load` that name the files.
FILES = (
  "path",
  "mix",
  "fields",
  "task_map",
  "default_task",
  "math_path",
  "math_fields",
  "math_answer",
  "math_limit",
)


@dataclasses.dataclass(frozen=True)
class Tasks:
  """The tasks of each stage."""

  synthesis: list[structs.Prompt]
  rl: list[structs.Prompt]
  held_out: list[structs.Prompt]
  documents: list[structs.Document]  # for pretraining
  notes: tuple[str, ...] = ()  # messages on dropped or truncated tasks
  # (place, SHA-256) of each source, keyed by field of config.data, or by the
  # stage that selected prompts.
  digests: Mapping[str, tuple[str, str]] = dataclasses.field(
    default_factory=dict
  )
  # Weight of each data set in RL's batches; {} without a mix.
  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)


def load(
  *,
  kind: str,
  seed: int,
  synthesis: int,
  rl: int,
  held_out: int,
  documents: int,
  math_share: float,
  path: str,
  fields: Mapping[str, str],
  task_map: Mapping[str, str],
  default_task: str,
  prompt_words: int,
  excerpt_words: int,
  math_path: str,
  math_fields: Mapping[str, str],
  math_answer: str,
  math_limit: int,
  responses_path: str,
  near_duplicate: float = 0.0,
  mix: Sequence[Any] = (),
  shares: Sequence[float] = (),
  needs: Mapping[str, int] | None = None,
) -> Tasks:
  """Loads or generates the tasks.

  Args:
    kind: "storyworld", generated from the seed, or "jsonl".
    seed: of generation and splitting.
    synthesis: tasks for the cold start.
    rl: tasks for RL (jsonl: at most this many; may overlap with the cold
      start).
    held_out: tasks that no training stage sees.
    documents: pretraining documents; 0 if the base model is loaded.
    math_share: fraction of storyworld's tasks and documents that are sums.
    path: source of tasks, see `data.rows`; "" for maths tasks only. Tasks
      without a reference are used only by the cold start.
    fields: our field -> column of `path`.
    task_map: value of the task column -> "open_ended" or "math".
    default_task: task of rows of `path` without one; "" means open-ended for a
      source without that column, and makes such rows errors in another.
    prompt_words: longer prompts, in words, are dropped and counted; 0 keeps
      all. (`prompts.filter_by_length` later drops prompts with too many
      tokens.)
    excerpt_words: open-ended references and answers of documents are truncated
      to this many words, see `drafts.excerpt`; 0 keeps them whole.
    math_path: source of maths tasks, "" for none.
    math_fields: our field -> column of `math_path`.
    math_answer: regular expression whose first group is the true answer.
    math_limit: maximum maths tasks, 0 for all; the other rows of the file only
      become pretraining documents.
    responses_path: JSONL of `id, score, response` from which documents are
      built; "" uses the references.
    near_duplicate: word 3-gram Jaccard index from which two tasks go to the
      same side of the split; 0 keeps only tasks together that differ in case,
      width or spacing.
    mix: sources in place of `path`, with their weights in RL's batches, see
      `mixture`; `math_path` may be one of them. RL's tasks are then chosen by
      weight, too, unless there are `shares`.
    shares: fractions of the tasks with a reference for (cold start, RL, held
      out), which share no task then; they replace the three counts of jsonl. ()
      keeps the counts. The cold start takes tasks without a reference, too.
    needs: the least tasks that the stages of this run work with, by
      "synthesis", "rl" and "held_out"; a stage that does not run needs none.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: an unknown kind, invalid rows, or too few tasks.
  """
  if kind == "storyworld":
    unseen: set[str] = set()

    def both(
      story: Callable[[int, int], list[Any]],
      sum_: Callable[[int, int], list[Any]],
      count: int,
      seed_: int,
    ) -> list[Any]:
      num_sums = round(count * math_share)
      return sums.mixed(
        _not_held_out(story, count - num_sums, seed_, unseen),
        _not_held_out(sum_, num_sums, seed_, unseen),
        seed_,
      )

    held = both(storyworld.prompts, sums.prompts, held_out, seed + 3)
    unseen.update(words.normal(p.prompt) for p in held)
    return Tasks(
      synthesis=both(storyworld.prompts, sums.prompts, synthesis, seed + 1),
      rl=both(storyworld.prompts, sums.prompts, rl, seed + 2),
      held_out=held,
      documents=both(storyworld.corpus, sums.corpus, documents, seed),
    )
  if kind != "jsonl":
    raise ValueError(
      f"Unknown config.data.kind {kind!r}; use 'storyworld' or 'jsonl'."
    )
  every, more_maths, digests = read(
    path,
    mix=mix,
    fields=fields,
    task_map=task_map,
    default_task=default_task,
    math_path=math_path,
    math_fields=math_fields,
    math_answer=math_answer,
    math_limit=math_limit,
  )
  every, notes = _shortened(every, prompt_words, excerpt_words)
  more_maths, _ = _shortened(more_maths, prompt_words, excerpt_words)
  bare = [p for p in every if not p.reference]
  every = [p for p in every if p.reference]
  if shares:
    # A fraction that is written in decimals may be a little too small.
    synthesis, rl, held_out = (
      int(share * len(every) + 1e-9) for share in shares
    )
  sets = mixture.parse(mix)
  places = [one.source for one in sets] or filter(None, (path, math_path))
  weights = {one.name: one.weight for one in sets}
  _check_counts(
    " and ".join(places),
    len(every),
    len(bare),
    {"synthesis": synthesis, "rl": rl, "held_out": held_out},
    needs or {},
    shares,
  )
  groups = dedup.clusters(every, threshold=near_duplicate)
  train, held = prompts_lib.split(
    every, held_out, seed, groups=groups, exact=not shares
  )
  same = len(every) - len(set(groups))
  if same:
    near = f" or share {near_duplicate:g} of its 3-grams" * (near_duplicate > 0)
    notes.append(
      f"{same} tasks have the same prompt as another one{near}; such tasks "
      "stay on one side of the split."
    )
  unseen = {words.normal(p.prompt) for p in held}
  leaked = [p for p in bare if words.normal(p.prompt) in unseen]
  if leaked:
    notes.append(
      f"{len(leaked)} open-ended tasks without a reference have the prompt of "
      "a held-out task; they are dropped."
    )
    bare = [p for p in bare if words.normal(p.prompt) not in unseen]
  rng = random.Random(f"tasks/{seed}")
  if shares:
    drawn = rng.sample(train, synthesis + rl)
    chosen = {
      "synthesis": [*drawn[:synthesis], *(bare if shares[0] else ())],
      "rl": drawn[synthesis:],
    }
  else:
    for_synthesis = [*train, *bare]
    chosen = {
      "synthesis": rng.sample(
        for_synthesis, min(synthesis, len(for_synthesis))
      ),
      "rl": _by_weight(train, rl, weights, rng)
      if weights
      else rng.sample(train, min(rl, len(train))),
    }
  notes.insert(
    0,
    "; ".join(
      f"{name}: {_count(prompts)}"
      for name, prompts in (*chosen.items(), ("held out", held))
    )
    + ".",
  )
  if bare:
    notes.append(
      f"{len(bare)} open-ended tasks have no reference; only the cold start "
      "uses them."
    )
  made: list[Any] = []
  if documents:
    responses = digest.Source(exchange.read_file)
    made, drafted = _documents(
      train,
      [p for p in more_maths if words.normal(p.prompt) not in unseen],
      responses_path,
      count=documents,
      seed=seed,
      words=excerpt_words,
      read_file=responses.read,
    )
    notes += drafted
    if responses_path:
      digests["responses_path"] = responses_path, responses.hexdigest()
  for note in notes:
    print(f"tasks: {note}", flush=True)
  return Tasks(
    **chosen,
    held_out=held,
    documents=made,
    notes=tuple(notes),
    digests=digests,
    weights=weights,
  )


def _by_weight(
  train: Sequence[structs.Prompt],
  count: int,
  weights: Mapping[str, float],
  rng: random.Random,
) -> list[structs.Prompt]:
  """Chooses tasks of every set by its weight, in random order."""
  by_set = {name: [p for p in train if p.set == name] for name in weights}
  taken = mixture.quotas(
    {name: len(mine) for name, mine in by_set.items()}, weights, count
  )
  chosen = [
    p for name, mine in by_set.items() for p in rng.sample(mine, taken[name])
  ]
  rng.shuffle(chosen)
  return chosen


def _check_counts(
  place: str,
  total: int,
  bare: int,
  counts: Mapping[str, int],
  needs: Mapping[str, int],
  shares: Sequence[float],
) -> None:
  """Refuses a data set that is too small for the stages of a run.

  Args:
    place: of the data.
    total: tasks with a reference.
    bare: tasks without one, for the cold start.
    counts: tasks asked for, by field of config.data.
    needs: see `load`.
    shares: likewise.

  Raises:
    ValueError: names each field that is too large, and values that fit.
  """
  held_out = counts["held_out"]
  train = total - held_out
  # Tasks that a stage gets: RL draws after the cold start from the same ones.
  given = {
    "synthesis": counts["synthesis"],
    "rl": min(counts["rl"], max(train, 0)),
    "held_out": held_out,
  }
  short = {n: least for n, least in needs.items() if given[n] < least}
  too_many = needs.get("synthesis", 0) and counts["synthesis"] > train + bare
  if train > 0 and not short and not (too_many and not shares):
    return
  asked = ", ".join(f"{name} {count:,}" for name, count in counts.items())
  lines = [
    f"{place}: {total:,} tasks are left with a reference"
    + (f" and {bare:,} without one" if bare else "")
    + f", too few for {'config.data.shares: ' * bool(shares)}{asked}."
  ]
  if train <= 0:
    lines.append(
      f"config.data.held_out is {held_out:,}, and some must be left to train "
      "on."
    )
  if too_many and train > 0:
    lines.append(
      f"config.data.synthesis is {counts['synthesis']:,} prompts and only "
      f"{train + bare:,} remain beside {held_out:,} held out."
    )
  for name, least in short.items():
    lines.append(_SHORT[name].format(given=given[name], least=least))
  held = min(held_out, total // 10) or min(1, held_out)
  left = total - held
  fitting = {"held_out": held, "synthesis": min(counts["synthesis"], left)}
  if needs.get("rl", 0) > left:
    # A power of two, which config.rl.mini_batch is likely to divide.
    fitting["rl.prompts"] = 1 << max(left, 1).bit_length() - 1
  flags = [
    f"--config.{'' if '.' in name else 'data.'}{name}={value}"
    for name, value in fitting.items()
    if value != counts.get(name)
  ]
  if flags and not shares:
    lines.append(f"These values fit: {' '.join(flags)}")
  lines.append(
    'Or divide what there is with --config.data.shares="(0.4,0.5,0.1)" (cold '
    "start, RL, held out), raise config.data.prompt_words, or add tasks."
  )
  raise ValueError("\n  ".join(lines))


# What a stage lacks.
_SHORT = {
  "synthesis": "The cold start gets {given:,} tasks and needs {least:,}.",
  "rl": (
    "RL gets {given:,} tasks and takes config.rl.prompts = {least:,} in each "
    "step; lower that, or give it more (config.data.rl)."
  ),
  "held_out": "Evaluation gets {given:,} tasks and needs {least:,}.",
}


def _not_held_out(
  make: Callable[[int, int], list[Any]],
  count: int,
  seed: int,
  held_out: Collection[str],
) -> list[Any]:
  """The first `count` items of `make(n, seed)` whose prompt is not held out."""
  more = count
  while True:
    every = make(more, seed)
    kept = [x for x in every if words.normal(x.prompt) not in held_out]
    if len(kept) >= count:
      return kept[:count]
    if more > 100 * count:
      raise ValueError(
        f"Of {more:,} generated prompts only {len(kept):,} are not among the "
        f"{len(held_out):,} held out, and {count:,} are needed. Lower "
        "config.data.held_out."
      )
    more += 2 * (count - len(kept))


def read(
  path: str,
  *,
  mix: Sequence[Any] = (),
  fields: Mapping[str, str],
  task_map: Mapping[str, str],
  default_task: str,
  math_path: str,
  math_fields: Mapping[str, str],
  math_answer: str,
  math_limit: int,
) -> tuple[
  list[structs.Prompt], list[structs.Prompt], dict[str, tuple[str, str]]
]:
  """Reads all tasks of all sources, the maths rows beyond the limit, and
  digests.

  Open-ended tasks may lack a reference. The arguments are those of `load`, the
  digests those of `Tasks`.

  Raises:
    ValueError: names the invalid rows of all sources.
  """
  if not path and not math_path and not mix:
    raise ValueError(
      "config.data.path and config.data.math_path are both empty. Name a "
      "file of tasks with --config.data.path=FILE."
    )
  every: list[structs.Prompt] = []
  more_maths: list[structs.Prompt] = []
  digests, faults = {}, []
  # (field of the digest, set, source); ids of two sources may clash.
  sources = [
    (f"data.mix/{one.name}", one.name, one.source) for one in mixture.parse(mix)
  ]
  if not mix:
    sources = [
      (field, "", place)
      for field, place in (("path", path), ("math_path", math_path))
      if place
    ]
  for field, name, place in sources:
    source = digest.Source(exchange.read_file)
    maths = place == math_path and field != "path"
    try:
      if maths:
        found = prompts_lib.load(
          place,
          fields=math_fields,
          default_task="math",
          answer_pattern=math_answer,
          read=source.read,
          seen=source.row,
        )
      else:
        found = _with_tasks(place, source, fields, task_map, default_task)
    except ValueError as error:  # the other sources may have bad rows, too
      faults.append(error)
      continue
    digests[field] = place, source.hexdigest()
    prefix = name or ("math" if maths else "")
    if prefix:
      found = [
        dataclasses.replace(p, id=f"{prefix}/{p.id}", set=name) for p in found
      ]
    limit = math_limit if maths and math_limit else len(found)
    every += found[:limit]
    more_maths += found[limit:]
  if len(faults) == 1:
    raise faults[0]
  if faults:
    raise ValueError("\n".join(map(str, faults)))
  return every, more_maths, digests


def _with_tasks(
  path: str,
  source: digest.Source,
  fields: Mapping[str, str],
  task_map: Mapping[str, str],
  default_task: str,
) -> list[structs.Prompt]:
  """Reads a source whose rows say what task they are of, or are open-ended."""
  column, has_tasks = fields.get("task") or None, False

  def seen(row: Mapping[str, Any]) -> None:
    nonlocal has_tasks
    has_tasks = has_tasks or column in row
    source.row(row)

  found = prompts_lib.load(
    path,
    fields=fields,
    task_map=task_map,
    default_task=default_task or None,
    read=source.read,
    require_reference=False,
    seen=seen,
  )
  if not has_tasks and not default_task:
    print(
      f"tasks: {path} has no column {column!r}, so its {len(found):,} tasks "
      "are open-ended (config.data.default_task).",
      flush=True,
    )
  return found


def _shortened(
  every: Sequence[structs.Prompt], prompt_words: int, excerpt_words: int
) -> tuple[list[structs.Prompt], list[str]]:
  """Drops long prompts, truncates open-ended references, and reports both
  counts."""
  kept = [
    p
    for p in every
    if not prompt_words or len(p.prompt.split()) <= prompt_words
  ]
  notes, out, cut = [], [], 0
  if len(kept) < len(every):
    lost = [p for p in every if len(p.prompt.split()) > prompt_words]
    notes.append(
      f"Dropped {_count(lost)} whose prompt is longer than {prompt_words} "
      "words."
    )
  for prompt in kept:
    if prompt.task == "open_ended":
      reference = drafts.excerpt(prompt.reference, excerpt_words)
      cut += reference != prompt.reference.strip()
      prompt = dataclasses.replace(prompt, reference=reference)
    out.append(prompt)
  if cut:
    notes.append(
      f"The references of {cut} open-ended tasks are truncated to at most "
      f"{excerpt_words} words, at the end of a sentence if possible."
    )
  return out, notes


def _documents(
  train: Sequence[structs.Prompt],
  more_maths: Sequence[structs.Prompt],
  responses_path: str,
  *,
  count: int,
  seed: int,
  words: int,
  read_file: rows.Read,
) -> tuple[list[structs.Document], list[str]]:
  """Builds documents of training tasks; the fraction of maths is that of the
  tasks."""
  opened = [p for p in train if p.task == "open_ended"]
  maths = [p for p in train if p.task == "math"]
  worked = [p for p in (*maths, *more_maths) if drafts.solution(p)]
  if not opened and not worked:
    raise ValueError(
      f"None of {len(maths)} maths tasks has a worked solution (text before "
      "'####' in its reference), so there is nothing to pretrain on. Add "
      "solutions or open-ended tasks, or load a base model and set "
      "config.data.documents to 0."
    )
  for_maths = round(count * len(maths) / len(train)) if worked else 0
  if not opened:
    for_maths = count
  out, notes = [], []
  if opened:
    responses: dict[str, list[tuple[float, str]]] = {}
    empty, source = 0, "the references"
    if responses_path:
      responses, empty = drafts.read_responses(
        responses_path, {p.id for p in opened}, read_file
      )
      source = f"{sum(map(len, responses.values())):,} responses"
    out += drafts.open_ended(
      opened, responses, count=count - for_maths, seed=seed, words=words
    )
    notes.append(
      f"{count - for_maths:,} open-ended pretraining documents built from "
      f"{source} to {len(opened)} training prompts"
      + (f" ({empty} empty ones left out)." if empty else ".")
    )
  if for_maths:
    out += drafts.maths(worked, count=for_maths, seed=seed)
    notes.append(
      f"{for_maths:,} maths pretraining documents from {len(worked):,} worked "
      "solutions."
    )
  random.Random(f"documents/{seed}").shuffle(out)
  return out, notes


def _count(prompts: Sequence[structs.Prompt]) -> str:
  maths = sum(p.task == "math" for p in prompts)
  return f"{len(prompts) - maths} open-ended and {maths} maths tasks"
