"""The state that travels: the trainable part as a flat dict of named tensors.

What passes between `llava` and `fed` is this and nothing else, and it is the same thing that lies
on disk as `mm_projector.bin`; so the code is llava's. `fed` takes these names from here.
"""

from llava.state import (
    SUFFIXES,
    State,
    StateError,
    check,
    fingerprint,
    fingerprints,
    is_finite,
    load,
    read_tensors,
    save,
)

__all__ = [
    "SUFFIXES",
    "State",
    "StateError",
    "check",
    "fingerprint",
    "fingerprints",
    "is_finite",
    "load",
    "read_tensors",
    "save",
]
