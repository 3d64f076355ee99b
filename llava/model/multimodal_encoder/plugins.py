"""Vision towers of other packages, which they declare as entry points: `model_type` → class.

    [project.entry-points."llava.vision_towers"]
    toy = "toy_tower:ToyTower"

The name is the `model_type` in config.json of the tower's folder. So a checkpoint or a folder names
no code: what may run is what was installed. Only the class that is asked for is imported.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from llava.errors import InputError, reason
from llava.model.multimodal_encoder.tower import VisionTower

GROUP = "llava.vision_towers"


def installed() -> list[str]:
    """The names of all towers that packages declare."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def plugged_in(model_type: Any) -> type[VisionTower] | None:
    """The class of a `model_type`; None if no package declares one.

    Raises:
        InputError: several packages do, or the class does not load.
    """
    found = {e.value: e for e in entry_points(group=GROUP) if e.name == model_type}
    if not found:
        return None
    places = [f"{e.value} of the package {e.dist.name if e.dist else '?'}" for e in found.values()]
    who = f"vision tower plug-in {model_type!r} ({', '.join(places)})"
    if len(found) > 1:
        raise InputError(f"{who}: two packages declare it, uninstall one")
    try:
        kind = next(iter(found.values())).load()
    except Exception as error:  # whatever a package's import may raise
        what = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{who}: it does not load ({what})") from error
    if not (isinstance(kind, type) and issubclass(kind, VisionTower)):
        raise InputError(f"{who}: a subclass of VisionTower is expected, found {kind!r}")
    return kind
