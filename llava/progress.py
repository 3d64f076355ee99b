"""Progress of long work: library code logs it, commands show it on the screen."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

LOGGERS = ("llava", "fed")


class _Lines(logging.Handler):
    """Prints messages as they are: to stdout, from a warning on to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(record.getMessage(), file=stream, flush=True)


@contextlib.contextmanager
def progress_shown() -> Iterator[None]:
    """For entry points: what our packages log at INFO or above is on the screen, a line each.

    It is there once: handlers of the root logger, which a library may have set up, do not get it.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    if any(isinstance(handler, _Lines) for handler in loggers[0].handlers):
        yield  # one entry point called by another
        return
    lines, before = _Lines(), [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(lines)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(lines)
            logger.setLevel(level)
            logger.propagate = propagate
