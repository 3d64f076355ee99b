"""The noise of private training: Gaussian, from a secret that only the run's own folder holds.

Whoever knew the noise could take it off again. So it does not come from --seed, which a server
knows, nor from a generator whose state can be told from its numbers: it is the key stream of
AES-256-CTR under a key that is, by HMAC-SHA256, a function of

- 256 bits from the operating system, drawn once, in OUTPUT/noise/NAME.json (readable by its
  owner);
- the task and the step;
- the very sum that the noise is added to.

A run that is killed and started again makes the same sums and draws the same noise, so that it ends
in the same bits. A sum that is another one, of whatever cause, gets noise that has nothing to do
with the first's: the difference of two outputs never shows a difference of sums. That the noise is
pseudo-random makes the guarantee one against those who cannot break AES.

Beside the secret stands which state each task began from. A task that is asked for again from
another state would spend the budget again, and is refused.

Values are double precision and lie within 8.6 standard deviations; of true Gaussian noise 1e-17 of
the values do not. They are added in double precision and rounded once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llava.atomic import write_secret
from llava.errors import InputError
from llava.json_files import read_json

FOLDER = "noise"
_BLOCK = 2**20  # values at a time


class NoiseSecret:
    """The secret in a file, drawn where there is none yet; `task` names what the noise is for.

    Args:
        file: OUTPUT/noise/NAME.json.
    """

    def __init__(self, file: Path):
        self.file = file
        if not file.exists():
            write_secret(file, json.dumps({"secret": secrets.token_hex(32), "tasks": {}}))
        values = read_json(file)
        try:
            self._secret, self._tasks = bytes.fromhex(values["secret"]), dict(values["tasks"])
            if len(self._secret) != 32:
                raise ValueError("not 256 bits")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: not the secret of a run's noise ({error!r})") from None

    def begin(self, task: str, start: str) -> None:
        """Write down that `task` starts from what `start` is the digest of.

        Raises:
            InputError: it has started before, from something else.
        """
        known = self._tasks.get(task)
        if known is not None and known != start:
            raise InputError(
                f"{self.file}: {task} has begun before from another state or under other flags; "
                "training on the same records again would spend their privacy again; if nothing of "
                "it was given away, choose another --output_dir"
            )
        if known is None:
            self._tasks[task] = start
            values = {"secret": self._secret.hex(), "tasks": self._tasks}
            write_secret(self.file, json.dumps(values))

    def noised(
        self, task: str, step: int, sums: Mapping[str, Tensor], scale: float
    ) -> Iterator[tuple[str, Tensor]]:
        """The sums with noise of standard deviation `scale`, one by one, float64."""
        draw = hmac.new(self._secret, f"{task}\0{step}\0".encode(), hashlib.sha256)
        for name, tensor in sums.items():
            draw.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
            draw.update(tensor.detach().cpu().contiguous().numpy().data)
        stream = GaussianStream(draw.digest())
        for name, tensor in sums.items():
            noise = stream.draw(tensor.numel(), tensor.device).view(tensor.shape)
            yield name, tensor.detach().double() + scale * noise


class GaussianStream:
    """Standard normal values that follow from a key of 32 bytes."""

    def __init__(self, key: bytes):
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import CTR

        # A key is used for one stream alone, so that its counter may begin at 0.
        self._cipher = Cipher(AES(key), CTR(bytes(16))).encryptor()

    def draw(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """The next `count` values, float64 (count,); a device computes them as it rounds."""
        blocks = [self._block(min(_BLOCK, count - at), device) for at in range(0, count, _BLOCK)]
        return torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *blocks])

    def _block(self, count: int, device: torch.device | str) -> Tensor:
        """By Box and Muller: two uniform values of 53 bits make two normal ones."""
        pairs = (count + 1) // 2
        bits = bytearray(self._cipher.update(bytes(16 * pairs)))
        whole = torch.frombuffer(bits, dtype=torch.int64).view(2, pairs).to(device)
        uniform = ((whole >> 11) + 2**52).double()  # 0 … 2^53 - 1
        radius = ((uniform[0] + 1) / 2**53).log().mul(-2).sqrt()
        angle = uniform[1] * (2 * math.pi / 2**53)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
