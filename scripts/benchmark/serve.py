"""A model worker under load, against transformers' `generate` called one by one.

    python scripts/benchmark/serve.py --model-path runs/quickstart/fedcmp \\
        --model-base playground/backbones/llm --device cpu
    python scripts/benchmark/serve.py … --requests 500        # is memory flat?

`--users` people ask at once about a picture, each again as soon as it has its answer. The same
questions go to `generate` in their order, in a process of its own, as a plain script around it
would. Answers have `--tokens` tokens each: no end mark counts here. `wait` is the time from asking
to the first word; one by one that is to wait for all who asked before. Memory is the worker's, and
its growth from the first tenth of the questions to the end.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from llava.eval.answer import Answerer, add_model_flags, single_turn

ROOT = Path(__file__).resolve().parents[2]
NO_STOP = "\0"
QUESTIONS = ("What is this?", "Name it in one word.", "Which colours does the picture have?")


def load(args: argparse.Namespace) -> Answerer:
    """The model, of which no token ends an answer."""
    args.conv_mode = None
    answerer = Answerer.load(args)
    answerer.tokenizer.eos_token = None
    answerer.model.generation_config.eos_token_id = None
    return answerer


def picture_files() -> list[Path]:
    found = sorted((ROOT / "playground/data/emoji/images/openmoji").glob("*.webp"))[:64]
    if not found:
        raise SystemExit("no pictures: run python -m playground.tools.unpack_data first")
    return found


def questions(args: argparse.Namespace, template) -> list[dict]:
    """The questions, as they go over the wire."""
    files = picture_files()
    return [
        {
            "prompt": single_turn(template, f"<image>\n{QUESTIONS[i % 3]}"),
            "images": [base64.b64encode(files[i % len(files)].read_bytes()).decode()],
            "temperature": 0,
            "max_new_tokens": args.tokens,
            "stop": NO_STOP,
        }
        for i in range(args.requests)
    ]


def serve(args: argparse.Namespace) -> None:
    """In a process of its own: the worker."""
    import uvicorn

    from llava.serve.batching import Engine
    from llava.serve.model_worker import ModelBackend
    from llava.serve.worker_app import worker_app

    answerer = load(args)
    backend = ModelBackend(answerer, Engine(answerer, args.rows))
    server = uvicorn.Server(uvicorn.Config(worker_app(backend), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    print(json.dumps({"address": f"http://127.0.0.1:{port}", "template": backend.mode}), flush=True)
    thread.join()


def one_by_one(args: argparse.Namespace) -> None:
    """In a process of its own: `generate` for one question after the other, as they come."""
    from transformers.generation.streamers import BaseStreamer

    from llava.eval.answer import generation_options
    from llava.mm_utils import load_image_from_base64
    from llava.serve.model_worker import ModelBackend

    answerer = load(args)

    class First(BaseStreamer):
        def __init__(self):
            self.at: list[float] = []

        def put(self, value):
            self.at.append(time.perf_counter())

        def end(self):
            pass

    asked = questions(args, ModelBackend(answerer, None).template)
    options = generation_options(0, args.tokens)
    waits, texts = [], []
    began = time.perf_counter()
    arrived = [began] * args.users  # each asks again when it has its answer
    for i, question in enumerate(asked):
        image = load_image_from_base64(question["images"][0])
        first = First()
        texts += answerer.answer(
            [question["prompt"]], [[answerer.picture(image)]], NO_STOP, options, first
        )
        waits.append(first.at[0] - arrived[i % args.users])
        arrived[i % args.users] = time.perf_counter()
    print(json.dumps({"seconds": time.perf_counter() - began, "waits": waits, "texts": texts}))


def under_load(address: str, asked: list[dict], users: int, pid: int) -> dict:
    """Ask a worker with `users` threads at once."""
    import httpx

    from llava.serve.protocol import read_chunks

    todo: queue.SimpleQueue = queue.SimpleQueue()
    for item in enumerate(asked):
        todo.put(item)
    waits, texts, resident = [0.0] * len(asked), [""] * len(asked), []

    def user() -> None:
        with httpx.Client(timeout=600, trust_env=False) as client:
            while True:
                try:
                    i, question = todo.get_nowait()
                except queue.Empty:
                    return
                at, last = time.perf_counter(), None
                path = f"{address}/worker_generate_stream"
                with client.stream("POST", path, json=question) as response:
                    for said in read_chunks(response.iter_raw()):
                        waits[i] = waits[i] or time.perf_counter() - at
                        last = said
                if last is None or last["error_code"]:
                    raise SystemExit(f"question {i} got {last}")
                texts[i] = last["text"][len(question["prompt"]) :]
                resident.append(_resident(pid))

    threads = [threading.Thread(target=user) for _ in range(users)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "waits": waits, "texts": texts, "resident": resident}


def _resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1e3


def main() -> None:
    args = arguments()
    if args.only:
        return {"serve": serve, "one by one": one_by_one}[args.only](args)
    from llava.conversation import get_template

    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--only"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    worker = subprocess.Popen([*command, "serve"], **quiet)
    try:
        line = worker.stdout.readline()
        if not line:
            raise SystemExit("the worker did not start; see --only serve")
        told = json.loads(line)
        asked = questions(args, get_template(told["template"]))
        under_load(told["address"], asked[: args.users], args.users, worker.pid)  # warm
        ours = under_load(told["address"], asked, args.users, worker.pid)
    finally:
        worker.kill()
    rows = {f"worker, {args.rows} rows": ours}
    if not args.alone:
        found = subprocess.run([*command, "one by one"], **quiet, check=True)
        rows["generate, one by one"] = json.loads(found.stdout.splitlines()[-1])
    report(args, rows, ours["resident"])
    return None


def report(args: argparse.Namespace, rows: dict[str, dict], resident: list[float]) -> None:
    import torch

    device = f"CPU, {torch.get_num_threads()} threads"
    if args.device != "cpu" and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    print(
        f"{args.model_path}, {device}, {args.users} users, {args.requests} questions, "
        f"{args.tokens} tokens each\n"
    )
    print("| | answers/s | tokens/s | × | median wait, s | longest wait, s |")
    print("|---|---:|---:|---:|---:|---:|")
    slowest = list(rows.values())[-1]["seconds"]
    for name, row in rows.items():
        speed, waits = args.requests / row["seconds"], row["waits"]
        print(
            f"| {name} | {speed:.2f} | {speed * args.tokens:.0f} | {slowest / row['seconds']:.2f} "
            f"| {statistics.median(waits):.3f} | {max(waits):.3f} |"
        )
    tenth = max(resident[: max(1, len(resident) // 10)])
    print(
        f"\nThe worker has {resident[-1]:.0f} MB, {resident[-1] - tenth:+.0f} MB since the first "
        "tenth of the questions."
    )
    if len(rows) > 1:
        texts = [row["texts"] for row in rows.values()]
        same = sum(len(set(found)) == 1 for found in zip(*texts, strict=True))
        print(f"{same} of {args.requests} answers are the same.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_flags(parser)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16, help="the worker's batch")
    parser.add_argument("--alone", action="store_true", help="the worker only")
    parser.add_argument("--only", choices=("serve", "one by one"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
