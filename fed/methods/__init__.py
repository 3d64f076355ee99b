"""Methods: ways to aggregate or merge states. One file, one method, one pure function.

    outcome = get("fedcmp")(states, weights=[120, 80], base=base, rescale=2.0)

A new method is a new file here with one function under `@method("its-name")`; its keyword-only
arguments with their types are its options, on the command line and in YAML. A method that changes
the clients' steps has a `ClientRule`.
"""

from fed.methods.interface.calibration import Calibration
from fed.methods.interface.client_rule import ClientRule
from fed.methods.interface.method import Method, Outcome
from fed.methods.interface.registry import get, method, names

__all__ = ["Calibration", "ClientRule", "Method", "Outcome", "get", "method", "names"]
