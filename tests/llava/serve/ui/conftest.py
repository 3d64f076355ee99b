"""What stands in for upstream's controller and workers, over real HTTP; and recorded runs."""

from __future__ import annotations

import asyncio

import pytest

from fed.merge import main as merge
from fed.train import train
from llava.serve import protocol
from llava.serve.http_server import application, streamed
from llava.serve.ui.chat_state import (
    Turn,
    fill,
)
from llava.serve.ui.worker_client import Options, WorkerClient


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


async def breaks(body):
    yield "half an", 0
    raise ConnectionResetError


@pytest.fixture(scope="session")
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
            "--fed_eval_explained", "True",
            "--output_dir", str(folder / method),
        ])  # fmt: skip
    experts = [str(folder / "local" / "clients" / name) for name in "ab"]
    merge(["--method", "pivotmerge", "--experts", *experts, "--options", "mode=energy",
           "--output", str(folder / "merge")])  # fmt: skip
    return folder
