"""The HTTP side of a worker, whatever answers behind it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import AsyncGenerator
from typing import Any, Protocol, runtime_checkable

from llava.errors import InputError, reason
from llava.serve import protocol
from llava.serve.http_server import application, body_object, serve, streamed, whole_body


class Backend(Protocol):
    """A model, here or on another server, that answers."""

    def status(self) -> dict[str, Any]:
        """`model_names`, `speed`, `queue_length`, and what else pages may want to know."""

    def stream(self, request: protocol.Request) -> AsyncGenerator[str]:
        """The answer so far, again and again; `InputError` for what cannot be answered."""


@runtime_checkable
class AttentionBackend(Backend, Protocol):
    """A backend that can also say where its model looked."""

    async def attention(self, body: dict) -> dict[str, Any]:
        """The reply to `/worker_attention`; `InputError` for a body that is none of its kind."""


def worker_app(backend: Backend):
    """The ASGI application of a worker: `/worker_generate_stream`, `/worker_get_status`.

    `/worker_attention` is there for an `AttentionBackend`.
    """

    async def answer(body: bytes) -> AsyncGenerator[bytes]:
        try:
            request = protocol.read_request(protocol.read_json(body))
            _check_model(request, backend.status()["model_names"])
            text = None
            async with contextlib.aclosing(backend.stream(request)) as texts:
                async for text in texts:
                    yield protocol.chunk(request.prompt + text)
            if text is None:  # an empty answer is an answer, too
                yield protocol.chunk(request.prompt)
        except InputError as error:
            yield protocol.chunk(str(error), protocol.ERROR_MODEL)
        except Exception as error:  # one question's trouble is its own
            yield protocol.chunk(_failure(error), protocol.ERROR_MODEL)

    async def worker_generate_stream(http):
        return streamed(answer(await whole_body(http)))

    async def worker_get_status(http) -> dict:
        return backend.status()

    more = [_attention_of(backend)] if isinstance(backend, AttentionBackend) else []
    return application(worker_generate_stream, worker_get_status, *more)


def _attention_of(backend: AttentionBackend):
    async def worker_attention(http) -> dict:
        try:
            return await backend.attention(await body_object(http))
        except InputError as error:
            return {"text": str(error), "error_code": protocol.ERROR_MODEL}
        except Exception as error:  # eager attention takes more memory than answering does
            return {"text": _failure(error), "error_code": protocol.ERROR_MODEL}

    return worker_attention


def _failure(error: Exception) -> str:
    """The message for the caller; the worker's log has the kind of error, too."""
    print(f"{type(error).__name__}: {reason(error)}", file=sys.stderr, flush=True)
    return f"the model failed: {reason(error)}"


def _check_model(request: protocol.Request, names: list[str]) -> None:
    if request.model and request.model not in names:
        raise InputError(f"this worker serves {', '.join(names)}, not {request.model!r}")


def serve_worker(backend: Backend, args: argparse.Namespace) -> None:
    """Serve a worker with the flags of `add_worker_flags` until it is told to stop."""
    from llava.serve.heartbeat import HeartBeat

    if not args.no_register:
        HeartBeat(args.controller_address, address_of(args), backend.status).start()
    serve(worker_app(backend), args)


def add_worker_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all workers share; those of upstream that say nothing here are taken too."""
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=21002)
    parser.add_argument("--worker-address", help="where others reach it, else host and port")
    parser.add_argument("--controller-address", default="http://localhost:21001")
    parser.add_argument("--limit-model-concurrency", type=int, default=5, help="rows of a batch")
    parser.add_argument("--no-register", action="store_true", help="serve without a controller")
    parser.add_argument("--multi-modal", action="store_true", help="upstream's; told by the model")
    parser.add_argument("--stream-interval", type=int, default=1, help="upstream's; always 1 here")


def address_of(args: argparse.Namespace) -> str:
    """The address of a worker with these flags."""
    return args.worker_address or f"http://{args.host}:{args.port}"
