"""Every config field, with the paper's value as default where it states one.

A config file starts from `get_config()`, changes values, and returns the locked
result. A comment that begins with [P] marks a default that the paper states,
[C] one from its released code; all others are ours.
"""

import ml_collections
from ml_collections import config_dict

STAGES = "synthesize,select,sft,rl,evaluate,report"


def supervised() -> dict:
  """Fields of `opera_jax.stages.supervised.Recipe`."""
  return {
    "epochs": 1,  # passes over the training pairs
    "batch_size": 16,  # packed rows per update
    # length of a row; a longer pair is dropped and counted; 0 is the longest
    # prompt and completion
    "row_tokens": 0,
    "packed": False,  # several pairs per row, separated by segment ids
    "learning_rate": 1e-5,  # peak of the schedule
    "warmup": 0.05,  # fraction of the updates with a rising learning rate
    # schedule after the warm-up: constant, linear or cosine; see
    # train/optimizer.py
    "decay": "constant",
    "optimizer": "adamw",  # adamw, adafactor, lion or muon
    "b2": 0.999,  # AdamW's decay rate of the second moment
    "weight_decay": 0.01,  # decoupled, on every parameter
    "max_grad_norm": 1.0,  # gradients are clipped to this global norm
    # dtype of the optimizer's moments: float32 or bfloat16
    "moment_dtype": "float32",
    # how token losses are averaged:
    # token_mean or sequence_mean, see losses/reduce.py
    "reduction": "token_mean",
    "micro_batches": 1,  # gradient accumulation steps per update
    # share of the pairs that is held out, and whose loss is logged
    "validation_share": 0.0,
    "validation_every": 50,  # updates between two validations
    "checkpoint_every": 100,  # updates between two checkpoints
    "seed": -1,  # seed of this stage; -1 uses config.seed
  }


def lora() -> dict:
  """Arguments of `opera_jax.models.lora.settings`; docs/running.md explains."""
  return {
    "rank": 0,  # columns of an adapter's A; 0 trains all parameters
    "alpha": 16.0,  # the adapter's product is scaled by alpha / rank
    # projections with an adapter
    "targets": ("q", "k", "v", "o", "gate", "up", "down"),
    # dtype of the frozen weights: bfloat16 or float32; adapters are float32
    "base_dtype": "bfloat16",
  }


def get_config() -> ml_collections.ConfigDict:
  """The paper's recipe, without a model size."""
  config = ml_collections.ConfigDict()
  config.stages = STAGES  # comma-separated stages to run; their order is fixed
  # stages to run again, with all later ones; their old results move to dropped/
  config.redo = ""
  # where metrics go: jsonl always, and tensorboard, wandb, trackio by name
  config.log = "jsonl,tensorboard"
  config.seed = 0  # seed of data, initialisation, sampling and shuffling
  # devices along each mesh axis; one may be -1 for all remaining devices
  config.mesh = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}
  config.runtime = {
    # "" for one process, "auto" (TPU pod, SLURM), or HOST:PORT,COUNT,INDEX
    "distributed": "",
    # seconds without a heartbeat after which a process counts as dead
    "heartbeat_seconds": 60,
    # folder that caches compiled programs; "auto" is in your user cache, "" is
    # off
    "compile_cache": "auto",
  }
  # base model: directory, GGUF file or hub id (NAME@REVISION), from which come
  # its sizes, tokenizer, chat template and end ids; "" pretrains a model
  config.checkpoint = ""
  config.tokenizer = {
    # directory, GGUF file or hub id; "" takes the checkpoint's or, without one,
    # trains a BPE on the documents
    "path": "",
    "bpe_size": 8192,  # vocabulary size of the trained BPE
    # two strings around a thought: tokens where the tokenizer has them, else
    # matched as text; () takes "<think>" and "</think>", added if missing
    "think": (),
    # Jinja file in place of the tokenizer's chat template, or "chatml"
    "chat_template": "",
    # on or off, passed to the chat template; "" leaves it to the template
    "enable_thinking": "",
  }
  config.max_prompt_tokens = 6_144  # [C] longer prompts are dropped and counted
  # longer references are dropped and counted
  config.max_reference_tokens = 4_096

  # None leaves a field to the checkpoint, which says what its model is. Without
  # a checkpoint the decoder's defaults hold, in sizes of a very small model.
  unset = config_dict.placeholder
  config.model = {
    # rows of the embedding; 0 uses the checkpoint's or the tokenizer's size
    "vocab_size": 0,
    "hidden_size": unset(int),  # width of the residual stream
    "num_hidden_layers": unset(int),  # transformer blocks
    "num_attention_heads": unset(int),  # query heads
    # key and value heads; must divide the query heads
    "num_key_value_heads": unset(int),
    "head_dim": unset(int),  # size of an attention head
    "intermediate_size": unset(int),  # width of the feed-forward layer
    "rope_theta": unset(float),  # base of the rotary embedding
    "rms_norm_eps": unset(float),  # added under the root of RMSNorm
    # the output head is the embedding
    "tie_word_embeddings": unset(bool),
    "max_position_embeddings": unset(int),  # context in tokens
    # whose layout the model has: qwen3, qwen2, llama, phi3 or gemma3_text
    "family": unset(str),
    "qk_norm": unset(bool),  # RMSNorm of each head's queries and keys
    "qkv_bias": unset(bool),  # bias of query, key and value projections
    "hidden_act": unset(str),  # of the MLP's gate: silu or gelu_pytorch_tanh
    "norm_offset": unset(bool),  # norms multiply by 1 + weight
    "output_norms": unset(bool),  # norms behind attention and MLP too
    # embeddings are multiplied by the root of their width
    "embedding_scale": unset(bool),
    "query_scale": unset(float),  # multiplies q.k; 0 is 1 / sqrt(head_dim)
    "sliding_window": unset(int),  # positions that a query sees; 0 is all
    # every so-manieth layer sees all positions nevertheless; 0 is none
    "sliding_window_pattern": unset(int),
    # rotary base of layers with a window; 0 is rope_theta
    "rope_local_theta": unset(float),
    # set of LongRoPE's factors (Phi-3.5) for the whole run: short or long
    "rope_factors": "short",
    # dtype of activations, float32 or bfloat16; master weights stay float32
    "dtype": "float32",
    # what the backward pass recomputes: none, dots, attention or full
    "remat": "dots",
    # attention implementation: splash, cudnn or xla; "" picks by device
    "attention": "",
  }
  config.data = {
      # storyworld (generated from the seed), or jsonl for files and data sets
      "kind": "storyworld",
      "synthesis": 20_000,  # [P] tasks of the cold start
      "rl": 1_674,  # [P] tasks of RL
      "held_out": 200,  # held-out tasks that no training stage sees
      # fractions of a file's tasks for (cold start, RL, held out), which share
      # none, in place of those three counts; () keeps the counts
      "shares": (),
      "documents": 0,  # pretraining documents; unused with a checkpoint
      "math_share": 0.0,  # fraction of storyworld's tasks that are sums
      "path": "",  # source of tasks: JSONL, Parquet, hf:, tfds:, or a directory
      # several sources in place of data.path, with their weights in RL's
      # batches: (source, weight) or (source, weight, name) each, see
      # data/mixture.py; one may be data.math_path
      "mix": (),
      # our field -> column of data.path
      "fields": {"id": "id", "task": "task", "prompt": "prompt",
                 "reference": "reference"},
      # value of the task column -> open_ended or math
      "task_map": {"open_ended": "open_ended", "math": "math"},
      # task of rows without one, or with one that task_map does not lead to
      # ours; "" is open_ended where the file has no such column, else an error
      "default_task": "",
      # maximum words of a prompt, longer ones are dropped; 0 means unlimited
      "prompt_words": 0,
      # references are truncated to this many words; 0 keeps them whole
      "excerpt_words": 0,
      "math_path": "",  # a second source, of maths tasks only; "" means none
      # our field -> column of data.math_path
      "math_fields": {"prompt": "question", "reference": "answer"},
      # regular expression whose first group is the true answer
      "math_answer": r"(?s)\A.*####\s*+(\S[^\n]*+)",
      "math_limit": 0,  # maximum maths tasks from data.math_path; 0 means all
      # JSONL of responses from which pretraining documents are built
      "responses_path": "",
      # word 3-gram Jaccard index from which two tasks stay on one side of the
      # split
      "near_duplicate": 0.0,
  }  # fmt: skip
  config.pool = {  # settings of experiments/pool.py
    # [P] prompts of the pool; 0 keeps all that pass the filters
    "size": 20_000,
    "min_chars": 8,  # shorter prompts are dropped
    "max_chars": 20_000,  # longer prompts are dropped; 0 means unlimited
    # longer references are dropped; 0 means unlimited
    "max_reference_chars": 0,
    # language codes to keep, such as "en"; empty keeps all
    "languages": (),
    # probability above which a prompt counts as another language
    "certainty": 0.5,
    # n-gram Jaccard index of near duplicates; 0 turns the search off
    "near_duplicate": 0.8,
    "ngram": 3,  # words per n-gram for pool.near_duplicate
    # directory or hub id of a sentence-transformers model, or "policy"
    "embedder": "",
    "batch": 4096,  # prompts embedded per batch; each batch is saved
    # number of clusters; 0 picks the one of highest silhouette
    "clusters": 0,
    # numbers of clusters to try if pool.clusters is 0
    "cluster_choices": (8, 12, 16, 24, 32, 48, 64),
    "cluster_sample": 4000,  # prompts used to compute the silhouette
    "minimum": 10,  # clusters with fewer prompts are not sampled
  }
  config.base = supervised()
  config.base.decay = "cosine"
  config.base.b2 = 0.95
  config.engine = {
    "prompt_slots": 16,  # prompts in flight
    # samples of a prompt in flight; further ones are queued; 0 is the most that
    # a stage takes
    "slots": 0,
    # allowed padded lengths of a prompt, tokens; () follows max_prompt_tokens,
    # see run/sizes.py, here and below
    "prompt_buckets": (),
    # KV cache sizes of a sample, in tokens; it grows through them; () follows
    # rollout.max_new_tokens
    "cache_buckets": (),
    # decode steps per call; the host looks at the results in between
    "steps": 64,
    "cache_dtype": "float32",  # dtype of the KV cache: float32 or bfloat16
  }
  config.rollout = {
    # [C] maximum tokens of a completion, including its stop token
    "max_new_tokens": 10_240,
    "temperature": 1.0,  # [P] divides the logits
    "top_k": 0,  # keeps the k most likely tokens; 0 keeps all
    # [P] nucleus sampling: keeps the top tokens of this total probability
    "top_p": 1.0,
    # drops tokens below this fraction of the top probability; 0 keeps all
    "min_p": 0.0,
    "min_new_tokens": 0,  # minimum tokens of a completion
    # longest period of a repetition that stops a completion; 0 turns this off
    "loop_period": 0,
    # number of final tokens that must repeat; at least two periods
    "loop_tokens": 0,
    "banned_ids": (),  # token ids that are never sampled
    "logit_bias": (),  # (token id, number added to its logit) pairs
  }
  config.scoring = {
    "batch_size": 16,  # prefixes per scoring call
    # allowed padded lengths of a prefix, tokens; () follows the longest prompt
    # and completion
    "prefix_buckets": (),
    # allowed numbers of continuations per prefix in a call; () follows the
    # other two
    "slot_buckets": (),
    # allowed padded lengths of a continuation, tokens; () follows
    # max_reference_tokens
    "continuation_buckets": (),
  }
  config.reward = {
    # weighted sum of rewards or "module:function"s; weight 0 only logs a term
    "terms": "opera + verifiable",
    # weighted sums that replace reward.terms for a task kind or a data set of
    # data.mix, by its name
    "by_task": {},
    # settings of those terms by name that differ from their defaults
    "options": {},
    "timeout": 60.0,  # time limit in seconds of a user's function for one step
    # environment variables passed to it although they look like secrets
    "environment": (),
    "alpha": 0.3,  # [P] weight of R_ppl; R_self has weight 1 - alpha
    "tau": 2.0,  # [P] R_self = tanh(count / tau)
    "mode": "both",  # both, or an ablation of the paper: r_self, r_ppl, one_hot
    # words that make a step reflective
    "keywords": ("But", "Wait", "Hmm", "However", "Let me think"),
    # match keywords as a word or substring (as the release); any: every step
    # counts
    "match": "word",
    # [P] baseline of a step: previous, reflective or start
    "compare": "previous",
    "separator": "\n\n",  # [C] separates the steps of a thought
    # [C] text inserted before the reference; "\n</think>\n\n" closes the
    # thought
    "bridge": "",
    # maximum scored steps of a thought; a metric counts the rest
    "max_steps": 64,
    # exact (falls back to math-verify if undecided), or math_verify
    "math_check": "exact",
  }
  config.synthesis = {
    "batch": 256,  # prompts per shard; one process works on a shard
    "candidates": 4,  # [P] k, continuations sampled at a reflection word
    # [C] reflections searched per thought; 0 is plain sampling
    "budget": 20,
    # [P] perplexity of the whole sequence, or of the candidate only
    "score": "sequence",
    "choose": "",  # "module:function" that chooses instead of the perplexity
    "temperature": 0.6,  # [C] divides the logits
    "top_k": 20,  # [C] keeps the k most likely tokens; 0 keeps all
    # [C] nucleus sampling: keeps the top tokens of this total probability
    "top_p": 0.95,
    # maximum tokens of a candidate; 0 is 1/10 of rollout.max_new_tokens
    "max_step_tokens": 0,
    # maximum tokens; a longer thought stays unclosed, or see close_thought; 0
    # is 4/5 of rollout.max_new_tokens
    "max_thought_tokens": 0,
    # maximum tokens of the final answer; 0 is 2/5 of rollout.max_new_tokens
    "max_answer_tokens": 0,
    # closes a thought that is too long, or in which the turn ended, and goes on
    # with the answer: for a model that has never seen the tag
    "close_thought": False,
    # [C] words at which the search forks; ("\n\n",) forks at every step
    "stop_words": ("Wait", "But", "Hmm", "Let me think", "However"),
    # prompt template, or a .txt file with it
    "template": "{prompt}",
    "method": "search",  # search, or rewrite (REER, arXiv 2509.06160)
    "rounds": 10,  # maximum rounds of rewriting
    # prompt template of rewriting, which contains the reference
    "guide": "configs/templates/rewrite.txt",
    "seed": -1,  # seed of this stage; -1 uses config.seed
  }
  config.select = {  # see `opera_jax.synthesis.filters`
    "min_reflections": 1,  # minimum reflective steps of a thought
    "max_repeat": 0.2,  # maximum fraction of steps that repeat an earlier one
    "ngram": 8,  # words per n-gram in the next two rules
    "max_ngram_repeat": 0.5,  # maximum fraction of repeated n-grams
    "max_copied": 0.7,  # maximum fraction of the answer copied from the prompt
    "max_foreign": 0.1,  # maximum fraction of letters of a foreign script
    "think_tags": False,  # whether think tags are allowed inside a text
    # words that open a sentence in a thought, but hardly ever in an answer
    "stop_words": ("Wait", "Hmm", "Let me think"),
    "max_stop_words": 1,  # maximum stop words in an answer
    "min_thought_words": 1,  # minimum words of a thought
    "max_thought_words": 0,  # maximum words of a thought; 0 means unlimited
    "min_answer_words": 1,  # minimum words of an answer
    "max_answer_words": 0,  # maximum words of an answer; 0 means unlimited
    # maximum perplexity in robust standard deviations; 0 means unlimited
    "max_deviation": 6.0,
    "keep_share": 1.0,  # fraction of the passing traces to keep, by perplexity
    "rl": {  # which prompts RL uses
      # samples per maths prompt that decide about it ([P] 8); 0 keeps all
      # prompts
      "samples": 0,
      "right": (
        1,
      ),  # [P] a maths prompt is kept if this many samples are right
      # "column:NAME" or "module:function" that scores open-ended prompts
      "judge": "",
      "band": (2.0, 3.0),  # [P] lowest and highest score (of 5) to keep
    },
  }
  # name and licence in the dataset cards of synthesis and selection
  config.card = {"name": "OPERA cold-start traces", "license": "unknown"}
  config.sft = supervised()
  config.sft.epochs = 5  # [P]
  # model to start from: "" or "base" for the base model, the folder of another
  # run's stage (runs/other/sft), or a checkpoint
  config.sft.init = ""
  config.sft.lora = lora()  # a LoRA adapter instead of all parameters
  config.rl = {
    # model to start from, and reference of KL: "" or "sft" for the SFT model,
    # "base", the folder of another run's stage (runs/other/sft), or a
    # checkpoint
    "init": "",
    "steps": 26,  # [P] steps of rollout, reward and update
    "prompts": 64,  # [C] prompts per step
    # uniform: shuffled passes over the prompts; pass_rate: drawn by the spread
    # of their last rewards, see rl/prompt_sampling.py
    "sampling": "uniform",
    # added to that spread (at most 1/4), so that every prompt is drawn again
    "sampling_floor": 0.05,
    "samples": 16,  # [C] completions per prompt
    "mini_batch": 8,  # [C] prompts per update
    "epochs_per_batch": 1,  # passes of updates over a step's completions (PPO)
    # mini-batches of about equal completion tokens, each of as many prompts
    "balance_tokens": False,
    "micro_batches": 1,  # gradient accumulation steps per update
    # completions per packed row; they share one copy of their prompt
    "completions_per_row": 1,
    # allowed padded lengths of a row (or of its completions), tokens; ()
    # follows the longest prompt and completion
    "row_buckets": (),
    "learning_rate": 1e-6,  # [P] peak of the schedule
    "warmup": 0.4,  # [C] fraction of the updates with a rising learning rate
    # [P] schedule after the warm-up: constant, linear or cosine
    "decay": "constant",
    "optimizer": "adamw",  # adamw, adafactor, lion or muon
    "weight_decay": 0.01,  # [C] decoupled, on every parameter
    "max_grad_norm": 1.0,  # [C] gradients are clipped to this global norm
    # dtype of the optimizer's moments: float32 or bfloat16
    "moment_dtype": "float32",
    "clip_low": 0.2,  # [C] the ratio is clipped at 1 - this
    "clip_high": 0.2,  # [C] and at 1 + this
    # [C] dual-clip bound at negative advantages; 0 turns it off
    "dual_clip": 3.0,
    # [C] weight of KL to the model that RL starts from; 0 turns it off
    "kl_coef": 0.001,
    "kl_estimator": "k3",  # [C] k3, k2, or k1 (only in the reward)
    # [C] sequence_mean, token_mean or constant; see losses/reduce.py
    "reduction": "sequence_mean",
    "constant": 0.0,  # divisor of the reduction "constant"
    # [C] loss: KL is added to the loss; reward: subtracted from the reward
    "kl_in": "loss",
    "loss": "clipped",  # [C] clipped, gspo or dpo
    "beta": 0.1,  # strength of DPO's reference
    "entropy_coef": 0.0,  # [C] weight of the entropy bonus
    "advantage": "grpo",  # [P] weighted sum of advantage estimators by name
    # settings of those estimators by name that differ from their defaults
    "advantage_options": {},
    # cap of the importance weight trainer / sampler; 0 turns it off
    "importance_cap": 0.0,
    # whose ratio the weight is: of a token, or the sequence's product
    "importance_level": "token",
    # weights above the cap: truncate to it, or mask (leave out of the loss)
    "importance_mode": "truncate",
    # weights below this are masked too; 0 turns it off
    "importance_floor": 0.0,
    # leaves completions without an end out of the loss (DAPO); their rewards
    # stay in the group's baseline
    "mask_truncated": False,
    # maximum |logprob| difference of sampler and trainer, nats; 0 is no check
    "max_logprob_diff": 0.1,
    "max_logprob_diff_steps": 3,  # consecutive steps above it that end the run
    # maximum extra batches that replace groups with equal rewards (DAPO)
    "max_resamples": 0,
    # term that must differ within a group; "" means the weighted sum
    "filter_reward": "",
    # weight of the critic's loss, for the estimator "gae"; 0 means no critic
    "value_coef": 0.0,
    "value_clip": 0.2,  # clip of the change of the critic's value in an update
    "ema": 0.0,  # rate of the policy's EMA, for "sdpo"; 0 turns it off
    # weight of the divergence from a teacher on its top tokens
    "divergence_coef": 0.0,
    "teacher_top_k": 100,  # number of those top tokens
    # stage whose model is the teacher; "" means the model that RL starts from
    "teacher": "",
    "tasks": ("open_ended", "math"),  # task kinds that RL uses
    "seed": -1,  # seed of this stage; -1 uses config.seed
    # RL stops after this many sampled tokens; 0 means unlimited
    "token_budget": 0,
    "checkpoint_every": 1,  # steps between two checkpoints
    # megabytes of compressed rollouts in rl/rollouts, beyond which the oldest
    # steps are deleted; 0 keeps none
    "keep_rollouts": 1_000,
  }
  # Validation on prompts from the end of RL's, which RL then does not train on
  # and the final evaluation does not report on.
  config.rl.validation = {
    "every": 0,  # steps between two validations; 0 turns validation off
    "prompts": 32,  # prompts taken from RL's
    "samples": 2,  # completions per prompt, at the rollout's temperature
    # what must rise: reward, or a reward term such as score or correct
    "metric": "reward",
    # validations in a row without a new best that end RL; 0 means unlimited
    "patience": 0,
    "keep_best": True,  # RL's model is that of the best validation
  }
  config.rl.lora = lora()  # a LoRA adapter instead of all parameters
  config.evaluate = {
    "samples": 2,  # completions per held-out prompt and model
    "temperature": 1.0,  # divides the logits; 0 is greedy
    # nucleus sampling: keeps the top tokens of this total probability
    "top_p": 1.0,
    "thoughts": 4,  # thoughts that the report shows step by step
    "resamples": 2_000,  # bootstrap resamples
    # also measures the run's own reward, where it has terms besides opera and
    # verifiable; a judge is asked then
    "reward": True,
  }
  return config


def full_size(config: ml_collections.ConfigDict, name: str) -> None:
  """Sets the values that the published Qwen3 models share at the paper's
  lengths.

  Prompts of 6,144 and responses of 10,240 tokens make rows of 16,384. Compute
  is bf16 and master weights float32. A prefix with more continuations than the
  largest slot bucket is scored in several rows.

  Args:
    config: modified in place.
    name: hub id of checkpoint and tokenizer.
  """
  config.checkpoint = name
  config.data.kind = "jsonl"
  config.synthesis.template = "configs/templates/monologue.txt"  # [P]
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.engine.cache_dtype = "bfloat16"
  config.sft.packed = True
