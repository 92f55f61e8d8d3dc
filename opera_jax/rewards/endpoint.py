"""A client of an OpenAI-compatible endpoint, with retries and a cache.

Requests go through the `openai` client, see `rewards.chat`. This module adds a
limit on the total time of each request, retries that tell the model what was
wrong, a fraction of questions that may fail, and an on-disk cache keyed by a
hash of the question. The key is read from the environment at each call, and is
only used in request headers.
"""

import asyncio
import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import random
import re
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from concurrent import futures
from typing import Any

from opera_jax.rewards import replies

# Statuses worth a retry; statuses that end the run, unless there were answers
# before.
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_FINAL = (401, 403, 404, 405, 407)
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_KEY = re.compile(r"[!-~]+")  # what a header may hold
_KEY_IN_PATH = re.compile(r"/(?:sk|pk|gsk|xai|hf|ghp)[-_]\w{8}")
_SHOWN = 300  # characters of a reply in an error
_CACHED_BYTES = 1 << 20
_REPORT_SECONDS = 10.0  # between two lines of progress
_TICK = 0.2


class EndpointError(RuntimeError):
  """The endpoint refuses, or too many questions have no readable answer."""


@dataclasses.dataclass(frozen=True)
class Failure:
  """A question without a readable answer after all retries."""

  problem: str
  reply: str = ""  # the last text, cut; "" where none came


@dataclasses.dataclass(frozen=True)
class Format:
  """The required form of a reply: a JSON schema, and a function that reads
  it."""

  name: str
  schema: dict[str, Any]  # JSON schema of the object
  read: Callable[[dict[str, Any]], Any]  # raises `replies.Unreadable`


def check_address(endpoint: str) -> str:
  """Checks the endpoint's address, which must not contain secrets.

  Raises:
    ValueError: no http address, or one that holds a password or a query. What
      could be secret is not shown.
  """
  rule = (
    'Give its base address, as in "https://host/v1", in '
    "config.reward.options.judge.endpoint."
  )
  if not isinstance(endpoint, str) or not endpoint.isprintable():
    raise ValueError(f"The judge's endpoint is no line of text. {rule}")
  try:
    parts: Any = urllib.parse.urlsplit(endpoint.strip())
    host, _ = parts.hostname, parts.port
  except ValueError:
    parts = host = None
  if parts is not None and (
    "@" in parts.netloc
    or parts.query
    or parts.fragment
    or _KEY_IN_PATH.search(parts.path)
  ):
    raise ValueError(
      "The judge's endpoint holds a user, a password, a query or a key, which "
      "would stand in the run's records. Name the environment variable that "
      f"holds the key in config.reward.options.judge.key_variable. {rule}"
    )
  if parts is None or parts.scheme not in ("http", "https") or not host:
    shown = "" if "@" in endpoint else f" {endpoint!r}"
    raise ValueError(f"The judge's endpoint{shown} is no http address. {rule}")
  return endpoint.strip().rstrip("/")


def check_variable(name: str) -> str:
  """Checks the name of the variable that holds the key; "" for none.

  Raises:
    ValueError: it is no name of a variable, or looks like the key itself. It
      is not shown.
  """
  if name == "":
    return name
  sane = isinstance(name, str) and _VARIABLE.fullmatch(name)
  if not sane or _looks_like_a_key(name):
    raise ValueError(
      "config.reward.options.judge.key_variable is the NAME of an environment "
      "variable, in capitals, digits and underscores, as in OPENAI_API_KEY; "
      "what stands there is none, or is a key itself, and is not shown. Put "
      "the key into a variable, and name that."
    )
  return name


def _looks_like_a_key(name: str) -> bool:
  """Whether a part between underscores is long and contains digits."""
  if name in os.environ:
    return False
  return any(
    len(piece) >= 12 and sum(c.isdigit() for c in piece) >= 2
    for piece in name.split("_")
  ) or (len(name) >= 20 and "_" not in name)


def read_key(variable: str) -> str:
  """Reads the key from a variable, and strips surrounding white space.

  Returns:
    The key; "" where the variable is not set, or none is named.

  Raises:
    ValueError: a key that no header can hold. It is not shown.
  """
  key = os.environ.get(variable, "").strip() if variable else ""
  if key and not _KEY.fullmatch(key):
    raise ValueError(
      f"The key in the environment variable {variable} holds a space, a line "
      "break or a letter beyond ASCII, which no header may; it is not shown. "
      "Set the variable to the key alone."
    )
  return key


class Client:
  """A client of one model at one endpoint; one thread may use it at a time."""

  def __init__(
    self,
    endpoint: str,
    model: str,
    *,
    key_variable: str = "OPENAI_API_KEY",
    cache: str = "",
    timeout: float = 60.0,
    retries: int = 4,
    backoff: float = 1.0,
    parallel: int = 8,
    max_tokens: int = 1024,
    length_field: str = "max_tokens",
    temperature: float = 0.0,
    system: str = "",
    use_schema: bool = True,
    reply_bytes: int = 1_000_000,
    prompt_price: float = 0.0,
    completion_price: float = 0.0,
  ):
    """Connects to nothing yet.

    Args:
      endpoint: base address, as in "https://host/v1".
      model: its name there.
      key_variable: environment variable of the key; "" sends none.
      cache: folder that caches answers; "" turns it off.
      timeout: seconds that a request may take from its first byte to the last
        of its reply.
      retries: maximum retries per question.
      backoff: seconds before the first retry; doubled each time.
      parallel: concurrent requests.
      max_tokens: of a reply, including thinking.
      length_field: the endpoint's name of that field.
      temperature: of sampling; below 0 uses the endpoint's default.
      system: the system's turn; "" sends none.
      use_schema: request the JSON schema; if the endpoint refuses it, requests
        are sent without.
      reply_bytes: of a reply; one that is longer is cut off and not read.
      prompt_price: cost of a million prompt tokens.
      completion_price: cost of a million completion tokens.

    Raises:
      ValueError: an address or a variable that cannot be, or that holds what
        must not be written down.
    """
    self._base = check_address(endpoint)
    self._key_variable = check_variable(key_variable)
    self._model = model
    self._cache = pathlib.Path(cache) if cache else None
    self._timeout, self._retries, self._backoff = timeout, retries, backoff
    self._parallel, self._reply_bytes = parallel, reply_bytes
    self._system, self._use_schema = system, use_schema
    self._settings: dict[str, Any] = {length_field: max_tokens}
    if temperature >= 0:
      self._settings["temperature"] = temperature
    self._prices = (prompt_price, completion_price)
    self._tokens = [0, 0]
    self._taken = False  # the endpoint took a request with a schema
    self._warned: set[str] = set()
    self.requests = 0  # sent, retries included
    self.answered = 0  # questions that got a readable reply
    self.hits = 0  # questions answered from the cache
    self.unreadable = 0  # replies that came and could not be read
    self.failed = 0  # questions without an answer after all tries

  def cost(self) -> float:
    """Total cost of all answers so far, in the currency of the prices."""
    return sum(t * p for t, p in zip(self._tokens, self._prices)) / 1e6

  def probe(self, question: str, wanted: Format) -> None:
    """Asks one question and reads the answer; the cache is not used.

    Raises:
      ImportError: the `openai` client is not installed.
      EndpointError: there is no readable answer.
      OSError: the cache cannot be written.
      ValueError: the key cannot be sent.
    """
    if self._cache is not None:
      try:
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._cache):
          pass
      except OSError as error:
        raise OSError(
          f"The judge's cache {str(self._cache)!r} cannot be written: {error}. "
          "Name another folder in config.reward.options.judge.cache, or none."
        ) from error
    host = urllib.parse.urlsplit(self._base).hostname or ""
    local = host == "localhost" or host.startswith("127.") or host == "::1"
    if (
      read_key(self._key_variable)
      and not local
      and self._base.startswith("http:")
    ):
      self._warn(
        f"the key in {self._key_variable} goes to {self._base} in clear text. "
        'Use https, or set key_variable to "" if no key is needed.'
      )
    self._ask([question], wanted, share=0.0, cached=False)

  def ask(
    self, questions: Sequence[str], wanted: Format, *, share: float = 0.0
  ) -> list[Any]:
    """Returns the endpoint's answers, one per question.

    A question fails if all its tries fail. The next try after an unreadable
    reply tells the model what was wrong with it, so that it can differ at
    temperature 0 too; after a request that failed, it is the same.

    Args:
      questions: the user's turns.
      wanted: what a reply must be.
      share: of the questions that may fail. Above 0, a single one always may,
        and all of them never.

    Returns:
      What `wanted.read` made of each reply, or a `Failure`.

    Raises:
      ImportError: the `openai` client is not installed.
      EndpointError: more questions failed, or the endpoint refuses.
      ValueError: the key cannot be sent.
    """
    return self._ask(questions, wanted, share=share, cached=True)

  def _ask(
    self, questions: Sequence[str], wanted: Format, share: float, cached: bool
  ) -> list[Any]:
    if not questions:
      return []
    most = max(1, int(share * len(questions))) if share > 0 else 0
    stop = threading.Event()
    # In a separate thread, since a notebook's thread already has an event loop.
    with futures.ThreadPoolExecutor(1) as pool:
      asking = pool.submit(
        asyncio.run,
        self._all(
          _chat(),
          questions,
          wanted,
          most=min(most, len(questions) - 1),
          share=share,
          cached=cached,
          stop=stop,
        ),
      )
      try:
        return asking.result()
      finally:
        stop.set()

  async def _all(
    self,
    chat: Any,
    questions: Sequence[str],
    wanted: Format,
    *,
    most: int,
    share: float,
    cached: bool,
    stop: threading.Event,
  ) -> list[Any]:
    """Asks all questions concurrently; stops as soon as too many have
    failed."""
    gate = asyncio.Semaphore(self._parallel)
    failures: list[Failure] = []
    over = asyncio.get_running_loop().create_future()
    done = 0

    async def one(client: Any, question: str) -> Any:
      nonlocal done
      async with gate:
        answer = await self._answer(chat, client, question, wanted, cached)
      done += 1
      if isinstance(answer, Failure):
        failures.append(answer)
        self.failed += 1
        if len(failures) > most and not over.done():
          over.set_result(None)
      return answer

    begin = shown = time.monotonic()
    async with chat.opened(
      self._base,
      read_key(self._key_variable),
      timeout=self._timeout,
      reply_bytes=self._reply_bytes,
    ) as client:
      tasks = [asyncio.create_task(one(client, q)) for q in questions]
      every = asyncio.gather(*tasks)
      try:
        while not stop.is_set():
          await asyncio.wait(
            [every, over],
            timeout=_TICK,
            return_when=asyncio.FIRST_COMPLETED,
          )
          if over.done():
            raise EndpointError(self._ending(failures, done, questions, share))
          if every.done():
            return every.result()
          if time.monotonic() - shown > _REPORT_SECONDS:
            shown = time.monotonic()
            print(
              f"judge: {done} of {len(questions)} questions in "
              f"{shown - begin:.0f} s; in all {self.unreadable} unreadable "
              f"replies, {self.failed} failed questions, cost "
              f"{self.cost():.4g}",
              flush=True,
            )
        raise asyncio.CancelledError
      finally:
        for task in tasks:
          task.cancel()
        await asyncio.gather(*tasks, every, return_exceptions=True)

  def _ending(
    self,
    failures: Sequence[Failure],
    done: int,
    questions: Sequence[str],
    share: float,
  ) -> str:
    """Why the run ends, with three of the replies."""
    last = "; ".join(
      f"{place}. {failure.problem}"
      + (f", in {failure.reply!r}" if failure.reply else "")
      for place, failure in enumerate(failures[-3:], 1)
    )
    return (
      f"{self._base}, model {self._model!r}: no readable answer to "
      f"{len(failures)} of {done} questions asked, {self._retries + 1} tries "
      f"each of at most {self._timeout:g} s. Of {len(questions)} a share of "
      f"{share:g} may fail (config.reward.options.judge.max_failed). The last: "
      f"{last}. Check the address, the model, the key in "
      f"{self._key_variable or 'no variable'} and the limits of the endpoint; "
      "or raise the judge's max_tokens, retries or timeout."
    )

  async def _answer(
    self, chat: Any, client: Any, question: str, wanted: Format, cached: bool
  ) -> Any:
    """One question's value, from the cache or after some tries; or Failure."""
    if cached:
      value = self._remembered(question, wanted)
      if value is not None:
        return value
    failure, note, asked = Failure("not asked"), "", 0.0
    for attempt in range(self._retries + 1):
      if attempt:
        await _sleep(self._pause(attempt, asked))
      asked, text = 0.0, ""
      try:
        async with asyncio.timeout(self._timeout):
          body = await self._send(chat, client, question + note, wanted)
        text, tokens = replies.content(body)
        for place, number in enumerate(tokens):
          self._tokens[place] += number
        value, reply = replies.last_object(text, wanted.read)
      except replies.Unreadable as error:
        self.unreadable += 1
        failure = Failure(self._safe(str(error)), self._safe(text[-_SHOWN:]))
        # So that a model at temperature 0 can answer differently.
        note = (
          f"\n\n(Try {attempt + 2}. The reply before could not be read: "
          f"{failure.problem}. Reply with the JSON object alone.)"
        )
      except TimeoutError:
        failure = Failure(f"no whole reply within {self._timeout:g} s")
      except chat.Refused as error:
        code = error.status_code
        failure = Failure(f"HTTP {code}", self._said(error.response))
        if (code in _FINAL or code < 400) and not self.answered:
          raise EndpointError(self._refusal(code)) from None
        if code not in _PASSING:
          return failure
        asked = _seconds(error.response.headers.get("retry-after", ""))
      except chat.BROKEN as error:
        cause = error.__cause__ or error
        failure = Failure(self._safe(f"{type(cause).__name__}: {cause}"))
      else:
        self.answered += 1
        self._keep(question, wanted, reply)
        return value
    return failure

  def _refusal(self, code: int) -> str:
    what = {
      401: "the key is not accepted",
      403: "the key has no right to this",
      404: "there is no such address or model",
    }.get(code, "it leads elsewhere" if code < 400 else "it refuses")
    return (
      f"{self._base}, model {self._model!r}: HTTP {code}, {what}. Check "
      "config.reward.options.judge.endpoint (redirects are not followed), "
      f"model, and the key in {self._key_variable or 'no variable'}."
    )

  async def _send(
    self, chat: Any, client: Any, question: str, wanted: Format
  ) -> bytes:
    """Sends a request; drops the schema if the endpoint refuses it."""

    def sent(extra: dict[str, Any]) -> Awaitable[bytes]:
      self.requests += 1
      return chat.complete(
        client,
        model=self._model,
        system=self._system,
        question=question,
        settings=self._settings | extra,
      )

    if not self._use_schema:
      return await sent({})
    schema = {"name": wanted.name, "strict": True, "schema": wanted.schema}
    try:
      body = await sent(
        {"response_format": {"type": "json_schema", "json_schema": schema}}
      )
    except chat.Refused as error:
      code = error.status_code
      passing = code in _PASSING or code in _FINAL or code < 400
      if self._taken or passing:
        raise
    else:
      self._taken = True
      return body
    body = await sent({})
    self._use_schema = False
    self._warn(
      f"{self._base} refuses response_format (HTTP {code}); going on without."
    )
    return body

  def _pause(self, attempt: int, asked: float) -> float:
    """Seconds before a try: doubled each time, at least what was asked for.

    Args:
      attempt: 1 for the first try after a failed one.
      asked: seconds that the endpoint asked for; at most `timeout` is granted.
    """
    wait = self._backoff * 2 ** (attempt - 1) * (1 + 0.1 * random.random())
    return max(wait, min(asked, self._timeout))

  def _safe(self, text: str) -> str:
    """Sanitises untrusted text for an error: one line, truncated, without the
    key."""
    key = os.environ.get(self._key_variable, "").strip()
    if key:
      text = text.replace(key, "[key]")
    return text[:_SHOWN].encode("unicode_escape", "replace").decode()

  def _said(self, response: Any) -> str:
    """The body of an error reply, sanitised."""
    return self._safe(response.content[:_SHOWN].decode("utf-8", "replace"))

  def _warn(self, text: str) -> None:
    """Prints a line once."""
    if text not in self._warned:
      self._warned.add(text)
      print(f"judge: {text}", flush=True)

  def _remembered(self, question: str, wanted: Format) -> Any:
    """Reads a cached answer; None if it is missing or damaged."""
    place = self._place(question, wanted)
    if place is None or not place.is_file():
      return None
    try:
      with open(place, "rb") as file:
        kept = json.loads(file.read(_CACHED_BYTES))
      if not isinstance(kept, dict) or not isinstance(kept.get("reply"), dict):
        raise replies.Unreadable("no kept reply")
      value = wanted.read(kept["reply"])
    except (OSError, ValueError, RecursionError):
      self._warn(f"{place} is damaged and is made again.")
      return None
    self.hits += 1
    return value

  def _keep(self, question: str, wanted: Format, reply: dict[str, Any]) -> None:
    """Caches the fields of the schema; a full disk only causes a warning."""
    place = self._place(question, wanted)
    if place is None:
      return
    reply = {name: reply[name] for name in wanted.schema["properties"]}
    text = json.dumps({"model": self._model, "reply": reply})
    try:
      place.parent.mkdir(parents=True, exist_ok=True)
      handle, partial = tempfile.mkstemp(dir=place.parent, suffix=".tmp")
      try:
        with open(handle, "w") as file:
          file.write(text)
        os.replace(partial, place)
      except OSError:
        os.unlink(partial)
        raise
    except OSError as error:
      self._warn(f"the cache {self._cache} takes no more answers: {error}.")

  def _place(self, question: str, wanted: Format) -> pathlib.Path | None:
    if self._cache is None:
      return None
    asked = [self._base, self._model, self._system, self._settings]
    text = json.dumps([*asked, wanted.schema, question])
    name = hashlib.sha256(text.encode()).hexdigest()
    return self._cache / name[:2] / f"{name}.json"


async def _sleep(seconds: float) -> None:
  await asyncio.sleep(seconds)


def _seconds(text: str) -> float:
  """Seconds of a Retry-After header; 0 for a date or an invalid value."""
  return float(text) if re.fullmatch(r"\d{1,6}", text.strip()) else 0.0


def _chat() -> Any:
  """`rewards.chat`, whose packages only a judge needs."""
  try:
    return importlib.import_module("opera_jax.rewards.chat")
  except ModuleNotFoundError as error:
    raise ImportError(
      "The judge asks its endpoint by the `openai` client, which is not "
      "installed. Install it with `pip install opera-jax[judge]` or, in a "
      "checkout, with `pip install -r requirements-judge.txt`."
    ) from error
