"""The page's parts over real HTTP, with what stands in for upstream's controller and workers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from fed.merge import main as merge
from fed.train import train
from llava.constants import MAX_PIXELS
from llava.conversation import get_template
from llava.errors import InputError
from llava.serve import protocol
from llava.serve.gradio_web_server import arguments, main
from llava.serve.http_server import application, streamed
from llava.serve.ui import compare, examples, run, run_data
from llava.serve.ui.chat_state import (
    PREPROCESS,
    Turn,
    chatbot_messages,
    conversation_of,
    fill,
    images_of,
)
from llava.serve.ui.feedback_log import FeedbackLog
from llava.serve.ui.overlay import DARKEST, overlay
from llava.serve.ui.worker_client import Options, PageError, Worker, WorkerClient
from tests.llava.serve.conftest import running


class Upstream:
    """Controller and workers at one address, without the status keys that are ours.

    `models` maps a name to an async generator of (text, error code), given what was asked.
    """

    def __init__(self, **models) -> None:
        self.models, self.asked = models, []

    def app(self, address=lambda http, model: str(http.base_url).rstrip("/")):
        async def refresh_all_workers(http):
            return None

        async def list_models(http):
            return {"models": list(self.models)}

        async def get_worker_address(http):
            model = (await http.json())["model"]
            return {"address": address(http, model) if model in self.models else ""}

        async def worker_get_status(http):
            return {"model_names": list(self.models), "speed": 1, "queue_length": 0}

        async def worker_generate_stream(http):
            body = await http.json()
            self.asked.append(body)

            async def pieces():
                async for text, code in self.models[body["model"]](body):
                    data = protocol.chunk(body["prompt"] + text if not code else text, code)
                    yield data[:5]  # bytes may be cut anywhere
                    yield data[5:]

            return streamed(pieces())

        return application(
            refresh_all_workers, list_models, get_worker_address, worker_get_status,
            worker_generate_stream,
        )  # fmt: skip


def says(*texts: str, code: int = 0):
    async def script(body):
        for text in texts:
            yield text, code

    return script


def ask(address: str, columns: dict[str, list[Turn]], options: Options | None = None) -> None:
    async def asking():
        async for _ in fill(WorkerClient(address), columns, options or Options()):
            pass

    asyncio.run(asking())


def typed(text: str, *files) -> Turn:
    return Turn.of({"text": text, "files": [str(file) for file in files]}, "Default")


# -- questions ---------------------------------------------------------------------------------


def test_an_upstream_worker_is_asked_as_upstreams_page_asks(pictures):
    upstream = Upstream(**{"llava-v1.5-7b": says("A", "A cat")})
    with running(upstream.app()) as address:
        turns = [typed("What is this?", pictures / "0.png")]
        ask(address, {"llava-v1.5-7b": turns}, Options(0.3, 0.9, 7))
        turns.append(typed("And these?", pictures / "1.png", pictures / "2.png"))
        ask(address, {"llava-v1.5-7b": turns})
    first, second = upstream.asked
    system = get_template("llava_v1").system  # what upstream takes for a model of this name
    assert turns[0].answer == "A cat"
    assert not turns[0].trouble
    assert first == {
        "model": "llava-v1.5-7b",
        "prompt": f"{system} USER: <image>\nWhat is this? ASSISTANT:",
        "images": turns[0].images,
        "temperature": 0.3,
        "top_p": 0.9,
        "max_new_tokens": 7,
        "stop": "</s>",
    }
    talk = (
        "<image>\nWhat is this? ASSISTANT: A cat</s>USER: <image>\n<image>\nAnd these? ASSISTANT:"
    )
    assert second["prompt"] == f"{system} USER: {talk}"
    assert second["images"] == turns[0].images + turns[1].images
    sent = [Image.open(io.BytesIO(base64.b64decode(image))) for image in second["images"]]
    for i, picture in enumerate(sent):
        assert picture.tobytes() == Image.open(pictures / f"{i}.png").convert("RGB").tobytes()


def test_a_typed_image_tag_is_text_and_is_shown_as_typed(pictures):
    turns = [typed("Is <image> a tag?", pictures / "0.png")]
    turns[0].answer = "<image> is"
    turns.append(typed("sure?"))
    turns[0].done = True
    prompt = conversation_of(turns, Worker("m", "", "v1")).get_prompt()
    assert prompt.count("<image>") == 1 == len(images_of(turns))
    assert "Is &lt;image&gt; a tag?" in [message["content"] for message in chatbot_messages(turns)]


def test_the_worker_says_how_its_prompts_are_made(pictures):
    turns = [typed("a", pictures / "0.png", pictures / "1.png")]
    chatml = conversation_of(turns, Worker("m", "", "chatml_direct"))
    assert "user\n<image>\n<image>\na<|im_end|>" in chatml.get_prompt()
    mmtag = conversation_of([typed("", pictures / "0.png")], Worker("m", "", "v1_mmtag"))
    assert "USER: <Image><image></Image> ASSISTANT:" in mmtag.get_prompt()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_sent_is_said_by_name(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "vast.png")
    assert MAX_PIXELS < 10_000**2
    for name, message in (
        ("notes.png", "notes.png cannot be read: cannot identify it as a picture."),
        (
            "vast.png",
            "vast.png cannot be read: 10000 x 10000 pixels; at most 64 million are taken.",
        ),
    ):
        with pytest.raises(PageError, match=f"^{re.escape(message)}$"):
            typed("what?", tmp_path / name)
    with pytest.raises(PageError, match="Type a question"):
        typed("  ")
    with pytest.raises(PageError, match="half an emoji"):
        typed("what? \ud83c")


@pytest.mark.parametrize("size", [(1400, 1), (1, 5000)])
@pytest.mark.parametrize("preprocess", PREPROCESS)
def test_a_thin_picture_can_be_sent(tmp_path, size, preprocess):
    Image.new("RGB", size, "red").save(tmp_path / "line.png")
    turn = Turn.of({"text": "what?", "files": [str(tmp_path / "line.png")]}, preprocess)
    sent = Image.open(io.BytesIO(base64.b64decode(turn.images[0])))
    square = {"Pad": (672, 672), "Resize": (336, 336)}.get(preprocess)
    assert sent.size == (square or tuple(min(side, 1344) for side in size))
    for fit in ("pad", "crop", "stretch"):
        assert overlay(sent, [[1, 0], [0, 1]], fit).size == sent.size


def test_an_upload_is_set_upright_and_deep_grey_is_grey(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scan = Image.fromarray(np.full((20, 30), 100 * 257, np.uint16))
    scan.save(tmp_path / "scan.png", exif=exif)
    turn = typed("what?", tmp_path / "scan.png")
    sent = Image.open(io.BytesIO(base64.b64decode(turn.images[0])))
    assert sent.size == (20, 30)
    assert sent.getcolors() == [(600, (100, 100, 100))]


# -- trouble -----------------------------------------------------------------------------------


async def breaks(body):
    yield "half an", 0
    raise ConnectionResetError


def trouble_with(model: str, upstream: Upstream) -> Turn:
    turns = [typed("hello")]
    with running(upstream.app()) as address:
        ask(address, {model: turns})
    return turns[0]


def test_upstreams_high_traffic_is_never_passed_on():
    traffic = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
    turn = trouble_with("m", Upstream(m=says(traffic, code=1)))
    assert "TRAFFIC" not in turn.trouble.upper()
    assert "m did not answer (error 1)" in turn.trouble


def test_a_workers_own_words_are_passed_on():
    turn = trouble_with("m", Upstream(m=says("the prompt is longer than the context", code=1)))
    assert turn.trouble == "the prompt is longer than the context"
    assert not turn.answer


def test_a_worker_that_stops_in_the_middle_leaves_its_words_and_a_message():
    turn = trouble_with("m", Upstream(m=breaks))
    assert turn.answer == "half an"
    assert "stopped in the middle" in turn.trouble
    assert [m["content"] for m in chatbot_messages([turn])][1:] == [
        "half an",
        f"**!** {turn.trouble}",
    ]


def test_no_worker_no_model_and_no_controller_are_told_apart():
    assert "No worker serves m now" in trouble_with("m", Upstream()).trouble
    assert trouble_with("", Upstream()).trouble == "Choose a model first."
    turns = [typed("hello")]
    ask("http://127.0.0.1:9", {"m": turns})
    assert "The controller at http://127.0.0.1:9 does not answer" in turns[0].trouble


def test_a_worker_that_is_gone_is_named():
    upstream = Upstream(m=says("a"))
    turns = [typed("hello")]
    with running(upstream.app(lambda http, model: "http://127.0.0.1:9")) as address:
        ask(address, {"m": turns})
    assert "The worker of m at http://127.0.0.1:9 does not answer" in turns[0].trouble


def test_an_upstream_worker_cannot_say_what_it_looked_at():
    with running(Upstream(m=says("a")).app()) as address:
        client = WorkerClient(address)

        async def look():
            return await client.attention(await client.worker("m"), "p a", "a", ["x"])

        with pytest.raises(PageError, match="cannot say what the model looked at"):
            asyncio.run(look())


def test_a_turn_without_an_answer_is_not_part_of_the_next_prompt(pictures):
    turns = [typed("lost", pictures / "0.png"), typed("now")]
    turns[0].trouble = "the worker stopped"
    assert "lost" not in conversation_of(turns, Worker("m", "", "v1")).get_prompt()
    assert images_of(turns) == []


# -- side by side ------------------------------------------------------------------------------


def test_models_are_asked_at_once_and_one_that_fails_fails_alone():
    there = {name: threading.Event() for name in "ab"}

    def meets(name: str, other: str):
        async def script(body):
            there[name].set()
            assert await asyncio.to_thread(there[other].wait, 60), "asked one after the other"
            yield name, 0

        return script

    upstream = Upstream(a=meets("a", "b"), b=meets("b", "a"), c=breaks, d=says("no", code=1))
    columns = {name: [typed("hello")] for name in "abcd"}
    with running(upstream.app()) as address:
        ask(address, columns)
    assert [columns[n][0].answer for n in "abcd"] == ["a", "b", "half an", ""]
    assert [bool(columns[n][0].trouble) for n in "abcd"] == [False, False, True, True]


def test_a_page_that_is_gone_hangs_up_on_all_workers():
    gone = {name: threading.Event() for name in "ab"}

    def endless(name: str):
        async def script(body):
            try:
                yield "word", 0
                await asyncio.sleep(3600)
            finally:
                gone[name].set()

        return script

    columns = {name: [typed("hello")] for name in "ab"}
    with running(Upstream(a=endless("a"), b=endless("b")).app()) as address:

        async def leaves():
            async with contextlib.aclosing(fill(WorkerClient(address), columns, Options())) as news:
                async for _ in news:
                    if all(turns[0].answer for turns in columns.values()):
                        break

        asyncio.run(leaves())
        assert all(event.wait(60) for event in gone.values())


# -- votes -------------------------------------------------------------------------------------


def test_the_log_is_upstreams_and_its_lines_stay_whole(tmp_path, pictures):
    turns = [typed("What?", pictures / "0.png")]
    turns[0].conversation, turns[0].model = conversation_of(turns, Worker("m", "", "v1")), "m"
    log = FeedbackLog(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(log.write, "upvote", turns, "127.0.0.1") for _ in range(40)]:
            done.result()
    today = datetime.date.today().isoformat()
    lines = [json.loads(x) for x in (tmp_path / f"{today}-conv.json").read_text().splitlines()]
    assert len(lines) == 40
    assert {"tstamp", "type", "model", "state", "ip"} <= set(lines[0])
    assert (lines[0]["type"], lines[0]["model"], lines[0]["ip"]) == ("upvote", "m", "127.0.0.1")
    assert lines[0]["state"]["messages"] == [["USER", "<image>\nWhat?"], ["ASSISTANT", None]]
    pixels = Image.open(pictures / "0.png").convert("RGB").tobytes()
    [stored] = (tmp_path / "serve_images" / today).iterdir()
    assert stored.name == f"{hashlib.md5(pixels).hexdigest()}.jpg"
    assert Image.open(stored).format == "JPEG"
    assert lines[0]["images"] == [stored.stem]


def answered(model: str, text: str, *files) -> list[Turn]:
    turn = typed(text, *files)
    turn.model, turn.answer = model, f"{model} says"
    turn.conversation = conversation_of([turn], Worker(model, "", "v1"))
    return [turn]


def test_a_vote_side_by_side_is_one_line_of_an_arenas_log(tmp_path, pictures):
    log = FeedbackLog(tmp_path)

    def lines() -> list[dict]:
        return [json.loads(x) for p in tmp_path.glob("*.json") for x in p.open()]

    talks = {model: answered(model, "What?", pictures / "0.png") for model in "abcd"}
    compare.cast(log, 1, ["b", "a"], talks, True, "127.0.0.1")
    for place in (0, 1, compare.MAX_COLUMNS):
        compare.cast(log, place, ["b", "a"], talks, True, "127.0.0.1")
    [line] = lines()
    assert (line["type"], line["models"], line["best"]) == ("rightvote", ["b", "a"], "a")
    assert line["anonymous"] is True
    assert line["ip"] == "127.0.0.1"
    said = [state["messages"][1][1] for state in line["states"]]
    [stored] = (tmp_path / "serve_images").glob("*/*.jpg")
    assert said == ["b says", "a says"]
    assert line["images"] == [[stored.stem]] * 2

    def kind_of(place: int, order: str) -> tuple[str, str | None]:
        talks.update({model: answered(model, "What?") for model in order})
        compare.cast(log, place, list(order), talks, False, "")
        return lines()[-1]["type"], lines()[-1]["best"]

    assert kind_of(0, "ab") == ("leftvote", "a")
    assert kind_of(2, "dcba") == ("bestvote", "b")
    assert kind_of(compare.MAX_COLUMNS, "abc") == ("tievote", None)
    assert kind_of(compare.MAX_COLUMNS + 1, "ab") == ("bothbad_vote", None)
    assert len(lines()) == 5
    assert not any(line["anonymous"] for line in lines()[1:])


def test_only_answers_to_one_question_are_voted_on():
    talks = {"a": answered("a", "What?"), "b": answered("b", "What?"), "c": answered("c", "Who?")}
    assert compare.comparable(["a", "b"], talks)
    assert not compare.comparable(["a"], talks)
    assert not compare.comparable([], {})
    assert not compare.comparable(["a", "c"], talks)
    assert not compare.comparable(["a", "d"], talks)
    talks["b"][0].answer = ""
    assert not compare.comparable(["a", "b"], talks)


# -- examples ----------------------------------------------------------------------------------


def test_examples_lie_beside_their_list(tmp_path, pictures, monkeypatch):
    (tmp_path / "0.png").write_bytes((pictures / "0.png").read_bytes())
    offers = [
        {"image": "0.png", "text": "What?"},
        {"image": [str(pictures / "1.png"), "0.png"]},
        {"text": "Who?"},
    ]
    file = tmp_path / "list.json"
    file.write_text(json.dumps(offers))
    here, other = str(tmp_path / "0.png"), str(pictures / "1.png")
    assert examples.read(str(file)) == [
        {"text": "What?", "files": [here]},
        {"text": "", "files": [other, here]},
        {"text": "Who?", "files": []},
    ]
    file.write_text(json.dumps([*offers[::2], {"image": "packed.png", "text": "And?"}]))
    monkeypatch.setattr(examples, "PLAYGROUND", file)
    assert [each["text"] for each in examples.read(None)] == ["What?", "Who?"]
    monkeypatch.setattr(examples, "PLAYGROUND", tmp_path / "no such")
    assert examples.read(None) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "list.json: no readable JSON"),
        ("{}", "list.json: a JSON list is expected, found a dict"),
        ('[{"text": "a"}, 3]', 'list.json, example 2: {"image": FILE or [FILE, …], "text": QUES'),
        ('[{"image": 3}]', "list.json, example 1: {"),
        ("[{}]", "list.json, example 1: {"),
        (
            '[{"image": "list.json"}]',
            "example 1: list.json cannot be read: cannot identify it as a picture.",
        ),
        ('[{"image": "no.png"}]', "example 1: no.png cannot be read: no such file."),
    ],
)
def test_examples_that_cannot_be_are_one_clear_error(tmp_path, text, message):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        examples.read(str(tmp_path / "list.json"))
    with pytest.raises(InputError, match="no such: no readable JSON"):
        examples.read(str(tmp_path / "no such"))


# -- attention ---------------------------------------------------------------------------------


def test_attention_lies_where_the_model_saw_the_picture():
    white = Image.new("RGB", (80, 40), "white")
    left = [[1.0, 0.0]] * 2  # on a square of two by two patches
    dark, bright = round(255 * DARKEST), 255

    padded = overlay(white, left, "pad").convert("L")
    assert padded.getpixel((0, 20)) == bright
    assert padded.getpixel((79, 20)) == dark
    cropped = overlay(white, left, "crop").convert("L")  # saw columns 20 to 60 alone
    assert [cropped.getpixel((x, 20)) for x in (19, 20, 59, 60)] == [dark, bright, dark, dark]
    stretched = overlay(white, left, "stretch").convert("L")
    assert stretched.getpixel((0, 0)) == bright
    assert stretched.getpixel((79, 39)) == dark
    top = overlay(white.rotate(90, expand=True), [[1, 1], [0, 0]], "crop").convert("L")
    assert [top.getpixel((20, y)) for y in (19, 20, 59)] == [dark, bright, dark]


# -- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """Folders of real runs of two clients, by Fed-CMP and alone, and of the merge of the latter."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("fedcmp", "local"):
        train([
            "--model_name_or_path", str(tiny / "llm"), "--vision_tower", str(tiny / "vision_tower"),
            "--version", "plain", "--mm_projector_type", "mlp2x_gelu", "--tune_mm_mlp_adapter",
            "True", "--image_folder", str(tiny / "images"), "--learning_rate", "1e-2",
            "--per_device_train_batch_size", "4", "--save_strategy", "no", "--report_to", "none",
            "--fed_clients", str(tiny / "clients.yaml"), "--fed_rounds", "2", "--fed_method",
            method, "--fed_eval_data_path", str(tiny / "heldout.json"),
            "--output_dir", str(folder / method),
        ])  # fmt: skip
    experts = [str(folder / "local" / "clients" / name) for name in "ab"]
    merge(["--method", "pivotmerge", "--experts", *experts, "--options", "mode=energy",
           "--output", str(folder / "merge")])  # fmt: skip
    return folder


def test_a_runs_records_become_plots(recorded):
    rounds, none = run_data.read(recorded / "fedcmp")
    assert none is None
    assert len(rounds) == 2
    losses = run_data.client_losses(rounds)
    assert [(row["round"], row["of"]) for row in losses] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert losses[3]["loss"] == rounds[1]["clients"]["b"]["loss"]
    held = run_data.heldout_losses(rounds)
    assert {row["of"] for row in held} == {"global on heldout"}
    assert len(held) == 2
    agreed = run_data.agreements(rounds)
    assert agreed[0]["cosine"] == rounds[0]["cosines"][0][1]
    assert len(agreed) == 4
    spectrum = [row for row in run_data.spectrum(rounds) if row["of"] == "layer 2"]
    assert [row["share"] for row in spectrum] == (
        rounds[1]["facts"]["layers"]["model.mm_projector.2"]["spectrum"]
    )
    alone = run_data.heldout_losses(run_data.read(recorded / "local")[0])
    assert {row["of"] for row in alone} == {"a on heldout", "b on heldout"}


def test_a_merges_weights_become_plots(recorded):
    none, facts = run_data.read(recorded / "merge")
    assert none == []
    assert run_data.experts(facts) == ["a", "b"]
    rows = run_data.layer_weights(facts)
    said = facts["method_facts"]["layers"]["model.mm_projector.0"]["alpha"]
    assert [row["weight"] for row in rows if row["layer"] == "layer 0"] == said
    facts["method_facts"], facts["experts"][1]["weight"] = {}, 3.0
    assert [row["weight"] for row in run_data.layer_weights(facts)] == [0.25, 0.75] * 2
    facts["experts"][1]["path"] = facts["experts"][0]["path"].replace("local", "other")
    assert run_data.experts(facts) == ["local/clients/a", "other/clients/a"]


def test_a_line_that_is_being_written_waits_for_its_end(recorded, tmp_path):
    text = (recorded / "fedcmp" / "rounds.jsonl").read_text()
    file = tmp_path / "rounds.jsonl"
    file.write_text(text[: len(text) - 30])
    before = run_data.stamp(tmp_path)
    assert len(run_data.read(tmp_path)[0]) == 1
    file.write_text(text)
    assert len(run_data.read(tmp_path)[0]) == 2
    assert run_data.stamp(tmp_path) != before


def test_a_folder_that_is_no_run_is_said_in_one_sentence(tmp_path):
    with pytest.raises(PageError, match="neither rounds.jsonl nor merge.json"):
        run_data.read(tmp_path)
    (tmp_path / "rounds.jsonl").write_text("rounds\n")
    with pytest.raises(PageError, match="are not JSON"):
        run_data.read(tmp_path)


def test_records_of_others_are_one_sentence_and_no_plot(tmp_path):
    for line in ('{"round": 1}', "[]", "3"):
        (tmp_path / "rounds.jsonl").write_text(line + "\n")
        text, *rest = run.seen_in(tmp_path)
        assert text == f"The records in {tmp_path} are not as `fed` writes them."
        assert not any(update["visible"] for update in rest)


def test_a_run_of_one_round_has_bars_in_place_of_lines(recorded):
    rounds, _ = run_data.read(recorded / "fedcmp")
    lines = [plot[2] == "line" for plot in run.PLOTS]

    def visible(rounds):
        updates = run._plotted(rounds, None)
        return [u["visible"] for u in updates[: len(lines)]], [
            u["visible"] for u in updates[len(lines) :]
        ]

    assert visible(rounds) == (lines, [False] * 4)
    only_spectrum = [plot[0] == "direction" for plot in run.PLOTS]
    assert visible(rounds[:1]) == (only_spectrum, [True, True, True, False])


def test_a_clients_name_is_text_on_the_page(recorded):
    rounds, _ = run_data.read(recorded / "fedcmp")
    text = json.dumps(rounds).replace('"a"', '"<img src=x>"')
    table = run._table(json.loads(text))["value"]
    assert "<img" not in table
    assert "&lt;img src=x&gt;" in table


# -- the server --------------------------------------------------------------------------------

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
            process.communicate(timeout=60)
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
