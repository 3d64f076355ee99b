"""Couriers carry spool files between the driver and the sites; they know no rounds.

The driver has one `Courier` for all sites, a site has one `SiteCourier`. Each kind is one module.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fed.drivers.flags import TryFlags
from fed.remote.spool import Spool
from llava.errors import InputError
from llava.suggest import did_you_mean

if TYPE_CHECKING:
    from fed.remote.site_yaml import SiteConfig

CONNECTED, CONNECTING, AWAY = "connected", "connecting", "away"

# The modules, each with its `DriverSide` and `SiteSide`; imported when chosen.
_KINDS = {"folder": "fed.remote.folder", "flare": "fed.remote.flare"}


@dataclass
class RemoteFlags(TryFlags):
    """The flags of --fed_driver remote."""

    LEAST: ClassVar = {**TryFlags.LEAST, "fed_job_gb": 0}

    fed_courier: str | None = field(
        default=None,
        metadata={
            "help": "What carries files to the sites: `folder` (both sides see OUTPUT/fed/spool), "
            "or `flare` (other machines), the default where there is a --fed_remote_kit."
        },
    )
    fed_remote_kit: str | None = field(
        default=None, metadata={"help": "The admin's kit of `python -m fed.remote.kits`."}
    )
    fed_job_gb: float = field(
        default=4.0,
        metadata={
            "help": "`flare`: gigabytes after which the processes that carry a site's files are "
            "replaced by new ones; they grow with what they carry."
        },
    )


class Courier(ABC):
    """The driver's side.

    What its library raises does not leave it; `InputError` does, for a setting that can never work.

    Args:
        spool: the folder with a spool for each site, by the site's name.
        sites: the sites' names.
        flags: those of the command line.
    """

    def __init__(self, spool: Path, sites: Sequence[str], flags: RemoteFlags):
        self.spool, self.sites, self.flags = spool, list(sites), flags

    @abstractmethod
    def keep_up(self) -> None:
        """Start what carries, or start it again; called every second or so while a site works."""

    @abstractmethod
    def status(self) -> dict[str, str]:
        """For each site `CONNECTED`, `AWAY` and perhaps why ("away: no such host"), or
        `CONNECTING` while neither is known yet."""

    @abstractmethod
    def close(self) -> None:
        """The driver ends; what carries may go on without it."""


class SiteCourier(ABC):
    """A site's side, as its site.yaml asks for."""

    def __init__(self, config: SiteConfig):
        self.config = config

    @abstractmethod
    def spools(self) -> list[Spool]:
        """The spools that there are now: one a run."""

    @abstractmethod
    def keep_up(self) -> None:
        """Start what carries, or start it again; called every second or so, also while a task is at
        work, then from another thread."""

    @abstractmethod
    def close(self) -> None:
        """The site ends; what was started for it ends, too."""


def make_courier(spool: Path, sites: Sequence[str], flags: RemoteFlags) -> Courier:
    """The courier that the command line asks for."""
    chosen = flags.fed_courier or ("flare" if flags.fed_remote_kit else None)
    if chosen is None:
        raise InputError(
            "--fed_driver remote needs --fed_remote_kit, or --fed_courier folder where the sites "
            "see the folder --output_dir"
        )
    return _module(chosen, "--fed_courier").DriverSide(spool, sites, flags)


def make_site_courier(config: SiteConfig) -> SiteCourier:
    """The courier that site.yaml asks for."""
    return _module(config.courier, f"{config.source}: courier").SiteSide(config)


def _module(name: str, where: str):
    if name not in _KINDS:
        raise InputError(
            f"{where} is {name!r}{did_you_mean(name, _KINDS)}; known are {', '.join(_KINDS)}"
        )
    return importlib.import_module(_KINDS[name])
