"""Real servers on loopback ports of their own, in threads of the test's process."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator

import pytest

from llava.conversation import get_template
from llava.eval.answer import single_turn


@contextlib.contextmanager
def running(app, port: int = 0) -> Iterator[str]:
    """`app` at a free port of loopback, or at `port`; gives its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.force_exit = server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def answerer(llava_folder):
    """The tiny LLaVA, loaded."""
    from llava.eval.answer import Answerer
    from llava.serve.model_worker import arguments

    args = arguments(["--model-path", str(llava_folder), "--device", "cpu"])
    args.conv_mode = None
    return Answerer.load(args)


@pytest.fixture(scope="session")
def shots(pictures) -> list[str]:
    """The pictures as they go over the wire."""
    return [base64.b64encode(p.read_bytes()).decode() for p in sorted(pictures.iterdir())]


def question(text: str, images: list[str], **more) -> dict:
    """A question to the tiny LLaVA as upstream's page sends it."""
    prompt = single_turn(get_template("llava_v0"), "<image>\n" * len(images) + text)
    return {
        "model": "tiny-llava",
        "prompt": prompt,
        "images": images,
        "temperature": 0,
        "top_p": 0.7,
        "max_new_tokens": 6,
        "stop": "###",
    } | more


def answers(address: str, body: dict, path: str = "worker_generate_stream") -> list[dict]:
    """All that a worker or controller answers."""
    import httpx

    from llava.serve.protocol import read_chunks

    # Not `json=`: httpx itself refuses half a surrogate pair, which other clients send.
    content = json.dumps(body)
    with httpx.stream("POST", f"{address}/{path}", content=content, timeout=60) as response:
        return list(read_chunks(response.iter_raw()))
