"""transformers without its reports on what it loads; what matters in them we say ourselves."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_inside = 0
_outer = contextlib.ExitStack()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers warns of nothing, and draws no bars where there is no terminal.

    Afterwards all is as it was before. These are settings of the whole process: of blocks that
    overlap, in several threads, the first sets them and the last puts them back.
    """
    global _inside
    with _lock:
        if not _inside:
            _outer.enter_context(_hushed())
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _outer.close()


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    without_downloads = are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if without_downloads:  # they have a switch of their own, which that turned on, too
                disable_progress_bars()
