"""An endpoint on this machine that does what it is told to do."""

import contextlib
import http.server
import json
import threading
import time


class Server(http.server.ThreadingHTTPServer):
  """Answers with what `replies` says, one after the other, then with `say`.

  An entry of `replies` is a status, the bytes of a whole reply, a text (the
  message's content), or a function that is given the handler.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, say):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.say = say
    self.replies, self.bodies, self.seen, self.headers = [], [], [], []
    self.usage = {"prompt_tokens": 100, "completion_tokens": 10}

  @property
  def address(self) -> str:
    return f"http://127.0.0.1:{self.server_port}/v1"

  def handle_error(self, request, client_address):
    pass  # the client lost patience


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True

  def do_GET(self):
    self.server.seen.append("GET")
    self.send_error(404)

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    question = body["messages"][-1]["content"]
    self.server.bodies.append(body)
    self.server.seen.append(question)
    self.server.headers.append(dict(self.headers.items()))
    what = self.server.replies.pop(0) if self.server.replies else None
    if what is None:
      what = self.server.say(question)
    if callable(what):
      self.close_connection = True
      what(self)
      return
    if isinstance(what, int):
      self.reply(b"{}", what)
    elif isinstance(what, bytes):
      self.reply(what)
    else:
      self.reply(completion(what, self.server.usage))

  def reply(self, payload: bytes, status: int = 200, **headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(payload)))
    if self.close_connection:  # else the client may ask once more on it
      self.send_header("Connection", "close")
    self.end_headers()
    self.wfile.write(payload)

  def log_message(self, *_):
    pass


def completion(content, usage=None) -> bytes:
  """A chat completion with that content, as an endpoint sends it."""
  answer = {"choices": [{"message": {"content": content}}], "usage": usage}
  return json.dumps(answer).encode()


def drip(handler):
  """A whole reply, a byte at a time, over minutes."""
  payload = completion("x" * 1000)
  handler.send_response(200)
  handler.send_header("Content-Length", str(len(payload)))
  handler.end_headers()
  for byte in payload:
    handler.wfile.write(bytes([byte]))
    handler.wfile.flush()
    time.sleep(0.1)


def drip_headers(handler):
  """Headers without end, slower than any time-out of a single read."""
  handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
  while True:
    handler.wfile.write(b"a")
    handler.wfile.flush()
    time.sleep(0.1)


def huge(handler):
  """400 MB."""
  handler.send_response(200)
  handler.send_header("Content-Length", str(400_000_000))
  handler.end_headers()
  for _ in range(400):
    handler.wfile.write(b"x" * 1_000_000)


def huge_refusal(handler):
  """The same behind an error's status."""
  handler.send_response(500)
  handler.send_header("Content-Length", str(400_000_000))
  handler.end_headers()
  for _ in range(400):
    handler.wfile.write(b"x" * 1_000_000)


@contextlib.contextmanager
def running(say):
  """A server in a thread of its own."""
  made = Server(say)
  thread = threading.Thread(
    target=made.serve_forever, args=(0.02,), daemon=True
  )
  thread.start()
  yield made
  made.shutdown()
  made.server_close()
