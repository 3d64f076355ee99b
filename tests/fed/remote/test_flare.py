"""The courier between machines: FLARE's server, sites and jobs as processes, killed and cut."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra `remote` is not installed")

from fed.remote import kits, policy
from fed.train import train
from tests.fed.drivers.test_remote import weights
from tests.fed.remote.rig import ROOT, Line, Rig, expected, free_port
from tests.fed.remote.sites import clients_yaml, is_at_work, site_yaml

SITES = ["st-mary", "north"]  # those that make numbers; a and b train


@pytest.fixture(scope="module")
def all_kits(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("flare") / "kits"
    kits.make_kits("localhost:1", [*SITES, "a", "b"], output)
    return output


@pytest.fixture
def rig(all_kits, tmp_path):
    """Kits with a free port of this machine; nothing is left at work at the end."""
    made = Rig(tmp_path, SITES)
    shutil.copytree(all_kits, tmp_path / "kits")
    made.port = free_port()
    listen_at(tmp_path / "kits", made.port)
    yield made
    made.close()


def change(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def listen_at(folder: Path, port: int) -> None:
    """Change the port in all kits."""
    target = f"localhost:{port}"

    def server(values):
        values["servers"][0]["service"]["target"] = target
        values["servers"][0]["admin_port"] = port

    change(folder / "localhost/startup/fed_server.json", server)
    change(folder / "admin/startup/fed_admin.json", lambda v: v["admin"].update(port=port))
    for site in (*SITES, "a", "b"):
        connect_to(folder, site, port)


def connect_to(folder: Path, site: str, port: int) -> None:
    change(
        folder / site / "startup/fed_client.json",
        lambda v: v["servers"][0]["service"].update(target=f"localhost:{port}"),
    )


def start_all(rig) -> None:
    for name in ("server", *SITES, "driver"):
        rig.start(name)


def asked(rig, site: str) -> bool:
    """Whether a request has reached a site."""
    return any((rig.folder / site / "spool").glob("*/*.req"))


def test_sites_end_in_the_bits_of_a_resident_run_through_kills(rig, flags, tiny, tmp_path):
    """Two rounds of `fed.train`; a site and the server are killed while they are needed."""
    common = {"fed_rounds": 2, "fed_one_pass": False, "num_train_epochs": 12}
    here, there = tmp_path / "resident", tmp_path / "out"
    train(flags(fed_clients=tiny / "clients.yaml", output_dir=here, **common))

    names = clients_yaml(tmp_path, {"name": "a"}, {"name": "b"})
    remote = {"fed_driver": "remote", "fed_remote_kit": tmp_path / "kits/admin"}
    argv = flags(fed_clients=names, output_dir=there, **common, **remote)
    files = {
        name: str(site_yaml(tmp_path, tiny, name, "", courier="flare", folder=None,
                            kit=str(tmp_path / "kits" / name)))
        for name in "ab"
    }  # fmt: skip
    rig.start("server")
    for name, file in files.items():
        rig.launch(name, "fed.site", file)
    rig.launch("run", "fed.train", *argv)

    spool = there / "fed" / "spool"
    rig.wait(lambda: is_at_work(spool / "a"), 90, "site a is at work")
    rig.kill("a")
    rig.launch("a", "fed.site", files["a"])
    rig.wait(lambda: rounds_of(there) == 1, 90, "the first round")
    rig.kill("server")
    rig.start("server")
    rig.wait(lambda: rig.processes["run"].poll() == 0, 90, "the end of the run")
    assert weights(there) == weights(here) != {}
    # Nothing of the records or their pictures has come to the server.
    for folder in (tmp_path / "kits/localhost", spool):
        for file in folder.rglob("*"):
            if file.is_file():
                assert not re.search(
                    rb"a (red|green|blue) picture|[ab]-\d+\.png", file.read_bytes()
                )


def rounds_of(output: Path) -> int:
    file = output / "rounds.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def line(rig):
    """What the site north is connected through."""
    line = Line(rig.port)
    connect_to(rig.folder / "kits", "north", line.port)
    yield line
    line.close()


@pytest.mark.slow
@pytest.mark.soak
def test_random_kills_and_cuts_change_nothing(rig, line):
    """Whatever is killed and wherever the line is cut, the run ends in the bits of a calm one."""
    rig.rounds, rig.size = 16, 20_000_000
    luck = random.Random(time.time_ns())

    def restart(name: str) -> None:
        rig.kill(name)
        time.sleep(luck.choice([0, 3]))
        rig.start(name)

    def kill_job(kit: str) -> None:
        if (pid := rig.job(kit)) is not None:
            os.kill(pid, signal.SIGKILL)

    def cut(state: str, seconds: float) -> None:
        line.cut(state)
        time.sleep(seconds)
        line.mend()

    def cut_in_a_file() -> None:
        """Close all connections once some more of a state or an update has passed."""
        line.cut_at = line.carried + luck.randrange(rig.size)
        rig.wait(lambda: line.state == "closed" or rig.done(), 120, "the line is cut")
        time.sleep(3)
        line.mend()

    faults = [
        *(functools.partial(restart, name) for name in ("server", "driver", *SITES)),
        *(functools.partial(kill_job, kit) for kit in ("localhost", *SITES)),
        *(functools.partial(cut, state, 5) for state in ("closed", "silent")),
        *(cut_in_a_file, cut_in_a_file),
        functools.partial(cut, "silent", 90),
    ]
    luck.shuffle(faults)
    start_all(rig)
    rig.wait(lambda: asked(rig, "north"), 60, "a request at a site")
    for fault in faults:
        assert not rig.done(), "the run is too short for its faults"
        print(time.ctime(), fault, flush=True)
        fault()
        time.sleep(luck.uniform(3, 12))
    rig.wait(rig.done, 400, "the end")
    assert rig.result() == expected(SITES, rig.rounds, rig.size)


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
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=90
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def loose_server(rig):
    """A server that allows everything, and the site st-mary with its strict kit."""
    kit = rig.folder / "kits" / "localhost"
    change(kit / "local/resources.json", lambda v: v.update(policy.server_resources(kit)))
    change(kit / "local/resources.json", lambda v: v.update(class_allow_list=["*"]))
    change(kit / "local/authorization.json", lambda v: v["permissions"].update(project_admin="any"))
    change(kit / "startup/fed_server.json", lambda v: v.update(require_signed_jobs=False))
    server = flare("server", kit, rig.folder / "server.log", org="fedllava")
    rig.start("st-mary")
    yield rig
    server.kill()
    server.wait()


def job(folder: Path, executor: str, code: str | None = None) -> Path:
    """A job for st-mary whose site part is `executor`, perhaps with code of its own."""
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
            "mandatory_clients": ["st-mary"],
            "deploy_map": {"app": ["server", "st-mary"]},
        },
        config / "config_fed_server.json": {
            "format_version": 2,
            "workflows": [
                {
                    "id": "w",
                    "path": "fed.remote.flare_job.ServerJob",
                    "args": {"spool": str(folder), "site": "st-mary", "run": "0" * 32},
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
    (folder / "st-mary").mkdir()
    return folder


def test_a_strict_site_refuses_other_jobs_whatever_the_server_allows(loose_server, tmp_path):
    rig = loose_server
    admin, site = tmp_path / "kits/admin", tmp_path / "kits/st-mary"
    user = policy.check_kit(admin).name
    rig.wait(lambda: "st-mary" in ask(admin, user).get("clients", []), 40, "st-mary is connected")
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()\n"

    def said() -> str:
        """What the site and the jobs there have logged."""
        files = [site / "log.txt", *site.glob("*-*/log.txt"), tmp_path / "st-mary/flare.log"]
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
    admin, site = tmp_path / "kits/admin", tmp_path / "kits/st-mary"
    user = policy.check_kit(admin).name
    rig.kill("st-mary")
    change(site / "local/resources.json", lambda v: v.update(class_allow_list=["*"]))
    change(
        site / "local/authorization.json", lambda v: v["permissions"].update(project_admin="any")
    )
    client = flare("client", site, tmp_path / "loose.log", uid="st-mary", org="st_mary")
    try:
        rig.wait(lambda: "st-mary" in ask(admin, user).get("clients", []), 60, "st-mary is there")
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
    admin, site = tmp_path / "kits/admin", tmp_path / "kits/st-mary"
    user = policy.check_kit(admin).name
    rig.wait(lambda: "clients" in ask(admin, user), 30, "the server is up")

    # None at all, and one of another authority: TLS ends there.
    root = site / "startup/rootCA.pem"
    assert refused(rig.port, root, None)
    kits.make_kits("localhost:1", ["st-mary"], tmp_path / "others")
    assert refused(rig.port, root, tmp_path / "others/st-mary/startup")
    assert not refused(rig.port, root, site / "startup")

    # A site's certificate in the admin's place.
    for name in ("client.crt", "client.key"):
        shutil.copy(admin / "startup" / name, tmp_path / name)
        shutil.copy(site / "startup" / name, admin / "startup" / name)
    assert "error" in ask(admin, user)
    assert "error" in ask(admin, "st-mary")
    for name in ("client.crt", "client.key"):
        shutil.copy(tmp_path / name, admin / "startup" / name)

    # Another site's: refused here by its name, and by the server.
    for name in ("client.crt", "client.key"):
        shutil.copy(tmp_path / "kits/north/startup" / name, site / "startup" / name)
    assert policy.check_kit(site).name == "north"
    client = flare("client", site, tmp_path / "false.log", uid="st-mary", org="st_mary")
    try:
        rig.wait(lambda: "failed to verify client identity" in server_log(rig), 30, "a refusal")
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
