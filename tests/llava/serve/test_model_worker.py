"""A worker over HTTP, as upstream's controller and page speak to it."""

from __future__ import annotations

import base64
import io
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image, ImageOps

from llava.eval.answer import Answerer, generation_options
from llava.serve import protocol
from llava.serve.batching import Engine
from llava.serve.model_worker import ModelBackend, arguments, run_folder
from llava.serve.worker_app import address_of, worker_app
from tests.llava.serve.conftest import answers, question, running


@pytest.fixture(scope="module")
def backend(answerer):
    engine = Engine(answerer, 4)
    yield ModelBackend(answerer, engine)
    engine.close()


@pytest.fixture(scope="module")
def worker(backend):
    with running(worker_app(backend)) as address:
        yield address


def alone(answerer, body: dict, pictures) -> str:
    """What transformers' own generation answers."""
    images = [answerer.picture(Image.open(p).convert("RGB")) for p in pictures]
    options = generation_options(0, body["max_new_tokens"])
    return answerer.answer([body["prompt"]], [images], "###", options)[0]


def test_the_status_is_upstreams_and_says_how_to_ask(worker):
    status = httpx.post(f"{worker}/worker_get_status").json()
    assert {n: status[n] for n in ("model_names", "speed", "queue_length")} == {
        "model_names": ["tiny-llava"], "speed": 1, "queue_length": 0,
    }  # fmt: skip
    assert status["template"] == "llava_v0"
    assert status["multimodal"]
    assert status["context_length"] == 256
    assert status["runs"] is None


def test_an_answer_grows_behind_its_prompt(worker, answerer, pictures, shots):
    body = question("What is this?", shots[:2])
    found = answers(worker, body)
    assert {c["error_code"] for c in found} == {0}
    texts = [c["text"].removeprefix(body["prompt"]) for c in found]
    assert all(c["text"].startswith(body["prompt"]) for c in found)
    assert len(texts) > 1
    assert texts[-1] == alone(answerer, body, [pictures / "0.png", pictures / "1.png"])


def test_without_a_stop_the_models_own_mark_ends_it(worker, answerer, pictures, shots):
    body = question("Why?", shots[2:3])
    del body["stop"], body["top_p"]
    prompt = body["prompt"]
    assert answers(worker, body)[-1]["text"].removeprefix(prompt) == alone(
        answerer, body, [pictures / "2.png"]
    )


def test_a_model_that_learnt_tokens_around_pictures_is_given_them(
    worker, backend, answerer, shots, monkeypatch
):
    asked, ask = [], backend.engine.ask
    monkeypatch.setattr(backend.engine, "ask", lambda q: (asked.append(q.prompt), ask(q)))
    monkeypatch.setattr(answerer.model.config, "mm_use_im_start_end", True)
    body = question("What?", shots[:1])
    found = answers(worker, body)
    assert "<im_start><image><im_end>" in asked[0]
    assert found[-1]["text"].startswith(body["prompt"])
    answers(worker, body | {"prompt": asked[0]})
    assert asked[1] == asked[0]


def test_an_empty_answer_is_an_answer(worker, answerer, shots, monkeypatch):
    every = set(range(answerer.model.config.vocab_size))
    monkeypatch.setattr(Answerer, "ends", every)
    body = question("Say nothing.", shots[:1])
    assert answers(worker, body) == [{"text": body["prompt"], "error_code": 0}]


def test_sixteen_users_at_once_lose_nothing(worker, backend, answerer, pictures, shots):
    bodies = [question(f"What is this, {i}?", shots[i % 7 : i % 7 + 1]) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda body: answers(worker, body)[-1], bodies))
    for i, (body, last) in enumerate(zip(bodies, found, strict=True)):
        expected = alone(answerer, body, [pictures / f"{i % 7}.png"])
        assert last == {"text": body["prompt"] + expected, "error_code": 0}
    assert backend.engine.length == 0


def test_who_hangs_up_in_mid_stream_frees_the_row(worker, backend, shots, monkeypatch):
    monkeypatch.setattr(Answerer, "ends", set())
    ask, questions, news, held = backend.engine.ask, [], [], threading.Event()

    def watched(asked):
        tell = asked.tell

        def told(text):
            news.append(text)
            tell(text)
            held.wait(300)  # the answer goes on when the client is gone

        asked.tell = told
        questions.append(asked)
        ask(asked)

    monkeypatch.setattr(backend.engine, "ask", watched)
    body = question("Tell.", shots[:1], temperature=9.0, stop="@@@@", max_new_tokens=1000)
    with httpx.stream("POST", f"{worker}/worker_generate_stream", json=body) as response:
        next(response.iter_raw())
    while not questions[0].cancelled:
        time.sleep(0.01)
    held.set()
    while backend.engine.length:
        time.sleep(0.01)
    assert None not in news  # it did not come to its end


def png(width: int, height: int) -> str:
    """A picture of one bit a pixel: millions of pixels in a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [base64.b64encode(b"no picture").decode()]}, "cannot identify it"),
        ({"images": ["abc"]}, "not base64"),
        ({"images": []}, "0 pictures were sent"),
        ({"prompt": "", "images": []}, "prompt is empty"),
        ({"prompt": "word " * 1000, "images": []}, "this model reads 256"),
        ({"prompt": "word " * 2000, "images": []}, "10,000 characters; this model reads 256"),
        ({"prompt": "x" * 10_000_000, "images": []}, "10,000,000 characters"),
        ({"prompt": "caf\udce9", "images": []}, "half a character"),
        ({"stop": "\ud83c"}, "half a character"),
        ({"temperature": -1}, "temperature is '-1'"),
        ({"model": "another"}, "this worker serves tiny-llava, not 'another'"),
    ],
)
def test_bad_questions_get_one_clear_error(worker, shots, changes, message):
    found = answers(worker, question("What?", shots[:1]) | changes)
    assert len(found) == 1
    assert found[0]["error_code"] == protocol.ERROR_MODEL
    assert message in found[0]["text"]
    assert answers(worker, question("What?", shots[:1]))[-1]["error_code"] == 0


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_a_hundred_megapixels_is_refused_before_it_is_decoded(worker):
    found = answers(worker, question("What?", [png(10_000, 10_000)]))
    assert "10000 x 10000 pixels; at most 64 million" in found[-1]["text"]


def test_what_is_not_json_or_too_large(worker, monkeypatch):
    response = httpx.post(f"{worker}/worker_generate_stream", content=b"{")
    assert b"not JSON" in response.content
    monkeypatch.setattr(protocol, "MAX_BYTES", 1 << 20)
    response = httpx.post(f"{worker}/worker_generate_stream", content=b" " * (2 << 20))
    assert response.status_code == 400
    assert "larger than 1 MiB" in response.json()["detail"]


def test_attention_is_a_share_of_each_picture(worker, answerer, shots):
    body = question("What is this?", shots[:2])
    answer = "a red picture"
    body |= {"answer": answer, "prompt": body["prompt"] + f" {answer}###"}
    before = answerer.model.config._attn_implementation
    found = httpx.post(f"{worker}/worker_attention", json=body, timeout=60).json()
    assert found["error_code"] == 0
    assert found["fit"] == "pad"
    assert len(found["grids"]) == 2
    for grid in found["grids"]:
        assert len(grid) == len(grid[0]) == 2
        assert math.isclose(sum(map(sum, grid)), 1, rel_tol=1e-4)
    assert answerer.model.config._attn_implementation == before
    for changes in ({"answer": "never said"}, {"answer": ""}):
        refused = httpx.post(f"{worker}/worker_attention", json=body | changes).json()
        assert refused["error_code"] == 1
        assert "last answer" in refused["text"]


def test_attention_is_as_before_after_an_error_too(worker, answerer, shots, monkeypatch):
    body = question("What is this?", shots[:1])
    body |= {"answer": "red", "prompt": body["prompt"] + " red###"}
    before, kinds = answerer.model.config._attn_implementation, []

    def fails(*args, **kwargs):
        kinds.append(answerer.model.config._attn_implementation)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(answerer.model.lm_head, "forward", fails)
    said = httpx.post(f"{worker}/worker_attention", json=body).json()
    assert said == {"text": "the model failed: out of memory", "error_code": protocol.ERROR_MODEL}
    assert kinds == ["eager"]
    assert answerer.model.config._attn_implementation == before
    assert not answerer.model.model.layers[0].self_attn._forward_hooks


def test_a_turned_photograph_is_seen_upright(worker, pictures):
    exif, turned, upright = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 6
    Image.open(pictures / "0.png").save(turned, "JPEG", exif=exif)
    ImageOps.exif_transpose(Image.open(turned)).save(upright, "PNG")
    found = []
    for file in (turned, upright):
        body = question("What is this?", [base64.b64encode(file.getvalue()).decode()])
        text = answers(worker, body)[-1]["text"]
        body |= {"answer": "a red one", "prompt": body["prompt"] + " a red one###"}
        seen = httpx.post(f"{worker}/worker_attention", json=body, timeout=60).json()["grids"]
        found.append((text, seen))
    assert found[0] == found[1]


def test_a_picture_of_one_row_is_answered(worker):
    assert answers(worker, question("What?", [png(100_000, 1)]))[-1]["error_code"] == 0
    found = answers(worker, question("What?", [png(1, 100_001)]))[-1]
    assert found["error_code"] == 1
    assert "sides of at most 100000" in found["text"]


def test_attention_is_that_of_transformers(answerer, pictures):
    """Against `output_attentions`, the whole matrices."""
    import torch

    from llava.mm_utils import expand_image_tokens, tokenizer_image_token
    from llava.serve.attention_maps import grids

    pixels, size = answerer.picture(Image.open(pictures / "0.png").convert("RGB"))
    prompt, answer = "USER: <image>\nWhat? ASSISTANT:", "a red one"
    with torch.inference_mode():
        found = torch.tensor(grids(answerer, prompt, answer, [(pixels, size)]))[0]
        head = tokenizer_image_token(prompt, answerer.tokenizer)
        tail = answerer.tokenizer(answer, add_special_tokens=False).input_ids
        ids = torch.tensor(head + tail)
        answerer.model.set_attn_implementation("eager")
        out = answerer.model(
            input_ids=ids[None], images=pixels[None], image_sizes=[size], output_attentions=True
        )
        answerer.model.set_attn_implementation("sdpa")
    expanded, _ = expand_image_tokens(ids, None, 4)
    rows = slice(len(expanded) - len(tail) - 1, len(expanded) - 1)
    seen = torch.stack([a[0, :, rows] for a in out.attentions]).mean((0, 1, 2))[expanded < 0]
    torch.testing.assert_close(found, (seen / seen.sum()).view(2, 2))


def test_flags_are_upstreams_and_the_run_of_a_model_is_found(tmp_path):
    args = arguments([])
    assert (args.host, args.port, args.limit_model_concurrency) == ("localhost", 21002, 5)
    assert args.controller_address == "http://localhost:21001"
    assert address_of(args) == "http://localhost:21002"
    assert address_of(arguments(["--worker-address", "http://w:1"])) == "http://w:1"
    (tmp_path / "run/clients/a").mkdir(parents=True)
    assert run_folder(str(tmp_path / "run/clients/a")) is None
    (tmp_path / "run/rounds.jsonl").touch()
    assert run_folder(str(tmp_path / "run/clients/a")) == str(tmp_path / "run")
