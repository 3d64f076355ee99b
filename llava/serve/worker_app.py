"""The HTTP side of a worker, whatever answers behind it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any, Protocol

from llava.errors import InputError, reason
from llava.serve import wire
from llava.serve.web import application, body_object, streamed, whole_body


class Backend(Protocol):
    """What answers."""

    def status(self) -> dict[str, Any]:
        """`model_names`, `speed`, `queue_length`, and what else pages may want to know."""

    def stream(self, request: wire.Request) -> AsyncIterator[str]:
        """The answer so far, again and again; `InputError` for what cannot be answered."""


def worker_app(backend: Backend):
    """The ASGI application of a worker: `/worker_generate_stream`, `/worker_get_status`.

    `/worker_attention` is there if the backend has `attention(body) -> dict`.
    """

    async def answer(body: bytes) -> AsyncIterator[bytes]:
        try:
            request = wire.read_request(wire.read_json(body))
            _check_model(request, backend.status()["model_names"])
            text = None
            async with contextlib.aclosing(backend.stream(request)) as texts:
                async for text in texts:
                    yield wire.chunk(request.prompt + text)
            if text is None:  # an empty answer is an answer, too
                yield wire.chunk(request.prompt)
        except InputError as error:
            yield wire.chunk(str(error), wire.ERROR_MODEL)
        except Exception as error:  # one question's trouble is its own
            print(f"{type(error).__name__}: {reason(error)}", file=sys.stderr, flush=True)
            yield wire.chunk(f"the model failed: {reason(error)}", wire.ERROR_MODEL)

    async def worker_generate_stream(http):
        return streamed(answer(await whole_body(http)))

    async def worker_get_status(http) -> dict:
        return backend.status()

    async def worker_attention(http) -> dict:
        try:
            return await backend.attention(await body_object(http))
        except InputError as error:
            return {"text": str(error), "error_code": wire.ERROR_MODEL}

    more = [worker_attention] if hasattr(backend, "attention") else []
    return application(worker_generate_stream, worker_get_status, *more)


def _check_model(request: wire.Request, names: list[str]) -> None:
    if request.model and request.model not in names:
        raise InputError(f"this worker serves {', '.join(names)}, not {request.model!r}")
