"""The HTTP server under controller and workers: POST endpoints that speak JSON."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import AsyncGenerator
from typing import Any

from llava.errors import InputError
from llava.serve import protocol


def check_installed(*more: str) -> None:
    """`InputError` if the packages that serve, and `more`, are not there."""
    for name in ("httpx", "starlette", "uvicorn", *more):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed: pip install 'fedllava[serve]'")


def application(*endpoints):
    """An ASGI application: each async function `name(request)` answers `POST /name`.

    What it returns goes out as JSON unless it is a response; an `InputError` is status 400.
    """
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def answering(endpoint):
        async def answer(http):
            try:
                found = await endpoint(http)
            except InputError as error:
                return JSONResponse({"detail": str(error)}, status_code=400)
            return found if isinstance(found, Response) else JSONResponse(found)

        return answer

    return Starlette(
        routes=[Route(f"/{e.__name__}", answering(e), methods=["POST"]) for e in endpoints]
    )


def streamed(pieces: AsyncGenerator[bytes]):
    """A response of `pieces`, which are closed at once when the client's connection ends."""
    from starlette.responses import StreamingResponse

    class StreamedAnswer(StreamingResponse):
        async def __call__(self, scope, receive, send) -> None:
            async with contextlib.aclosing(pieces):
                await super().__call__(scope, receive, send)

    return StreamedAnswer(pieces, media_type="application/octet-stream")


async def whole_body(http) -> bytes:
    """The body of a request; one larger than any honest question is an `InputError`."""
    found = bytearray()
    async for piece in http.stream():
        found += piece
        if len(found) > protocol.MAX_BYTES:
            raise InputError(f"the question is larger than {protocol.MAX_BYTES >> 20} MiB")
    return bytes(found)


async def body_object(http) -> dict:
    """The JSON object that is a request's body."""
    body = protocol.read_json(await whole_body(http))
    if not isinstance(body, dict):
        raise InputError("a JSON object is expected")
    return body


def required(body: dict, name: str, kind: type) -> Any:
    """The value of a field that must be there."""
    if not isinstance(body.get(name), kind):
        raise InputError(f"{name}: {kind.__name__} is expected, {body.get(name)!r} was sent")
    return body[name]


def serve(app, args: argparse.Namespace) -> None:
    """Run `app` at `args.host` and `args.port` until it is told to stop."""
    import uvicorn

    if args.host not in ("localhost", "127.0.0.1", "::1"):
        print(f"listening on {args.host}: other machines can reach it", file=sys.stderr, flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
