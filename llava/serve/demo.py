"""Everything of the demo at once, on this machine: controller, a worker for each model, the page.

python -m llava.serve.demo [[NAME=]MODEL …] [--model-base …]

Prints one address. Ctrl-C stops all of it. A worker that dies is said to have died; the others go
on. Logs lie in `--log-dir`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llava.errors import InputError, one_clear_error
from llava.eval.answer import add_model_flags
from llava.serve.http_server import check_installed

WAIT = 600  # seconds for a model to load
QUICKSTART = Path("runs/quickstart")
"""What scripts/quickstart.sh makes, from the repository's root."""


class Processes:
    """The processes of the demo, each with its log."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, module: str, *flags: str) -> None:
        """Start `python -m llava.serve.MODULE` in a group of its own, so that we stop it."""
        with open(self.log(name), "w") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"llava.serve.{module}", *flags],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def log(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '-')}.log"

    def dead(self) -> list[str]:
        """The names of those that have ended, each told once."""
        ended = [name for name, process in self.processes.items() if process.poll() is not None]
        for name in ended:
            del self.processes[name]
        return ended

    def said(self, name: str) -> str:
        """The last line of a part's log."""
        lines = self.log(name).read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "nothing")

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def main(args: argparse.Namespace) -> None:
    check_installed("gradio")
    if not args.models:
        of_quickstart(args)
    models = named(args.models)
    folder = Path(args.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bases = {name: args.model_base or base_of(path) for name, path in models.items()}
    processes = Processes(folder)
    with contextlib.suppress(KeyboardInterrupt), stopping(processes):
        controller = f"http://127.0.0.1:{(port := free_port())}"
        processes.start("controller", "controller", "--host", "127.0.0.1", "--port", str(port))
        for name, path in models.items():
            flags = ["--model-path", path, "--model-name", name, "--device", args.device]
            flags += ["--host", "127.0.0.1", "--port", str(free_port())]
            flags += ["--controller-address", controller]
            flags += ["--model-base", bases[name]] if bases[name] else []
            flags += ["--load-8bit"] if args.load_8bit else []
            flags += ["--load-4bit"] if args.load_4bit else []
            if args.attn_implementation:
                flags += ["--attn_implementation", args.attn_implementation]
            processes.start(name, "model_worker", *flags)
        wait_for(processes, controller, set(models))
        page = ["--controller-url", controller, "--model-list-mode", "reload"]
        page += ["--log-dir", str(folder), "--host", args.host]
        page += ["--port", str(args.port)] if args.port else []
        for flag in ("examples", "auth", "ssl_certfile", "ssl_keyfile"):
            if value := getattr(args, flag):
                page += [f"--{flag.replace('_', '-')}", value]
        page += [word for run in args.run for word in ("--run", run)]
        page += ["--share"] if args.share else []
        processes.start("page", "gradio_web_server", *page)
        watch(processes)


def of_quickstart(args: argparse.Namespace) -> None:
    """Serve, and show the runs of, what the quickstart made."""
    if not (QUICKSTART / "fedcmp/mm_projector.bin").is_file():
        raise InputError(
            f"{QUICKSTART}/fedcmp is not there: run bash scripts/quickstart.sh first, "
            "or name a model"
        )
    folders = {
        "Fed-CMP": "fedcmp",
        "FedAvg": "fedavg",
        "objects-alone": "alone/clients/objects",
        "centralised": "central",
    }
    args.models = [f"{name}={QUICKSTART / folder}" for name, folder in folders.items()]
    args.model_base = args.model_base or "playground/backbones/llm"
    args.run = args.run or [str(QUICKSTART / name) for name in ("fedcmp", "fedavg", "alone")]
    os.environ["HF_HUB_OFFLINE"] = "1"  # all of it is here


def watch(processes: Processes) -> None:
    """Tell the page's address, then who dies, until nobody or no page is left."""
    told = 0
    while True:
        lines = processes.log("page").read_text().splitlines()
        for line in lines[told:]:
            if line.startswith(("page:", "listening", "error:", "public")):
                print(line, flush=True)
        told = len(lines)
        for name in processes.dead():
            if name == "page":
                raise InputError(
                    f"the page stopped: {processes.said(name)} (see {processes.log(name)})"
                )
            print(f"{name} stopped: {processes.said(name)} (see {processes.log(name)})", flush=True)
        time.sleep(0.3)


def wait_for(processes: Processes, controller: str, models: set[str]) -> None:
    """Until all models are served; `InputError` if one ends before."""
    import httpx

    print(f"loading {', '.join(sorted(models))} …", flush=True)
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        for name in processes.dead():
            raise InputError(
                f"{name} did not start: {processes.said(name)} (see {processes.log(name)})"
            )
        with contextlib.suppress(httpx.HTTPError, ValueError):
            served = httpx.post(f"{controller}/list_models", trust_env=False).json()["models"]
            if models <= set(served):
                return
        time.sleep(0.3)
    raise InputError(f"{', '.join(sorted(models))}: not all were loaded in {WAIT} s")


@contextlib.contextmanager
def stopping(processes: Processes) -> Iterator[None]:
    """Afterwards all processes are stopped; what ends a terminal or a service ends this, too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        print("stopping", flush=True)
        processes.stop()


def named(models: list[str]) -> dict[str, str]:
    """`[NAME=]PATH` each: name → path; without a name it is the folder's."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.gguf import find_gguf

    found: dict[str, str] = {}
    for model in models:
        name, equals, path = model.partition("=")
        path = os.path.expanduser(path if equals else model)
        name = name if equals else get_model_name_from_path(path)
        if not name or not path:
            raise InputError(f"{model!r}: MODEL or NAME=MODEL is expected")
        if name in found or name in ("controller", "page"):
            raise InputError(f"two parts are called {name!r}; name the model: NAME={path}")
        if path.startswith((".", "/")) and not find_gguf(path) and not Path(path).is_dir():
            raise InputError(f"{path}: no such folder")
        found[name] = path
    return found


def base_of(path: str) -> str | None:
    """The language model that a projector's folder says it was trained on, if that is there."""
    from llava.json_files import read_json
    from llava.model.builder import has_weights
    from llava.model.checkpoint_names import PROJECTOR_FILE

    folder = Path(path)
    if not (folder / PROJECTOR_FILE).is_file() or has_weights(folder):
        return None
    return read_json(folder / "config.json").get("_name_or_path") or None


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "models",
        nargs="*",
        metavar="[NAME=]MODEL",
        help="a folder or a hub name; none: what the quickstart made",
    )
    add_model_flags(parser)
    add("--run", action="append", default=[], help="a federated run or merge for the page to show")
    add("--host", default="127.0.0.1", help="of the page; 0.0.0.0 lets other machines in")
    add("--port", type=int, default=None, help="of the page; else the first free from 7860 on")
    add("--examples", default=None, metavar="FILE.json", help="what the page offers to click")
    add("--auth", default=None, metavar="USER:PASSWORD")
    add("--ssl-certfile", default=None)
    add("--ssl-keyfile", default=None)
    add("--share", action="store_true", help="let gradio's servers make the page public")
    add("--log-dir", default="runs/demo", help="logs, votes, pictures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
