"""A client's memory of an attempt: its secrets, what it was given and what it has answered.

It is a file of mode 0600, written before an answer is handed out: a client that is killed and
started again gives the same answers, byte by byte, and no others. To refuse instead, and have a new
attempt, would need no file with secrets; but every restart would cost all the clients an attempt,
and an attempt may not be made anew once some have unmasked it (below). A file that is put back from
a backup undoes this: nobody may do that.

One file serves one exchange. The next attempt takes the place of the last one, whose secrets are
gone with it. After the last answer the secrets are gone as well, and that answer alone is kept.
Then no other attempt of this exchange is begun: with sums over two sets of clients, the server
would know their difference, which may be a single client's vector [R].
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fed.privacy.keys import new_key, new_seed
from fed.privacy.terms import PROTOCOL, Terms
from llava.atomic import write_secret
from llava.errors import InputError
from llava.json_files import read_json

STEPS = ("AdvertiseKeys", "ShareKeys", "MaskedInputCollection", "ConsistencyCheck", "Unmasking")
"""Rounds 0 to 4 of the paper."""

_LAST = STEPS[-1]


@dataclass(frozen=True)
class Secrets:
    """Of one attempt: c_u^SK, and the seeds of s_u^SK and of the self mask (b_u)."""

    channel_key: bytes = field(default_factory=new_key)
    mask_key_seed: bytes = field(default_factory=new_seed)
    self_mask_seed: bytes = field(default_factory=new_seed)


@dataclass(frozen=True)
class _State:
    """`received` and `sent`: the server's message and the answer, by step."""

    exchange: list[Any]
    terms: str
    secrets: Secrets | None = field(default_factory=Secrets)
    received: dict[str, bytes] = field(default_factory=dict)
    sent: dict[str, bytes] = field(default_factory=dict)


class Memory:
    """The state of `client` under `terms`, in memory and, where there is one, in `file`."""

    def __init__(self, terms: Terms, client: str, file: Path | None):
        """Go on from `file`, or begin, with new secrets in the place of an earlier attempt's.

        Raises:
            InputError: the file is another exchange's or damaged, or its attempt was unmasked and
                is another than this.
        """
        self.file, self.who = file, f"client {client}"
        self._state = _State([terms.run, terms.round, terms.exchange, client], terms.digest)
        if file is not None and file.exists():
            known = _read(file)
            _check_next(known, self._state, file)
            if known.terms == terms.digest:
                self._state = known
                return
        self._write(self._state)

    @property
    def secrets(self) -> Secrets:
        if self._state.secrets is None:
            raise InputError(f"{self.who}: this attempt is over, and its keys are destroyed")
        return self._state.secrets

    def received(self, step: str) -> bytes:
        """The server's message for a step that is done."""
        return self._state.received[step]

    def answer(self, step: str, given: bytes) -> bytes | None:
        """The answer of `step` if it was given already; None if it is this step's turn.

        Raises:
            InputError: it is another step's turn, or the answer was one to another message.
        """
        state = self._state
        if step not in state.sent:
            if state.secrets is None:
                raise InputError(f"{self.who}: this attempt is over, and its keys are destroyed")
            if tuple(state.sent) != STEPS[: STEPS.index(step)]:
                done = ", ".join(state.sent) or "nothing"
                raise InputError(f"{self.who}: it is not the turn of {step}; done: {done}")
            return None
        if state.received[step] != given:
            raise InputError(
                f"{self.who}: the server sends a second message for {step}, other than the first"
            )
        return state.sent[step]

    def keep(self, step: str, given: bytes, answer: bytes) -> bytes:
        """Remember an answer, and nothing else after the last one; returns it once it is safe."""
        if self.file is not None and _read(self.file) != self._state:
            raise InputError(
                f"{self.file}: is not as {self.who} left it: a later attempt or another process "
                "has begun"
            )
        if step == _LAST:
            over = replace(self._state, secrets=None)
            state = replace(over, received={step: given}, sent={step: answer})
        else:
            received, sent = self._state.received, self._state.sent
            state = replace(
                self._state, received={**received, step: given}, sent={**sent, step: answer}
            )
        self._write(state)
        self._state = state
        return answer

    def _write(self, state: _State) -> None:
        if self.file is None:
            return
        values: dict[str, Any] = {"protocol": PROTOCOL, **vars(state)}
        secrets = vars(state.secrets) if state.secrets else {}
        values["secrets"] = {name: value.hex() for name, value in secrets.items()}
        for part in ("received", "sent"):
            messages = values[part].items()
            values[part] = {step: base64.b64encode(text).decode() for step, text in messages}
        write_secret(self.file, json.dumps(values).encode())


def _check_next(known: _State, new: _State, file: Path) -> None:
    """Whether a file of `known` may become one of `new`."""
    if known.exchange != new.exchange:
        raise InputError(
            f"{file}: is of the exchange {known.exchange}, expected {new.exchange}; each secure "
            "sum of each client has a file of its own"
        )
    if known.terms != new.terms and _LAST in known.sent:
        raise InputError(
            f"client {new.exchange[-1]}: this sum was unmasked in another attempt; a second one "
            "could tell the server a single client's vector"
        )


def _read(file: Path) -> _State:
    values = read_json(file)
    try:
        if values.pop("protocol") != PROTOCOL:
            raise ValueError(f"not of version {PROTOCOL}")
        secrets = {name: bytes.fromhex(text) for name, text in values["secrets"].items()}
        values["secrets"] = Secrets(**secrets) if secrets else None
        for part in ("received", "sent"):
            texts = values[part].items()
            values[part] = {step: base64.b64decode(text) for step, text in texts}
        return _State(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: not a client's memory of a secure sum ({error})") from None
