"""The demo as a person uses it: controller, workers and page, with Chromium in front."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from fed.train import train
from llava.eval.answer import Answerer
from llava.serve.batching import Engine
from llava.serve.controller import Registry, controller_app
from llava.serve.demo import free_port
from llava.serve.model_worker import ModelBackend, run_folder
from llava.serve.model_worker import arguments as worker_arguments
from llava.serve.worker_app import worker_app
from tests.llava.serve.conftest import running
from tests.llava.serve.test_gradio_web_server import page
from tests.llava.serve.ui.conftest import Upstream

ROOT = Path(__file__).parents[3]
PARTS = ROOT / "playground" / "backbones" / "instruct"
PATIENCE = 60_000  # milliseconds that the browser waits for what must come
FRAIL, STEADY = "llava-v1-frail", "llava-v1-steady"
SLOW = "llava-v1-slow"  # a stand-in that says its words when the test wants it to
OFFERS = {"What is this?": [0], "And these two?": [0, 1]}  # examples: question, heldout pictures


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skips where none is installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    if not (path := next(filter(None, found), None)):
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run of two clients on the playground's parts; its model names a picture's colour."""
    folder = tmp_path_factory.mktemp("runs") / "llava-v1-fedcmp"
    train([
        "--model_name_or_path", str(PARTS / "llm"), "--vision_tower", str(PARTS / "vision_tower"),
        "--version", "v1", "--mm_projector_type", "mlp2x_gelu", "--tune_mm_mlp_adapter", "True",
        "--mm_use_im_patch_token", "False", "--image_folder", str(tiny / "images"),
        "--num_train_epochs", "4", "--learning_rate", "3e-3", "--per_device_train_batch_size", "4",
        "--save_strategy", "no", "--report_to", "none", "--fed_clients", str(tiny / "clients.yaml"),
        "--fed_rounds", "2", "--fed_one_pass", "False", "--fed_method", "fedcmp",
        "--fed_eval_data_path", str(tiny / "heldout.json"), "--output_dir", str(folder),
    ])  # fmt: skip
    return folder


class Stage:
    """What the stand-in does: a word, then what the test says next, unless the page is gone."""

    def __init__(self) -> None:
        self.go, self.gone = threading.Event(), threading.Event()
        self.then = "first second"

    async def script(self, body):
        import asyncio

        self.go.clear(), self.gone.clear()
        try:
            yield "first", 0
            while not self.go.is_set():
                await asyncio.sleep(0.02)
            yield self.then, 0
        finally:
            self.gone.set()


class Demo:
    """Controller, three workers and the page, and windows onto it.

    The worker of FRAIL is a process of its own, for it is to be killed.
    """

    def __init__(
        self, browser, trained: Path, images: Path, folder: Path, stack: contextlib.ExitStack
    ) -> None:
        self.browser, self.trained, self.folder = browser, trained, folder
        self.stage, self.hosts, self.port = Stage(), set(), free_port()
        self.controller = stack.enter_context(running(controller_app(Registry())))
        stack.callback(lambda: self.frail.kill())
        self.start_frail()

        args = worker_arguments([*self.flags(STEADY), "--controller-address", self.controller])
        args.conv_mode = None
        answerer = Answerer.load(args)
        answerer.name = STEADY
        engine = Engine(answerer, 2)
        stack.callback(engine.close)
        backend = ModelBackend(answerer, engine, run_folder(args.model_path))
        for app in (worker_app(backend), Upstream(**{SLOW: self.stage.script}).app()):
            body = {"worker_name": stack.enter_context(running(app)), "check_heart_beat": False}
            httpx.post(f"{self.controller}/register_worker", json=body).raise_for_status()

        offers = [{"image": [f"heldout-{n}.png" for n in pictures], "text": text}
                  for text, pictures in OFFERS.items()]  # fmt: skip
        (images / "examples.json").write_text(json.dumps(offers))
        flags = ("--controller-url", self.controller, "--model-list-mode", "reload",
                 "--examples", str(images / "examples.json"))  # fmt: skip
        self.address = stack.enter_context(page(folder, *flags))
        self.wait_for_frail()

    def flags(self, name: str) -> list[str]:
        return ["--model-path", str(self.trained), "--model-base", str(PARTS / "llm"),
                "--model-name", name, "--device", "cpu"]  # fmt: skip

    def start_frail(self) -> None:
        command = [sys.executable, "-m", "llava.serve.model_worker", *self.flags(FRAIL), "--port",
                   str(self.port), "--controller-address", self.controller]  # fmt: skip
        with open(self.folder / "worker.txt", "a") as log:
            self.frail = subprocess.Popen(command, stdout=log, stderr=log)

    def wait_for_frail(self) -> None:
        """Until it has registered."""
        for _ in range(1200):
            assert self.frail.poll() is None, (self.folder / "worker.txt").read_text()
            if FRAIL in httpx.post(f"{self.controller}/list_models").json()["models"]:
                return
            time.sleep(0.1)
        raise AssertionError("the worker has not registered")

    @contextlib.contextmanager
    def window(self, **options):
        """A page of its own; what it asks of the net is noted."""
        with contextlib.closing(self.browser.new_context(**options)) as context:
            context.set_default_timeout(PATIENCE)
            context.on("request", lambda request: self.hosts.add(httpx.URL(request.url).host))
            window = context.new_page()
            window.goto(self.address)
            window.get_by_role("textbox", name="Your question").wait_for()
            window.wait_for_function("document.querySelector('#model input').value")
            yield window


@pytest.fixture(scope="module")
def demo(browser, trained, tiny, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        demo = Demo(browser, trained, tiny / "images", tmp_path_factory.mktemp("demo"), stack)
        yield demo
    assert demo.hosts == {"127.0.0.1"}, "a page asked another host"


@pytest.fixture
def red(tiny) -> Path:
    return tiny / "images" / "heldout-0.png"


def choose(window, model: str) -> None:
    window.get_by_label("Model", exact=True).click()
    window.get_by_role("option", name=model, exact=True).click()


def ask(window, text: str, *pictures: Path, box: str = "Your question") -> None:
    """Add pictures, type, press Enter."""
    field = window.get_by_role("textbox", name=box, exact=True)
    if pictures:
        window.locator(".multimodal-textbox:visible input[type=file]").set_input_files(pictures)
        window.get_by_role("button", name="Remove file").nth(len(pictures) - 1).wait_for()
    field.fill(text)
    field.press("Enter")


def answered(window, place: int = 0) -> str:
    """The text of an answer, once it is finished."""
    window.locator("button:enabled", has_text="Upvote").wait_for()
    return window.locator("#chatbot .bot.message").nth(place).inner_text()


def overflow(window) -> int:
    return window.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_a_person_asks_about_pictures_votes_and_sees_what_was_looked_at(demo, red):
    with demo.window() as window:
        choose(window, STEADY)
        ask(window, "What is this?", red)
        assert "red" in answered(window)
        ask(window, "And <image> this?", red.with_name("heldout-1.png"))
        window.locator("#chatbot .user.message").nth(1).wait_for()
        assert answered(window, 1)
        assert "And <image> this?" in window.locator("#chatbot .user.message").nth(1).inner_text()
        window.get_by_role("button", name="Upvote").click()
        window.locator("button:disabled", has_text="Upvote").wait_for()
        window.get_by_role("button", name="What did it look at?").click()
        window.get_by_text(re.compile("brightest patch .*%")).nth(1).wait_for()
    [log] = demo.folder.glob("*-conv.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["type"] for line in lines] == ["chat", "chat", "upvote"]
    assert lines[2]["model"] == STEADY
    assert len(lines[2]["images"]) == 2
    first, _, second, _ = (text for _, text in lines[2]["state"]["messages"])
    assert first == "<image>\nWhat is this?"
    assert second == "<image>\nAnd < image > this?"


def test_words_come_one_by_one_and_a_closed_tab_hangs_up(demo):
    with demo.window() as window:
        choose(window, SLOW)
        ask(window, "Say two words.")
        window.get_by_text("first▌", exact=True).wait_for()
        demo.stage.go.set()
        window.get_by_text("first second", exact=True).wait_for()
        window.locator("button:enabled", has_text="Regenerate").click()
        window.get_by_text("first▌", exact=True).wait_for()
        window.locator("button:enabled", has_text="Stop").click()
        assert demo.stage.gone.wait(300)
        window.locator("button:enabled", has_text="Regenerate").click()
        window.get_by_text("first▌", exact=True).wait_for()
        assert not demo.stage.gone.is_set()
    assert demo.stage.gone.wait(300)


def test_models_answer_side_by_side_and_a_picture_that_is_none_is_said(demo, red, tmp_path):
    with demo.window() as window:
        window.get_by_role("tab", name="Side by side").click()
        columns = window.locator("[role=log]:visible")
        columns.nth(1).wait_for()
        chosen = window.get_by_label("Models, two to four")
        chosen.click()
        window.get_by_role("option", name=STEADY, exact=True).click()
        columns.nth(2).wait_for()
        (tmp_path / "notes.png").write_text("no picture")
        ask(window, "What is this?", tmp_path / "notes.png", box="Your question to all")
        window.get_by_text("notes.png cannot be read: cannot identify it as a picture.").wait_for()
        window.get_by_role("button", name="Remove file").click()
        ask(window, "What is this?", red, box="Your question to all")
        bots = [columns.nth(place).locator(".bot.message") for place in range(3)]
        texts = {FRAIL: bots[0], SLOW: bots[1], STEADY: bots[2]}
        texts[SLOW].get_by_text("first▌").wait_for()
        for name in (FRAIL, STEADY):  # these end while the slow one is still at it
            texts[name].get_by_text(re.compile("red picture$")).wait_for()
        assert texts[SLOW].inner_text().startswith("first▌")
        demo.stage.go.set()
        texts[SLOW].get_by_text("first second", exact=True).wait_for()


def click_example(window, text: str, box: str):
    """Click it, see that the box holds it, and return the box's field."""
    from playwright.sync_api import expect

    field = window.get_by_role("textbox", name=box, exact=True)
    window.get_by_role("button", name=text).click()
    expect(field).to_have_value(text, timeout=PATIENCE)
    pictures = window.locator("[aria-label^='Remove file']:visible")
    expect(pictures).to_have_count(len(OFFERS[text]), timeout=PATIENCE)
    return field


def test_an_example_is_ready_to_be_sent(demo):
    for tab, box in (("Chat", "Your question"), ("Side by side", "Your question to all")):
        with demo.window() as window:
            window.get_by_role("tab", name=tab).click()
            click_example(window, "And these two?", box)
            field = click_example(window, "What is this?", box)  # in place of the other
            if tab == "Chat":
                choose(window, STEADY)
            field.press("Enter")
            said = window.locator("[role=log]:visible").nth(0).locator(".bot.message")
            said.get_by_text(re.compile("red picture$")).wait_for()
            assert field.input_value() == ""
            demo.stage.go.set()


def test_a_vote_side_by_side_is_taken_once_and_tells_the_names(demo):
    from playwright.sync_api import expect

    box = "Your question to all"
    with demo.window() as window:
        window.get_by_role("tab", name="Side by side").click()
        kinds = re.compile(r"^\s*(Best: .*|Tie|Both bad)\s*$")
        votes = window.locator("button:visible", has_text=kinds)

        def expect_votes(able: bool, *names: str) -> None:
            texts = [*(f"Best: {name}" for name in names), "Tie", "Both bad"]
            expect(votes).to_have_text(texts, timeout=PATIENCE)
            for vote in votes.all():
                expect(vote).to_be_enabled(enabled=able, timeout=PATIENCE)

        expect_votes(False, FRAIL, SLOW)
        window.get_by_label("Hide names until a vote").check()
        expect_votes(False, "Model A", "Model B")
        click_example(window, "What is this?", box).press("Enter")
        window.get_by_text("first▌", exact=True).wait_for()
        window.get_by_text(re.compile("red picture$")).wait_for()
        expect_votes(False, "Model A", "Model B")
        demo.stage.go.set()
        expect_votes(True, "Model A", "Model B")
        first = window.locator("[role=log]:visible").nth(0).locator(".bot.message").inner_text()
        columns = [SLOW, FRAIL] if first == "first second" else [FRAIL, SLOW]
        window.get_by_role("button", name="Best: Model A").click()
        expect_votes(False, *columns)
        click_example(window, "What is this?", box).press("Enter")
        window.get_by_text("first▌", exact=True).wait_for()
        demo.stage.go.set()
        expect_votes(True, *columns)
        window.get_by_role("button", name="Tie").click()
        expect_votes(False, *columns)
    [log] = demo.folder.glob("*-conv.json")
    lines = [line for line in map(json.loads, log.open()) if "models" in line]
    assert [line["type"] for line in lines] == ["leftvote", "tievote"]
    assert [line["best"] for line in lines] == [columns[0], None]
    assert [line["anonymous"] for line in lines] == [True, False]
    assert all(line["models"] == columns for line in lines)
    states = [state["messages"] for state in lines[1]["states"]]
    assert [[text for _, text in turns[::2]] for turns in states] == [
        ["<image>\nWhat is this?"] * 2
    ] * 2
    assert states[columns.index(SLOW)][3][1] == "first second"


def test_the_page_of_a_run_is_live(demo):
    records = demo.trained / "rounds.jsonl"
    with demo.window() as window:
        window.get_by_role("tab", name="Run").click()
        window.get_by_text("fedcmp, round 2 is finished, with 2 clients.").wait_for()
        window.locator(".vega-embed canvas, .vega-embed svg").nth(3).wait_for()
        assert window.get_by_role("cell").count() == 4  # cosines, two clients by two
        last = json.loads(records.read_text().splitlines()[-1]) | {"round": 3}
        text = json.dumps(last)
        with open(records, "a") as file:
            file.write(text[:100])
            file.flush()
            file.write(text[100:] + "\n")
        window.get_by_text("fedcmp, round 3 is finished, with 2 clients.").wait_for()
        sites, row = demo.trained / "fed" / "sites.json", {"state": "at work", "since": "today"}
        for step in (9, 10):
            row |= {"asked": "round 4", "step": step, "steps": 90, "loss": 0.25}
            sites.write_text(json.dumps({"st-mary": row}))
            said = f"at work on round 4: step {step} of 90, loss 0.2500"
            window.get_by_role("cell", name=said).wait_for()
        sites.unlink()
        window.locator("#sites").wait_for(state="hidden")


def test_a_killed_worker_is_told_of_and_comes_back(demo, red):
    with demo.window() as window:
        choose(window, FRAIL)
        demo.frail.send_signal(signal.SIGSTOP)
        ask(window, "What is this?", red)
        window.locator("#chatbot .user.message").wait_for()
        demo.frail.kill()
        demo.frail.wait()
        message = f"The worker of {FRAIL} at http://localhost:{demo.port} does not answer."
        window.get_by_text(message).wait_for()
        httpx.post(f"{demo.controller}/refresh_all_workers", timeout=60)
        window.locator("button:enabled", has_text="Regenerate").click()
        window.get_by_text(f"No worker serves {FRAIL} now.").wait_for()
        demo.start_frail()
        demo.wait_for_frail()
        window.locator("button:enabled", has_text="Regenerate").click()
        assert "red" in answered(window)


def test_on_a_phone_in_the_dark_by_keyboard_nothing_is_fetched_from_elsewhere(demo, red):
    asked = []

    async def elsewhere(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    options = {"viewport": {"width": 375, "height": 700}, "color_scheme": "dark"}
    with running(elsewhere) as other, demo.window(**options) as window:
        for tab in ("Side by side", "Run", "Chat"):
            window.get_by_role("tab", name=tab).focus()
            window.keyboard.press("Enter")
            window.get_by_role("tab", name=tab, selected=True).wait_for()
            assert overflow(window) <= 0, tab
        red_green_blue = re.findall(r"[\d.]+", window.evaluate(
            "getComputedStyle(document.querySelector('.gradio-container')).backgroundColor"
        ))  # fmt: skip
        assert max(map(float, red_green_blue[:3])) < 64
        choose(window, SLOW)
        demo.stage.then = f"first ![picture]({other}/leak.png) end"
        window.get_by_role("textbox", name="Your question").focus()
        window.keyboard.type("a")
        window.keyboard.press("Shift+Enter")
        window.keyboard.type("b")
        window.keyboard.press("Enter")
        window.get_by_text("first▌", exact=True).wait_for()
        demo.stage.go.set()
        window.get_by_alt_text("picture").wait_for(state="attached")
        window.locator("button:enabled", has_text="Upvote").wait_for()
        for _ in range(2):  # over the button that sends
            window.keyboard.press("Tab")
        assert window.evaluate("document.activeElement.innerText").strip() == "Upvote"
        assert overflow(window) <= 0
    assert asked == []
