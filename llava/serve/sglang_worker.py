"""A worker whose model answers elsewhere: on SGLang, vLLM or any OpenAI-compatible server.

python -m llava.serve.sglang_worker --sgl-endpoint http://127.0.0.1:30000

The prompt that a page made with a conversation template is taken apart into messages again; the
server puts them together with its own chat template. Up to `--limit-model-concurrency` questions
are passed on at once, more wait in their order.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator
from typing import Any

from llava.conversation import SeparatorStyle, get_template
from llava.errors import InputError, one_clear_error
from llava.eval.answer import conv_mode_of
from llava.serve import protocol
from llava.serve.http_server import check_installed
from llava.serve.openai_client import OpenAIClient
from llava.serve.openai_messages import chat_messages, read_prompt
from llava.serve.text_stream import visible_text
from llava.serve.worker_app import add_worker_flags, serve_worker


class OpenAIBackend:
    """The model `model` of a server, served under `name` with prompts of the template `mode`."""

    def __init__(
        self,
        server: OpenAIClient,
        model: str,
        name: str,
        mode: str,
        limit: int = 5,
        context_length: int | None = None,
    ):
        if limit < 1:
            raise InputError(f"--limit-model-concurrency {limit}: at least 1 is expected")
        if get_template(mode).sep_style is SeparatorStyle.PLAIN:
            raise InputError(f"--conv-mode {mode}: a template with turns is needed")
        self.server, self.model, self.name, self.mode = server, model, name, mode
        self.context_length = context_length
        self._slots = asyncio.Semaphore(limit)
        self._asked = 0

    def status(self) -> dict[str, Any]:
        """Upstream's three values, and what a page needs to make prompts."""
        status = {
            "model_names": [self.name],
            "speed": 1,
            "queue_length": self._asked,
            "template": self.mode,
            "multimodal": True,  # a server that takes no pictures says so itself
            "runs": None,
        }
        return status | ({"context_length": self.context_length} if self.context_length else {})

    async def stream(self, request: protocol.Request) -> AsyncGenerator[str]:
        """The answer so far, whenever there is more of it."""
        self._asked += 1
        try:
            body = await asyncio.to_thread(self._body, request)
            async with self._slots, contextlib.aclosing(self.server.chat(body)) as pieces:
                stop, text, told = request.stop or "", "", ""
                async for piece in pieces:
                    text += piece
                    if stop and stop in text:  # hanging up ends the server's work
                        break
                    if (news := visible_text(text, stop, whole=False).strip()) != told:
                        told = news
                        yield told
            if (whole := visible_text(text, stop, whole=True).strip()) != told or not whole:
                yield whole
        finally:
            self._asked -= 1

    def _body(self, request: protocol.Request) -> dict[str, Any]:
        # No `stop`: the answer is cut here, and some servers fail at one when there are pictures.
        greedy = request.temperature <= protocol.GREEDY_BELOW
        return {
            "model": self.model,
            "messages": chat_messages(read_prompt(request.prompt, self.mode), request.images),
            "stream": True,
            "temperature": 0 if greedy else request.temperature,
            "top_p": request.top_p,
            "max_tokens": request.max_new_tokens,
        }


def template_for(name: str) -> str:
    """The template for a model of this name: upstream's, and Vicuna v1's where it knows none.

    (Upstream falls back on `llava_v0`, whose `###` would end an answer at a heading.)
    """
    mode = conv_mode_of(name)
    return "vicuna_v1" if mode == "llava_v0" else mode


def backend_of(args: argparse.Namespace) -> OpenAIBackend:
    """The backend that the flags describe; asks the server what it has."""
    key = None
    if args.api_key_env and not (key := os.environ.get(args.api_key_env)):
        raise InputError(f"--api-key-env {args.api_key_env}: no such environment variable is set")
    server = OpenAIClient(args.sgl_endpoint, key and key.strip())
    listed = _listed(server, needed=not args.model_path)
    model = args.model_path or next(iter(listed))
    if listed and model not in listed:
        print(f"note: {server.name} lists {', '.join(listed)}, not {model}", file=sys.stderr)
    name = args.model_name or model.rstrip("/").split("/")[-1]
    mode = args.conv_mode or template_for(name)
    length = listed.get(model, {}).get("max_model_len")
    print(
        f"{model} of {server.name} is served as {name}; conversation template: {mode}",
        file=sys.stderr,
        flush=True,
    )
    return OpenAIBackend(server, model, name, mode, args.limit_model_concurrency, length)


def _listed(server: OpenAIClient, needed: bool) -> dict[str, dict[str, Any]]:
    """The server's models by name; where none is needed, a server that lists none will do."""
    try:
        listed = {model["id"]: model for model in server.models()}
        if needed and not listed:
            raise InputError(f"the model server at {server.name} lists no model")
        return listed
    except InputError as error:
        if needed:
            raise InputError(f"{error} (with --model-path its list is not needed)") from None
        print(f"note: asked for its models, {error}", file=sys.stderr)
        return {}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Upstream's flags, `--api-key-env` and `--conv-mode`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sgl-endpoint", default="http://127.0.0.1:30000", help="the server, with or without /v1"
    )
    parser.add_argument("--model-path", help="which of the server's models, else its first")
    parser.add_argument("--model-name", help="the name to serve under, else the last part of that")
    parser.add_argument("--api-key-env", help="the environment variable that holds the API key")
    parser.add_argument("--conv-mode", help="the template of pages' prompts, else by name")
    add_worker_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Serve the server's model to the controller's users."""
    check_installed()
    serve_worker(backend_of(args), args)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
