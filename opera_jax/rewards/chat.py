"""The `openai` client with additional limits; only a judge needs it.

Its packages are those of requirements-judge.txt. The size of every reply is
limited, including error replies. Redirects are not followed. Only the headers
named here are sent, whatever the environment adds for other endpoints.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai

from opera_jax.rewards import replies

Refused = openai.APIStatusError
# Other errors of a request, such as a broken or refused connection.
BROKEN = (openai.OpenAIError, httpx2.HTTPError, OSError, ValueError)
_HEADERS = ("host", "accept", "content-type", "content-length", "connection")


class Limited(httpx2.AsyncByteStream):
  """The bytes of a reply, up to a limit."""

  def __init__(self, stream: Any, most: int):
    """Reads nothing yet.

    Args:
      stream: of the reply.
      most: maximum bytes to read.
    """
    self._stream, self._most = stream, most

  async def __aiter__(self) -> AsyncIterator[bytes]:
    read = 0
    async for chunk in self._stream:
      read += len(chunk)
      if read > self._most:
        raise replies.Unreadable(f"the reply is longer than {self._most} bytes")
      yield chunk

  async def aclose(self) -> None:
    """Closes the connection."""
    await self._stream.aclose()


@contextlib.asynccontextmanager
async def opened(
  base: str, key: str, *, timeout: float, reply_bytes: int
) -> AsyncIterator[openai.AsyncOpenAI]:
  """A client of an endpoint, closed afterwards.

  Args:
    base: address of the endpoint.
    key: sent with every request; "" sends none.
    timeout: seconds of each read and write; the caller limits the total.
    reply_bytes: maximum size of a reply; a longer one raises
      `replies.Unreadable`.
  """

  async def headers(request: httpx2.Request) -> None:
    kept = {n: v for n, v in request.headers.items() if n in _HEADERS}
    request.headers.clear()
    request.headers.update(
      kept | {"user-agent": "opera-jax", "accept-encoding": "identity"}
    )
    if key:
      request.headers["authorization"] = f"Bearer {key}"

  async def limit(response: httpx2.Response) -> None:
    coding = response.headers.get("content-encoding", "").lower()
    if coding not in ("", "identity"):
      raise replies.Unreadable("the reply is compressed, unasked")
    response.stream = Limited(response.stream, reply_bytes)

  async with openai.AsyncOpenAI(
    base_url=base,
    api_key="none",
    max_retries=0,
    timeout=timeout,
    http_client=httpx2.AsyncClient(
      timeout=timeout,
      follow_redirects=False,
      event_hooks={"request": [headers], "response": [limit]},
    ),
  ) as client:
    yield client


async def complete(
  client: openai.AsyncOpenAI,
  *,
  model: str,
  system: str,
  question: str,
  settings: dict[str, Any],
) -> bytes:
  """One chat completion; the body of the reply, unread.

  Args:
    client: see `opened`.
    model: its name at the endpoint.
    system: the system's turn; "" sends none.
    question: the user's turn. Lone surrogates, which no request can hold,
      are replaced.
    settings: further fields of the request.

  Raises:
    Refused: a status other than success.
    replies.Unreadable: a reply that is too long, or compressed.
  """
  turns = [("system", system)] * bool(system) + [("user", question)]
  messages = [
    {"role": role, "content": text.encode("utf-8", "replace").decode()}
    for role, text in turns
  ]
  # Return the raw reply, since its content is untrusted.
  reply = await client.post(
    "/chat/completions",
    cast_to=httpx2.Response,
    body={"model": model, "messages": messages, **settings},
  )
  return reply.content
