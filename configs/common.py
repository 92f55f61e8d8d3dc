"""Every field of a run, with the paper's values where the paper has one.

A config file starts from `get_config()`, changes values, and returns the
locked result. Sources: [P] the paper, [C] its released code, see the README.
"""

import ml_collections

STAGES = "synthesize,select,sft,rl,evaluate,report"


def supervised() -> dict:
  """Fields of `opera_jax.stages.supervised.Recipe`."""
  return {
    "epochs": 1,  # passes over the training pairs
    "batch_size": 16,  # packed rows an update
    "row_tokens": 4096,  # length of a row; a longer pair is dropped and counted
    "packed": False,  # several pairs a row, kept apart by segments
    "learning_rate": 1e-5,  # peak of the schedule
    "warmup": 0.05,  # share of the updates over which the rate rises
    "decay": "constant",  # after the warm-up: constant, or cosine
    "b2": 0.999,  # of AdamW's second moment
    "weight_decay": 0.01,  # decoupled, on every parameter
    "max_grad_norm": 1.0,  # gradients are clipped to this global norm
    "moment_dtype": "float32",  # of Adam's moments, float32 or bfloat16
    # token_mean or sequence_mean, see losses/reduce.py
    "reduction": "token_mean",
    "micro_batches": 1,  # an update's rows go through in so many pieces
    "checkpoint_every": 100,  # updates between two checkpoints
    "seed": -1,  # of this stage alone; -1 takes the run's
  }


def get_config() -> ml_collections.ConfigDict:
  """The paper's recipe, without a model size."""
  config = ml_collections.ConfigDict()
  config.stages = STAGES  # stages to run, separated by commas, in this order
  # stages to do again, with those after them; what they left goes to dropped/
  config.redo = ""
  config.seed = 0  # of data, models, samples and order
  # devices along each axis; one may be -1 and takes those that are left
  config.mesh = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}
  config.runtime = {
    # "" for one process, "auto" (TPU pod, SLURM), or HOST:PORT,COUNT,INDEX
    "distributed": "",
    # a process that is silent for so long ends the run
    "heartbeat_seconds": 60,
    # folder of compiled programs; "auto" is private to you, "" keeps none
    "compile_cache": "auto",
  }
  # directory or hub id (NAME@REVISION) of a Qwen3; "" pretrains a model
  config.checkpoint = ""
  config.tokenizer = {
    "path": "",  # directory or hub id; "" trains a BPE on the documents
    "bpe_size": 8192,  # vocabulary of the BPE that is trained
  }
  config.max_prompt_tokens = 6_144  # [C] longer prompts are dropped and counted
  # longer references are dropped and counted
  config.max_reference_tokens = 4_096

  config.model = {
    # rows of the embedding; 0 takes the tokenizer's vocabulary
    "vocab_size": 0,
    "hidden_size": 128,  # width of the residual stream
    "num_hidden_layers": 2,  # transformer blocks
    "num_attention_heads": 4,  # query heads
    # key and value heads; they divide the query heads
    "num_key_value_heads": 2,
    "head_dim": 32,  # width of an attention head
    "intermediate_size": 384,  # width of the feed-forward layer
    "rope_theta": 1_000_000.0,  # base of the rotary embedding
    "rms_norm_eps": 1e-6,  # added under the root of RMSNorm
    "tie_word_embeddings": True,  # the output head is the embedding
    # of the computation, float32 or bfloat16; weights stay float32
    "dtype": "float32",
    # what the backward pass recomputes: none, dots, attention or full
    "remat": "dots",
    # implementation: splash, cudnn or xla; "" goes by the device
    "attention": "",
  }
  config.data = {
      # storyworld (made from the seed), or jsonl for any file
      "kind": "storyworld",
      "synthesis": 20_000,  # [P] tasks of the cold start
      "rl": 1_674,  # [P] tasks of RL
      "held_out": 200,  # tasks that no training stage sees
      "documents": 0,  # pretraining documents; unread with a checkpoint
      "math_share": 0.0,  # share of storyworld's tasks that are sums
      "path": "",  # tasks: JSONL, Parquet, hf:, tfds:, or a directory
      # our field -> column of data.path
      "fields": {"id": "id", "task": "task", "prompt": "prompt",
                 "reference": "reference"},
      # value of the task column -> open_ended or math
      "task_map": {"open_ended": "open_ended", "math": "math"},
      "default_task": "",  # task of rows that name none; "" makes them errors
      "prompt_words": 0,  # a longer prompt is dropped; 0 for no limit
      # longer references are cut to these; 0 keeps them whole
      "excerpt_words": 0,
      "math_path": "",  # a second source, of maths tasks alone; "" for none
      # our field -> column of data.math_path
      "math_fields": {"prompt": "question", "reference": "answer"},
      # regular expression whose first group is the true answer
      "math_answer": r"(?s)\A.*####\s*+(\S[^\n]*+)",
      "math_limit": 0,  # maths tasks taken of data.math_path; 0 for all
      # JSONL of responses that documents are drafted from
      "responses_path": "",
      # word 3-gram Jaccard index that keeps two tasks on one side of the split
      "near_duplicate": 0.0,
  }  # fmt: skip
  config.pool = {  # of experiments/pool.py
    "size": 20_000,  # [P] prompts of the pool; 0 takes all that are left
    "min_chars": 8,  # shorter prompts are dropped
    "max_chars": 20_000,  # longer prompts are dropped; 0 for no limit
    "max_reference_chars": 0,  # longer references are dropped; 0 for no limit
    # codes of languages that stay, such as "en"; none keeps all
    "languages": (),
    # probability from which a prompt counts as of another language
    "certainty": 0.5,
    # Jaccard index of n-grams that makes a near duplicate; 0 looks for none
    "near_duplicate": 0.8,
    "ngram": 3,  # words of an n-gram of pool.near_duplicate
    # directory or hub id of a sentence-transformers model; or "policy"
    "embedder": "",
    "batch": 4096,  # prompts embedded between two saves
    # number of clusters; 0 takes the choice of highest silhouette
    "clusters": 0,
    # numbers of clusters tried where pool.clusters is 0
    "cluster_choices": (8, 12, 16, 24, 32, 48, 64),
    "cluster_sample": 4000,  # prompts on which the silhouette is measured
    "minimum": 10,  # smallest cluster that is sampled from, prompts
  }
  config.base = supervised()
  config.base.decay = "cosine"
  config.base.b2 = 0.95
  config.engine = {
    "prompt_slots": 16,  # prompts in flight
    "slots": 16,  # samples of a prompt in flight; further ones wait
    # allowed padded lengths of a prompt, tokens
    "prompt_buckets": (512, 1024, 2048, 4096, 6144),
    # lengths that a sample's KV cache grows through, tokens
    "cache_buckets": (1024, 2048, 4096, 8192, 10_240),
    "steps": 64,  # tokens that are decoded between two looks of the host
    "cache_dtype": "float32",  # of keys and values, float32 or bfloat16
  }
  config.rollout = {
    "max_new_tokens": 10_240,  # [C] longest completion, its stop token included
    "temperature": 1.0,  # [P] divides the logits
    "top_k": 0,  # keeps the k likeliest tokens; 0 keeps all
    "top_p": 1.0,  # [P] keeps the likeliest tokens that reach this share
    "min_p": 0.0,  # keeps tokens so likely beside the likeliest; 0 keeps all
    "min_new_tokens": 0,  # no completion ends before so many tokens
    # longest period of a repetition that ends a completion; 0 ends none
    "loop_period": 0,
    "loop_tokens": 0,  # last tokens that must repeat; at least two periods
    "banned_ids": (),  # token ids that are never sampled
    "logit_bias": (),  # (token id, number added to its logit) pairs
  }
  config.scoring = {
    "batch_size": 16,  # prefixes scored in one call
    # allowed padded lengths of a prefix, tokens
    "prefix_buckets": (1024, 2048, 4096, 8192, 16_384),
    # allowed numbers of continuations of a prefix in a call
    "slot_buckets": (1, 4, 8, 16, 32),
    # allowed padded lengths of a continuation, tokens
    "continuation_buckets": (256, 512, 1024, 2048, 4096),
  }
  config.reward = {
    # weighted sum of rewards or "module:function"s; weight 0 only measures
    "terms": "opera + verifiable",
    "options": {},  # settings of those terms by name, other than their defaults
    "timeout": 60.0,  # seconds that a user's function may take for one step
    # variables passed to a user's function although they look like keys
    "environment": (),
    "alpha": 0.3,  # [P] weight of R_ppl; R_self has the rest
    "tau": 2.0,  # [P] R_self = tanh(count / tau)
    "mode": "both",  # both, or an ablation of the paper: r_self, r_ppl, one_hot
    # words that make a step reflective
    "keywords": ("But", "Wait", "Hmm", "However", "Let me think"),
    # keywords as a word, a substring (as the release), or any: every step
    "match": "word",
    # [P] what a step must beat: previous, reflective or start
    "compare": "previous",
    "separator": "\n\n",  # [C] between two steps of a thought
    # [C] text before the reference; "\n</think>\n\n" closes the thought first
    "bridge": "",
    "max_steps": 64,  # steps told apart in a thought; further ones are counted
    # exact (asks math-verify where it cannot tell), or math_verify
    "math_check": "exact",
  }
  config.synthesis = {
    "batch": 256,  # prompts of a shard, which one process works at
    "candidates": 4,  # [P] k, next steps sampled at a reflection word
    # [C] reflections that are searched in a thought; 0 is plain sampling
    "budget": 20,
    # [P] perplexity over the whole sequence, or over the candidate
    "score": "sequence",
    "choose": "",  # a judge in place of the perplexity, "module:function"
    "temperature": 0.6,  # [C] divides the logits
    "top_k": 20,  # [C] keeps the k likeliest tokens; 0 keeps all
    "top_p": 0.95,  # [C] keeps the likeliest tokens that reach this share
    "max_step_tokens": 1024,  # longest candidate
    "max_thought_tokens": 8192,  # a longer thought stays unclosed
    "max_answer_tokens": 4096,  # longest final answer
    # [C] words at which the search forks; ("\n\n",) forks at every step
    "stop_words": ("Wait", "But", "Hmm", "Let me think", "However"),
    # the guiding words around a prompt, or a .txt file with them
    "template": "{prompt}",
    "method": "search",  # search, or rewrite (REER, arXiv 2509.06160)
    "rounds": 10,  # most rounds of rewriting
    # guiding words of rewriting, with the reference in them
    "guide": "configs/templates/rewrite.txt",
    "seed": -1,  # of this stage alone; -1 takes the run's
  }
  config.select = {  # see `opera_jax.synthesis.filters`
    "min_reflections": 1,  # fewest reflective steps of a thought
    "max_repeat": 0.2,  # largest share of steps that repeat an earlier one
    "ngram": 8,  # words of an n-gram of the next two rules
    "max_ngram_repeat": 0.5,  # largest share of n-grams that repeat
    "max_copied": 0.7,  # largest share of the answer that is the prompt's text
    "max_foreign": 0.1,  # largest share of letters of a foreign script
    "think_tags": False,  # whether a think tag may stand inside a text
    # words that open a sentence of thinking, hardly one of an answer
    "stop_words": ("Wait", "Hmm", "Let me think"),
    "max_stop_words": 1,  # most stop words in an answer
    "min_thought_words": 1,  # shortest thought, words
    "max_thought_words": 0,  # longest thought, words; 0 for no limit
    "min_answer_words": 1,  # shortest answer, words
    "max_answer_words": 0,  # longest answer, words; 0 for no limit
    # perplexity outliers, robust standard deviations; 0 for no limit
    "max_deviation": 6.0,
    "keep_share": 1.0,  # part kept of what passes, by perplexity
    "rl": {  # which prompts RL is run on
      # completions that judge a maths prompt ([P] 8); 0 keeps all prompts
      "samples": 0,
      "right": (1,),  # [P] a maths prompt is kept if so many of them are right
      # "column:NAME" or "module:function" that scores open-ended prompts
      "judge": "",
      "band": (2.0, 3.0),  # [P] lowest and highest score of 5 that is kept
    },
  }
  # name and licence in the dataset cards of synthesis and selection
  config.card = {"name": "OPERA cold-start traces", "license": "unknown"}
  config.sft = supervised()
  config.sft.epochs = 5  # [P]
  config.rl = {
    "steps": 26,  # [P] each samples, rewards and updates once
    "prompts": 64,  # [C] prompts of a step
    "samples": 16,  # [C] completions of a prompt
    "mini_batch": 8,  # [C] prompts of an update
    "micro_batches": 1,  # an update's rows go through in so many pieces
    # completions of a prompt that share one copy of it in an update
    "completions_per_row": 1,
    # allowed padded lengths of a row (or of its completions), tokens
    "row_buckets": (2048, 4096, 8192, 16_384),
    "learning_rate": 1e-6,  # [P] after the warm-up, constant
    "warmup": 0.4,  # [C] share of the updates over which the rate rises
    "weight_decay": 0.01,  # [C] decoupled, on every parameter
    "max_grad_norm": 1.0,  # [C] gradients are clipped to this global norm
    "moment_dtype": "float32",  # of Adam's moments, float32 or bfloat16
    "clip_low": 0.2,  # [C] the ratio is clipped at 1 - this
    "clip_high": 0.2,  # [C] and at 1 + this
    # [C] bound of the loss at negative advantages; 0 for none
    "dual_clip": 3.0,
    "kl_coef": 0.001,  # [C] weight of KL to the SFT model; 0 leaves it out
    "kl_estimator": "k3",  # [C] k3 or k2; or k1, in the reward alone
    # [C] sequence_mean, token_mean or constant; see losses/reduce.py
    "reduction": "sequence_mean",
    "constant": 0.0,  # divisor of the reduction "constant"
    "kl_in": "loss",  # [C] KL joins the loss, or is taken off the reward
    "loss": "clipped",  # [C] clipped, gspo or dpo
    "beta": 0.1,  # strength of DPO's reference
    "entropy_coef": 0.0,  # [C] weight of the entropy bonus
    "advantage": "grpo",  # [P] weighted sum of advantage estimators by name
    "advantage_options": {},  # settings of those estimators by name
    # bound on trainer's / sampler's probability as a weight; 0 for no weights
    "importance_cap": 0.0,
    # nats between sampler and trainer that end the run; 0 watches nothing
    "max_logprob_diff": 0.1,
    "max_logprob_diff_steps": 3,  # steps in a row beyond it that end the run
    # most further batches in place of groups with equal rewards (DAPO)
    "max_resamples": 0,
    # term whose spread keeps a group; "" is the weighted sum
    "filter_reward": "",
    # weight of a critic's loss, for the estimator "gae"; 0 for no critic
    "value_coef": 0.0,
    "value_clip": 0.2,  # bound on the change of the critic's value in an update
    "ema": 0.0,  # rate of a moving mean of the policy, for "sdpo"; 0 keeps none
    # weight of the divergence from a teacher's top tokens
    "divergence_coef": 0.0,
    "teacher_top_k": 100,  # number of those top tokens
    "teacher": "",  # stage whose model is the teacher; "" takes the SFT model
    "tasks": ("open_ended", "math"),  # kinds of tasks that RL uses
    "seed": -1,  # of this stage alone; -1 takes the run's
    # ends RL once so many tokens were sampled; 0 for no budget
    "token_budget": 0,
    "checkpoint_every": 1,  # steps between two checkpoints
  }
  config.evaluate = {
    "samples": 2,  # completions of a held-out prompt, for each model
    "temperature": 1.0,  # divides the logits; 0 takes the likeliest token
    "top_p": 1.0,  # keeps the likeliest tokens that reach this share
    "thoughts": 4,  # thoughts that the report shows step by step
    "resamples": 2_000,  # resamples of the bootstrap
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
