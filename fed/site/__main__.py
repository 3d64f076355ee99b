"""A site of a federated run: `python -m fed.site site.yaml`, with the keys of its file in
`fed/remote/site_yaml.py`.

It loads the site's model when the first request comes, and answers requests until it is stopped.
Data, pictures and whatever a client keeps stay on this machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import transformers

from fed.drivers.process_groups import unwound_by_signals
from fed.remote.site_yaml import read_site
from fed.site.serve import serve
from llava.errors import one_clear_error


def site(argv: Sequence[str] | None = None) -> None:
    """Serve the site of a site.yaml."""
    parser = argparse.ArgumentParser(
        prog="python -m fed.site", description="Train at a site of a federated run, when asked."
    )
    parser.add_argument("file", metavar="site.yaml", help="what the site has, and what it allows")
    parser.add_argument(
        "--key", action="store_true", help="print the public key of its secure sums, and end"
    )
    args = parser.parse_args(argv)
    config = read_site(args.file)
    if args.key:
        from fed.site.held import Held

        print(Held.public_key(config))
        return
    if config.process.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(config.process.gpus)
    with unwound_by_signals():
        serve(config)


def main() -> None:
    with one_clear_error():
        transformers.logging.set_verbosity_error()
        site()


if __name__ == "__main__":
    main()
