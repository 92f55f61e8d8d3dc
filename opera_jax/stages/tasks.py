"""The tasks of a run, and the documents its base model is pretrained on."""

import dataclasses
import json
import lzma
import pathlib
import random
import re
from collections.abc import Mapping, Sequence

from opera_jax import structs
from opera_jax.data import prompts as prompts_lib
from opera_jax.data import storyworld


@dataclasses.dataclass(frozen=True)
class Tasks:
  """Disjoint tasks of the stages."""

  synthesis: list[structs.Prompt]
  rl: list[structs.Prompt]
  held_out: list[structs.Prompt]
  documents: list[structs.Document]  # for pretraining


def load(
  *,
  kind: str,
  seed: int,
  synthesis: int,
  rl: int,
  held_out: int,
  documents: int,
  path: str,
  fields: Mapping[str, str],
  task_map: Mapping[str, str],
  math_path: str,
  math_fields: Mapping[str, str],
  math_answer: str,
  math_limit: int,
  responses_path: str,
) -> Tasks:
  """Loads or makes the tasks.

  Args:
    kind: "storyworld", made from the seed, or "jsonl".
    seed: of the making and the splitting.
    synthesis: tasks for the cold start (jsonl: at most).
    rl: tasks for RL (jsonl: at most; may be those of the cold start).
    held_out: tasks that no training stage sees.
    documents: pretraining documents; 0 where the base model is loaded.
    path: JSONL or Parquet of open-ended tasks.
    fields: our field -> column of `path`.
    task_map: value of the task column -> "open_ended" or "math".
    math_path: JSONL of maths tasks, "" for none.
    math_fields: our field -> column of `math_path`.
    math_answer: regular expression whose first group is the true answer.
    math_limit: maths tasks used at most.
    responses_path: JSONL of `id, score, response`, the pretraining corpus.

  Raises:
    ValueError: an unknown kind, or a file without enough tasks.
  """
  if kind == "storyworld":
    return Tasks(
      synthesis=storyworld.prompts(synthesis, seed + 1),
      rl=storyworld.prompts(rl, seed + 2),
      held_out=storyworld.prompts(held_out, seed + 3),
      documents=storyworld.corpus(documents, seed),
    )
  if kind != "jsonl":
    raise ValueError(
      f"Unknown config.data.kind {kind!r}; use 'storyworld' or 'jsonl'."
    )
  if not path:
    raise ValueError(
      "config.data.kind is 'jsonl' and config.data.path is empty. Name a "
      "JSONL file of tasks with --config.data.path=FILE."
    )
  every = prompts_lib.load(path, fields=fields, task_map=task_map)
  if math_path:
    every += prompts_lib.load(
      math_path,
      fields=math_fields,
      default_task="math",
      answer_pattern=math_answer,
      limit=math_limit,
    )
  if held_out >= len(every):
    raise ValueError(
      f"{path} has {len(every)} tasks and config.data.held_out is "
      f"{held_out}; some must be left to train on. Lower it."
    )
  train, held = prompts_lib.split(every, held_out, seed)
  rng = random.Random(f"tasks/{seed}")
  return Tasks(
    synthesis=rng.sample(train, min(synthesis, len(train))),
    rl=rng.sample(train, min(rl, len(train))),
    held_out=held,
    documents=_drafted(train, responses_path, documents, seed)
    if documents
    else [],
  )


def _drafted(
  train: Sequence[structs.Prompt], path: str, count: int, seed: int
) -> list[structs.Document]:
  """Documents from many responses to each prompt: a draft, then an answer.

  Nobody wrote thoughts for these prompts. A document's thought is a few
  passages of one response, some opened by a reflection word, and its answer
  is a better-judged response; so the base model learns the form of thinking,
  with content that belongs to the prompt. Maths tasks think their worked
  solution. Held-out prompts give no document.
  """
  rng = random.Random(f"drafts/{seed}")
  by_id: dict[str, list[tuple[float, str]]] = {}
  if path:
    opener = lzma.open if path.endswith(".xz") else open
    with opener(pathlib.Path(path), "rt", encoding="utf-8") as file:
      for number, line in enumerate(file, start=1):
        try:
          row = json.loads(line)
          item = (float(row["score"]), str(row["response"]))
        except (ValueError, KeyError) as error:
          raise ValueError(
            f"{path}:{number}: not a response ({error}); a line needs id, "
            "score and response. Mend or drop the line."
          ) from error
        by_id.setdefault(row["id"], []).append(item)
  usable = [
    p for p in train if p.task == "math" or len(by_id.get(p.id, ())) > 1
  ]
  if not usable:
    raise ValueError(
      f"No training prompt has two responses in {path!r}; pretraining needs "
      "them. Set config.data.responses_path, or load a base model."
    )
  out = []
  for i in range(count):
    prompt = usable[i % len(usable)]
    if prompt.task == "math":
      worked = str(prompt.columns.get("answer", prompt.reference))
      steps = worked.split("####")[0].strip().split("\n")
      answer = f"The answer is {prompt.reference}."
    else:
      worse, better = sorted(rng.sample(by_id[prompt.id], 2))
      steps = [_opened(rng, s) for s in _passages(rng, worse[1])]
      answer = better[1]
    out.append(structs.Document(prompt.prompt, "\n\n".join(steps), answer))
  return out


def _passages(rng: random.Random, response: str) -> list[str]:
  sentences = [
    s.strip()
    for s in re.split(r"(?<=[.!?])\s+|\n+", response)
    if len(s.strip()) > 20
  ]
  if not sentences:
    return [response[:200].strip() or "..."]
  count = min(len(sentences), rng.randint(2, 5))
  places = sorted(rng.sample(range(len(sentences)), count))
  return [sentences[p][:200] for p in places]


def _opened(rng: random.Random, step: str) -> str:
  if rng.random() < 0.5:
    return step
  return f"{rng.choice(storyworld.OPENERS)} {step[0].lower()}{step[1:]}"
