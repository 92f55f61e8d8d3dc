"""Whatever a config says wrong is found before anything starts."""

import importlib

import pytest
from conftest import ROOT

from opera_jax.configs import common, tiny
from opera_jax.losses import kl, reduce
from opera_jax.rewards import compose, opera_requests, opera_reward, verifiable
from opera_jax.rl import learner, score
from opera_jax.stages import cold_start, config_check
from opera_jax.synthesis import search
from opera_jax.train import optimizer

EVERY = {"synthesize", "select", "sft", "rl", "evaluate", "report"}

# Field, hostile value, what the error must say beside the field's name.
HOSTILE = [
  # Names.
  ("rl.loss", "clip", "did you mean 'clipped'"),
  ("rl.advantage", "grp", "did you mean 'grpo'"),
  ("rl.advantage", "grpo + grpo", "comes twice"),
  ("rl.advantage", "", "not empty"),
  ("rl.reduction", "token_means", "did you mean 'token_mean'"),
  ("rl.kl_estimator", "k4", "'k3'"),
  ("rl.kl_in", "losses", "did you mean 'loss'"),
  ("rl.moment_dtype", "float16", "'bfloat16'"),
  ("rl.tasks", ("open_end",), "did you mean 'open_ended'"),
  ("rl.tasks", (), "at least 1"),
  ("rl.sampling", "pass_rates", "did you mean 'pass_rate'"),
  ("rl.sampling_floor", 0.0, "above 0"),
  ("rl.sampling_floor", 0.1, "config.rl.sampling is 'pass_rate'"),
  ("data.mix", "a.jsonl", "it must be a tuple"),
  ("data.mix", ("a.jsonl", 2.0), "needs a comma"),
  ("data.mix", (("a.jsonl", -1.0),), "above 0"),
  ("data.mix", (("a.jsonl", 1.0),), 'config.data.kind="jsonl"'),
  ("reward.by_task", {"maths": "opera"}, "did you mean 'math'"),
  ("reward.by_task", {"math": "oprea"}, "did you mean 'opera'"),
  ("reward.by_task", {"math": "opera+sar"}, "by_task.math"),
  ("reward.by_task", {"math": 1}, "it must be text"),
  ("rl.tasks", "math", "tuple"),
  ("rl.teacher", "stf", "no model of that name"),
  ("rl.filter_reward", "verifable", "did you mean 'verifiable'"),
  ("base.decay", "cos", "did you mean 'cosine'"),
  ("sft.decay", "square", "'constant', 'linear', 'cosine'"),
  ("sft.reduction", "constant", "'token_mean'"),
  ("base.moment_dtype", "fp32", "'float32'"),
  ("model.dtype", "bf16", "did you mean 'bfloat16'"),
  ("model.remat", "dot", "use one of"),
  ("model.attention", "flash", "use one of"),
  ("engine.cache_dtype", "int8", "'float32'"),
  ("data.kind", "storyworlds", "did you mean 'storyworld'"),
  ("data.default_task", "maths", "did you mean 'math'"),
  ("reward.mode", "rself", "did you mean 'r_self'"),
  ("reward.compare", "prev", "did you mean 'previous'"),
  ("reward.match", "words", "did you mean 'word'"),
  ("reward.math_check", "exakt", "did you mean 'exact'"),
  ("reward.terms", "oprea + verifiable", "did you mean 'opera'"),
  ("reward.terms", "1.2.3*sar", "no term of a weighted sum"),
  ("reward.terms", "1e400*opera", "weights are finite"),
  ("reward.terms", "nan*opera", "no term of a weighted sum"),
  ("reward.terms", "opera+verifiable", "spaces around the plus"),
  ("synthesis.score", "foo", "'sequence', 'candidate'"),
  ("synthesis.method", "searching", "did you mean 'search'"),
  # Ranges.
  ("rl.clip_low", 0.0, "above 0"),
  ("rl.clip_low", 1.5, "at most 1"),
  ("rl.clip_high", -0.2, "above 0"),
  ("rl.dual_clip", 1.1, "must exceed 1 + clip_high"),
  ("rl.kl_coef", -0.1, "at least 0"),
  ("rl.kl_estimator", "k1", "useless in a loss"),
  ("rl.steps", 0, "at least 1"),
  ("rl.prompts", 0, "at least 1"),
  ("rl.samples", 1, "at least 2"),
  ("rl.mini_batch", 3, "do not divide"),
  ("rl.mini_batch", 0, "at least 1"),
  ("rl.micro_batches", 5, "do not divide"),
  ("rl.completions_per_row", 3, "divisor"),
  ("rl.learning_rate", float("nan"), "finite"),
  ("rl.learning_rate", 0.0, "above 0"),
  ("rl.warmup", 1.5, "at most 1"),
  ("rl.weight_decay", -1.0, "at least 0"),
  ("rl.max_grad_norm", 0.0, "above 0"),
  ("rl.max_resamples", -1, "at least 0"),
  ("rl.ema", 1.0, "below 1"),
  ("rl.max_logprob_diff_steps", 0, "at least 1"),
  ("rl.importance_cap", -1.0, "at least 0"),
  ("rl.importance_level", "step", "'token', 'sequence'"),
  ("rl.importance_mode", "clip", "'truncate', 'mask'"),
  ("rl.mask_truncated", 1, "True or False"),
  ("rl.advantage_options", {"grpo": {"scale": "step"}}, "'group', 'batch'"),
  ("sft.validation_share", 1.0, "below 1"),
  ("sft.validation_every", 0, "at least 1"),
  ("sft.validation_every", 7, "nothing in this run reads it"),
  ("rl.validation.every", -1, "at least 0"),
  ("rl.validation.samples", 1, "at least 2"),
  ("rl.validation.patience", 2, "nothing in this run reads it"),
  ("rl.epochs_per_batch", 0, "at least 1"),
  ("rl.optimizer", "adam", "did you mean 'adamw'"),
  ("rl.decay", "square", "'linear'"),
  ("rl.checkpoint_every", 0, "at least 1"),
  ("rl.token_budget", -1, "at least 0"),
  ("rl.reduction", "constant", "set the divisor"),
  ("rl.entropy_coef", float("inf"), "finite"),
  ("base.epochs", 0, "at least 1"),
  ("base.checkpoint_every", 0, "at least 1"),
  ("base.b2", 1.0, "below 1"),
  ("sft.batch_size", 0, "at least 1"),
  ("sft.micro_batches", 3, "does not divide"),
  ("rollout.temperature", 0.0, "above 0"),
  ("rollout.top_p", 0.0, "above 0"),
  ("rollout.top_p", 1.5, "at most 1"),
  ("rollout.min_p", -0.1, "at least 0"),
  ("rollout.top_k", -1, "at least 0"),
  ("rollout.min_new_tokens", 10_000, "max_new_tokens"),
  ("rollout.loop_period", 4, "loop_tokens"),
  ("rollout.logit_bias", ((3, 1.0, 2.0),), "pairs"),
  ("evaluate.samples", 1, "at least 2"),
  ("evaluate.top_p", 0.0, "above 0"),
  ("evaluate.temperature", -1.0, "at least 0"),
  ("evaluate.resamples", 0, "at least 1"),
  ("synthesis.temperature", 0.0, "above 0"),
  ("synthesis.top_p", 0.0, "above 0"),
  ("synthesis.candidates", 0, "at least 1"),
  ("synthesis.budget", -1, "at least 0"),
  ("synthesis.batch", 0, "at least 1"),
  ("synthesis.stop_words", (), "at least 1"),
  ("synthesis.template", "Think.", "holds {prompt} 0 times"),
  ("select.max_repeat", 1.5, "at most 1"),
  ("select.keep_share", 0.0, "above 0"),
  ("select.ngram", 0, "at least 1"),
  ("select.rl.band", (3.0, 2.0), "band"),
  ("reward.alpha", 1.5, "at most 1"),
  ("reward.tau", 0.0, "above 0"),
  ("reward.timeout", 0.0, "above 0"),
  ("reward.max_steps", 0, "at least 1"),
  ("reward.separator", "", "not empty"),
  ("reward.keywords", (), "at least 1"),
  ("reward.keywords", "But", "tuple"),
  ("reward.keywords", ("But", ""), "not empty"),
  ("data.math_share", 2.0, "at most 1"),
  ("data.math_share", -1.0, "at least 0"),
  ("data.near_duplicate", 1.5, "at most 1"),
  ("data.shares", (0.5, 0.5), "three fractions"),
  ("data.shares", (0.5, 0.5, 0.1), "a sum of at most 1"),
  ("data.shares", (0.0, 0.0, 1.0), "three fractions"),
  ("data.near_duplicate", 0.5, "nothing in this run reads it"),
  ("data.held_out", -1, "at least 0"),
  ("data.held_out", 0, "needs tasks"),
  ("data.documents", 0, "nothing to train one on"),
  ("engine.prompt_slots", 0, "at least 1"),
  ("engine.steps", 0, "at least 1"),
  ("engine.prompt_buckets", (128, 64), "ascending"),
  ("scoring.prefix_buckets", (0, 64), "from 1 on"),
  ("scoring.batch_size", 0, "at least 1"),
  ("mesh.tensor", 0, "-1 for what is left"),
  ("mesh.data", -1, "one axis at most"),
  ("max_prompt_tokens", 0, "at least 1"),
  ("rl.advantage", None, "must be text"),
  ("reward.options", {"judge": 3}, "mapping of names"),
  ("rl.advantage_options", [("grpo", 1)], "mapping of names"),
  ("data.path", 3, "must be text"),
  ("model.num_key_value_heads", 3, "multiple of model.num_key_value_heads"),
  ("runtime.heartbeat_seconds", 0, "at least 1"),
  # Lengths against buckets.
  ("rollout.max_new_tokens", 2_048, "add a bucket of 2144"),
  ("rl.row_buckets", (64, 128), "holds rows of 128 tokens at most"),
  ("max_prompt_tokens", 4_096, "config.engine.prompt_buckets"),
  # Given twice, or to what is not there.
  ("data.path", "tasks.jsonl", "reads no file"),
  ("data.math_path", "tasks.jsonl", "reads no file"),
  ("data.task_map", {"chat": "open"}, "task_map leads to ['open']"),
  ("reward.options", {"opera": {"alpha": 0.5}}, "use config.reward.alpha"),
  ("reward.options", {"opera": {"tau": 9.0}}, "use config.reward.tau"),
  (
    "reward.options",
    {"verifiable": {"method": "exact"}},
    "use config.reward.math_check",
  ),
  ("reward.options", {"verifiable": {"time_out": 9}}, "time_out"),
  ("reward.options", {"opera": {"alhpa": 0.5}}, "alhpa"),
  ("reward.options", {"sar": {"form": "log"}}, "not a term"),
  (
    "rl.advantage_options",
    {"oppo": {"anchor": False}},
    "none of the estimators",
  ),
  ("rl.advantage_options", {"grpo": {"epsilom": 1e-3}}, "epsilom"),
  ("rl.advantage_options", {"grpo": {"ddof": 2}}, "ddof"),
  ("rl.advantage_options", {"grpo": {"epsilon": 0.0}}, "epsilon"),
  # Changed, and read by nothing.
  ("rl.beta", 0.5, "nothing in this run reads it"),
  ("rl.constant", 8.0, "nothing in this run reads it"),
  ("rl.value_clip", 0.1, "nothing in this run reads it"),
  ("rl.teacher_top_k", 8, "nothing in this run reads it"),
  ("rl.ema", 0.1, "nothing in this run reads it"),
  ("rl.teacher", "base", "nothing in this run reads it"),
  ("rl.filter_reward", "verifiable", "nothing in this run reads it"),
  ("select.rl.right", (2,), "nothing in this run reads it"),
  ("select.rl.band", (1.0, 2.0), "nothing in this run reads it"),
  ("synthesis.rounds", 3, "nothing in this run reads it"),
  ("data.prompt_words", 50, "nothing in this run reads it"),
  ("data.math_answer", "x(.)", "nothing in this run reads it"),
  ("rollout.loop_tokens", 8, "nothing in this run reads it"),
]


def _config(**changes):
  config = tiny.get_config("smoke").copy_and_resolve_references()
  config.unlock()
  for field, value in changes.items():
    _set(config, field, value)
  return config


def _set(config, field, value):
  *sections, name = field.split(".")
  for section in sections:
    config = config[section]
  with config.ignore_type():
    config[name] = value


def _check(config, stages=EVERY, **more):
  config_check.check(config.to_dict(), stages, **more)


@pytest.mark.parametrize(("field", "value", "said"), HOSTILE)
def test_a_hostile_value_is_refused(field, value, said):
  with pytest.raises(config_check.ConfigError) as error:
    _check(_config(**{field: value}))
  assert said in str(error.value) and str(error.value).count("config.")


# More than one value, so that the fault is in how they go together.
TOGETHER = [
  (
    {"data.kind": "jsonl", "data.path": "a", "data.mix": (("b", 1.0),)},
    "beside config.data.mix",
  ),
  (
    {"data.kind": "jsonl", "data.mix": (("b", 1),), "data.math_path": "bb"},
    "which is not in config.data.mix ['b']",
  ),
  (
    {
      "data.kind": "jsonl",
      "data.mix": (("books.jsonl", 1.0),),
      "reward.by_task": {"book": "opera"},
    },
    "did you mean 'books'",
  ),
  ({"rl.loss": "dpo", "rl.kl_coef": 0.5}, "config.rl.kl_coef is 0.5"),
  ({"rl.loss": "dpo", "rl.kl_estimator": "k2"}, "config.rl.kl_estimator"),
  ({"rl.loss": "dpo", "rl.clip_low": 0.1}, "config.rl.clip_low"),
  ({"rl.loss": "dpo", "rl.importance_cap": 2.0}, "config.rl.importance_cap"),
  ({"rl.loss": "dpo", "rl.completions_per_row": 2}, "compares two rows"),
  ({"rl.kl_coef": 0.0, "rl.kl_in": "reward"}, "config.rl.kl_in"),
  ({"rl.value_coef": 0.5}, "add gae"),
  ({"rl.advantage": "gae"}, "needs a critic's values"),
  ({"rl.divergence_coef": 1.0}, "an advantage estimator with a teacher"),
  ({"rl.advantage": "sdpo"}, "set config.rl.ema above 0"),
  ({"reward.mode": "r_self", "reward.alpha": 0.5}, "config.reward.alpha"),
  ({"data.kind": "jsonl"}, "are both empty"),
  (
    {"data.kind": "jsonl", "data.path": "x", "data.math_share": 0.5},
    "config.data.math_share",
  ),
  ({"tokenizer.think": ("<a>",)}, "config.tokenizer.think is"),
  ({"tokenizer.think": ("<a>", "<a>")}, "two different strings"),
  ({"tokenizer.enable_thinking": "yes"}, "one of '', 'on', 'off'"),
  ({"synthesis.close_thought": 1}, "it must be True or False"),
  (
    {"synthesis.method": "rewrite", "synthesis.score": "candidate"},
    "config.synthesis.score",
  ),
  ({"rl.importance_mode": "mask"}, "config.rl.importance_cap is above 0"),
  ({"rl.balance_tokens": True, "rl.mini_batch": 4}, "config.rl.balance_tok"),
  ({"rl.importance_level": "sequence"}, "config.rl.importance_level is"),
  (
    {"rl.importance_cap": 2.0, "rl.importance_floor": 0.5},
    "config.rl.importance_floor is 0.5",
  ),
  (
    {
      "rl.importance_cap": 2.0,
      "rl.importance_floor": 3.0,
      "rl.importance_mode": "mask",
    },
    "every token is masked",
  ),
  (
    {"rl.advantage": "gdpo", "rl.kl_in": "reward"},
    "gdpo of config.rl.advantage normalises",
  ),
  (
    {"sft.optimizer": "adafactor", "sft.moment_dtype": "bfloat16"},
    "config.sft.moment_dtype: adafactor keeps sums",
  ),
  ({"sft.optimizer": "lion", "sft.b2": 0.9}, "config.sft.b2 is 0.9"),
  ({"rl.lora.rank": -1}, "config.rl.lora: A LoRA adapter has a rank of at"),
  ({"sft.lora.rank": 0.5}, "config.sft.lora.rank is 0.5; it must be a whole"),
  ({"sft.lora.rank": 4, "sft.lora.targets": ()}, "config.sft.lora: LoRA with"),
  (
    {"rl.lora.rank": 4, "rl.lora.targets": ("q_proj", "updown")},
    "config.rl.lora: LoRA targets that match no projection: 'q_proj' (did you "
    "mean 'q'?); 'updown' (did you mean 'down'?)",
  ),
  ({"rl.lora.rank": 4, "rl.lora.targets": "q"}, "rl.lora.targets is 'q'; it"),
  ({"rl.lora.rank": 4, "rl.lora.base_dtype": "int8"}, "config.rl.lora: Frozen"),
  ({"rl.lora.alpha": 8.0}, "it matters where config.rl.lora.rank is above 0"),
  ({"rl.lora.ranks": 8}, "did you mean config.rl.lora.rank"),
]


@pytest.mark.parametrize(("changes", "said"), TOGETHER)
def test_values_that_do_not_go_together_are_refused(changes, said):
  with pytest.raises(config_check.ConfigError) as error:
    _check(_config(**changes))
  assert said in str(error.value)


def test_what_is_redone_is_not_there_any_more(tmp_path):
  for stage in ("select", "sft"):
    (tmp_path / stage).mkdir()
    (tmp_path / stage / "DONE.json").write_text('{"updates": 1}')
  _check(_config(), {"rl"}, workdir=tmp_path)
  with pytest.raises(config_check.ConfigError, match="add sft to config.stag"):
    _check(_config(redo="sft"), {"rl"}, workdir=tmp_path)
  _check(_config(redo="sft"), {"sft", "rl"}, workdir=tmp_path)
  with pytest.raises(config_check.ConfigError, match="polish"):
    _check(_config(redo="polish"), EVERY, workdir=tmp_path)


def test_all_faults_come_in_one_error():
  changes = {"rl.loss": "clip", "synthesis.score": "foo", "reward.tau": 0.0}
  with pytest.raises(config_check.ConfigError, match="has 3 faults") as error:
    _check(_config(**changes))
  assert all(f"config.{field} is" in str(error.value) for field in changes)


def test_what_no_stage_of_the_run_reads_is_left_alone():
  config = _config(**{"rl.loss": "clip", "evaluate.samples": 1})
  _check(config, {"synthesize", "select", "sft"})
  with pytest.raises(config_check.ConfigError, match="has 2 faults"):
    _check(config)


def test_stages_that_lack_their_inputs_are_refused(tmp_path):
  with pytest.raises(config_check.ConfigError, match="add sft to config.stag"):
    _check(_config(), {"rl"}, workdir=tmp_path)
  (tmp_path / "sft").mkdir()
  (tmp_path / "sft" / "DONE.json").write_text('{"updates": 1}')
  _check(_config(), {"rl"}, workdir=tmp_path)
  # Evaluation compares what there is; without an SFT model RL says what to do.
  _check(_config(), {"evaluate"}, workdir=tmp_path)
  with pytest.raises(config_check.ConfigError, match=r"config\.rl\.init=base"):
    _check(_config(), {"rl"}, workdir=tmp_path / "other")
  _check(_config(**{"rl.init": "base"}), {"rl"}, workdir=tmp_path / "other")
  with pytest.raises(config_check.ConfigError, match="nothing is there"):
    _check(_config(**{"rl.init": "a/b/sft"}), {"rl"}, workdir=tmp_path)


_DEMANDING = (
  *("rl.advantage", "rl.reduction", "rl.kl_estimator", "reward.terms"),
)


@pytest.mark.parametrize(
  ("field", "names", "more"),
  [
    ("rl.loss", learner.LOSSES, {"rl.dual_clip": 3.0}),
    (
      "rl.advantage",
      compose.files("opera_jax.advantages", "AdvantageEstimator"),
      {},
    ),
    ("rl.reduction", reduce.NAMES, {}),
    ("rl.kl_estimator", kl.NAMES, {}),
    ("rl.kl_in", ("loss", "reward"), {}),
    ("base.decay", optimizer.DECAYS, {}),
    ("rl.decay", optimizer.DECAYS, {}),
    ("rl.optimizer", tuple(optimizer.NAMES), {}),
    ("sft.moment_dtype", optimizer.MOMENT_DTYPES, {}),
    ("reward.mode", opera_reward.MODES, {}),
    ("reward.compare", opera_requests.COMPARE, {}),
    ("reward.match", ("word", "substring", "any"), {}),
    ("reward.math_check", verifiable.METHODS, {}),
    ("reward.terms", compose.files("opera_jax.rewards", "Reward"), {}),
    ("synthesis.score", search.SCORES, {}),
    ("synthesis.method", cold_start.METHODS, {}),
    ("rl.tasks", (("math",), ("open_ended",), ("open_ended", "math")), {}),
    ("model.dtype", config_check.DTYPES, {}),
  ],
)
def test_every_name_of_every_list_passes(field, names, more):
  """With what the name itself asks for."""
  needs = {
    "gae": {"rl.value_coef": 0.5},
    "sdpo": {"rl.ema": 0.05},
    "constant": {"rl.constant": 64.0},
    "k1": {"rl.kl_in": "reward"},
    "judge": {
      "reward.options": {"judge": {"endpoint": "http://h/v1", "model": "m"}}
    },
    "function": None,  # named by its import path
  }
  assert len(names) > 1
  for name in names:
    extra = needs.get(name, {}) if field in _DEMANDING else {}
    if extra is not None:
      _check(_config(**more | {field: name} | extra))


FILES = sorted(
  str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
  for path in (ROOT / "configs").rglob("*.py")
  if path.stem
  not in (
    *("__init__", "common", "base"),
    *("ablations", "cold_start", "evidence"),  # of experiments.ablate
  )
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("arg", ["", "smoke", "ablation"])
def test_shipped_configs_have_no_fault(name, arg):
  try:
    config = importlib.import_module(name).get_config(*([arg] if arg else []))
  except (TypeError, ValueError):
    pytest.skip(f"{name} has no size {arg!r}")
  config = config.copy_and_resolve_references()
  config.unlock()
  if config.data.kind == "jsonl":
    config.data.path = "FILE"
  if ".methods." in f".{name}." and not arg:  # sizes alone: model, no data
    config.data.documents = 10_000
  if config.rl.init:  # no cold start, and no SFT model to evaluate
    _check(config, {"rl", "report"})
  else:
    _check(config)


def test_the_defaults_of_what_may_go_unread_are_those_of_the_configs():
  config = common.get_config().to_dict()
  for field, read in config_check.READ.items():
    value = config
    for name in field.split("."):
      value = value[name]
    assert config_check._plain(value) == config_check._plain(read.default), (
      field
    )


def test_every_field_has_a_rule():
  """What has none would only fail later."""
  config = common.get_config().to_dict()
  missing = []
  for section, values in config.items():
    if section in ("card", "pool") or not isinstance(values, dict):
      continue
    known = config_check.RULES[section][1]
    missing += [f"{section}.{name}" for name in values if name not in known]
  # Sections of their own.
  assert sorted(missing) == [
    *("rl.lora", "rl.validation", "select.rl", "sft.lora"),
  ]
  for name in missing:
    section, inner = name.split(".")
    assert set(config_check.RULES[name][1]) == set(config[section][inner])


def test_one_field_says_how_maths_is_checked_in_every_term():
  reward = _config(
    **{
      "reward.terms": "verifiable + 0.2*length",
      "reward.options": {"length": {"kind": "efficient"}},
      "reward.math_check": "math_verify",
    }
  ).reward.to_dict()
  _, made = score.build_rewards(
    lambda _: (), **{name: reward[name] for name in score.REWARD_FIELDS}
  )
  assert made["verifiable"].method == made["length"].method == "math_verify"
  assert made["length"].kind == "efficient"


@pytest.mark.parametrize(
  "section, name, said",
  [
    ("rl", "credit", "config.rl.credit is now config.rl.advantage"),
    ("rl", "stepz", "config.rl.stepz is no field; did you mean config.rl.step"),
    ("", "price", "config.price is now config.scoring"),
  ],
)
def test_fields_that_are_none_are_named(section, name, said):
  config = tiny.get_config().to_dict()
  (config[section] if section else config)[name] = {}
  with pytest.raises(config_check.ConfigError, match=said):
    config_check.check(config, ["rl"])
