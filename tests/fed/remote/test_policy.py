"""What a strict kit refuses, whatever the server allows, and whom a certificate lets in."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra `remote` is not installed")

from fed.remote import kits, policy
from tests.fed.remote.rig import ROOT, change


def flare(kind: str, kit: Path, log: Path, **values: str) -> subprocess.Popen:
    """FLARE's own server or client of a kit, past all checks of ours."""
    module = f"nvflare.private.fed.app.{kind}.{kind}_train"
    sets = [f"{key}={value}" for key, value in values.items()]
    words = ["-m", module, "-m", str(kit), "-s", f"fed_{kind}.json", "--set", "secure_train=true"]
    (kit / "transfer").mkdir(exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-u", *words, *sets, "config_folder=config"],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ask(kit: Path, user: str, *job: Path) -> dict:
    words = ["-m", "tests.fed.remote.flare_admin", str(kit), user, *map(str, job)]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=600
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def loose_server(rig):
    """A server that allows everything, and the site a with its strict kit."""
    kit = rig.folder / "kits" / "localhost"
    change(kit / "local/resources.json", lambda v: v.update(policy.server_resources(kit)))
    change(kit / "local/resources.json", lambda v: v.update(class_allow_list=["*"]))
    change(kit / "local/authorization.json", lambda v: v["permissions"].update(project_admin="any"))
    change(kit / "startup/fed_server.json", lambda v: v.update(require_signed_jobs=False))
    server = flare("server", kit, rig.folder / "server.log", org="fedllava")
    rig.start("a")
    yield rig
    server.kill()
    server.wait()


def job(folder: Path, executor: str, code: str | None = None) -> Path:
    """A job for site a whose site part is `executor`, perhaps with code of its own."""
    config = folder / "app/config"
    config.mkdir(parents=True)
    if code is not None:
        (folder / "app/custom").mkdir()
        (folder / "app/custom/evil.py").write_text(code)
    values = {
        folder / "meta.json": {
            "name": folder.name,
            "resource_spec": {},
            "min_clients": 1,
            "mandatory_clients": ["a"],
            "deploy_map": {"app": ["server", "a"]},
        },
        config / "config_fed_server.json": {
            "format_version": 2,
            "workflows": [
                {
                    "id": "w",
                    "path": "fed.remote.flare_job.ServerJob",
                    "args": {"spool": str(folder), "site": "a", "run": "0" * 32, "enough": 1e9},
                }
            ],
        },
        config / "config_fed_client.json": {
            "format_version": 2,
            "executors": [{"tasks": ["*"], "executor": {"path": executor, "args": {}}}],
        },
    }
    for path, value in values.items():
        path.write_text(json.dumps(value))
    (folder / "a").mkdir()
    return folder


def test_a_strict_site_refuses_other_jobs_whatever_the_server_allows(loose_server, tmp_path):
    rig = loose_server
    admin, site = tmp_path / "kits/admin", tmp_path / "kits/a"
    user = policy.check_kit(admin).name
    rig.wait(lambda: "a" in ask(admin, user).get("clients", []), "a is connected")
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()\n"

    def said() -> str:
        """What the site and the jobs there have logged."""
        files = [site / "log.txt", *site.glob("*-*/log.txt"), tmp_path / "a/flare.log"]
        return "\n".join(file.read_text() for file in files if file.exists())

    with_code = ask(admin, user, job(tmp_path / "with-code", "evil.Evil", code))
    assert "BYOC not permitted" in said() + json.dumps(with_code) + server_log(rig)
    assert with_code.get("status", "") != "FINISHED:COMPLETED"

    other = "nvflare.app_common.np.np_trainer.NPTrainer"
    ask(admin, user, job(tmp_path / "other-class", other))
    assert "is not in allow_list" in said()

    # FLARE's client API runs a command that the job brings.
    command = "nvflare.app_common.executors.client_api_launcher_executor.ClientAPILauncherExecutor"
    ask(admin, user, job(tmp_path / "command", command))
    assert said().count("is not in allow_list") >= 2
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.soak
def test_a_loose_site_would_have_run_that_code(loose_server, tmp_path):
    """What the test above would see if a strict policy did nothing."""
    rig = loose_server
    admin, site = tmp_path / "kits/admin", tmp_path / "kits/a"
    user = policy.check_kit(admin).name
    rig.kill("a")
    change(site / "local/resources.json", lambda v: v.update(class_allow_list=["*"]))
    change(
        site / "local/authorization.json", lambda v: v["permissions"].update(project_admin="any")
    )
    client = flare("client", site, tmp_path / "loose.log", uid="a", org="a")
    try:
        rig.wait(lambda: "a" in ask(admin, user).get("clients", []), "a is there")
        marker = tmp_path / "marker"
        code = f"open({str(marker)!r}, 'w').close()\n"
        ask(admin, user, job(tmp_path / "with-code", "evil.Evil", code))
        assert marker.exists()
    finally:
        client.kill()
        client.wait()


def server_log(rig) -> str:
    kit = rig.folder / "kits/localhost"
    files = [kit / "log.txt", rig.folder / "server.log"]
    return "\n".join(file.read_text() for file in files if file.exists())


def test_a_certificate_is_good_for_its_own_name_alone(rig, tmp_path):
    rig.start("server")
    admin, site = tmp_path / "kits/admin", tmp_path / "kits/a"
    user = policy.check_kit(admin).name
    rig.wait(lambda: "clients" in ask(admin, user), "the server is up")

    # None at all, and one of another authority: TLS ends there.
    root = site / "startup/rootCA.pem"
    assert refused(rig.port, root, None)
    kits.make_kits("localhost:1", ["a"], tmp_path / "others")
    assert refused(rig.port, root, tmp_path / "others/a/startup")
    assert not refused(rig.port, root, site / "startup")

    # A site's certificate in the admin's place.
    for name in ("client.crt", "client.key"):
        shutil.copy(admin / "startup" / name, tmp_path / name)
        shutil.copy(site / "startup" / name, admin / "startup" / name)
    assert "error" in ask(admin, user)
    assert "error" in ask(admin, "a")
    for name in ("client.crt", "client.key"):
        shutil.copy(tmp_path / name, admin / "startup" / name)

    # Another site's: refused here by its name, and by the server.
    for name in ("client.crt", "client.key"):
        shutil.copy(tmp_path / "kits/b/startup" / name, site / "startup" / name)
    assert policy.check_kit(site).name == "b"
    client = flare("client", site, tmp_path / "false.log", uid="a", org="a")
    try:
        rig.wait(lambda: "failed to verify client identity" in server_log(rig), "a refusal")
        assert ask(admin, user) == {"clients": []}
    finally:
        client.kill()
        client.wait()


def refused(port: int, root: Path, kit: Path | None) -> bool:
    """Whether the server ends a TLS connection with these credentials."""
    context = ssl.create_default_context(cafile=str(root))
    if kit is not None:
        context.load_cert_chain(kit / "client.crt", kit / "client.key")
    with socket.create_connection(("127.0.0.1", port), 5) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as secured:
                secured.settimeout(1)
                # With TLS 1.3 the refusal comes after the handshake.
                return secured.recv(1) == b""
        except TimeoutError:
            return False  # it waits for what a client has to say
        except OSError:
            return True
