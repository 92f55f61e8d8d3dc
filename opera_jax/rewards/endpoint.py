"""Asks an OpenAI-compatible endpoint, once for every distinct question.

Standard library alone. Answers are kept on disk by a hash of the question;
the key comes from the environment for each request and goes nowhere else.
"""

import hashlib
import http.client
import json
import os
import pathlib
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class EndpointError(RuntimeError):
  """No readable answer after all tries."""


class Client:
  """One model behind one endpoint; safe to use from several threads."""

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
    prompt_price: float = 0.0,
    completion_price: float = 0.0,
  ):
    """Connects to nothing yet.

    Args:
      endpoint: base address, as in "https://host/v1".
      model: its name there.
      key_variable: environment variable of the key; "" sends none.
      cache: folder of answers; "" keeps none.
      timeout: seconds a request may take.
      retries: further tries.
      backoff: seconds before the first of them; doubled each time.
      prompt_price: cost of a million prompt tokens.
      completion_price: cost of a million completion tokens.

    Raises:
      ValueError: an address that is no http address.
    """
    if not endpoint.startswith(("http://", "https://")):
      raise ValueError(
        f"The judge's endpoint is {endpoint!r}; give its base address, as in "
        '"https://host/v1", in config.reward.options.judge.endpoint.'
      )
    self._address = endpoint.rstrip("/") + "/chat/completions"
    self._model, self._key_variable = model, key_variable
    self._cache = pathlib.Path(cache) if cache else None
    self._timeout, self._retries, self._backoff = timeout, retries, backoff
    self._prices = (prompt_price, completion_price)
    self._lock = threading.Lock()
    self._tokens = [0, 0]
    self.requests = 0  # sent, retries included
    self.hits = 0  # questions answered from the cache

  def cost(self) -> float:
    """What all answers so far cost, in the currency of the prices."""
    with self._lock:
      return sum(t * p for t, p in zip(self._tokens, self._prices)) / 1e6

  def ask(self, question: str, read: Callable[[dict[str, Any]], Any]) -> Any:
    """The endpoint's reply to one user turn, read as a JSON object.

    Args:
      question: the user's turn.
      read: turns the object into a value; its ValueError means try again.

    Raises:
      EndpointError: every try failed, or the endpoint refuses the request.
    """
    place = self._place(question)
    if place is not None and place.exists():
      with self._lock:
        self.hits += 1
      return read(json.loads(place.read_text())["reply"])
    problem = ""
    for attempt in range(self._retries + 1):
      if attempt:
        wait = self._backoff * 2 ** (attempt - 1)
        time.sleep(wait * (1 + 0.1 * random.random()))
      try:
        reply = json_object(self._send(question))
        value = read(reply)
      except urllib.error.HTTPError as error:
        problem = f"HTTP {error.code}"
        if error.code not in _RETRIED:
          break
      except (
        *(OSError, http.client.HTTPException),
        *(ValueError, KeyError, TypeError, IndexError),
      ) as error:
        problem = f"{type(error).__name__}: {error}"
      else:
        self._keep(place, reply)
        return value
    raise EndpointError(
      f"{self._address}, model {self._model!r}: no readable answer after "
      f"{attempt + 1} tries, the last: {problem}. Check the address, the key "
      f"in {self._key_variable or 'no variable'}, and the limits of the "
      "endpoint; or raise retries, timeout or backoff."
    )

  def _send(self, question: str) -> str:
    """One request; the text of the reply."""
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(self._key_variable, "") if self._key_variable else ""
    body = {
      "model": self._model,
      "messages": [{"role": "user", "content": question}],
      "temperature": 0,
    }
    request = urllib.request.Request(
      self._address, json.dumps(body).encode(), headers
    )
    if key:
      # Not repeated to wherever a redirect leads.
      request.add_unredirected_header("Authorization", f"Bearer {key}")
    with self._lock:
      self.requests += 1
    with urllib.request.urlopen(request, timeout=self._timeout) as response:
      answer = json.load(response)
    usage = answer.get("usage") or {}
    with self._lock:
      self._tokens[0] += int(usage.get("prompt_tokens", 0))
      self._tokens[1] += int(usage.get("completion_tokens", 0))
    return answer["choices"][0]["message"]["content"]

  def _place(self, question: str) -> pathlib.Path | None:
    if self._cache is None:
      return None
    text = json.dumps([self._address, self._model, question])
    name = hashlib.sha256(text.encode()).hexdigest()
    return self._cache / name[:2] / f"{name}.json"

  def _keep(self, place: pathlib.Path | None, reply: dict[str, Any]) -> None:
    if place is None:
      return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(f".{threading.get_ident()}.tmp")
    partial.write_text(json.dumps({"model": self._model, "reply": reply}))
    partial.replace(place)


def json_object(text: str) -> dict[str, Any]:
  """The JSON object in a reply, code fences and words around it aside.

  Raises:
    ValueError: there is none.
  """
  begin, end = text.find("{"), text.rfind("}")
  if begin < 0 or end < begin:
    raise ValueError(f"The reply holds no JSON object: {text[:80]!r}.")
  return json.loads(text[begin : end + 1])
