"""Sites in secure sums: the requests of a round's sums as tickets, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fed.clients.sum_client import SumRequest
from fed.clients.task import ClientError
from fed.clients.update import Update, load_update
from fed.remote.spool import Answer
from fed.state import State
from llava.errors import InputError

TERMS, MESSAGE, ANSWER = "terms", "message", "answer"

# Requests by site -> each site's answer as it comes, None if it did not come in time.
AskSites = Callable[[Mapping[str, SumRequest]], Iterator[tuple[str, "Answer | InputError | None"]]]


class SumsAtSites:
    """The sites of a round, as `fed.server.secure_sums` asks them.

    Args:
        keys: the public keys that sites have told.
        send: asks sites and waits.
    """

    def __init__(self, keys: Mapping[str, bytes], send: AskSites):
        self.keys, self._send = keys, send

    def ask(
        self, requests: Mapping[str, SumRequest]
    ) -> Iterator[tuple[str, bytes | bytearray | ClientError]]:
        for name, answer in self._send(requests):
            try:
                yield name, answered(name, answer)
            except InputError as error:
                yield name, ClientError(str(error))


def state_of(request: SumRequest) -> State:
    """What of a request travels in its file, beside what is given."""
    return {TERMS: octets(request.terms), MESSAGE: octets(request.message)}


def answered(name: str, answer: Answer | InputError | None) -> bytes:
    """A site's message.

    Raises:
        InputError: it has sent none.
    """
    if answer is None:
        raise InputError(f"site {name} has not answered in time")
    if isinstance(answer, InputError):
        raise answer
    if answer.reason is not None:
        raise InputError(f"site {name} says: {answer.reason}")
    found = load_update(answer.update).state if answer.update is not None else {}
    tensor = found.get(ANSWER)
    if found.keys() != {ANSWER} or tensor is None or tensor.dtype != torch.uint8:
        raise InputError(f"site {name}: its answer is not a message of a secure sum")
    return bytes_of(tensor)


def answer_of(message: bytes | bytearray) -> Update:
    """A site's message as what it gives."""
    return Update({ANSWER: octets(message)}, 0)


def octets(data: bytes | bytearray) -> Tensor:
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.zeros(0, dtype=torch.uint8)
    )


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of `octets`; `InputError` of another tensor."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise InputError(f"bytes are expected, found {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.numpy().tobytes()
