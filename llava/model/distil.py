"""`python -m llava.model.distil`: a Pilot connector → one mlp2x_gelu projector that imitates it.

    python -m llava.model.distil --model-path CLIENT --model-base LLM \
        --data-path mine.json --image-folder mine/images --output OUT

A mixture of several adapters is no projector of one adapter's size, so that it is imitated: the
projector starts as the own task's adapter and is fitted to what the whole connector gives for the
features of pictures (mean square error, Adam). Every tenth picture is left out and tells how far
the two are apart. OUT is what CLIENT is, LoRA included, with a connector that upstream knows.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from llava.errors import InputError, one_clear_error
from llava.model import lora
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import write_config
from llava.model.checkpoint_names import PROJECTOR_FILE, PROJECTOR_PREFIX
from llava.model.multimodal_projector.pilot import PilotConnector
from llava.model.multimodal_projector.plain import MLPConnector
from llava.state import save


class Distilled(NamedTuple):
    """A projector, and its relative errors ||x − x'|| / ||x|| over the tokens x of the connector.

    `own` is that of the own task's adapter by itself, where the projector starts; `fitted` on the
    pictures that it was fitted to, `left_out` on others.
    """

    projector: MLPConnector
    own: float
    fitted: float
    left_out: float


def distil(
    connector: PilotConnector,
    features: torch.Tensor,
    *,
    steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Distilled:
    """Imitate a connector by one of its adapters' size.

    Args:
        features: of the tower, (pictures, patches, mm_hidden_size); every tenth is left out.
        batch_size: pictures a step.
        learning_rate: of Adam; falls to 0 along a cosine.
    """
    connector = copy.deepcopy(connector).eval().float().requires_grad_(False)
    features = features.to(next(connector.parameters()).device)
    first = connector[0]
    assert isinstance(first, nn.Linear)
    projector = MLPConnector(first.in_features, first.out_features, 2).to(features.device)
    base = {n: t for n, t in connector.state_dict().items() if n in projector.state_dict()}
    projector.load_state_dict(base)
    left_out = torch.arange(len(features)) % 10 == 9
    fitted = features[~left_out]

    own = _error(projector, connector, features)
    optimizer = torch.optim.Adam(projector.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
    )
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = fitted[torch.randint(len(fitted), (batch_size,), generator=draw)].float()
        with torch.no_grad():
            wanted = connector(batch)
        # Relative to the tokens' size, so that a learning rate means the same for every model.
        loss = nn.functional.mse_loss(projector(batch), wanted) / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Distilled(
        projector,
        own,
        _error(projector, connector, fitted),
        _error(projector, connector, features[left_out]),
    )


@torch.no_grad()
def _error(projector: nn.Module, connector: nn.Module, features: torch.Tensor) -> float:
    missed = whole = 0.0
    for batch in features.split(16):
        wanted = connector(batch.float())
        missed += float((projector(batch.float()) - wanted).square().sum())
        whole += float(wanted.square().sum())
    return math.sqrt(missed / whole) if whole else math.nan


def distil_checkpoint(
    model_path: str,
    model_base: str | None,
    data_path: str,
    image_folder: str,
    output: str,
    *,
    pictures: int = 500,
    device: str = "cpu",
    **options,
) -> Distilled:
    """Distil the connector of a projector or LoRA folder into `output`, new or empty.

    Args:
        data_path: LLaVA JSON; its first `pictures` pictures are looked at.
        options: those of `distil`.

    Raises:
        InputError: no Pilot connector there, no picture, or something is in the way.
    """
    source, target = Path(model_path), Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--output {output}: a folder that is new or empty is expected")
    _, model, _, _ = load_pretrained_model(
        model_path, model_base, source.name, device=device, dtype=torch.float32
    )
    connector = getattr(model.get_model(), "mm_projector", None)
    if not isinstance(connector, PilotConnector):
        kind = getattr(model.config, "mm_projector_type", None)
        raise InputError(f"{model_path}: mm_projector_type is {kind!r}, `pilot` is expected")
    distilled = distil(connector, _features(model, data_path, image_folder, pictures), **options)
    state = {PROJECTOR_PREFIX + n: t for n, t in distilled.projector.state_dict().items()}
    is_lora = (source / lora.ADAPTER_CONFIG).is_file()
    if not is_lora and not (source / PROJECTOR_FILE).is_file():
        raise InputError(f"{model_path}: a folder of a projector or of LoRA is expected")
    if is_lora:
        others = {n: t for n, t in lora.read_beside(source).items() if "mm_projector." not in n}
        named = {lora.PEFT_PREFIX + name: tensor for name, tensor in (others | state).items()}
        save(named, target / lora.NON_LORA_FILE)
        lora.copy_adapter(source, target)
    else:
        save(state, target / PROJECTOR_FILE)
    config = copy.deepcopy(model.config)
    config.mm_projector_type = "mlp2x_gelu"
    del config.mm_pilot
    write_config(config, target, full=False)
    return distilled


@torch.no_grad()
def _features(model, data_path: str, image_folder: str, most: int) -> torch.Tensor:
    from llava.mm_utils import image_pixels, open_image
    from llava.train.data import load_records

    names: dict[str, None] = {}
    for record in load_records(data_path):
        found = record.get("image") or []
        names |= dict.fromkeys([found] if isinstance(found, str) else found)
    if min(len(names), most) < 10:
        raise InputError(
            f"--data-path {data_path}: {min(len(names), most)} pictures, at least 10 are expected"
        )
    tower = model.get_vision_tower()
    parts = []
    for name in list(names)[:most]:
        pixels = image_pixels(
            open_image(Path(image_folder) / name), tower.image_processor, model.config
        )
        tiles = pixels if pixels.ndim == 4 else pixels.unsqueeze(0)
        parts.append(tower(tiles.to(device=tower.device, dtype=tower.dtype)))
    return torch.cat(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Distil a Pilot connector into an mlp2x_gelu.")
    parser.add_argument("--model-path", required=True, help="a Pilot client's folder")
    parser.add_argument("--model-base", help="its language model")
    parser.add_argument("--data-path", required=True, help="LLaVA JSON, for its pictures")
    parser.add_argument("--image-folder", required=True)
    parser.add_argument("--output", required=True, help="a folder that is new or empty")
    parser.add_argument("--pictures", type=int, default=500, help="how many are looked at")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16, help="pictures a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args(argv))
    for name in ("pictures", "steps", "batch_size"):
        if args[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} is {args[name]}, at least 1 is expected")
    distilled = distil_checkpoint(**args)
    print(
        f"relative error of the tokens: {distilled.left_out:.4f} on pictures left out, "
        f"{distilled.fitted:.4f} on those fitted to; {distilled.own:.4f} by the "
        "own adapter as it was"
    )
    print(f"wrote {args['output']}")


if __name__ == "__main__":
    with one_clear_error():
        main()
