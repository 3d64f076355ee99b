"""The worker before an OpenAI-compatible server: wire format on both sides, over real sockets.

The server is one that plays what SGLang, vLLM and `transformers serve` send; the last test asks
the last of them itself, where it can run.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from PIL import Image

from llava.conversation import get_template
from llava.errors import InputError
from llava.serve.protocol import read_chunks
from llava.serve.sglang_worker import OpenAIBackend, arguments, backend_of, template_for
from llava.serve.worker_app import worker_app

INSTRUCT = Path(__file__).resolve().parents[3] / "playground/backbones/instruct"
PATIENCE = 60
"""Seconds after which a test that waits in vain fails."""


def vllm(content: str | None, finish: str | None = None) -> str:
    delta = {"content": content} if content is not None else {}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return "data: " + json.dumps(
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
         "choices": [choice]}, ensure_ascii=False
    ) + "\n\n"  # fmt: skip


def usage() -> str:
    return 'data: {"object":"chat.completion.chunk","choices":[],"usage":{"total_tokens":9}}\n\n'


DONE = "data: [DONE]\n\n"
GOOD = vllm("") + vllm(" A") + vllm(" cat") + vllm(".") + vllm("", "stop") + usage() + DONE
TRANSFORMERS = (  # what `transformers serve` 5.23 sent, shortened
    'data: {"id":"31","choices":[{"delta":{"role":"assistant"},"index":0}],"created":1,"model":"m"}'
    '\n\ndata: {"id":"31","choices":[{"delta":{"content":"rect"},"index":0}],"created":1}\n\n'
    'data: {"id":"31","choices":[{"delta":{"content":"angle"},"index":0}],"created":1}\n\n'
    'data: {"id":"31","choices":[{"delta":{},"index":0,"finish_reason":"stop"}],"created":1,'
    '"usage":{"completion_tokens":3,"prompt_tokens":45,"total_tokens":48}}\n\n'
)
SAID = {
    "good": (200, GOOD),
    "slow": (200, GOOD),
    "transformers": (200, TRANSFORMERS),
    "carriage returns and comments": (200, ": ping\r\n\r\n" + GOOD.replace("\n", "\r\n")),
    "line separator": (200, vllm("a\u2028b\x85c") + DONE),
    "stop": (200, vllm("one #") + vllm("## two ##") + vllm("# Human: three") + DONE),
    "no stop after all": (200, vllm("one ##") + vllm("", "stop") + DONE),
    "nothing": (200, vllm("") + vllm("", "stop") + DONE),
    "thinks first": (
        200,
        'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n' + vllm("yes") + DONE,
    ),
    "too long": (
        400,
        '{"error":{"message":"maximum context length is 4096 tokens","code":400}}',
    ),
    "old vllm": (404, '{"object":"error","message":"The model `m` does not exist.","code":404}'),
    "fastapi": (422, '{"detail":[{"loc":["body","messages"],"msg":"Field required"}]}'),
    "detail": (400, '{"detail":"Server is pinned to a model"}'),
    "no reason": (403, "{}"),
    "text": (500, "Internal Server Error"),
    "proxy": (502, "<html><body>" + "nginx " * 200 + "</body></html>"),
    "moved": (307, ""),
    "error in stream": (200, vllm("a") + 'data: {"error":{"message":"out of memory"}}\n\n' + DONE),
    "error as text": (200, vllm("a") + 'data: {"error": "CUDA "launch" failure"}\n\n'),
    "old error": (200, 'data: {"object":"error","message":"too many"}\n\n' + DONE),
    "abort": (200, vllm("a") + vllm("", "abort") + DONE),
    "ends early": (200, vllm("a") + vllm("b")),
    "no object": (200, "data: 5\n\n"),
    "no events": (200, "<html>"),
}


class Player(ThreadingHTTPServer):
    """A server that plays for each question what `SAID` has under its last message's text."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.bodies, self.keys, self.registered = [], [], []
        self.models = {"data": [{"id": "org/llava-v1.5-tiny", "max_model_len": 4096}, {"id": "b"}]}
        self.holding, self.hung_up = threading.Semaphore(0), threading.Semaphore(0)
        self.heard, self.released = threading.Event(), threading.Event()
        self.lock, self.slow, self.slow_at_most = threading.Lock(), 0, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def count(self, change: int) -> None:
        with self.lock:
            self.slow += change
            self.slow_at_most = max(self.slow, self.slow_at_most)

    def handle_error(self, request, client_address):
        pass  # a client that hung up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.keys.append(self.headers.get("Authorization"))
        self.answer(200 if self.server.models else 500, json.dumps(self.server.models).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.server.registered.append((self.path, body))
            self.server.heard.set()
            return self.answer(200, b"null")
        self.server.bodies.append(body)
        content = body["messages"][-1]["content"]
        name = content if isinstance(content, str) else content[-1]["text"]
        if name == "for ever":
            return self.play_until_hung_up()
        if name == "silent":
            self.server.released.wait(PATIENCE)
        if name == "slow":
            self.server.count(1)
            time.sleep(0.1)
            self.server.count(-1)
        if name in ("breaks", "silent"):
            return self.play(vllm("a").encode(), whole=False)
        status, said = SAID[name]
        self.play(said.encode()) if status == 200 else self.answer(status, said.encode())
        return None

    def answer(self, status: int, body: bytes):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def play(self, said: bytes, whole: bool = True):
        """Cut anywhere, through characters too."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i in range(0, len(said), 7):
            self.piece(said[i : i + 7])
        if whole:
            self.piece(b"")
        self.close_connection = True

    def piece(self, data: bytes):
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def play_until_hung_up(self):
        self.server.holding.release()
        try:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while True:
                self.piece(vllm("on and ").encode())
                time.sleep(0.01)
        except OSError:
            self.server.hung_up.release()
            raise


@contextlib.contextmanager
def running(backend: OpenAIBackend):
    """The worker's address while it serves on a thread."""
    import uvicorn

    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(worker_app(backend), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(PATIENCE)


def wait_for(happened) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server():
    player = Player()
    yield player
    player.shutdown()


@pytest.fixture(scope="module")
def worker(server):
    with running(backend_of(arguments(["--sgl-endpoint", server.address]))) as address:
        yield address


def prompt_of(*turns: str | None, template: str = "llava_v1") -> str:
    talk = get_template(template)
    for i, text in enumerate((*turns, None)):
        talk.append_message(talk.roles[i % 2], text)
    return talk.get_prompt()


def ask(worker: str, prompt: str, images: list[str] | None = None, **more) -> list[dict]:
    """All objects of the answer."""
    body = {"model": "llava-v1.5-tiny", "prompt": prompt, "images": images or []} | more
    url = f"{worker}/worker_generate_stream"
    with httpx.stream("POST", url, json=body, timeout=PATIENCE, trust_env=False) as answer:
        return list(read_chunks(answer.iter_bytes()))


def texts(worker: str, name: str, **more) -> list[str]:
    """What came after the prompt; each must be a good one."""
    prompt = prompt_of(name)
    chunks = ask(worker, prompt, **more)
    assert all(one["error_code"] == 0 and one["text"].startswith(prompt) for one in chunks)
    return [one["text"][len(prompt) :] for one in chunks]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("good", ["A", "A cat", "A cat."]),
        ("transformers", ["rect", "rectangle"]),
        ("carriage returns and comments", ["A", "A cat", "A cat."]),
        ("line separator", ["a\u2028b\x85c"]),
        ("stop", ["one #", "one ### two ##", "one ### two ### Human: three"]),
        ("nothing", [""]),
        ("thinks first", ["yes"]),
    ],
)
def test_an_answer_streams_as_it_comes(worker, name, told):
    assert texts(worker, name) == told


def test_an_answer_is_cut_at_the_stop_and_its_beginning_is_never_shown(worker):
    assert texts(worker, "stop", stop="###") == ["one"]
    assert texts(worker, "no stop after all", stop="###") == ["one", "one ##"]
    assert texts(worker, "good", stop="</s>") == ["A", "A cat", "A cat."]


def test_the_server_is_asked_in_messages(worker, server):
    image = png(Image.new("RGB", (3, 2)))
    prompt = prompt_of("<image>\nWhat is it?", "A cat.", "good")
    chunks = ask(worker, prompt, [image], temperature=0.2, top_p=0.7, max_new_tokens=5, stop="</s>")
    assert chunks[-1] == {"text": f"{prompt}A cat.", "error_code": 0}
    url = f"data:image/png;base64,{image}"
    assert server.bodies[-1] == {
        "model": "org/llava-v1.5-tiny",
        "messages": [
            {"role": "system", "content": get_template("llava_v1").system},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "What is it?"},
                ],
            },
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "good"},
        ],
        "stream": True,
        "temperature": 0.2,
        "top_p": 0.7,
        "max_tokens": 5,
    }
    texts(worker, "good", temperature=0.0005)
    assert server.bodies[-1]["temperature"] == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too long", "refused (status 400): maximum context length is 4096 tokens"),
        ("old vllm", "refused (status 404): The model `m` does not exist."),
        ("fastapi", "refused (status 422): Field required"),
        ("detail", "refused (status 400): Server is pinned to a model"),
        ("no reason", "refused (status 403): it does not say why"),
        ("text", "failed (status 500): Internal Server Error"),
        ("proxy", "failed (status 502): Bad Gateway"),
        ("moved", "refused (status 307): Temporary Redirect"),
        ("error in stream", "failed: out of memory"),
        ("error as text", 'sent what is no part of an answer: {"error": "CUDA "launch" failure"}'),
        ("old error", "failed: too many"),
        ("abort", "gave up on the question"),
        ("ends early", "broke off in the middle of the answer"),
        ("breaks", "connection to the model server broke off: "),
        ("no object", "sent what is no part of an answer: 5"),
        ("no events", "broke off in the middle of the answer"),
    ],
)
def test_what_goes_wrong_is_the_last_object_in_words(worker, name, words):
    *before, last = ask(worker, prompt_of(name))
    assert last["error_code"] == 1
    assert words in last["text"]
    assert len(last["text"]) < 400
    assert "ASSISTANT" not in last["text"]
    assert all(one["error_code"] == 0 for one in before)
    assert texts(worker, "good")[-1] == "A cat."  # nobody else suffers


@pytest.mark.parametrize(
    ("prompt", "images", "words"),
    [
        ("What is this?", [], "the prompt is not of the template llava_v1"),
        (prompt_of("<image>\ngood"), [], "0 pictures were sent"),
        (prompt_of("<image>\ngood"), ["AAAA"], "cannot identify it as a picture"),
        (prompt_of("good", "an <image>", "good"), ["AAAA"], "the questions have 0 <image> tags"),
    ],
)
def test_a_bad_question_does_not_reach_the_server(worker, server, prompt, images, words):
    asked = len(server.bodies)
    (only,) = ask(worker, prompt, images)
    assert only["error_code"] == 1
    assert words in only["text"]
    assert len(server.bodies) == asked


def test_a_server_that_is_not_there_is_said_to_be_away(server):
    backend = backend_of(arguments(["--sgl-endpoint", server.address]))
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        gone = type(backend.server)(f"http://{address}")
        with running(OpenAIBackend(gone, "m", "llava-v1.5-tiny", "llava_v1")) as worker:
            (only,) = ask(worker, prompt_of("good"))
        assert only["error_code"] == 1
        assert f"the model server at {address} cannot be reached" in only["text"]


def test_a_server_that_falls_silent_is_not_waited_for_in_all_eternity(server, monkeypatch):
    monkeypatch.setattr("llava.serve.openai_client.READ_TIMEOUT_S", 0.1)
    with running(backend_of(arguments(["--sgl-endpoint", server.address]))) as worker:
        (only,) = ask(worker, prompt_of("silent"))
    server.released.set()
    assert only == {"text": "the model server was silent for 0.1 seconds", "error_code": 1}


def test_who_hangs_up_frees_the_server_and_who_waits_comes_next(server):
    backend = backend_of(
        arguments(["--sgl-endpoint", server.address, "--limit-model-concurrency", "1"])
    )
    with running(backend) as worker:
        prompt = prompt_of("for ever")
        body = {"prompt": prompt}
        url = f"{worker}/worker_generate_stream"
        with httpx.stream("POST", url, json=body, timeout=PATIENCE, trust_env=False) as answer:
            chunks = read_chunks(answer.iter_bytes())
            assert next(chunks)["text"].startswith(f"{prompt}on and")
            assert server.holding.acquire(timeout=PATIENCE)
            found: list[str] = []
            second = threading.Thread(target=lambda: found.extend(texts(worker, "good")))
            second.start()
            wait_for(lambda: backend.status()["queue_length"] == 2)
            assert not found
            assert not server.hung_up.acquire(blocking=False)
        assert server.hung_up.acquire(timeout=PATIENCE)
        second.join(PATIENCE)
        assert found[-1] == "A cat."
        wait_for(lambda: backend.status()["queue_length"] == 0)


def test_no_more_questions_than_the_limit_are_with_the_server(server):
    flags = ["--sgl-endpoint", server.address, "--limit-model-concurrency", "2"]
    with running(backend_of(arguments(flags))) as worker, ThreadPoolExecutor(8) as people:
        answers = list(people.map(lambda _: texts(worker, "slow")[-1], range(8)))
    assert answers == ["A cat."] * 8
    assert 1 <= server.slow_at_most <= 2


def test_the_server_stops_working_at_the_stop(server, worker):
    assert texts(worker, "for ever", stop="and on")[-1] == "on"
    assert server.hung_up.acquire(timeout=PATIENCE)


def test_the_status_has_upstreams_values_and_ours(worker):
    status = httpx.post(f"{worker}/worker_get_status", trust_env=False).json()
    assert status == {
        "model_names": ["llava-v1.5-tiny"], "speed": 1, "queue_length": 0, "template": "llava_v1",
        "multimodal": True, "context_length": 4096, "runs": None,
    }  # fmt: skip


def test_names_key_and_template_come_from_the_flags(server, monkeypatch, capsys):
    monkeypatch.setenv("SOME_KEY", " secret\n")
    flags = ["--sgl-endpoint", f"{server.address}/v1/", "--api-key-env", "SOME_KEY"]
    backend = backend_of(arguments([*flags, "--model-path", "b", "--conv-mode", "mpt"]))
    assert server.keys[-1] == "Bearer secret"
    status = backend.status()
    assert status["model_names"] == ["b"]
    assert status["template"] == "mpt"
    assert "context_length" not in status  # the server does not say
    backend = backend_of(arguments([*flags, "--model-path", "/x/c", "--model-name", "named"]))
    assert (backend.model, backend.name, backend.mode) == ("/x/c", "named", "vicuna_v1")
    told = capsys.readouterr().err
    assert " lists org/llava-v1.5-tiny, b, not /x/c" in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY: no such environment variable"),
        (["--sgl-endpoint", "localhost:30000"], "http://host:port is expected"),
        (["--sgl-endpoint", "http://"], "http://host:port is expected"),
        (["--sgl-endpoint", "http://host:port"], "--sgl-endpoint http://host:port: "),
        (["--conv-mode", "vicuna"], "no conversation template"),
        (["--conv-mode", "plain"], "a template with turns is needed"),
        (["--limit-model-concurrency", "0"], "at least 1 is expected"),
        (["--sgl-endpoint", "http://127.0.0.1:1"], "cannot be reached"),
    ],
)
def test_bad_flags_are_one_clear_error(server, monkeypatch, flags, message):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(InputError, match=message):
        backend_of(arguments(["--sgl-endpoint", server.address, *flags]))


@pytest.mark.parametrize("models", [None, {"data": []}, {"models": ["x"]}, {"data": [5]}])
def test_a_server_without_a_list_of_models_needs_the_models_name(models, capsys):
    player = Player()
    player.models = models
    with pytest.raises(InputError, match="with --model-path its list is not needed"):
        backend_of(arguments(["--sgl-endpoint", player.address]))
    backend = backend_of(arguments(["--sgl-endpoint", player.address, "--model-path", "a/b"]))
    assert (backend.model, backend.name) == ("a/b", "b")
    player.shutdown()


def test_a_template_by_name_is_upstreams_or_vicunas():
    told = {name: template_for(name) for name in ("llava-v1.5-7b", "Qwen2-VL", "mistral", "mpt")}
    assert told == {
        "llava-v1.5-7b": "llava_v1",
        "Qwen2-VL": "vicuna_v1",
        "mistral": "mistral_instruct",
        "mpt": "mpt",
    }


def test_upstreams_flags_are_taken():
    line = "--host localhost --port 1 --worker-address http://w --controller-address http://c"
    line += " --model-path p --model-name n --multi-modal --limit-model-concurrency 3"
    line += " --stream-interval 2 --no-register --sgl-endpoint http://s"
    args = arguments(line.split())
    assert (args.host, args.port, args.worker_address, args.controller_address) == (
        "localhost", 1, "http://w", "http://c")  # fmt: skip
    assert (args.model_path, args.model_name, args.limit_model_concurrency) == ("p", "n", 3)
    assert args.no_register
    assert args.sgl_endpoint == "http://s"


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def test_the_command_registers_and_answers(server):
    port = free_port()
    command = [sys.executable, "-m", "llava.serve.sglang_worker", "--sgl-endpoint", server.address,
               "--controller-address", server.address, "--port", str(port)]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert server.heard.wait(PATIENCE)
            path, body = server.registered[0]
            assert path == "/register_worker"
            assert body["worker_name"] == f"http://localhost:{port}"
            assert body["worker_status"]["model_names"] == ["llava-v1.5-tiny"]
            wait_for(lambda: listening(port))
            assert texts(f"http://127.0.0.1:{port}", "good")[-1] == "A cat."
        finally:
            process.terminate()
            told = process.communicate()[1]
    assert "org/llava-v1.5-tiny of 127.0.0.1" in told
    assert "conversation template: llava_v1" in told


def listening(port: int) -> bool:
    with socket.socket() as place:
        return place.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A projector-only LLaVA on the playground's models, whose answers depend on the picture."""
    import torch

    from llava.model.builder import from_pretrained
    from llava.model.checkpoint import projector_state, read_config, write_config
    from llava.model.checkpoint_names import PROJECTOR_FILE
    from llava.state import save

    folder = tmp_path_factory.mktemp("models") / "llava-v1-tiny"
    torch.manual_seed(0)
    config = read_config(INSTRUCT / "llm")
    config.mm_hidden_size, config.mm_projector_type = 192, "mlp2x_gelu"
    config.mm_vision_tower, config.mm_vision_select_layer = str(INSTRUCT / "vision_tower"), -2
    config.mm_use_im_patch_token, config.conversation_template = False, "v1"
    model = from_pretrained(str(INSTRUCT / "llm"), config, dtype=torch.float32)
    save(projector_state(model), folder / PROJECTOR_FILE)
    write_config(model.config, folder, full=False)
    return {"model_path": str(folder), "model_base": str(INSTRUCT / "llm")}


@pytest.mark.slow
def test_transformers_own_server_answers_as_the_model_does(llava, tmp_path):
    pytest.importorskip("openai", reason="`transformers serve` needs the openai package")
    from argparse import Namespace

    from llava.eval.answer import Answerer, generation_options
    from llava.model.convert import to_hf

    to_hf(llava["model_path"], str(tmp_path / "hf"), model_base=llava["model_base"])
    images = [Image.effect_noise((30, 20), 90).convert("RGB"), Image.new("RGB", (9, 9), "white")]
    answerer = Answerer.load(
        Namespace(**llava, conv_mode=None, device="cpu", load_8bit=False, load_4bit=False)
    )
    pictures = [answerer.picture(image) for image in images]
    questions = [
        (prompt_of("Hi"), []),
        (prompt_of("<image>\nWhat?"), [0]),
        (prompt_of("<image>\nWhat?"), [1]),
        (prompt_of("<image>\n<image>\nSame?", "No.", "<image>\nAnd this?"), [0, 1, 0]),
    ]
    greedy = generation_options(0, 24)
    told = [
        answerer.answer([prompt], [[pictures[i] for i in shown]], "</s>", greedy)[0]
        for prompt, shown in questions
    ]
    assert len(set(told)) == len(told)  # the pictures matter

    port = free_port()
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()",
               "serve", str(tmp_path / "hf"), "--host", "127.0.0.1", "--port", str(port),
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, **silent) as process:
        try:
            wait_for(lambda: listening(port) or process.poll() is not None)
            flags = ["--sgl-endpoint", f"http://127.0.0.1:{port}"]
            flags += ["--model-path", str(tmp_path / "hf"), "--model-name", "llava-v1.5-tiny"]
            with running(backend_of(arguments(flags))) as worker:
                for (prompt, shown), answer in zip(questions, told, strict=True):
                    sent = [png(images[i]) for i in shown]
                    more = {"temperature": 0, "max_new_tokens": 24, "stop": "</s>"}
                    *_, last = ask(worker, prompt, sent, **more)
                    assert last == {"text": prompt + answer, "error_code": 0}
        finally:
            process.terminate()


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
