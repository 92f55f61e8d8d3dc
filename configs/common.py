"""Every field of a run, with the paper's values where the paper has one.

A config file starts from `get_config()`, changes values, and returns the
locked result. Sources: [P] the paper, [C] its released code, see the README.
"""

import ml_collections

STAGES = "synthesize,select,sft,rl,evaluate,report"


def supervised() -> dict:
  """Fields of `opera_jax.stages.supervised.Recipe`."""
  return {
    "epochs": 1,
    "batch_size": 16,
    "row_tokens": 4096,
    "packed": False,
    "learning_rate": 1e-5,
    "warmup": 0.05,
    "decay": "constant",
    "b2": 0.999,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "moment_dtype": "float32",  # of Adam's moments; or bfloat16
    "reduction": "token_mean",
    "micro_batches": 1,
    "checkpoint_every": 100,
    "seed": -1,  # of this stage alone; -1 takes the run's
  }


def get_config() -> ml_collections.ConfigDict:
  """The paper's recipe, without a model size."""
  config = ml_collections.ConfigDict()
  config.stages = STAGES  # a comma-separated choice, in this order
  # Stages to do again with those after them; what they left goes to dropped/.
  config.redo = ""
  config.seed = 0
  config.mesh = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}
  config.runtime = {
    # "": one process; "auto": a TPU pod or SLURM; or HOST:PORT,COUNT,INDEX.
    "distributed": "",
    "heartbeat_seconds": 60,  # a process without a sign of life ends the run
    # "auto": a private directory of the user; or a local one; "" for none.
    "compile_cache": "auto",
  }
  # Directory or hub id of a Qwen3 checkpoint; "" pretrains on documents. An id
  # may carry a revision, NAME@REVISION; so may all that are fetched.
  config.checkpoint = ""
  config.tokenizer = {
    "path": "",  # directory or hub id; "" trains a BPE on the documents
    "bpe_size": 8192,
  }
  config.max_prompt_tokens = 6_144  # [C]; longer: dropped and counted
  config.max_reference_tokens = 4_096

  config.model = {
    "vocab_size": 0,  # 0 takes the tokenizer's
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "remat": "dots",  # or none, full, attention
    "attention": "",  # splash, cudnn or xla; "" goes by the device
  }
  config.data = {
      "kind": "storyworld",
      "synthesis": 20_000,  # [P]
      "rl": 1_674,  # [P]
      "held_out": 200,
      "documents": 0,
      "math_share": 0.0,  # of storyworld's tasks: sums
      "path": "",
      "fields": {"id": "id", "task": "task", "prompt": "prompt",
                 "reference": "reference"},
      "task_map": {"open_ended": "open_ended", "math": "math"},
      "default_task": "",
      "prompt_words": 0,
      "excerpt_words": 0,
      "math_path": "",
      "math_fields": {"prompt": "question", "reference": "answer"},
      # The line behind the last "####"; see prompts.GSM8K_ANSWER.
      "math_answer": r"(?s)\A.*####\s*+(\S[^\n]*+)",
      "math_limit": 0,
      "responses_path": "",
      # Jaccard index of word 3-grams from which two tasks are not split.
      "near_duplicate": 0.0,
  }  # fmt: skip
  config.pool = {  # of experiments/pool.py
    "size": 20_000,  # [P]; 0 takes all that are left
    "min_chars": 8,
    "max_chars": 20_000,  # 0 for no limit; so below
    "max_reference_chars": 0,
    "languages": (),  # codes such as "en", "zh"; none keeps all
    "certainty": 0.5,  # probability from which another language is dropped
    "near_duplicate": 0.8,  # Jaccard index of word n-grams; 0 looks for none
    "ngram": 3,
    # Directory or hub id of a sentence-transformers model, or "policy".
    "embedder": "",
    "batch": 4096,  # prompts embedded between two saves
    "clusters": 0,  # 0 takes the choice of highest silhouette
    "cluster_choices": (8, 12, 16, 24, 32, 48, 64),
    "cluster_sample": 4000,
    "minimum": 10,  # prompts of a cluster
  }
  config.base = supervised()
  config.base.decay = "cosine"
  config.base.b2 = 0.95
  config.engine = {
    "rows": 16,  # prompts in flight
    "slots": 16,  # samples of a prompt in flight
    "prompt_buckets": (512, 1024, 2048, 4096, 6144),
    "cache_buckets": (1024, 2048, 4096, 8192, 10_240),
    "steps": 64,  # tokens between two refills
    "cache_dtype": "float32",
  }
  config.rollout = {
    "max_new_tokens": 10_240,  # [C]
    "temperature": 1.0,  # [P]
    "top_k": 0,
    "top_p": 1.0,  # [P]
    "min_p": 0.0,
    "min_new_tokens": 0,
    "loop_period": 0,  # above 0: ends completions that go round in circles
    "loop_tokens": 0,
    "banned_ids": (),  # never drawn
    "logit_bias": (),  # (token id, what is added to its logit) pairs
  }
  config.scoring = {
    "batch_size": 16,  # prefixes a call
    "prefix_buckets": (1024, 2048, 4096, 8192, 16_384),
    "slot_buckets": (1, 4, 8, 16, 32),
    "continuation_buckets": (256, 512, 1024, 2048, 4096),
  }
  config.reward = {
    # Weighted rewards by name, as in "verifiable + 0.2*sar": files of
    # opera_jax/rewards, or "package.module:function". Weight 0 measures.
    "terms": "opera + verifiable",
    # Settings of those rewards by name, where their defaults do not do.
    "options": {},
    "timeout": 60.0,  # seconds of a user's function, a step
    # Variables that it sees although their names or values look like keys.
    "environment": (),
    "alpha": 0.3,  # [P]
    "tau": 2.0,  # [P]
    "mode": "both",  # or r_self, r_ppl, one_hot: the paper's ablations
    "keywords": ("But", "Wait", "Hmm", "However", "Let me think"),
    "match": "word",  # "substring" as the release does; "any": every step
    "compare": "previous",  # [P]; or "reflective", "start"
    "separator": "\n\n",  # [C]
    "bridge": "",  # [C]; "\n</think>\n\n" closes the thought first
    "max_steps": 64,
    # "exact" asks math-verify where it cannot tell; or "math_verify".
    "math_check": "exact",
  }
  config.synthesis = {
    "batch": 256,
    "candidates": 4,  # [P]
    "budget": 20,  # [C]; 5: the first five; 0: plain sampling
    "score": "sequence",  # [P]; or "candidate"
    "choose": "",  # "module:function", a judge in place of the log-probability
    "temperature": 0.6,  # [C]
    "top_k": 20,  # [C]
    "top_p": 0.95,  # [C]
    "max_step_tokens": 1024,
    "max_thought_tokens": 8192,
    "max_answer_tokens": 4096,
    # [C]; ("\n\n",) searches at every step, whatever its words
    "stop_words": ("Wait", "But", "Hmm", "Let me think", "However"),
    "template": "{prompt}",  # the meta-prompt, or a .txt file with it
    # "search", or "rewrite": REER (arXiv 2509.06160) in its place
    "method": "search",
    "rounds": 10,  # of rewriting
    "guide": "configs/templates/rewrite.txt",  # shows it the reference
    "seed": -1,  # of this stage alone; -1 takes the run's
  }
  config.select = {  # see `opera_jax.synthesis.filters`
    "min_reflections": 1,
    "max_repeat": 0.2,  # a largest share of 1 rules nothing out
    "ngram": 8,
    "max_ngram_repeat": 0.5,
    "max_copied": 0.7,
    "max_foreign": 0.1,
    "think_tags": False,
    "stop_words": ("Wait", "Hmm", "Let me think"),
    "max_stop_words": 1,  # in an answer
    "min_thought_words": 1,
    "max_thought_words": 0,  # 0 for no limit
    "min_answer_words": 1,
    "max_answer_words": 0,
    "max_deviation": 6.0,  # 0 for no limit
    "keep_share": 1.0,
    "rl": {  # which prompts RL is run on
      "samples": 0,  # of the SFT model a maths prompt; [P] 8; 0 keeps all
      "right": (1,),  # [P] numbers of right ones that are kept
      # "column:NAME" or "package.module:function" scores open-ended prompts.
      "judge": "",
      "band": (2.0, 3.0),  # [P] scores that are kept, of 5
    },
  }
  # Of the data sets that synthesis and selection leave, in their README.md.
  config.card = {"name": "OPERA cold-start traces", "license": "unknown"}
  config.sft = supervised()
  config.sft.epochs = 5  # [P]
  config.rl = {
    "steps": 26,  # [P]
    "prompts": 64,  # [C] a step
    "samples": 16,  # [C] a prompt
    "mini_batch": 8,  # prompts an update [C]
    "micro_batches": 1,
    # Samples of a prompt that a row of an update holds behind one copy of it;
    # 1: a row a sample.
    "completions_per_row": 1,
    # Padded lengths of a row, or of the samples in one that share a prompt.
    "row_buckets": (2048, 4096, 8192, 16_384),
    "learning_rate": 1e-6,  # [P]
    "warmup": 0.4,  # [C] share of the updates
    "weight_decay": 0.01,  # [C]
    "max_grad_norm": 1.0,  # [C]
    "moment_dtype": "float32",
    "clip_low": 0.2,  # [C]
    "clip_high": 0.2,  # [C]
    "dual_clip": 3.0,  # [C]
    "kl_coef": 0.001,  # [C]
    "kl_estimator": "k3",  # [C]
    "reduction": "sequence_mean",  # [C]
    "constant": 0.0,  # divisor of reduction "constant"
    "kl_in": "loss",  # [C]; or "reward"
    "loss": "clipped",  # [C]; or "gspo", "dpo"
    "beta": 0.1,  # of DPO
    "entropy_coef": 0.0,  # [C]
    # Weighted advantage estimators by name: files of opera_jax/advantages.
    "advantage": "grpo",  # [P]
    "advantage_options": {},
    "importance_cap": 0.0,  # of trainer against sampler; 0 weighs nothing
    # nats between sampler and trainer that end the run,
    "max_logprob_diff": 0.1,
    "max_logprob_diff_steps": 3,  # after so many steps beyond it in a row
    # Batches of other prompts that a step samples in place of groups whose
    # rewards are all equal, at most (DAPO); 0 keeps such groups.
    "max_resamples": 0,
    # The term of reward.terms whose spread decides; "": the weighted sum.
    "filter_reward": "",
    "value_coef": 0.0,  # above 0: a critic, for advantage "gae"
    "value_clip": 0.2,
    "ema": 0.0,  # above 0: a moving mean of the policy, for "sdpo"
    "divergence_coef": 0.0,  # above 0: from the teacher's top tokens
    "teacher_top_k": 100,  # of them
    "teacher": "",  # a finished stage's folder; "" takes the SFT model
    "tasks": ("open_ended", "math"),
    "seed": -1,  # of this stage alone; -1 takes the run's
    "token_budget": 0,  # above 0: stops once so many tokens are sampled
    "checkpoint_every": 1,
  }
  config.evaluate = {
    "samples": 2,  # a held-out prompt and model
    "temperature": 1.0,
    "top_p": 1.0,
    "thoughts": 4,  # shown step by step in the report
    "resamples": 2_000,  # of the bootstrap
  }
  return config


def full_size(config: ml_collections.ConfigDict, name: str) -> None:
  """What the published Qwen3 models share at the paper's lengths, in place.

  Prompts of 6,144 and responses of 10,240 tokens make rows of 16,384. Compute
  is bf16 and master weights float32. A prefix with more continuations than the
  largest slot bucket is scored in several rows.

  Args:
    config: changed.
    name: hub id of checkpoint and tokenizer.
  """
  config.checkpoint = name
  config.tokenizer.path = name
  config.data.kind = "jsonl"
  config.synthesis.template = "configs/templates/monologue.txt"  # [P]
  config.model.vocab_size = 151_936
  config.model.num_key_value_heads = 8
  config.model.head_dim = 128
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.engine.cache_dtype = "bfloat16"
  config.engine.cache_buckets = (1_280, 2_560, 5_120, 10_240)
  config.scoring.slot_buckets = (1, 4, 8)
  config.sft.packed = True
  config.sft.row_tokens = 16_384
