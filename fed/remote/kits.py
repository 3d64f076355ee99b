"""Kits: a folder for the server, one for the run, and one for each site, with certificates.

    python -m fed.remote.kits --server fed.example.org:443 --site st-mary --site north

Who gets which is said at the end. `KITS/authority` can make kits in the project's name: it stays
with the coordinator. The same command with other sites adds these; `--renew NAME` gives a site (or
the server, by its host's name, or `admin`) a new certificate, `--withdraw NAME` shuts a site out.
docs/sites.md has it step by step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed.remote import policy
from fed.remote.certificate import INSTALL
from fed.remote.flare import no_answer
from llava.atomic import new_folder, remove_leftovers, write_text
from llava.errors import InputError, one_clear_error, reason
from llava.flags import FlagParser
from llava.json_files import read_json
from llava.suggest import did_you_mean

ADMIN = "admin"
AUTHORITY = "authority"
_PROJECT = "fedllava"
_ADMIN_SUBJECT = "admin@fedllava.org"  # FLARE wants an address; nothing is sent there
_RESERVED = {ADMIN, AUTHORITY, "server", "client", "relay", "global", "pool", "all"}
_DAYS_OF_ROOT = 3650
_LONGEST_NAME = 64  # of the common name of a certificate


@dataclass(frozen=True)
class Project:
    """Whose kits lie in a folder; `authority/project.json`."""

    host: str
    port: int
    sites: tuple[str, ...]

    @property
    def server(self) -> str:
        return f"{self.host}:{self.port}"

    def folder_names(self) -> dict[str, str]:
        """The kit's folder for each participant's name in certificates."""
        return {self.host: self.host, _ADMIN_SUBJECT: ADMIN, **{site: site for site in self.sites}}


def make_kits(server: str, sites: Sequence[str], output: Path) -> list[policy.Kit]:
    """Make the kits that are not there yet; `InputError` leaves all as it was."""
    host, port = _host_and_port(server)
    _check_sites(sites, host)
    known = read_project(output) if (output / AUTHORITY).exists() else None
    if known is not None and known.server != server:
        raise InputError(
            f"{output}: these are the kits of the server {known.server}, found --server {server}; "
            "name another --output"
        )
    for site in sites:
        if (output / site).exists():
            raise InputError(
                f"{output / site}: is there already; --renew {site} gives it a new certificate"
            )
    before = known.sites if known else ()
    project = Project(host, port, tuple(dict.fromkeys([*before, *sites])))
    names = [name for name in project.folder_names().values() if not (output / name).exists()]
    return _provision(project, names, output)


def renew_kits(names: Sequence[str], output: Path) -> list[policy.Kit]:
    """Give participants new keys and certificates; the old ones stay valid until they end."""
    project = read_project(output)
    for name in names:
        _known(name, [*project.folder_names().values()], "--renew", output)
    return _provision(project, names, output, renew=True)


def withdraw_site(name: str, output: Path) -> bool:
    """Let the server refuse a site, whatever it presents; whether a server that is up was told.

    Raises:
        InputError: there is no such site, or the server that is up did not do it; the server of
            this folder then does from its next start on.
    """
    project = read_project(output)
    _known(name, project.sites, "--withdraw", output)
    kit = policy.check_kit(output / project.host, "server")
    refused = sorted(policy.withdrawn(kit.folder) | {name})
    write_text(kit.folder / policy.WITHDRAWN, json.dumps({"disabled_clients": refused}, indent=2))
    admin = policy.check_kit(output / ADMIN, "admin")
    if no_answer(admin.server):
        return False
    words = ["fed.remote.flare_gate", str(admin.folder), admin.name, name]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if done.returncode:
        last = [*done.stderr.splitlines(), "it said nothing"][:1]
        raise InputError(
            f"{name} is withdrawn from the server's next start on; the one that is up at "
            f"{admin.server} says: {last[0]}"
        )
    return True


def read_project(output: Path) -> Project:
    """Whose kits are in a folder; `InputError` if none are."""
    file = output / AUTHORITY / "project.json"
    values = read_json(file)
    try:
        return Project(str(values["host"]), int(values["port"]), tuple(map(str, values["sites"])))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: host, port and sites are expected ({reason(error)})") from None


def _known(name: str, names: Sequence[str], flag: str, output: Path) -> None:
    if name not in names:
        raise InputError(
            f"{flag} {name}: {output} has no such kit{did_you_mean(name, names)}; it has "
            f"{', '.join(names)}"
        )


def _host_and_port(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    label = "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
    if not re.fullmatch(rf"{label}(\.{label})*", host) or len(host) > _LONGEST_NAME:
        raise InputError(
            f"--server {server}: HOST:PORT is expected, with the name by which sites reach the "
            f"server, as fed.example.org:443, of at most {_LONGEST_NAME} letters"
        )
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise InputError(f"--server {server}: a port from 1 to 65535 is expected after the colon")
    return host, int(port)


def _check_sites(sites: Sequence[str], host: str) -> None:
    seen: set[str] = set()
    for site in sites:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", site) or len(site) > _LONGEST_NAME:
            raise InputError(
                f"--site {site!r}: letters, digits, '_' and '-' are expected, at most "
                f"{_LONGEST_NAME} of them"
            )
        if site.lower() in _RESERVED or site.lower() == host.lower():
            raise InputError(f"--site {site}: that name is taken; choose another")
        # Names become folders, and some file systems do not tell cases apart.
        if site.lower() in seen:
            raise InputError(f"--site {site}: two sites are called so")
        seen.add(site.lower())


def _provision(
    project: Project, names: Sequence[str], output: Path, renew: bool = False
) -> list[policy.Kit]:
    """Make the kits that are called so, and what the authority knows of them."""
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    if not names:
        raise InputError(f"{output}: all these kits are there; name a --site to add")
    authority = output / AUTHORITY
    subjects = {folder: subject for subject, folder in project.folder_names().items()}
    with tempfile.TemporaryDirectory(dir=output, prefix=".provision-") as temporary:
        work = Path(temporary) / _PROJECT
        (work / "state").mkdir(parents=True)
        if authority.exists():
            known = read_json(authority / "cert.json")
            for name in names if renew else ():
                known.pop(subjects[name], None)
            write_text(work / "state" / "cert.json", json.dumps(known))
        _call_flare(_project_file(project, names), Path(temporary))
        with new_folder(authority, replace=True) as folder:
            os.chmod(folder, 0o700)
            shutil.copy(work / "state" / "cert.json", folder / "cert.json")
            os.chmod(folder / "cert.json", 0o600)
            facts = {"host": project.host, "port": project.port, "sites": project.sites}
            write_text(folder / "project.json", json.dumps(facts, indent=1))
        for name in names:
            _place(work / "prod_00" / subjects[name], output / name, project)
    return [policy.check_kit(output / name) for name in names]


def _place(made: Path, kit: Path, project: Project) -> None:
    """Make a kit of what FLARE has made, or give the kit that is there its new certificate."""
    if kit.exists():
        with new_folder(kit / "startup", replace=True) as folder:
            shutil.copytree(made / "startup", folder, dirs_exist_ok=True)
        return
    with new_folder(kit) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
        os.chmod(folder, 0o700)  # it has a private key
        if kit.name == ADMIN:
            return
        for name in ("resources.json.default", "authorization.json.default", "privacy.json.sample"):
            (folder / "local" / name).unlink(missing_ok=True)
        is_server = kit.name == project.host
        resources = policy.server_resources(kit) if is_server else policy.site_resources()
        write_text(folder / "local" / "resources.json", json.dumps(resources, indent=1))
        rights = json.dumps(policy.authorization("server" if is_server else "site"), indent=1)
        write_text(folder / "local" / "authorization.json", rights)


def _project_file(project: Project, names: Sequence[str]) -> dict[str, Any]:
    """What `nvflare provision` reads: the server, the admin, and the sites that are to be made."""
    host = project.host
    participants: list[dict[str, Any]] = [
        {"name": host, "type": "server", "org": _PROJECT, "fed_learn_port": project.port}
    ]
    for site in project.sites:
        if site in names:
            org = re.sub(r"[^A-Za-z0-9_]", "_", site)
            participants.append({"name": site, "type": "client", "org": org})
    participants.append(
        {"name": _ADMIN_SUBJECT, "type": "admin", "org": _PROJECT, "role": "project_admin"}
    )
    impl = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": _PROJECT,
        "participants": participants,
        "builders": [
            {"path": f"{impl}.workspace.WorkspaceBuilder", "args": {}},
            {
                "path": f"{impl}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "require_signed_jobs": True},
            },
            {"path": f"{impl}.cert.CertBuilder", "args": {"root_valid_days": _DAYS_OF_ROOT}},
            {"path": f"{impl}.signature.SignatureBuilder", "args": {}},
        ],
    }


def _call_flare(project: dict[str, Any], folder: Path) -> None:
    """`nvflare provision`, with a home of its own: it leaves files there."""
    file = folder / "project.yml"
    write_text(file, json.dumps(project))  # JSON is YAML
    command = [sys.executable, "-m", "nvflare.cli", "provision", "-p", file, "-w", folder]
    done = subprocess.run(
        [*map(str, command), "--force"],
        cwd=folder,
        env={**os.environ, "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if "No module named 'nvflare'" in done.stderr or "No module named nvflare" in done.stderr:
        raise InputError(f"sites on other machines need {INSTALL}")
    if done.returncode or not (folder / _PROJECT / "prod_00").is_dir():
        last = [*filter(None, (done.stdout + done.stderr).splitlines()), "it said nothing"][-2:]
        raise InputError(f"nvflare provision has failed: {' '.join(last)}")


@contextlib.contextmanager
def _private() -> Iterator[None]:
    """What is written inside is for this user alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _say(kits: Sequence[policy.Kit], output: Path) -> None:
    for kit in kits:
        ends = f"valid until {kit.certificate.ends:%Y-%m-%d}"
        if kit.role == "server":
            todo = f"for the machine {kit.name}; there: python -m fed.remote.server {kit.name}"
        elif kit.role == "admin":
            todo = f"for the run, on the same machine: --fed_remote_kit {output / ADMIN}"
        else:
            todo = f"for {kit.name}, by a way nobody else can read; there: `kit:` in site.yaml"
        name = ADMIN if kit.role == "admin" else kit.name
        print(f"{output / name}  {ends}  {todo}")
    print(f"{output / AUTHORITY}  keep it: who has it can make kits in this project's name")


def main(argv: Sequence[str] | None = None) -> None:
    parser = FlagParser(prog="python -m fed.remote.kits", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--server", metavar="HOST:PORT", help="where sites reach the server; one port is enough")
    add("--site", action="append", default=[], metavar="NAME", help="a site; once for each")
    add("--output", type=Path, default=Path("kits"), help="the folder of the kits")
    add("--renew", action="append", default=[], metavar="NAME", help="make a new certificate")
    add("--withdraw", action="append", default=[], metavar="NAME", help="shut a site out")
    args = parser.parse_args(argv)
    with one_clear_error(), _private():
        if bool(args.server) == bool(args.renew or args.withdraw) or (
            args.site and not args.server
        ):
            raise InputError("--server HOST:PORT with --site NAME …, or --renew, or --withdraw")
        for name in args.withdraw:
            told = withdraw_site(name, args.output)
            when = "from now on" if told else "from its next start on; it does not answer now"
            print(f"{name} is withdrawn: the server refuses it {when}; take it out of clients.yaml")
        if args.renew:
            _say(renew_kits(args.renew, args.output), args.output)
        if args.server:
            _say(make_kits(args.server, args.site, args.output), args.output)


if __name__ == "__main__":
    main()
