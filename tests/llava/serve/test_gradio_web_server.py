"""The page's server: its flags, its guard, and that it asks no outside host."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from llava.errors import InputError
from llava.serve.gradio_web_server import arguments, main

WATCHED = """
import os, runpy, sys
def watch(event, args):  # a line in one piece: threads write at once
    if event == "socket.connect":
        os.write(2, f"connects to {args[1][0]}\\n".encode())
    elif event == "socket.getaddrinfo":
        name = args[0].decode() if isinstance(args[0], bytes) else args[0]
        os.write(2, f"looks up {name}\\n".encode())
sys.addaudithook(watch)
runpy.run_module("llava.serve.gradio_web_server", run_name="__main__", alter_sys=True)
"""


@contextlib.contextmanager
def page(folder, *flags: str) -> Iterator[str]:
    """A page in a process of its own that may speak to this machine alone; gives its address."""
    command = [sys.executable, "-c", WATCHED, "--log-dir", str(folder), *flags]
    with open(folder / "stderr.txt", "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = process.stdout.readline()
            assert line.startswith("page: http"), (folder / "stderr.txt").read_text()
            yield line.split()[1]
        finally:
            process.terminate()
            process.communicate(timeout=600)
    spoken = re.findall("(?:connects to|looks up) (.*)", (folder / "stderr.txt").read_text())
    assert spoken, spoken
    assert set(spoken) <= {"127.0.0.1", "localhost", "::1", "None"}, spoken


def test_a_guarded_page_lets_nobody_in_and_tells_browsers_to_stay_here(tmp_path):
    with page(
        tmp_path, "--auth", "ann:secret", "--controller-url", "http://127.0.0.1:9"
    ) as address:
        assert httpx.URL(address).host == "127.0.0.1"
        with httpx.Client(base_url=address) as client:
            assert client.get("/config").status_code == 401
            wrong = client.post("/login", data={"username": "ann", "password": "wrong"})
            assert wrong.status_code == 400
            right = client.post("/login", data={"username": "ann", "password": "secret"})
            assert right.status_code == 200
            found = client.get("/")
            assert found.headers["content-security-policy"].startswith("default-src 'self' ")
            assert client.get("/config").status_code == 200
            assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--moderate"], "--moderate sends what people type to a service outside"),
        (["--run", "no/such"], "--run no/such: no such folder"),
        (["--auth", "ann"], "--auth: USER:PASSWORD is expected"),
        (["--ssl-certfile", "x"], "--ssl-certfile and --ssl-keyfile go together"),
        (["--ssl-certfile", "no", "--ssl-keyfile", "no"], "--ssl-certfile no: "),
    ],
)
def test_flags_that_cannot_be_are_one_clear_error(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        main(arguments(flags))


def test_the_flags_are_upstreams_and_reading_them_is_light():
    args = vars(arguments([]))
    upstream = {
        "controller_url": "http://localhost:21001", "concurrency_count": 16,
        "model_list_mode": "once", "share": False, "moderate": False, "embed": False, "port": None,
    }  # fmt: skip
    assert {name: args[name] for name in upstream} == upstream
    assert args["host"] == "127.0.0.1"
    code = (
        "import sys; from llava.serve.gradio_web_server import arguments; arguments([]); "
        "print([m for m in ('torch', 'gradio', 'fastapi', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
