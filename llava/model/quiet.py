"""transformers and peft without their reports on what they load; what matters we say ourselves."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers warns of nothing, and draws no bars where there is no terminal.

    Nor does bitsandbytes, which peft imports, tell of kernels that 4 bits on a CPU could use.
    """
    from transformers.utils import logging as of_transformers

    bitsandbytes = logging.getLogger("bitsandbytes")
    verbosity, level = of_transformers.get_verbosity(), bitsandbytes.level
    of_transformers.set_verbosity_error()
    bitsandbytes.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        of_transformers.set_verbosity(verbosity)
        bitsandbytes.setLevel(level)
