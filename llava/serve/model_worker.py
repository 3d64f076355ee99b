"""A worker: one model that answers over HTTP, many conversations at once.

python -m llava.serve.model_worker --model-path … --controller-address http://localhost:21001

It registers with its controller and tells it every 15 seconds that it lives. Up to
`--limit-model-concurrency` questions are answered in one batch, more wait in their order.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template
from llava.errors import InputError, one_clear_error
from llava.eval.answer import Answerer, Picture, add_model_flags, conv_mode_of, end_mark
from llava.serve import protocol
from llava.serve.http_server import check_installed
from llava.serve.worker_app import add_worker_flags, serve_worker

if TYPE_CHECKING:
    from llava.serve.batching import Engine


class ModelBackend:
    """A loaded model behind the wire format."""

    def __init__(self, answerer: Answerer, engine: Engine, runs: str | None = None):
        self.answerer, self.engine, self.runs = answerer, engine, runs
        config = answerer.model.config
        self.mode = getattr(config, "conversation_template", None) or conv_mode_of(answerer.name)
        self.template = get_template(self.mode)

    def status(self) -> dict[str, Any]:
        """Upstream's three values, and what a page needs to make this model's prompts."""
        return {
            "model_names": [self.answerer.name],
            "speed": 1,
            "queue_length": self.engine.length,
            "template": self.mode,
            "multimodal": self.answerer.image_processor is not None,
            "context_length": self.answerer.context_length,
            "runs": self.runs,
        }

    async def stream(self, request: protocol.Request) -> AsyncGenerator[str]:
        """The answer so far, whenever there is more of it."""
        from llava.serve.batching import QueuedPrompt

        pictures = await asyncio.to_thread(self._pictures, request.images)
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        question = QueuedPrompt(
            self._marked(request.prompt),
            pictures,
            request.temperature,
            request.top_p,
            request.max_new_tokens,
            request.stop or end_mark(self.template),
            lambda news: loop.call_soon_threadsafe(told.put_nowait, news),
        )
        self.engine.ask(question)
        try:
            while (news := await told.get()) is not None:
                if isinstance(news, Exception):
                    raise news
                yield news
        finally:
            question.cancelled = True  # no more to say, or nobody listens

    async def attention(self, body: Any) -> dict[str, Any]:
        """The attention of an answer's tokens to the places of each picture."""
        from llava.serve.attention_maps import grids

        request = protocol.read_request(body)
        answer = body.get("answer")
        if not isinstance(answer, str) or not answer.strip() or answer not in request.prompt:
            raise InputError("answer: the text of the prompt's last answer is expected")
        if not request.images:
            raise InputError("there is no picture in this conversation")
        pictures = await asyncio.to_thread(self._pictures, request.images)
        head, _, _ = self._marked(request.prompt).rpartition(answer)
        found = await asyncio.wrap_future(
            self.engine.call(lambda: grids(self.answerer, head, answer, pictures))
        )
        squared = getattr(self.answerer.model.config, "image_aspect_ratio", None) or ""
        crops = getattr(self.answerer.image_processor, "do_center_crop", False)
        fits = {"pad": "pad", "anyres": "stretch"}  # see `image_pixels`
        fit = fits.get(squared, "crop" if crops else "stretch")
        return {"grids": found, "fit": fit, "error_code": 0}

    def _marked(self, prompt: str) -> str:
        """The prompt with the tokens around pictures that some models learnt; pages send none."""
        if not getattr(self.answerer.model.config, "mm_use_im_start_end", False):
            return prompt
        whole = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        return prompt if whole in prompt else prompt.replace(DEFAULT_IMAGE_TOKEN, whole)

    def _pictures(self, images: tuple[str, ...]) -> list[Picture]:
        from llava.mm_utils import load_image_from_base64

        return [self.answerer.picture(load_image_from_base64(image)) for image in images]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Upstream's flags, and `--attn_implementation`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_flags(parser)
    parser.add_argument("--model-name", help="the name to serve under, else the folder's")
    add_worker_flags(parser)
    parser.add_argument("--use-flash-attn", action="store_true")
    return parser.parse_args(argv)


def run_folder(model_path: str) -> str | None:
    """The federated run that a model lies in or under, if it does."""
    from pathlib import Path

    folder = Path(model_path).expanduser().absolute()
    for place in (folder, *list(folder.parents)[:2]):
        if (place / "rounds.jsonl").is_file() or (place / "merge.json").is_file():
            return str(place)
    return None


def main(args: argparse.Namespace) -> None:
    """Load the model and serve it."""
    check_installed()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args.conv_mode = None
    if args.use_flash_attn:
        args.attn_implementation = args.attn_implementation or "flash_attention_2"
    answerer = Answerer.load(args)
    answerer.name = args.model_name or answerer.name
    from llava.serve.batching import Engine

    engine = Engine(answerer, args.limit_model_concurrency)
    backend = ModelBackend(answerer, engine, run_folder(args.model_path))
    print(f"{answerer.name}: conversation template {backend.mode}", file=sys.stderr, flush=True)
    try:
        serve_worker(backend, args)
    finally:
        engine.close()


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
