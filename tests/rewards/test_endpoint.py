"""The client of the judge against a server that misbehaves."""

import asyncio
import gzip
import json
import os
import pathlib
import resource
import signal
import time

import pytest

from opera_jax.rewards import endpoint, judge

from rewards import hostile_server  # isort: skip

GRADES = dict.fromkeys(judge.DIMENSIONS, 4)
FINE = json.dumps(GRADES)
WANTED = endpoint.Format(
  "grades",
  {"type": "object", "properties": dict.fromkeys(judge.DIMENSIONS, {})},
  judge.read_grades,
)
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server():
  with hostile_server.running(lambda question: FINE) as made:
    yield made


def _client(server, **settings):
  given = {"timeout": 5.0, "backoff": 0.0, "key_variable": ""} | settings
  return endpoint.Client(server.address, "fake", **given)


def _one(client, question="q", **settings):
  return client.ask([question], WANTED, **settings)[0]


@pytest.mark.parametrize(
  "trouble",
  [
    *(408, 429, 500, 502, 503, 504),
    *(b"", b"null", b"[]", b"3", b"{broken", b"[" * 100_000, b"\xff\xfe"),
    b'{"choices": []}',
    b'{"choices": [{"message": {"content": null}}]}',
    b'{"choices": [{"message": {"content": ["x"]}}]}',
    *("", "I would rather not.", "null", "[]", "{" * 60_000, "9" * 10_000),
    json.dumps(GRADES | {"contextual_utility": 9}),
    json.dumps(GRADES | {"contextual_utility": True}),
    '{"a":' * 10_000,
    lambda handler: None,  # closes the connection
    lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"),
    lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n"),
    lambda handler: handler.reply(b"x" * 2_000_000),
    lambda handler: handler.reply(b"{}", **{"Content-Type": "a; charset=x"}),
  ],
  ids=lambda trouble: ascii(trouble)[:24],
)
def test_misbehaviour_is_tried_again(server, trouble):
  server.replies = [trouble, trouble]
  client = _client(server)
  assert _one(client) == GRADES
  # A server that fails may be asked once more, without the schema.
  assert client.requests == 3 and client.failed == 0


@pytest.mark.parametrize(
  "usage",
  ["x", [], None, {"prompt_tokens": 10**30, "completion_tokens": "many"}],
)
def test_nonsense_about_tokens_costs_nothing(server, usage):
  server.usage = usage
  client = _client(server, prompt_price=1.0, completion_price=1.0)
  assert _one(client) == GRADES and client.cost() == 0


def test_tokens_cost_what_the_prices_say(server):
  client = _client(server, prompt_price=2.0, completion_price=5.0)
  server.replies = ["words"]  # an unreadable reply costs as well
  _one(client)
  assert client.cost() == pytest.approx(2 * 250e-6)


def test_a_retry_after_an_unreadable_reply_differs(server):
  server.replies = ["no", "{}", 500, json.dumps(GRADES | {"x": 1})]
  assert _one(_client(server)) == GRADES
  first, second, third, again = server.seen
  assert first == "q"
  assert len({first, second, third}) == 3
  assert "no JSON object" in second and second.startswith("q\n\n(Try 2.")
  assert again == third  # the failed request is sent again as it was
  # All at temperature 0.
  assert {body["temperature"] for body in server.bodies} == {0}


def test_waits_grow_and_obey_retry_after(server, monkeypatch):
  waits = []

  async def wait(seconds):
    waits.append(seconds)

  monkeypatch.setattr(endpoint, "_sleep", wait)
  later = {"Retry-After": "3"}
  much = {"Retry-After": "999999"}
  server.replies = [
    *(429, 429, 429),
    lambda handler: handler.reply(b"{}", 429, **later),
    lambda handler: handler.reply(b"{}", 503, **much),
  ]
  _one(_client(server, backoff=0.1, retries=5, timeout=7.0))
  assert len(waits) == 5
  assert 1.7 < waits[1] / waits[0] < 2.3 and 1.7 < waits[2] / waits[1] < 2.3
  assert waits[3] == 3
  assert waits[4] == 7  # what is asked for is bounded


def test_tries_end_and_say_what_was_wrong(server):
  server.say = lambda question: 500
  with pytest.raises(
    endpoint.EndpointError, match="1 of 1 questions asked, 3 tries.*HTTP 500"
  ):
    _one(_client(server, retries=2))
  assert len(server.seen) == 3


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_refusal_of_everything_ends_at_once(server, code):
  server.say = lambda question: code
  with pytest.raises(endpoint.EndpointError, match=f"HTTP {code}.*model"):
    _client(server).ask(["q"] * 50, WANTED, share=0.5)
  assert len(server.seen) < 40


@pytest.mark.parametrize("code", [400, 403, 413, 422])
def test_a_refused_question_fails_without_retries(server, code):
  """A text that is too long, say, or that a gateway takes for an attack."""
  server.say = lambda question: code if "long" in question else FINE
  client = _client(server, parallel=1)
  got = client.ask(["q", "long", "q2"], WANTED, share=0.5)
  assert got[0] == got[2] == GRADES
  assert isinstance(got[1], endpoint.Failure)
  assert got[1].problem == f"HTTP {code}"
  assert client.failed == 1 and server.seen == ["q", "long", "q2"]


def test_nobody_there_is_a_failure_and_not_a_riddle():
  client = endpoint.Client("http://127.0.0.1:9/v1", "m", retries=1, backoff=0)
  with pytest.raises(endpoint.EndpointError, match="Connect"):
    _one(client)


@pytest.mark.parametrize("what", ["drip", "drip_headers"])
def test_the_limit_is_on_the_whole_request(server, what):
  server.say = lambda question: getattr(hostile_server, what)
  begin = time.monotonic()
  with pytest.raises(endpoint.EndpointError, match="no whole reply within 0.4"):
    _one(_client(server, timeout=0.4, retries=1))
  assert time.monotonic() - begin < 10


@pytest.mark.parametrize("what", ["huge", "huge_refusal"])
def test_a_huge_reply_is_cut(server, what):
  server.say = lambda question: getattr(hostile_server, what)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  begin = time.monotonic()
  with pytest.raises(endpoint.EndpointError, match="longer than 1000000 bytes"):
    _one(_client(server, retries=0))
  assert time.monotonic() - begin < 10
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert grown < 50_000  # KB; the reply is 400 MB


def test_a_compressed_reply_is_not_unpacked(server):
  bomb = gzip.compress(hostile_server.completion(FINE + " " * 10_000_000))
  server.say = lambda question: (
    lambda handler: handler.reply(bomb, **{"Content-Encoding": "gzip"})
  )
  with pytest.raises(endpoint.EndpointError, match="compressed"):
    _one(_client(server, retries=0))
  assert server.headers[0]["accept-encoding"] == "identity"


def test_what_a_request_holds(server):
  client = _client(server, system="Be fair.", max_tokens=77, temperature=0.5)
  _one(client, "\ud800 question")
  (body,) = server.bodies
  assert body["messages"] == [
    {"role": "system", "content": "Be fair."},
    {"role": "user", "content": "? question"},
  ]
  assert body["max_tokens"] == 77 and body["temperature"] == 0.5
  asked = body["response_format"]
  assert asked["type"] == "json_schema"
  assert asked["json_schema"]["schema"] == WANTED.schema
  client = _client(
    server,
    length_field="max_completion_tokens",
    temperature=-1,
    use_schema=False,
  )
  _one(client)
  assert set(server.bodies[1]) == {"model", "messages", "max_completion_tokens"}


def _refuses_schema(server):
  def say(question):
    return 400 if "response_format" in server.bodies[-1] else FINE

  return say


def test_an_endpoint_without_schemas_is_asked_without(server, capsys):
  server.say = _refuses_schema(server)
  client = _client(server, parallel=1)
  got = client.ask([f"q{k}" for k in range(4)], WANTED)
  assert got == [GRADES] * 4
  assert client.requests == 5 and client.unreadable == 0
  assert capsys.readouterr().out.count("refuses response_format") == 1


def test_an_endpoint_that_took_a_schema_is_not_asked_without(server):
  client = _client(server)
  _one(client)
  server.say = lambda question: 400
  with pytest.raises(endpoint.EndpointError):
    _one(client, "other")
  assert client.requests == 2


def _text_of(folder: pathlib.Path) -> str:
  return "".join(p.read_text() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("around", ["{}", "{}\n", " {}\r\n\t"])
def test_the_key_goes_to_the_endpoint_and_nowhere_else(
  server, tmp_path, monkeypatch, capsys, around
):
  monkeypatch.setenv("MY_KEY", around.format(KEY))
  client = _client(
    server, key_variable="MY_KEY", cache=str(tmp_path), retries=0
  )
  server.say = lambda question: (
    json.dumps(GRADES | {"note": KEY}) if question == "q" else f"I saw {KEY}"
  )
  assert _one(client) == GRADES
  assert server.headers[0]["authorization"] == f"Bearer {KEY}"
  shown = [repr(client), repr(vars(client)), _text_of(tmp_path)]
  for reply in (
    f"I saw {KEY}",
    hostile_server.completion(KEY),
    401,
    lambda h: h.reply(json.dumps({"error": {"message": KEY}}).encode(), 400),
    lambda h: h.reply(b"{}", 302, Location=f"http://127.0.0.1:9/{KEY}"),
    lambda h: h.wfile.write(f"HTTP/1.1 200 {KEY}\r\n\r\n{KEY}".encode()),
    lambda h: h.wfile.write(f"{KEY}\r\n\r\n".encode()),
  ):
    server.say = lambda question, reply=reply: reply
    with pytest.raises(endpoint.EndpointError) as failure:
      _one(client, "another")
    error = failure.value
    while error is not None:
      shown.append(str(error))
      error = error.__cause__
  out, err = capsys.readouterr()
  assert KEY not in "".join(shown) + out + err


@pytest.mark.parametrize(
  "key", [f"{KEY}\nX-Evil: 1", f"{KEY} b", f"{KEY}\x00", f"{KEY}\u2019", "\x7f"]
)
def test_a_key_that_no_header_holds_is_refused_unseen(server, monkeypatch, key):
  monkeypatch.setattr(endpoint.os, "environ", {**os.environ, "MY_KEY": key})
  client = _client(server, key_variable="MY_KEY")
  for ask in (_one, lambda c: c.probe("q", WANTED)):
    with pytest.raises(ValueError, match="MY_KEY.*not shown") as failure:
      ask(client)
    assert KEY not in str(failure.value)
  assert not server.seen


@pytest.mark.parametrize("variable", ["", "MY_KEY"])
@pytest.mark.parametrize("key", [None, "", " \n"])
def test_without_a_key_none_is_sent(server, monkeypatch, variable, key):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
  monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-mine")
  monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Mine: {KEY}")
  if key is not None:
    monkeypatch.setenv("MY_KEY", key)
  assert _one(_client(server, key_variable=variable)) == GRADES
  sent = json.dumps(server.headers[0]).lower()
  assert "authorization" not in sent
  for word in (KEY, "mine", "openai", "stainless"):
    assert word not in sent


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(server, monkeypatch, code):
  monkeypatch.setenv("MY_KEY", KEY)
  with hostile_server.running(lambda question: FINE) as other:
    server.say = lambda question: (
      lambda handler: handler.reply(
        b"", code, Location=f"{other.address}/chat/completions"
      )
    )
    with pytest.raises(endpoint.EndpointError, match="redirects"):
      _one(_client(server, key_variable="MY_KEY"))
    assert not other.seen


@pytest.mark.parametrize(
  "address",
  [
    "http://me:hunter2@host/v1",
    "https://hunter2@host/v1",
    "https://:hunter2@host/v1",
    "me:hunter2@host/v1",
    "https://host/v1?api_key=hunter2",
    "https://host/v1#hunter2",
    "https://host/sk-hunter2hunter2/v1",
    "http://hunter2@[bad/v1",
  ],
)
def test_an_address_with_a_secret_is_refused_unseen(address):
  with pytest.raises(ValueError, match="address") as failure:
    judge.Reward(address, "m")
  assert "hunter2" not in str(failure.value)


@pytest.mark.parametrize(
  "address", ["ftp://x", "host/v1", "http://", "", "http://h:port/v1", "h\n"]
)
def test_what_is_no_address_is_refused(address):
  with pytest.raises(ValueError, match="judge's endpoint.*address"):
    judge.Reward(address, "m")


@pytest.mark.parametrize(
  "variable",
  [
    KEY,
    "sk_live_4f9a8b7c6d5e4f3a2b1c",
    "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "AKIAIOSFODNN7EXAMPLE",
    "SK_LIVE_4F9A8B7C6D5E",
    "0123456789ABCDEF0123456789ABCDEF",
    "Bearer x",
    "MY_KEY\n",
    "MY KEY",
    "$MY_KEY",
  ],
)
def test_a_variable_that_is_a_key_is_refused_unseen(variable):
  with pytest.raises(ValueError, match="key_variable is the NAME") as failure:
    judge.Reward("http://x/v1", "m", key_variable=variable)
  assert variable not in str(failure.value)


@pytest.mark.parametrize("variable", ["", "OPENAI_API_KEY", "K", "JUDGE_2"])
def test_a_variable_is_a_name(variable):
  made = judge.Reward("http://x/v1", "m", key_variable=variable)
  assert made.key_variable == variable


def test_a_key_in_clear_text_is_warned_about(server, monkeypatch, capsys):
  monkeypatch.setenv("MY_KEY", KEY)
  _client(server, key_variable="MY_KEY").probe("q", WANTED)
  assert "clear text" not in capsys.readouterr().out
  client = endpoint.Client(
    "http://judge.invalid/v1", "m", key_variable="MY_KEY", retries=0
  )
  with pytest.raises(endpoint.EndpointError):
    client.probe("q", WANTED)
  assert "goes to http://judge.invalid/v1 in clear text" in (
    capsys.readouterr().out
  )


def test_answers_are_kept_on_disk(server, tmp_path):
  first = _client(server, cache=str(tmp_path))
  first.ask(["a", "b"], WANTED)
  again = _client(server, cache=str(tmp_path))
  assert again.ask(["a", "b"], WANTED) == [GRADES] * 2
  assert again.requests == 0 and again.hits == 2 and again.cost() == 0
  # Other settings, another answer.
  other = _client(server, cache=str(tmp_path), system="Be kind.")
  other.ask(["a"], WANTED)
  assert other.requests == 1


def _truncated(path):
  path.write_bytes(path.read_bytes()[:-5])


def _flipped(path):
  data = bytearray(path.read_bytes())
  data[10] ^= 0x80
  path.write_bytes(bytes(data))


def _fifo(path):
  path.unlink()
  os.mkfifo(path)


def _folder(path):
  path.unlink()
  path.mkdir()


def _dangling(path):
  path.unlink()
  path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize(
  "damage",
  [
    *(_truncated, _flipped, _fifo, _folder, _dangling),
    *(b"", b"null", b"[]", b"{}", b'{"reply": null}', b'{"reply": []}'),
    *(b'{"reply": {"better": true}}', b"[" * 100_000, b"\x00" * 99),
    json.dumps({"reply": GRADES | {"contextual_utility": True}}).encode(),
    b" " * (1 << 21),
  ],
  ids=lambda damage: getattr(damage, "__name__", ascii(damage)[:20]),
)
def test_a_damaged_answer_is_made_again(server, tmp_path, damage, capsys):
  _client(server, cache=str(tmp_path)).ask(["a"], WANTED)
  (path,) = (p for p in tmp_path.rglob("*.json"))
  if callable(damage):
    damage(path)
  else:
    path.write_bytes(damage)
  client = _client(server, cache=str(tmp_path))
  assert client.ask(["a"], WANTED) == [GRADES]
  assert client.requests == 1 and client.hits == 0
  out = capsys.readouterr().out
  if damage is _folder:
    assert "takes no more answers" in out
  else:
    assert json.loads(path.read_text())["reply"] == GRADES
  assert not list(tmp_path.rglob("*.tmp"))


def test_progress_and_cost_are_printed(server, monkeypatch, capsys):
  monkeypatch.setattr(endpoint, "_REPORT_SECONDS", 0.1)

  def slow(question):
    time.sleep(0.15)
    return FINE

  server.say = slow
  client = _client(server, parallel=1, prompt_price=1.0)
  client.ask([f"q{k}" for k in range(6)], WANTED)
  out = capsys.readouterr().out
  assert "of 6 questions in" in out and "0 unreadable replies" in out
  assert "cost" in out


def test_it_works_where_a_loop_runs_already(server):
  async def cell():
    return _one(_client(server))

  assert asyncio.run(cell()) == GRADES


def test_an_interrupt_ends_it_soon(server):
  server.say = lambda question: hostile_server.drip
  previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
  begin = time.monotonic()
  try:
    # Again after 5 seconds: an interrupt inside a callback of the garbage
    # collector is reported there and lost.
    signal.setitimer(signal.ITIMER_REAL, 0.5, 5)
    with pytest.raises(KeyboardInterrupt):
      _client(server, timeout=60.0).ask(["q"] * 20, WANTED)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)
  assert time.monotonic() - begin < 10


def test_nothing_to_ask_asks_nothing(server):
  assert _client(server).ask([], WANTED) == [] and not server.seen
