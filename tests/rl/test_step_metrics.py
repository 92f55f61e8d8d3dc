"""The metrics of an RL step count what their names say."""

import types

import numpy as np

from opera_jax import structs
from opera_jax.rl import score, step_metrics


def _sample(size, finished):
  return structs.Sample(
    np.zeros(size, np.int32), np.full(size, -1.0, np.float32), finished
  )


def test_lengths_clipping_and_groups_of_equal_rewards():
  groups = [
    [_sample(2, True), _sample(6, False)],
    [_sample(3, True), _sample(5, True)],
  ]
  rows = [np.full(1 + len(s.tokens), -1.25) for group in groups for s in group]
  scored = score.Scored(
    total_BN=np.asarray([[0.0, 1.0], [0.25, 0.25]]),
    terms={},
    prefixes=[],
    logprobs=structs.Logprobs(rows, rows, [], [], 20, 4),
    thoughts=None,
    deltas_RJ=None,
    open_ended_B=np.asarray([True, False]),
    separate_tokens=30,
    rollouts=types.SimpleNamespace(
      texts=[
        "<think>a</think> </think>b",
        "<think>a</think>b</think>",
        "\n</think>b",
        "<think>a",
      ],
      prompts=[types.SimpleNamespace(set=name) for name in ("", "sums")],
    ),
  )
  line = step_metrics.rl_step(
    scored,
    groups,
    old=scored.logprobs,
    ema=None,
    updates=[{"kl": 1.0}, {"kl": 3.0}],
    clock={"time/start": 0.0, "time/reward": 2.0, "time/update": 8.0},
  )
  assert line["completions/mean_length"] == 4.0
  assert line["completions/min_length"] == 2.0
  assert line["completions/max_length"] == 6.0
  assert line["completions/clipped_ratio"] == 0.25
  assert line["reward/mean"] == 0.375
  np.testing.assert_allclose(line["reward/std"], np.sqrt(0.5) / 2)
  np.testing.assert_allclose(
    line["reward/batch_std"], np.std([0.0, 1.0, 0.25, 0.25])
  )
  assert line["reward_by_task/open_ended"] == 0.5
  assert line["reward_by_task/math"] == 0.25
  by_set = {n: v for n, v in line.items() if n.startswith("reward_by_set/")}
  assert by_set == {"reward_by_set/sums": 0.25}
  assert line["completions/stray_think_close"] == 0.5
  assert line["frac_reward_zero_std"] == 0.5
  assert line["sampler_trainer/logprob_diff"] == 0.25
  assert line["scoring/prefix_tokens"] == 20
  assert line["scoring/continuation_tokens"] == 4
  assert line["kl"] == 2.0
  assert line["step_time"] == 8.0 and line["time/update"] == 6.0
  assert line["tokens_per_second"] == 2.0
