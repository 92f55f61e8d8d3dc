"""FLOPs against a direct count over the matrices of a tiny model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from opera_jax.models import decoder, lora
from opera_jax.plan import cost

CONFIG = decoder.Config(
  vocab_size=50,
  hidden_size=8,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=6,
  intermediate_size=20,
)


def test_a_token_costs_two_flops_a_weight_of_every_matrix():
  _, params = decoder.abstract(CONFIG)
  axes = decoder.logical_axes(params)
  matrices = sum(
    x.size
    for x, names in zip(
      jax.tree.leaves(params),
      jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
    )
    if names[0] == "layers" and "norm" not in names and len(names) > 2
  )
  assert cost.layer_flops(CONFIG) == 2 * matrices
  assert cost.head_flops(CONFIG) == 2 * 8 * 50


def test_attention_counts_the_pairs_that_the_mask_shows():
  T, S, G = 5, 2, 3
  seen = int(jnp.tri(T).sum()) + S * (G * T + int(jnp.tri(G).sum()))
  pair = (
    2
    * 2
    * CONFIG.num_attention_heads
    * CONFIG.head_dim
    * CONFIG.num_hidden_layers
  )
  per_token = cost.layer_flops(CONFIG) + cost.head_flops(CONFIG)
  want = 7 * ((T + S * G) * per_token + seen * pair)
  assert cost.score(CONFIG, 7, T, S, G).total == want


def test_decoding_costs_what_one_pass_over_its_tokens_costs():
  """Prefix and samples once each, whatever the number of passes."""
  prefill = cost.prefill(CONFIG, 2, 9).total
  decode = cost.decode(CONFIG, 2 * 4, 9, 6).total
  together = cost.score(CONFIG, 2, 9, 4, 6).total
  unread = 2 * 8 * cost.head_flops(CONFIG)  # of the prompts but their ends
  assert prefill + decode == together - unread


def test_with_lora_frozen_matrices_take_no_product_for_their_gradient():
  full = dataclasses.replace(CONFIG, remat="none")
  low = dataclasses.replace(full, lora=lora.Settings(2, targets=("q", "down")))
  # q: [8, 2] and [2, 24]; down: [20, 2] and [2, 8].
  adapter = 2 * 3 * 2 * (8 + 24 + 20 + 8)
  assert cost.adapter_flops(low) == adapter
  assert cost.adapter_flops(full) == 0
  tokens = 7 * 5
  matrices = tokens * (cost.layer_flops(full) + cost.head_flops(full))
  ours, theirs = cost.update(low, 7, 5), cost.update(full, 7, 5)
  assert ours.forward == theirs.forward + tokens * adapter
  assert ours.backward == theirs.backward - matrices + 2 * tokens * adapter


@pytest.mark.parametrize("remat, again", [("none", 0), ("full", 1)])
def test_backward_is_twice_forward_and_remat_is_forward_again(remat, again):
  config = decoder.Config(**{**vars(CONFIG), "remat": remat})
  one = cost.update(config, 4, 16)
  attention = cost.attention_flops(config, 4 * cost.causal_pairs(16))
  head = 4 * 16 * cost.head_flops(config)
  assert one.backward == 2 * one.forward
  streamed = head + attention / 2
  assert one.recompute == again * (one.forward - head) + streamed


def test_every_remat_policy_has_a_cost():
  assert set(cost._RECOMPUTED) == set(decoder.REMAT)


def test_a_shared_prompt_is_counted_once_and_meets_no_head():
  T, S, G = 10, 3, 4
  shared = cost.update(CONFIG, 2, T, S, G)
  pairs = 2 * (T * (T + 1) / 2 + S * (G * T + G * (G + 1) / 2))
  assert shared.forward == (
    2 * (T + S * G) * cost.layer_flops(CONFIG)
    + cost.attention_flops(CONFIG, pairs)
    + 2 * S * G * cost.head_flops(CONFIG)
  )
  assert shared.total < cost.update(CONFIG, 2 * S, T + G).total
