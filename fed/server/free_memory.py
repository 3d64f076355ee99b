"""Memory that is free, given back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Give free pages of the heap back, where the C library is glibc.

    Small objects that live on, such as what is known of an update, are put into the holes that
    tensors of some megabytes have left; the next tensor then makes the heap longer, once a client.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
