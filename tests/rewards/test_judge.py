"""The judge against a local server that misbehaves."""

import http.server
import json
import threading
import time

import numpy as np
import pytest

from opera_jax.rewards import endpoint, judge

GRADES = dict.fromkeys(judge.DIMENSIONS, 4)


class _Server(http.server.ThreadingHTTPServer):
  """Answers with what `replies` says, one after the other, then well."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.replies, self.seen, self.keys = [], [], []
    self.say = lambda question: json.dumps(GRADES)


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"]))
    question = json.loads(body)["messages"][0]["content"]
    self.server.seen.append(question)
    self.server.keys.append(self.headers.get("Authorization"))
    trouble = self.server.replies.pop(0) if self.server.replies else "fine"
    if isinstance(trouble, int):
      self.send_response(trouble)
      self.end_headers()
      return
    if trouble == "slow":
      time.sleep(1.0)
    text = self.server.say(question)
    if trouble == "bad grades":
      text = json.dumps(GRADES | {"contextual_utility": 9})
    if trouble == "words":
      text = "I would rather not."
    answer = {
      "choices": [{"message": {"content": f"```json\n{text}\n```"}}],
      "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }
    payload = (
      b"{broken" if trouble == "bad json" else json.dumps(answer).encode()
    )
    try:
      self.send_response(200)
      self.send_header("Content-Length", str(len(payload)))
      self.end_headers()
      self.wfile.write(payload)
    except BrokenPipeError:
      pass  # the client lost patience

  def log_message(self, *_):
    pass


@pytest.fixture
def server():
  made = _Server()
  thread = threading.Thread(target=made.serve_forever, daemon=True)
  thread.start()
  yield made
  made.shutdown()
  made.server_close()


def _reward(server, **settings):
  return judge.Reward(
    endpoint=f"http://127.0.0.1:{server.server_port}/v1",
    model="fake",
    timeout=0.3,
    backoff=0.01,
    parallel=1,
    **settings,
  )


def test_rubric_is_the_mean_of_four_grades(server, rollouts):
  server.say = lambda question: json.dumps(
    dict.fromkeys(judge.DIMENSIONS, 5 if "good" in question else 1)
    | {"contextual_utility": 3}
  )
  case = rollouts([["<think>x</think>good", "<think>good</think>bad"]])
  got = _reward(server, prompt_price=2.0, completion_price=5.0)
  parts = got.rewards(case, None)
  np.testing.assert_allclose(parts["total"], [[3.5 / 4, 0.5 / 4]])
  np.testing.assert_array_equal(parts["structural_integrity"], [[5, 1]])
  assert "x</think>" not in server.seen[0]  # the thought is not shown
  np.testing.assert_allclose(parts["judge_cost"].sum(), 2 * 250e-6, rtol=1e-5)


@pytest.mark.parametrize(
  "troubles", [[429, 500], ["slow"], ["bad json", "words", "bad grades"], [503]]
)
def test_misbehaviour_is_tried_again(server, rollouts, troubles):
  server.replies = list(troubles)
  reward = _reward(server)
  got = reward.rewards(rollouts([["a", "b"]]), None)
  np.testing.assert_allclose(got["total"], 0.75)
  assert reward.client.requests == 2 + len(troubles)


def test_waits_grow(server, monkeypatch):
  waits = []
  monkeypatch.setattr(endpoint.time, "sleep", waits.append)
  server.replies = [429] * 3
  _reward(server).client.ask("q", judge.read_grades)
  assert len(waits) == 3
  assert 1.7 < waits[1] / waits[0] < 2.3 and 1.7 < waits[2] / waits[1] < 2.3


def test_tries_end_and_say_what_was_wrong(server):
  server.replies = [500] * 9
  with pytest.raises(endpoint.EndpointError, match="after 3 tries.*HTTP 500"):
    _reward(server, retries=2).client.ask("q", judge.read_grades)
  server.replies = [401]
  with pytest.raises(endpoint.EndpointError, match="after 1 tries.*HTTP 401"):
    _reward(server).client.ask("q", judge.read_grades)


def test_answers_are_kept_on_disk(server, rollouts, tmp_path):
  case = rollouts([["a", "b"]])
  first = _reward(server, cache=str(tmp_path))
  first.rewards(case, None)
  again = _reward(server, cache=str(tmp_path))
  got = again.rewards(case, None)
  np.testing.assert_allclose(got["total"], 0.75)
  assert again.client.requests == 0 and again.client.hits == 2
  assert again.client.cost() == 0


def test_the_key_goes_to_the_endpoint_and_nowhere_else(
  server, rollouts, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
  reward = _reward(server, cache=str(tmp_path))
  reward.rewards(rollouts([["a", "b"]]), None)
  assert server.keys == ["Bearer sk-secret"] * 2
  server.replies = [401]
  with pytest.raises(endpoint.EndpointError) as failure:
    reward.client.ask("another", judge.read_grades)
  kept = "".join(p.read_text() for p in tmp_path.rglob("*.json"))
  shown = repr(reward) + repr(vars(reward.client)) + str(failure.value)
  out, err = capsys.readouterr()
  assert "sk-secret" not in kept + shown + out + err


def test_pairwise_asks_both_orders_and_reports_bias(server, rollouts):
  # The judge prefers the longer answer, but never lets "same" lose the first
  # place: biased there, consistent elsewhere.
  def say(question):
    first = question.split("# Answer A\n")[1].split("\n\n# Answer B")[0]
    second = question.split("# Answer B\n")[1]
    choice = "A" if len(first) >= len(second) else "B"
    return json.dumps({"better": choice})

  server.say = say
  case = rollouts([["a", "bbb", "cc", "dd"]])
  got = _reward(server, mode="pairwise", opponents=3).rewards(case, None)
  # Each pair is met twice (n, m) and (m, n), each in both orders.
  np.testing.assert_allclose(got["total"], [[0, 1, 0.5, 0.5]])
  assert len(server.seen) == 4 * 3 * 2
  # 2 of 12 comparisons are of equal lengths: always the first place.
  np.testing.assert_allclose(got["self_consistency"], 10 / 12)
  np.testing.assert_allclose(got["position_bias"], 2 / 24)


def test_a_fair_judge_has_no_bias():
  got = judge.tally([(0, 1), (1, 2)], [1.0, 0.5], [0.0, 0.5], 4)
  np.testing.assert_allclose(got.win_R, [1, 0.25, 0.5, 0.5])
  assert got.position_bias == 0 and got.self_consistency == 1
  # One that always takes the first place settles nothing.
  got = judge.tally([(0, 1)], [1.0], [1.0], 2)
  np.testing.assert_allclose(got.win_R, [0.5, 0.5])
  assert got.position_bias == 0.5 and got.self_consistency == 0


def test_bad_settings_are_refused(server, rollouts):
  with pytest.raises(ValueError, match="http"):
    endpoint.Client("ftp://x", "m")
  with pytest.raises(ValueError, match="Unknown mode 'vibes'"):
    judge.Reward("http://x", "m", mode="vibes")
  with pytest.raises(ValueError, match="opponents"):
    _reward(server, mode="pairwise", opponents=2).rewards(
      rollouts([["a", "b"]]), None
    )
