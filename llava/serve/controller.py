"""The controller: it knows the workers, and says which of them answers next.

python -m llava.serve.controller [--host localhost] [--port 21001]
    [--dispatch-method lottery|shortest_queue]

Workers register and send a heart beat every 15 seconds; after 30 without one a worker is dropped.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.errors import InputError, one_clear_error
from llava.serve import protocol
from llava.serve.http_server import (
    application,
    body_object,
    check_installed,
    required,
    serve,
    streamed,
    whole_body,
)

DISPATCH = ("lottery", "shortest_queue")
CONNECT_TIMEOUT_S = 5


@dataclasses.dataclass
class RegisteredWorker:
    """A worker's status; `heard` is when its last heart beat came, None if it sends none."""

    model_names: list[str]
    speed: float
    queue_length: int
    heard: float | None


class Registry:
    """The workers by their addresses."""

    def __init__(self, dispatch: str = DISPATCH[0], now: Callable[[], float] = time.monotonic):
        if dispatch not in DISPATCH:
            raise InputError(f"--dispatch-method {dispatch}: {' or '.join(DISPATCH)} is expected")
        self.dispatch, self.now = dispatch, now
        self._workers: dict[str, RegisteredWorker] = {}

    def register(self, name: str, status: Any, check_heart_beat: bool) -> None:
        """Take a worker in, or take in its news; a status that is none is an `InputError`."""
        try:
            names = [str(model) for model in status["model_names"]]
            speed, length = float(status["speed"]), int(status["queue_length"])
        except (TypeError, KeyError, ValueError):
            raise InputError(
                f"worker {name}: its status has no model_names, speed and queue_length"
            ) from None
        if speed <= 0:
            raise InputError(f"worker {name}: its speed is {speed:g}; over 0 is expected")
        heard = self.now() if check_heart_beat else None
        self._workers[name] = RegisteredWorker(names, speed, length, heard)

    def beat(self, name: str, queue_length: int) -> bool:
        """A worker lives; False if it is not known, and so should register."""
        worker = self.alive().get(name)
        if worker is None:
            return False
        worker.queue_length = int(queue_length)
        if worker.heard is not None:
            worker.heard = self.now()
        return True

    def forget(self, name: str) -> None:
        self._workers.pop(name, None)

    def alive(self) -> dict[str, RegisteredWorker]:
        """The workers that have spoken lately."""
        oldest = self.now() - CONTROLLER_HEART_BEAT_EXPIRATION
        for name, worker in list(self._workers.items()):
            if worker.heard is not None and worker.heard < oldest:
                del self._workers[name]
        return self._workers

    def models(self) -> list[str]:
        return sorted({model for worker in self.alive().values() for model in worker.model_names})

    def choose(self, model: str) -> str:
        """The address of a worker with this model, or an empty text.

        `lottery` draws by speed; `shortest_queue` takes the least work for its speed, and counts
        the new question in at once.
        """
        found = {name: w for name, w in self.alive().items() if model in w.model_names}
        if not found:
            return ""
        if self.dispatch == "lottery":
            return random.choices(list(found), [worker.speed for worker in found.values()])[0]
        name = min(found, key=lambda name: found[name].queue_length / found[name].speed)
        found[name].queue_length += 1
        return name

    def status(self) -> dict[str, Any]:
        """All workers as one, as a controller answers that is itself a worker of another."""
        workers = self.alive().values()
        return {
            "model_names": self.models(),
            "speed": sum(worker.speed for worker in workers),
            "queue_length": sum(worker.queue_length for worker in workers),
        }


class Endpoints:
    """Upstream's endpoints of a controller; a method's name is its path."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    async def register_worker(self, http) -> None:
        import httpx

        body = await body_object(http)
        name = required(body, "worker_name", str)
        try:
            status = body.get("worker_status") or await _ask_status(name)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise InputError(f"worker {name} does not answer ({type(error).__name__})") from None
        self.registry.register(name, status, bool(body.get("check_heart_beat", True)))

    async def refresh_all_workers(self, http) -> None:
        import httpx

        for name, worker in list(self.registry.alive().items()):
            try:
                status = await _ask_status(name)
                self.registry.register(name, status, worker.heard is not None)
            except (InputError, httpx.HTTPError, httpx.InvalidURL, ValueError):
                self.registry.forget(name)

    async def list_models(self, http) -> dict:
        return {"models": self.registry.models()}

    async def get_worker_address(self, http) -> dict:
        model = required(await body_object(http), "model", str)
        return {"address": self.registry.choose(model)}

    async def receive_heart_beat(self, http) -> dict:
        body = await body_object(http)
        name, length = required(body, "worker_name", str), required(body, "queue_length", int)
        return {"exist": self.registry.beat(name, length)}

    async def worker_get_status(self, http) -> dict:
        return self.registry.status()

    async def worker_generate_stream(self, http):
        return streamed(self._relay(await whole_body(http)))

    async def _relay(self, body: bytes) -> AsyncGenerator[bytes]:
        """A worker's answer to a question, object by object."""
        import httpx

        try:
            question = protocol.read_json(body)
            model = question.get("model", "") if isinstance(question, dict) else ""
        except InputError as error:
            yield protocol.chunk(str(error), protocol.ERROR_MODEL)
            return
        if not (name := self.registry.choose(model)):
            known = ", ".join(self.registry.models()) or "none"
            text = f"no worker serves the model {model!r} now; models that are served: {known}"
            yield protocol.chunk(text, protocol.NO_WORKER)
            return
        timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=None)  # a busy worker may think
        try:
            async with (
                httpx.AsyncClient(timeout=timeout, trust_env=False) as client,
                client.stream("POST", f"{name}/worker_generate_stream", content=body) as answer,
            ):
                rest = b""
                async for piece in answer.aiter_raw():  # half an object is of no use to anybody
                    whole, nul, rest = (rest + piece).rpartition(protocol.NUL)
                    yield whole + nul
        except httpx.HTTPError as error:
            text = f"the worker of {model} stopped in the middle ({type(error).__name__})"
            yield protocol.chunk(text, protocol.WORKER_GONE)


async def _ask_status(worker: str) -> Any:
    """The status that the worker at an address gives."""
    import httpx

    # Proxies of the environment are for outside hosts.
    async with httpx.AsyncClient(timeout=CONNECT_TIMEOUT_S, trust_env=False) as client:
        answer = await client.post(f"{worker}/worker_get_status")
        answer.raise_for_status()
        return answer.json()


def controller_app(registry: Registry):
    """The ASGI application of a controller."""
    endpoints = Endpoints(registry)
    return application(
        endpoints.register_worker,
        endpoints.refresh_all_workers,
        endpoints.list_models,
        endpoints.get_worker_address,
        endpoints.receive_heart_beat,
        endpoints.worker_get_status,
        endpoints.worker_generate_stream,
    )


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=21001)
    parser.add_argument("--dispatch-method", choices=DISPATCH, default=DISPATCH[0])
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    check_installed()
    serve(controller_app(Registry(args.dispatch_method)), args)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
