"""The page's client of controller and workers, with their failures in words."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from llava.eval.answer import conv_mode_of
from llava.serve.protocol import NO_WORKER, WORKER_GONE, Reader

CONNECT_TIMEOUT_S = 10.0  # seconds
READ_TIMEOUT_S = 300.0  # seconds that a worker may be silent: a long queue, a large model on a CPU


class PageError(Exception):
    """A message for the person at the page."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """Who answers for a model, and what it says of the model; upstream's says less."""

    model: str
    address: str
    template: str
    multimodal: bool = True
    runs: str | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of an answer's generation."""

    temperature: float = 0.2
    top_p: float = 0.7
    max_new_tokens: int = 512


class WorkerClient:
    """A client of the controller at an address, and of the workers that it names."""

    def __init__(self, controller: str) -> None:
        self.controller = controller.rstrip("/")

    async def models(self) -> list[str]:
        """Names of all models that are served now; `PageError` where there are none."""
        await self._ask_controller("refresh_all_workers")
        found = sorted(set((await self._ask_controller("list_models"))["models"]))
        if not found:
            raise PageError(
                f"The controller at {self.controller} knows no worker yet. Start one (python -m "
                "llava.serve.model_worker) and wait until its log says that it has registered."
            )
        return found

    async def worker(self, model: str | None) -> Worker:
        """One that serves `model`."""
        if not model:
            raise PageError("Choose a model first.")
        address = (await self._ask_controller("get_worker_address", {"model": model}))["address"]
        if not address:
            raise PageError(
                f"No worker serves {model} now. Choose another model, or start a worker for it "
                "(python -m llava.serve.model_worker)."
            )
        with _worker_trouble(model, address):
            status = await _post(f"{address}/worker_get_status", {}, CONNECT_TIMEOUT_S)
        template = status.get("template") or conv_mode_of(model)
        sees = status.get("multimodal", True)
        return Worker(model, address, template, sees, status.get("runs"))

    async def answer(
        self, worker: Worker, prompt: str, stop: str, images: Sequence[str], options: Options
    ) -> AsyncGenerator[str]:
        """The answer so far, again and again. Closing the iterator ends the worker's connection."""
        import httpx

        body = {"model": worker.model, "prompt": prompt, "images": list(images), "stop": stop}
        body |= dataclasses.asdict(options)
        begun = False
        with _worker_trouble(worker.model, worker.address, lambda: begun):
            async with (
                _client(READ_TIMEOUT_S) as client,
                client.stream("POST", f"{worker.address}/worker_generate_stream", json=body) as got,
            ):
                if got.status_code != httpx.codes.OK:
                    raise httpx.HTTPError(f"status {got.status_code}")
                begun, reader = True, Reader()
                async for piece in got.aiter_bytes():
                    for said in reader.feed(piece):
                        if code := said["error_code"]:
                            raise PageError(_in_words(worker.model, code, said["text"]))
                        yield said["text"][len(prompt) :].strip()

    async def attention(
        self, worker: Worker, prompt: str, answer: str, images: Sequence[str]
    ) -> tuple[list[list[list[float]]], str]:
        """The answer's attention, a grid for each picture, and how pictures were squared."""
        body = {"model": worker.model, "prompt": prompt, "answer": answer, "images": list(images)}
        with _worker_trouble(worker.model, worker.address):
            said = await _post(
                f"{worker.address}/worker_attention", body, READ_TIMEOUT_S, missing={}
            )
        if not said:
            raise PageError(f"The worker of {worker.model} cannot say what the model looked at.")
        if said["error_code"]:
            raise PageError(_in_words(worker.model, said["error_code"], said["text"]))
        return said["grids"], said["fit"]

    async def _ask_controller(self, path: str, body: dict | None = None) -> Any:
        import httpx

        try:
            return await _post(f"{self.controller}/{path}", body or {}, 3 * CONNECT_TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            raise PageError(
                f"The controller at {self.controller} does not answer. Start it (python -m "
                "llava.serve.controller), or give this page its address with --controller-url."
            ) from None


def _client(silence: float):
    import httpx

    # Proxies of the environment are for outside hosts, and none is ever asked.
    timeout = httpx.Timeout(silence, connect=CONNECT_TIMEOUT_S)
    return httpx.AsyncClient(timeout=timeout, trust_env=False)


async def _post(address: str, body: dict, silence: float, missing: Any = None) -> Any:
    """The JSON that comes back; `missing`, if given, where there is no such path."""
    async with _client(silence) as client:
        answer = await client.post(address, json=body)
    if answer.status_code == 404 and missing is not None:
        return missing
    answer.raise_for_status()
    return answer.json()


@contextlib.contextmanager
def _worker_trouble(model: str, address: str, begun=lambda: False):
    import httpx

    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        who = f"The worker of {model} at {address}"
        if isinstance(error, httpx.ReadTimeout):
            text = f"{who} has been silent for too long."
        elif begun():
            text = f"{who} stopped in the middle of the answer."
        else:
            text = f"{who} does not answer."
        raise PageError(f"{text} Ask again once it runs again.") from None


def _in_words(model: str, code: int, text: str) -> str:
    """A worker's message. Upstream's blames traffic whatever has happened, so it is not shown."""
    if text and "HIGH TRAFFIC" not in text.upper():
        return text
    what = {
        NO_WORKER: "No worker serves it now.",
        WORKER_GONE: "Its worker does not answer.",
    }.get(code, "Its worker failed and does not say why; the worker's own log does.")
    return f"{model} did not answer (error {code}). {what}"
