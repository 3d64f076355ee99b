"""`python -m llava.model.make_delta`: a model → its difference to a base, for `apply_delta`.

    python -m llava.model.make_delta --base-model-path LLAMA --target-model-path LLAVA \
        --delta-path OUT
"""

from __future__ import annotations

import argparse

from llava.errors import one_clear_error
from llava.model.apply_delta import add_base


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a model's difference to its base.")
    parser.add_argument("--base-model-path", required=True)
    parser.add_argument("--target-model-path", required=True)
    parser.add_argument("--delta-path", required=True, help="a folder that is new or empty")
    args = parser.parse_args(argv)
    add_base(args.target_model_path, args.base_model_path, args.delta_path, sign=-1)


if __name__ == "__main__":
    with one_clear_error():
        main()
