"""A worker's life with its controller: it registers, tells that it lives, registers again."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from llava.constants import WORKER_HEART_BEAT_INTERVAL


class HeartBeat:
    """Keeps a worker known to a controller, from a thread of its own.

    A controller that is not there yet, or was started anew, gets to know the worker at the next
    beat. `status()` is what the worker says of itself, with upstream's `queue_length` in it.
    """

    def __init__(
        self,
        controller_address: str,
        worker_address: str,
        status: Callable[[], dict[str, Any]],
        interval: float = WORKER_HEART_BEAT_INTERVAL,
    ):
        self.controller_address = controller_address.rstrip("/")
        self.worker_address = worker_address
        self.status = status
        self.interval = interval
        self._known: bool | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heart beat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def beat(self) -> bool:
        """Register, or tell that the worker lives; returns whether the controller knows it now."""
        import httpx

        name = self.worker_address
        try:
            status = self.status()
            if self._known:
                beat = {"worker_name": name, "queue_length": status["queue_length"]}
                self._known = self._post("receive_heart_beat", beat)["exist"]
            if not self._known:
                news = {"worker_name": name, "check_heart_beat": True, "worker_status": status}
                self._post("register_worker", news)
                self._say(True, f"registered with the controller at {self.controller_address}")
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            self._say(
                False,
                f"no answer from the controller at {self.controller_address} "
                f"({type(error).__name__}); trying again every {self.interval:g} s",
            )
        return bool(self._known)

    def _live(self) -> None:
        while not self._stopped.is_set():
            wait = self.interval if self.beat() else min(self.interval, 3)
            self._stopped.wait(wait)

    def _post(self, path: str, body: dict) -> Any:
        import httpx

        # Without the proxies of the environment, which are for outside hosts.
        address = f"{self.controller_address}/{path}"
        answer = httpx.post(address, json=body, timeout=5, trust_env=False)
        answer.raise_for_status()
        return answer.json()

    def _say(self, known: bool, text: str) -> None:
        """Print what changed, not every beat."""
        if known != self._known:
            print(text, file=sys.stderr, flush=True)
        self._known = known
