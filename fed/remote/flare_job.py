"""A site's job in FLARE: one class at the server, one at the site, as strict kits allow them.

The server's part answers messages, the site's part sends them (`fed.remote.exchange`). Neither
takes anything from the other but files of the spool.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import Task
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fed.remote.exchange import LostError, Message, ServerEnd, SiteEnd
from fed.remote.flare import END, HEARD, REPORT, RUN, SILENCE, SPOOL_VARIABLE
from fed.remote.flare_process import end_with_parent
from fed.remote.policy import withdrawn
from fed.remote.spool import Spool
from llava.atomic import write_text
from llava.errors import InputError, reason
from llava.folder_lock import Lock

_TOPIC = "fedllava.exchange"
_MESSAGE = "message"
_LOOK_TIMEOUT, _PIECE_TIMEOUT = 10.0, 60.0  # seconds for an answer
_PAUSE = 0.5  # seconds between two looks where nothing is to be moved
_LOCK_PATIENCE = 30.0  # seconds that a killed job's lock may be held
_ALONE = 60.0  # seconds without an answer after which the site's part gives its job up


class _OverError(Exception):
    """The server's part has ended the job."""


class ServerJob(Controller):
    """The server's part.

    Args:
        spool: the driver's folder of spools, on this machine.
        site: whose job it is.
        run: the name of the folder at the sites.
        enough: bytes of files after which the job ends, so that a new one takes its place: FLARE's
            processes grow with what they carry. It ends between files, never within one.
    """

    def __init__(self, spool: str, site: str, run: str, enough: float):
        super().__init__()
        end_with_parent()
        self._root, self._site, self._run = Path(spool), site, run
        self._enough = enough
        self._end: ServerEnd | None = None
        self._deadline = 0.0

    def start_controller(self, fl_ctx: FLContext) -> None:
        self._engine.register_aux_message_handler(_TOPIC, self._answer)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        pass

    def process_result_of_unknown_task(self, *args: Any, **kwargs: Any) -> None:
        pass

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Answer until the site is silent, or the driver has ended."""
        folder = self._root / self._site
        if not folder.is_dir():
            return self.system_panic(f"{folder}: a driver's spool is expected there", fl_ctx)
        with _held(folder, abort_signal, 5.0):
            self._end = ServerEnd(Spool(folder, self._site))
            task = Task(name="carry", data=Shareable({"run": self._run}), timeout=0)
            self.send(task, fl_ctx, targets=[self._site])
            self._deadline = time.monotonic() + 2 * SILENCE
            while not (
                abort_signal.triggered
                or task.completion_status is not None
                or self._end is None
                or time.monotonic() > self._deadline
                or (self._root / END).exists()
            ):
                time.sleep(0.2)
            self._end = None
        return None

    def _answer(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        peer, end = fl_ctx.get_peer_context(), self._end
        if peer is None or peer.get_identity_name() != self._site:
            return make_reply(ReturnCode.BAD_REQUEST_DATA)
        if self._site in withdrawn(Path(fl_ctx.get_workspace().get_root_dir())):
            self._end = end = None
        message = request[_MESSAGE]
        looks = message.get("do") == "look"
        reply = make_reply(ReturnCode.OK)
        if looks and end and end.carried > self._enough:  # a site looks between two files
            self._end = end = None
        if end is None:
            reply[_MESSAGE] = {"over": True}
            return reply
        reply[_MESSAGE] = end.answer(message)
        # After a piece the next one is under way, and may take its time on a slow line.
        patience = SILENCE if looks else _PIECE_TIMEOUT
        self._deadline = time.monotonic() + patience
        with contextlib.suppress(OSError):
            (self._root / self._site / HEARD).touch()
        return reply


class SiteJob(Executor):
    """The site's part; what it may touch is the folder that `SPOOL_VARIABLE` names."""

    def __init__(self) -> None:
        super().__init__()
        end_with_parent()
        self._root = Path(os.environ[SPOOL_VARIABLE])
        self._reported = (0.0, "")
        self._answered = 0.0

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Carry until the job ends."""
        run = str(shareable["run"])
        if not RUN.fullmatch(run):
            raise InputError(f"the server's run is called {run!r:.80}, 32 hex digits are expected")
        spool = Spool(self._root / run, fl_ctx.get_identity_name())
        end = SiteEnd(spool, lambda message: self._call(message, fl_ctx))
        self._answered = time.monotonic()
        with _held(spool.folder, abort_signal, _LOCK_PATIENCE):
            while not abort_signal.triggered and time.monotonic() - self._answered < _ALONE:
                try:
                    moved = end.step()
                except _OverError:
                    break
                except LostError as error:
                    self._report(str(error))
                    time.sleep(1)
                    continue
                except (InputError, OSError, KeyError, TypeError, ValueError) as error:
                    self._report(f"the site's spool: {reason(error)}")
                    time.sleep(5)
                    continue
                self._report("")
                if not moved:
                    time.sleep(_PAUSE)
        return make_reply(ReturnCode.OK)

    def _call(self, message: Message, fl_ctx: FLContext) -> Message:
        """Send a message to the server's part."""
        timeout = _LOOK_TIMEOUT if message["do"] == "look" else _PIECE_TIMEOUT
        replies = fl_ctx.get_engine().send_aux_request(
            targets=None,
            topic=_TOPIC,
            request=Shareable({_MESSAGE: message}),
            timeout=timeout,
            fl_ctx=fl_ctx,
            optional=True,
        )
        reply = next(iter(replies.values()), None) if replies else None
        if reply is None or reply.get_return_code() != ReturnCode.OK or _MESSAGE not in reply:
            code = "nothing" if reply is None else reply.get_return_code()
            raise LostError(f"no answer from the server ({code}); trying on")
        if "over" in reply[_MESSAGE]:
            raise _OverError
        self._answered = time.monotonic()
        return dict(reply[_MESSAGE])

    def _report(self, trouble: str) -> None:
        """Tell the site's process how it goes, in a file."""
        when, said = self._reported
        if trouble != said or time.monotonic() - when > 5:
            self._reported = time.monotonic(), trouble
            with contextlib.suppress(OSError):
                write_text(self._root / REPORT, json.dumps({"error": trouble}))


@contextlib.contextmanager
def _held(folder: Path, abort_signal: Signal, patience: float) -> Iterator[None]:
    """Hold a spool, once the job before has ended; `InputError` if it does not end."""
    deadline = time.monotonic() + patience
    while True:
        try:
            lock = Lock(folder, "another job carries for this site")
            break
        except InputError:
            if time.monotonic() > deadline or abort_signal.triggered:
                raise
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()
