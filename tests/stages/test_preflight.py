"""What lies outside of a run is tried before its base model is trained."""

import pytest

from opera_jax.configs import tiny
from opera_jax.experiments import opera_rl
from opera_jax.rewards import endpoint


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("reward.terms", "opera + nowhere:f", "'nowhere:f' cannot be imported"),
    ("reward.terms", "opera + math:sqrt + math:pi", "'math:pi' is float"),
    ("synthesis.choose", "nowhere:f", "'nowhere:f' cannot be imported"),
    ("synthesis.choose", "f", "'f' is no path of a function"),
    ("select.rl.judge", "nowhere:f", "'nowhere:f' cannot be imported"),
    ("select.rl.judge", "__main__:f", "%%writefile"),
    (
      "reward.terms",
      "judge",
      "no readable answer",
    ),
  ],
)
def test_it_is_refused_before_any_work(field, value, message, tmp_path):
  config = tiny.get_config("smoke").unlock()
  config.data.documents = 60
  config.sft.batch_size = 8  # a row for each of the fake devices
  if value == "judge":
    config.reward.options = {
      "judge": {
        # Nobody listens at port 9.
        "endpoint": "http://127.0.0.1:9/v1",
        "model": "m",
        "retries": 1,
        "backoff": 0.0,
      }
    }
  config.update_from_flattened_dict({field: value})
  with pytest.raises((ValueError, endpoint.EndpointError), match=message):
    opera_rl.opera(config, str(tmp_path))
  assert not (tmp_path / "base").exists()
