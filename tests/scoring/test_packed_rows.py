"""States and the tokens that they predict are aligned, both ways."""

import jax.numpy as jnp
import numpy as np
import pytest

from opera_jax.scoring import packed_rows


@pytest.mark.parametrize("trailing", [(), (3,)])
def test_a_state_predicts_the_next_token(trailing):
  states = packed_rows.PredictingStates(jnp.zeros((2, 5, 1)), prefix_length=0)
  token_RT = np.arange(10 * max(trailing, default=1)).reshape(2, 5, *trailing)
  target_RX = states.to_states(jnp.asarray(token_RT))
  np.testing.assert_array_equal(target_RX[:, :-1], token_RT[:, 1:])
  back_RT = states.to_tokens(target_RX)
  np.testing.assert_array_equal(back_RT[:, 1:], token_RT[:, 1:])
  np.testing.assert_array_equal(back_RT[:, 0], 0 * token_RT[:, 0])


def test_behind_a_shared_prompt_states_are_already_aligned():
  states = packed_rows.PredictingStates(jnp.zeros((1, 4, 1)), prefix_length=2)
  token_RT = jnp.arange(1, 7)[None]
  np.testing.assert_array_equal(states.to_states(token_RT), [[3, 4, 5, 6]])
  np.testing.assert_array_equal(
    states.to_tokens(states.to_states(token_RT)), [[0, 0, 3, 4, 5, 6]]
  )
