"""A strict kit: all that FLARE may do for a site or for the server. Any other kit is refused.

A kit is the folder that `fed.remote.kits` makes for one participant. `startup/` has its certificate
and the server's address, `local/` what the participant allows; FLARE reads both. A strict site
builds one class for a job, `SITE_CLASS`, which copies files between the wire and the site's spool;
it takes no code, no command and no shell, and sends no logs. Which jobs it takes is not the
server's to say: a job has to be signed with the certificate of the admin kit.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed.remote.certificate import Certificate, read_certificate
from llava.errors import InputError
from llava.json_files import read_json

SITE_CLASS = "fed.remote.flare_job.SiteJob"
SERVER_CLASS = "fed.remote.flare_job.ServerJob"
GATE_CLASS = "fed.remote.flare_gate.Gate"
JOBS_CLASS = "fed.remote.flare_store.Jobs"
WITHDRAWN = "disabled_clients.json"
"""In the server's kit, FLARE's own name and form: the sites that were withdrawn."""
MANY = 10_000  # sites, and jobs at once: a job carries one site's files
PATIENCE = 3600  # seconds without a word from a site before the server gives its job up

_REMEDY = "this is no kit that python -m fed.remote.kits has made, or it was changed since"
_STARTUP = {"site": "fed_client.json", "server": "fed_server.json", "admin": "fed_admin.json"}
_LOCAL_FILES = {"authorization.json", "resources.json", "log_config.json.default"}
# "any" is: whoever holds the certificate of the admin kit; no other role has any right.
_RIGHTS = {
    "submit_job": "any",
    "manage_job": "any",
    "view": "any",
    "clone_job": "none",
    "download_job": "none",
    "operate": "none",
    "shell_commands": "none",
    "byoc": "none",
    "server-predeployed-flwr": "none",
}


@dataclass(frozen=True)
class Kit:
    """A kit that was checked.

    Attributes:
        folder: absolute.
        role: "site", "server" or "admin".
        server: HOST:PORT that it connects to, or listens at.
        certificate: whose kit it is, and until when.
    """

    folder: Path
    role: str
    server: str
    certificate: Certificate

    @property
    def name(self) -> str:
        return self.certificate.name


def authorization(role: str) -> dict[str, Any]:
    """`local/authorization.json` of a site or of the server."""
    rights = dict(_RIGHTS)
    if role == "server":
        rights["disable_client"] = "any"  # to withdraw a site
    return {"format_version": "1.0", "permissions": {"project_admin": rights}}


def withdrawn(folder: Path) -> set[str]:
    """The sites that the server whose kit is `folder` refuses."""
    file = folder / WITHDRAWN
    return set(read_json(file)["disabled_clients"]) if file.exists() else set()


def site_resources() -> dict[str, Any]:
    """`local/resources.json` of a site."""
    common = "nvflare.app_common"
    return {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [SITE_CLASS],
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30, "compression": "Gzip"},
        "components": [
            {
                "id": "resource_manager",
                "path": f"{common}.resource_managers.gpu_resource_manager.GPUResourceManager",
                "args": {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0, "expiration_period": 300},
            },
            {
                "id": "resource_consumer",
                "path": f"{common}.resource_consumers.gpu_resource_consumer.GPUResourceConsumer",
                "args": {},
            },
            {
                "id": "process_launcher",
                "path": f"{common}.job_launcher.client_process_launcher.ClientProcessJobLauncher",
                "args": {},
            },
        ],
    }


def server_resources(folder: Path) -> dict[str, Any]:
    """`local/resources.json` of the server whose kit is `folder`; it stores configurations alone.

    Relative folders would depend on where the server is started, and FLARE's own lie in /tmp.
    """
    common = "nvflare.app_common"
    root = folder.absolute()
    return {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [SERVER_CLASS],
        "servers": [
            {
                "admin_storage": str(root / "transfer"),
                "max_num_clients": MANY,
                "heart_beat_timeout": PATIENCE,
                "download_job_url": "http://localhost/",
                "admin_timeout": 10.0,
            }
        ],
        "snapshot_persistor": {
            "path": f"{common}.state_persistors.storage_state_persistor.StorageStatePersistor",
            "args": {
                "uri_root": "/",
                "storage": {
                    "path": f"{common}.storages.filesystem_storage.FilesystemStorage",
                    "args": {"root_dir": str(root / "snapshots"), "uri_root": "/"},
                },
            },
        },
        "components": [
            {
                "id": "job_scheduler",
                "path": f"{common}.job_schedulers.job_scheduler.DefaultJobScheduler",
                "args": {"max_jobs": MANY},
            },
            {
                "id": "job_manager",
                "path": JOBS_CLASS,
                "args": {"uri_root": str(root / "jobs"), "job_store_id": "job_store"},
            },
            {
                "id": "job_store",
                "path": f"{common}.storages.filesystem_storage.FilesystemStorage",
            },
            {
                "id": "process_launcher",
                "path": f"{common}.job_launcher.server_process_launcher.ServerProcessJobLauncher",
                "args": {},
            },
            {"id": "gate", "path": GATE_CLASS, "args": {}},
        ],
    }


def check_kit(folder: str | os.PathLike, role: str | None = None) -> Kit:
    """The kit in a folder.

    Args:
        role: what it is to be for.

    Raises:
        InputError: no kit, one for another role, one whose policy is not the strict one (the file
            and the key are named), or a certificate that is not valid now.
    """
    root = Path(folder).absolute()
    if re.search(r"[\s'\"\\#]", str(root)):
        raise InputError(f"{root}: FLARE works in no folder with a space or a quote in its name")
    found = [each for each, name in _STARTUP.items() if (root / "startup" / name).is_file()]
    if len(found) != 1:
        raise InputError(
            f"{folder}: not a kit: startup/{_STARTUP[role or 'site']} is expected in it"
        )
    if role is not None and found[0] != role:
        raise InputError(f"{folder}: this is the {found[0]}'s kit, that of the {role} is expected")
    server = _STARTUP_CHECKS[found[0]](root)
    which = "server.crt" if found[0] == "server" else "client.crt"
    return Kit(root, found[0], server, read_certificate(root / "startup" / which))


def _check_site(root: Path) -> str:
    file = root / "startup" / _STARTUP["site"]
    values = read_json(file)
    _same(file, values, ("require_signed_jobs",), True)
    _same(file, values, ("client", "connection_security"), "mtls")
    _check_local(root, "site", site_resources())
    return str(_value(file, values, ("servers", 0, "service", "target")))


def _check_server(root: Path) -> str:
    file = root / "startup" / _STARTUP["server"]
    values = read_json(file)
    _same(file, values, ("require_signed_jobs",), True)
    _same(file, values, ("servers", 0, "connection_security"), "mtls")
    _check_local(root, "server", server_resources(root))
    return str(_value(file, values, ("servers", 0, "service", "target")))


def _check_admin(root: Path) -> str:
    file = root / "startup" / _STARTUP["admin"]
    values = read_json(file)
    _same(file, values, ("admin", "connection_security"), "mtls")
    host, port = (_value(file, values, ("admin", key)) for key in ("host", "port"))
    return f"{host}:{port}"


_STARTUP_CHECKS = {"site": _check_site, "server": _check_server, "admin": _check_admin}


def _check_local(root: Path, role: str, resources: dict[str, Any]) -> None:
    """Refuse what `local/` has beyond the strict files: each would be read, or be imported."""
    local = root / "local"
    present = {path.name for path in local.iterdir()} if local.is_dir() else set()
    if others := sorted(present - _LOCAL_FILES):
        raise InputError(f"{local / others[0]}: a strict kit has no such file; {_REMEDY}")
    expected = {"resources.json": resources, "authorization.json": authorization(role)}
    for name, values in expected.items():
        _compare(local / name, read_json(local / name), values)


def _compare(file: Path, found: Any, expected: Any, key: str = "") -> None:
    """Refuse the first value that differs, by its key."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in [*expected, *(set(found) - set(expected))]:
            below = f"{key}.{name}".lstrip(".")
            _compare(file, found.get(name, _MISSING), expected.get(name, _MISSING), below)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            _compare(file, one, other, f"{key}.{i}")
    elif found != expected or type(found) is not type(expected):
        raise InputError(f"{file}: {key} is {found!r}, {expected!r} is expected; {_REMEDY}")


class _Missing:
    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


def _value(file: Path, values: Any, keys: tuple[str | int, ...]) -> Any:
    for key in keys:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return _MISSING
    return values


def _same(file: Path, values: Any, keys: tuple[str | int, ...], expected: Any) -> None:
    _compare(file, _value(file, values, keys), expected, ".".join(map(str, keys)))
