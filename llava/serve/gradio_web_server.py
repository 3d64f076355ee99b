"""The web page: talk to models, compare them, see the run that they came from.

    python -m llava.serve.gradio_web_server --controller-url http://localhost:21001 --run runs/x

Nothing that the page shows or does asks an outside host.
"""

# No postponed annotations: gradio finds its Request by them.
import argparse
import os
import ssl
import sys
from pathlib import Path

from llava.errors import InputError, one_clear_error, reason
from llava.serve.http_server import check_installed

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TITLE = "# LLaVA: what came out of the federation"
CSS = """
.cosines { overflow-x: auto }
.cosines caption { text-align: left; padding: 0.5em 0; white-space: nowrap }
.cosines td, .cosines th { padding: 0.3em 0.6em; text-align: right; white-space: nowrap }
#sites table { width: 100%; font-variant-numeric: tabular-nums }
#sites caption { text-align: left; padding: 0.5em 0 }
#sites td, #sites th { padding: 0.3em 0.6em; text-align: left; vertical-align: top }
#sites td { overflow-wrap: anywhere }
#sites span { white-space: nowrap }
.cosines td, .cosines th, #sites td, #sites th { border-color: var(--border-color-primary) }
button[aria-label="Share"] { display: none }
.gallery:has(> .gallery-item) { flex-wrap: nowrap; overflow-x: auto }
.gallery-item { flex: none }
.gallery-item .container { min-width: 0; gap: 0.4rem }
.gallery-item .container p { font-size: 0.875rem; white-space: nowrap }
.gallery-item .container img { height: 2.25rem; width: 2.25rem }
"""


def build(client, log, runs: list[str], offers: list, model_list_mode: str, embed: bool = False):
    """The page as gradio Blocks."""
    import gradio as gr

    from llava.serve.ui.chat import chat_tab
    from llava.serve.ui.compare import compare_tab
    from llava.serve.ui.run import run_tab
    from llava.serve.ui.worker_client import PageError

    at_start: list[str] = []

    async def models(request: gr.Request):
        """The models that are served: asked at each load, or until there are some."""
        trouble = ""
        if model_list_mode == "reload" or not at_start:
            try:
                at_start[:] = await client.models()
            except PageError as error:
                at_start.clear()
                trouble = str(error)
        asked = request.query_params.get("model")
        first = asked if asked in at_start else next(iter(at_start), None)
        return (
            gr.update(choices=at_start, value=first),
            gr.update(choices=at_start, value=at_start[:2]),
            gr.update(value=f"{trouble} Then load this page again.", visible=bool(trouble)),
        )

    with gr.Blocks(title="LLaVA", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        if not embed:
            gr.Markdown(TITLE)
        notice = gr.Markdown(visible=False)
        with gr.Tab("Chat"):
            model = chat_tab(client, log, offers)
        with gr.Tab("Side by side"):
            several = compare_tab(client, log, offers)
        with gr.Tab("Run"):
            run, choices = run_tab(client, runs)
        page.load(models, None, [model, several, notice], show_progress="hidden")
        page.load(choices, None, run, show_progress="hidden")
    return page


def main(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    check_installed("gradio")
    if args.moderate:
        raise InputError(
            "--moderate sends what people type to a service outside, and this page asks no outside "
            "host: leave it out"
        )
    for folder in args.run:
        if not Path(folder).is_dir():
            raise InputError(f"--run {folder}: no such folder")
    user, colon, password = (args.auth or "").partition(":")
    if args.auth is not None and not (user and colon and password):
        raise InputError("--auth: USER:PASSWORD is expected")
    if bool(args.ssl_certfile) != bool(args.ssl_keyfile):
        raise InputError("--ssl-certfile and --ssl-keyfile go together")
    if args.ssl_certfile:
        try:
            ssl.create_default_context().load_cert_chain(args.ssl_certfile, args.ssl_keyfile)
        except OSError as error:  # what ssl raises is one too
            raise InputError(f"--ssl-certfile {args.ssl_certfile}: {reason(error)}") from None
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr
    from starlette.middleware import Middleware

    from llava.serve.ui import examples
    from llava.serve.ui.feedback_log import FeedbackLog
    from llava.serve.ui.worker_client import WorkerClient

    page = build(WorkerClient(args.controller_url), FeedbackLog(args.log_dir), args.run,
                 examples.read(args.examples), args.model_list_mode, args.embed)  # fmt: skip
    page.queue(default_concurrency_limit=args.concurrency_count, api_open=False)
    system = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])
    try:
        _, address, public = page.launch(
            server_name=args.host, server_port=args.port, share=args.share,
            auth=(user, password) if user else None,
            ssl_certfile=args.ssl_certfile, ssl_keyfile=args.ssl_keyfile, ssl_verify=False,
            theme=theme, css=CSS, max_file_size="64mb", footer_links=[], run_history=False,
            ssr_mode=False, pwa=False, enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(OnlySelf)], "openapi_url": None},
            quiet=True, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError:
        where = f"{args.host}:{args.port}" if args.port else args.host
        raise InputError(f"the page cannot listen at {where}: is the port taken?") from None
    print(f"page: {address.rstrip('/')}", flush=True)
    if args.share:
        print(f"public page: {public or 'no link could be made'}", file=sys.stderr, flush=True)
    if args.host not in LOOPBACK:
        print(f"listening on {args.host}: other machines can reach it", file=sys.stderr, flush=True)
    page.block_thread()


class OnlySelf:
    """Tells browsers to load nothing from other hosts, whatever a model writes into its answer."""

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def guarded(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"], (b"content-security-policy", self.POLICY)
                ]  # fmt: skip
            await send(message)

        await self.app(scope, receive, guarded)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    add("--port", type=int, default=None, help="else the first that is free from 7860 on")
    add("--controller-url", default="http://localhost:21001")
    add("--concurrency-count", type=int, default=16, help="answers at once; others queue")
    add("--model-list-mode", choices=("once", "reload"), default="once",
        help="ask which models there are once, or each time the page is loaded")  # fmt: skip
    add("--share", action="store_true", help="let gradio's servers make the page public")
    add("--moderate", action="store_true", help="refused: it would ask an outside host")
    add("--embed", action="store_true", help="without the title, to be part of another page")
    add("--run", action="append", default=[], metavar="DIR",
        help="a federated run or a merge to show; may be repeated")  # fmt: skip
    add("--examples", default=None, metavar="FILE.json",
        help='what to offer to click, as [{"image": FILE, "text": QUESTION}, …] with FILEs relative'
        " to it; [] for nothing; else the playground's, where they are")  # fmt: skip
    add("--auth", default=None, metavar="USER:PASSWORD", help="who may enter")
    add("--ssl-certfile", default=None, help="serve https with this certificate")
    add("--ssl-keyfile", default=None)
    add("--log-dir", default=".", help="for DATE-conv.json and serve_images/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
