"""The process group of a DeepSpeed run."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import warnings
from collections.abc import Sequence

from llava.errors import InputError
from llava.process_group import end_process_group
from llava.train.arguments import check_deepspeed, modernise


def start_process_group(argv: Sequence[str] | None = None) -> None:
    """Start the process group that a command line with `--deepspeed` asks for; else do nothing.

    An entry calls it once, before its flags are parsed: transformers' TrainingArguments, and with
    ZeRO-3 the model, take the world for one process otherwise.

    Raises:
        InputError: the file of `--deepspeed` is none, or the package deepspeed is missing.
    """
    if check_deepspeed(modernise(sys.argv[1:] if argv is None else argv)) is None:
        return
    import torch

    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f"--deepspeed needs the package deepspeed: pip install 'fedllava[train]' ({error})"
        ) from None

    # What the libraries tell each other: DeepSpeed calls torch by old names, transformers leaves
    # gradient accumulation to DeepSpeed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    logging.getLogger("accelerate.accelerator").addFilter(
        lambda record: "Gradient accumulation steps mismatch" not in record.getMessage()
    )
    if "RANK" not in os.environ:  # started without a launcher: a world of one
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(end_process_group)
