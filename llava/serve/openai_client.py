"""The client of an OpenAI-compatible server: SGLang, vLLM, `transformers serve` and others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from llava.errors import InputError, reason

READ_TIMEOUT_S = 300
"""Seconds that a busy server may keep an answer waiting for its next word."""


class OpenAIClient:
    """The client of `endpoint`, such as `http://127.0.0.1:30000`; `key` is its API key, if any."""

    def __init__(self, endpoint: str, key: str | None = None):
        import httpx

        try:
            url = httpx.URL(endpoint)
        except httpx.InvalidURL as error:
            raise InputError(f"--sgl-endpoint {endpoint}: {reason(error)}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise InputError(f"--sgl-endpoint {endpoint}: http://host:port is expected")
        self.base = endpoint.rstrip("/").removesuffix("/v1") + "/v1"
        self.name = url.netloc.decode()  # without a password
        self._options: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx.Timeout(READ_TIMEOUT_S, connect=10, pool=None),
            "trust_env": url.host not in ("localhost", "127.0.0.1", "::1"),  # no proxy on the way
        }
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(limits=limits, **self._options)

    def models(self) -> list[dict[str, Any]]:
        """The models it lists: `id`, and what else the server says of each."""
        import httpx

        with self._in_words():
            answer = httpx.get(f"{self.base}/models", **self._options)
            if answer.status_code != 200:
                raise InputError(_refusal(answer))
        try:
            return [model for model in answer.json()["data"] if isinstance(model["id"], str)]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"the model server at {self.name} has no list of models") from None

    async def chat(self, body: dict[str, Any]) -> AsyncGenerator[str]:
        """The answer to `body`, a chat completion's, piece by piece.

        Closing the iterator closes the connection, and with it the server's work. A refusal, a
        failure or an answer that breaks off is an `InputError`.
        """
        request = self._client.stream("POST", f"{self.base}/chat/completions", json=body)
        ended = False
        with self._in_words():
            async with request as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise InputError(_refusal(answer))
                async for data in _events(answer.aiter_bytes()):
                    if data == b"[DONE]":
                        return
                    text, end = _read_event(data)
                    ended = ended or end
                    if text:
                        yield text
        if not ended:
            raise InputError("the model server broke off in the middle of the answer")

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        """Failures of the connection as an `InputError`."""
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise InputError(
                f"the model server at {self.name} cannot be reached: {reason(error)}"
            ) from error
        except httpx.TimeoutException as error:
            raise InputError(f"the model server was silent for {READ_TIMEOUT_S} seconds") from error
        except httpx.HTTPError as error:
            raise InputError(
                f"the connection to the model server broke off: {reason(error)}"
            ) from error


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events. Lines end at a line feed alone: JSON may hold U+2028."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _read_event(data: bytes) -> tuple[str, bool]:
    """The text that an event adds, and whether the answer ends with it."""
    try:
        event = json.loads(data)
        failed = event.get("error") or event.get("object") == "error"
        choice: dict[str, Any] = next(iter(event.get("choices") or ()), {})
        text, end = (choice.get("delta") or {}).get("content"), choice.get("finish_reason")
    except (ValueError, AttributeError, TypeError):
        said = reason(ValueError(data.decode(errors="replace")))
        raise InputError(f"the model server sent what is no part of an answer: {said}") from None
    if failed:
        raise InputError(f"the model server failed: {_words(event)}")
    if end == "abort":
        raise InputError("the model server gave up on the question")
    return text or "", end is not None


def _refusal(answer: Any) -> str:
    """An error status in words; `answer` is httpx's, read."""
    try:
        said = _words(answer.json())
    except ValueError:
        page = answer.text.lstrip().startswith("<") or not answer.text.strip()
        said = answer.reason_phrase if page else reason(ValueError(answer.text))
    verb = "failed" if answer.status_code >= 500 else "refused"
    return f"the model server {verb} (status {answer.status_code}): {said}"


def _words(said: Any) -> str:
    """The message of an error, wherever this server puts it."""
    while isinstance(said, dict):
        said = next((said[name] for name in ("error", "message", "detail") if said.get(name)), None)
    if isinstance(said, list):  # FastAPI's list of fields
        said = "; ".join(
            str(one.get("msg", one)) if isinstance(one, dict) else str(one) for one in said
        )
    return reason(ValueError(said or "it does not say why"))
