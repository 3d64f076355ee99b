"""The FLARE courier's two sides before anything is carried: bad settings, and what they load."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fed.remote import flare
from fed.remote.courier import RemoteFlags
from llava.errors import InputError
from tests.fed.remote.rig import ROOT, free_port, listen_at
from tests.fed.remote.sites import wait_for

SPEAKS_FLARE = {"flare_gate.py", "flare_job.py", "flare_store.py", "flare_watch.py"}


def test_few_modules_import_flare():
    """Each version of FLARE speaks differently: it is met in a few places."""
    found = {
        path.name
        for folder in ("fed", "llava")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(from|import) nvflare", path.read_text(), re.MULTILINE)
    }
    assert found == SPEAKS_FLARE


def test_a_driver_and_a_site_load_no_flare_and_a_job_no_torch():
    pytest.importorskip("nvflare", reason="the extra `remote` is not installed")
    for module, heavy in (("flare", "nvflare"), ("flare", "torch"), ("flare_job", "torch")):
        code = f"import sys, fed.remote.{module}; sys.exit({heavy!r} in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_the_extra_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(flare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fedllava\[remote\]'"):
        flare.DriverSide(tmp_path, ["a"], RemoteFlags(fed_remote_kit="x"))


@pytest.fixture
def made(all_kits, tmp_path) -> Path:
    shutil.copytree(all_kits, tmp_path / "kits")
    listen_at(tmp_path / "kits", free_port())
    return tmp_path / "kits"


def test_a_driver_needs_the_admins_kit(made, tmp_path):
    with pytest.raises(InputError, match="--fed_courier flare needs --fed_remote_kit"):
        flare.DriverSide(tmp_path, ["a"], RemoteFlags())
    with pytest.raises(InputError, match="this is the site's kit, that of the admin is expected"):
        flare.DriverSide(tmp_path, ["a"], RemoteFlags(fed_remote_kit=str(made / "a")))
    with pytest.raises(InputError, match="client a.b: a site's name has letters"):
        flare.DriverSide(tmp_path, ["a.b"], RemoteFlags(fed_remote_kit=str(made / "admin")))


def test_a_site_needs_its_own_kit(made, tmp_path):
    def config(**values):
        common = {"name": "a", "kit": made / "a", "work": tmp_path, "source": Path("site.yaml")}
        return SimpleNamespace(**{**common, **values})

    with pytest.raises(InputError, match="site.yaml: courier flare needs kit"):
        flare.SiteSide(config(kit=None))
    with pytest.raises(InputError, match=r"site.yaml: name is a, but the kit .* is that of b"):
        flare.SiteSide(config(kit=made / "b"))
    with pytest.raises(InputError, match="not a kit"):
        flare.SiteSide(config(kit=tmp_path))
    first = flare.SiteSide(config())
    try:
        with pytest.raises(InputError, match=f"site.yaml: another process uses {made / 'a'} "):
            flare.SiteSide(config(work=tmp_path / "other"))
    finally:
        first.close()
    flare.SiteSide(config()).close()


def test_a_server_that_does_not_answer_is_said_by_both_sides(made, tmp_path, capsys):
    driver = flare.DriverSide(
        tmp_path / "spool", ["a", "b"], RemoteFlags(fed_remote_kit=str(made / "admin"))
    )
    config = SimpleNamespace(name="a", kit=made / "a", work=tmp_path, source=Path("site.yaml"))
    site = flare.SiteSide(config)
    try:
        assert driver.status() == {"a": "connecting", "b": "connecting"}  # nobody has looked yet

        def status() -> bool:
            driver.keep_up()
            site.keep_up()
            return "no answer from the server localhost" in driver.status()["a"]

        wait_for(status, 0.1)
        assert "site a: no answer from the server localhost" in capsys.readouterr().out
    finally:
        driver.close()
        site.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_ends_at_once(made, tmp_path, number):
    log, console = tmp_path / "log", made / "localhost/console.log"
    console.unlink(missing_ok=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fed.remote.server", str(made / "localhost")],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    wait_for(lambda: console.exists() and "Server started" in console.read_text(errors="replace"))
    process.send_signal(number)
    assert process.wait(5) == 128 + number
    assert "listening at port" in log.read_text()
    assert "Traceback" not in console.read_text(errors="replace")
