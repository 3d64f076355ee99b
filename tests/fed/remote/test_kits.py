"""Kits as FLARE's provisioning makes them, their policies, and wrong ways to ask for them."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import socket
import stat
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra `remote` is not installed")

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fed.remote import kits, policy, server
from fed.remote.certificate import read_certificate
from llava.errors import InputError

HOST, PORT = "fed.example.org", 8443
SITES = ["st-mary", "north_2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("kits") / "kits"
    kits.make_kits(f"{HOST}:{PORT}", SITES, output)
    return output


@pytest.fixture
def own(made, tmp_path) -> Path:
    """A copy to change; the server's kit knows its new place."""
    output = tmp_path / "kits"
    shutil.copytree(made, output)
    write(output / HOST / "local/resources.json", policy.server_resources(output / HOST))
    return output


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def read(path: Path):
    return json.loads(path.read_text())


def key_of(path: Path) -> bytes:
    return next((path / "startup").glob("*.key")).read_bytes()


def test_each_participant_has_a_strict_kit_of_its_own(made):
    assert {p.name for p in made.iterdir()} == {"authority", HOST, "admin", *SITES}
    for name, role in ((HOST, "server"), ("admin", "admin"), *((s, "site") for s in SITES)):
        kit = policy.check_kit(made / name, role)
        assert (kit.role, kit.server) == (role, f"{HOST}:{PORT}")
        assert 355 < kit.certificate.days_left() < 365
        assert name == "admin" or kit.name == name
        assert stat.S_IMODE(os.stat(made / name).st_mode) == 0o700
    assert len({key_of(made / name) for name in (HOST, "admin", *SITES)}) == 4


def test_the_authority_stays_with_the_coordinator(made):
    assert {p.name for p in (made / "authority").iterdir()} == {"cert.json", "project.json"}
    assert stat.S_IMODE(os.stat(made / "authority" / "cert.json").st_mode) == 0o600
    secret = read(made / "authority" / "cert.json")["root_pri_key"].split("\n")[1]
    for path in made.rglob("*"):
        if path.is_file() and path.parent.name != "authority":
            assert secret not in path.read_text(errors="replace")


def test_a_site_is_added_later(own):
    before = {name: key_of(own / name) for name in (HOST, "admin", *SITES)}
    new = kits.make_kits(f"{HOST}:{PORT}", ["south"], own)
    assert [kit.name for kit in new] == ["south"]
    assert {name: key_of(own / name) for name in before} == before
    roots = {(own / name / "startup/rootCA.pem").read_bytes() for name in (*before, "south")}
    assert len(roots) == 1
    assert kits.read_project(own).sites == (*SITES, "south")


def test_a_certificate_is_renewed(own):
    before = {name: key_of(own / name) for name in (HOST, *SITES)}
    (own / "st-mary" / "note").write_text("the site's own")
    kits.renew_kits(["st-mary"], own)
    assert key_of(own / "st-mary") != before["st-mary"]
    assert key_of(own / "north_2") == before["north_2"]
    assert (own / "st-mary" / "note").exists()
    assert policy.check_kit(own / "st-mary").name == "st-mary"


def test_a_site_is_withdrawn(own):
    for site in SITES:
        assert not kits.withdraw_site(site, own)  # no server is up
    assert policy.withdrawn(own / HOST) == set(SITES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--server HOST:PORT with --site NAME"),
        ("--site a", "--server HOST:PORT with --site NAME"),
        ("--server x.org:1 --renew a", "--server HOST:PORT with --site NAME"),
        ("--server x.org --site a", "--server x.org: HOST:PORT is expected"),
        ("--server x.org: --site a", "--server x.org:: a port from 1 to 65535"),
        ("--server x.org:0 --site a", "a port from 1 to 65535"),
        ("--server x.org:65536 --site a", "a port from 1 to 65535"),
        ("--server x.org:8x --site a", "a port from 1 to 65535"),
        ("--server https://x.org:443 --site a", "HOST:PORT is expected"),
        (f"--server {'x' * 65}:443 --site a", "at most 64 letters"),
        ("--server x.org:443 --site st.mary", "--site 'st.mary': letters, digits"),
        ("--server x.org:443 --site ../a", "--site '../a': letters, digits"),
        ("--server x.org:443 --site -a", "expected one argument"),
        ("--server x.org:443 --site admin", "--site admin: that name is taken"),
        ("--server x-org:443 --site X-org", "--site X-org: that name is taken"),
        ("--server x.org:443 --site a --site A", "--site A: two sites are called so"),
        (f"--server {HOST}:{PORT} --site st-mary", "st-mary: is there already; --renew st-mary"),
        (f"--server {HOST}:{PORT}", "all these kits are there; name a --site"),
        (f"--server {HOST}:1 --site a", f"these are the kits of the server {HOST}:{PORT}"),
        ("--renew st-marry", "--renew st-marry: .* no such kit .did you mean st-mary"),
        ("--withdraw nobody", "--withdraw nobody: .* no such kit"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(own, capsys, words, message):
    before = {str(p): p.stat().st_mtime_ns for p in own.rglob("*")}
    with pytest.raises(SystemExit) as ended:
        kits.main([*words.split(), "--output", str(own)])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said)
    assert "Traceback" not in said
    assert {str(p): p.stat().st_mtime_ns for p in own.rglob("*")} == before


def test_it_says_what_goes_where(own, capsys):
    kits.main(["--server", f"{HOST}:{PORT}", "--site", "south", "--output", str(own)])
    said = capsys.readouterr().out
    assert re.search(r"south  valid until \d{4}-\d\d-\d\d  for south, by a way nobody else", said)
    assert "authority  keep it" in said


def loosened():
    """A file of a site's kit, the change, and the key that the refusal names."""
    resources, rights = "local/resources.json", "local/authorization.json"
    startup = "startup/fed_client.json"
    streamer = {"id": "site_log_streamer", "path": "nvflare.x.SiteLogStreamer", "args": {}}
    more = "fed.remote.flare_job.Other"
    return [
        (resources, lambda v: v["class_allow_list"].append(more), "class_allow_list"),
        (resources, lambda v: v.update(class_allow_list=["*"]), "class_allow_list.0"),
        (resources, lambda v: v.update(class_allow_list=["fed."]), "class_allow_list.0"),
        (resources, lambda v: v.pop("class_allow_list"), "class_allow_list"),
        (
            resources,
            lambda v: v.update(class_list_enforcement_mode="warn"),
            "class_list_enforcement_mode",
        ),
        (resources, lambda v: v.update(allow_log_streaming=True), "allow_log_streaming"),
        (resources, lambda v: v.update(allow_log_streaming=0), "allow_log_streaming"),
        (resources, lambda v: v["components"].append(streamer), "components"),
        (resources, lambda v: v["components"][2].update(path="x.Launcher"), "components.2.path"),
        (resources, lambda v: v.update(handlers=[]), "handlers"),
        *(
            (
                rights,
                lambda v, right=right: v["permissions"]["project_admin"].update({right: "any"}),
                f"permissions.project_admin.{right}",
            )
            for right in ("byoc", "shell_commands", "operate", "download_job", "clone_job")
        ),
        (rights, lambda v: v["permissions"].update(lead={"byoc": "any"}), "permissions.lead"),
        (rights, lambda v: v["permissions"].update(project_admin="any"), "permissions.project_adm"),
        (startup, lambda v: v.update(require_signed_jobs=False), "require_signed_jobs"),
        (startup, lambda v: v.pop("require_signed_jobs"), "require_signed_jobs"),
        (startup, lambda v: v["client"].update(connection_security="tls"), "client.connection_sec"),
    ]


@pytest.mark.parametrize("case", range(len(loosened())))
def test_a_loosened_kit_is_refused_by_file_and_key(own, case):
    name, change, key = loosened()[case]
    path = own / "st-mary" / name
    value = read(path)
    change(value)
    write(path, value)
    with pytest.raises(
        InputError, match=f"{re.escape(str(path))}: {re.escape(key)}.* is .*expected"
    ):
        policy.check_kit(own / "st-mary", "site")


@pytest.mark.parametrize(
    "name", ["custom/evil.py", "job_resources.json", "a__resources.json", "privacy.json"]
)
def test_a_file_more_is_refused_by_name(own, name):
    path = own / "st-mary" / "local" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(InputError, match=f"local/{name.split('/')[0]}: a strict kit has no such"):
        policy.check_kit(own / "st-mary")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kit: shutil.rmtree(kit / "startup"), "not a kit: startup/fed_client.json"),
        (lambda kit: (kit / "local/resources.json").unlink(), "resources.json: no such file"),
        (lambda kit: (kit / "local/resources.json").write_text("{"), "no readable JSON"),
        (lambda kit: (kit / "local/resources.json").write_text("[]"), "a JSON object is expected"),
        (lambda kit: (kit / "startup/client.crt").write_text("x"), "not a certificate of a kit"),
        (lambda kit: (kit / "startup/client.crt").unlink(), "not a certificate of a kit"),
    ],
)
def test_a_broken_kit_is_refused(own, change, message):
    change(own / "st-mary")
    with pytest.raises(InputError, match=message):
        policy.check_kit(own / "st-mary", "site")


def test_a_kit_for_another_role_is_refused(own):
    with pytest.raises(InputError, match="this is the admin's kit, that of the site is expected"):
        policy.check_kit(own / "admin", "site")


@pytest.mark.parametrize(
    ("begins", "ends", "message"),
    [
        (-400, -40, "the certificate of st-mary has ended on .* --renew st-mary"),
        (2, 300, "begins on .* UTC, and here it is .*clock"),
    ],
)
def test_a_certificate_of_another_time_is_refused(tmp_path, begins, ends, message):
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "st-mary"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "x"),
        ]
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + datetime.timedelta(days=begins))
        .not_valid_after(now + datetime.timedelta(days=ends))
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "client.crt"
    path.write_bytes(made.public_bytes(Encoding.PEM))
    with pytest.raises(InputError, match=message):
        read_certificate(path)


def test_a_server_that_was_moved_stores_where_it_is(own, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(own / HOST, moved)
    with pytest.raises(InputError, match="admin_storage is .* is expected"):
        policy.check_kit(moved)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        file = moved / "startup/fed_server.json"
        values = read(file)
        values["servers"][0]["service"]["target"] = f"{HOST}:{taken.getsockname()[1]}"
        write(file, values)
        with pytest.raises(InputError, match="port .* cannot be listened at: Address already"):
            server.serve(moved)
    assert policy.check_kit(moved).role == "server"
    assert str(moved) in (moved / "local/resources.json").read_text()
