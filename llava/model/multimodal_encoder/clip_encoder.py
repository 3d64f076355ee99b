"""The CLIP vision tower: pictures in, one feature vector per patch out, no gradients."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch
from torch import nn

from llava.errors import InputError


class CLIPVisionTower(nn.Module):
    """A frozen CLIP vision encoder by local path or hub name.

    Args:
        name: a folder or hub name with a CLIP (vision) model and its preprocessor.
        args: reads `mm_vision_select_layer` (which hidden state, default −2) and
            `mm_vision_select_feature` (`patch`: without the class token, or `cls_patch`).
        delay_load: read the config only; weights come with `load_model`.
    """

    def __init__(self, name: str, args, delay_load: bool = False):
        super().__init__()
        from transformers import AutoConfig

        self.vision_tower_name = name
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        if self.select_feature not in ("patch", "cls_patch"):
            raise InputError(
                f"mm_vision_select_feature is {self.select_feature!r}; known are patch, cls_patch"
            )
        self.is_loaded = False
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(f"--vision_tower {name}: no readable model there ({error})") from None
        self.config = getattr(config, "vision_config", config)
        if self.config.model_type != "clip_vision_model":
            raise InputError(
                f"--vision_tower {name}: a CLIP vision model is expected, "
                f"found model_type {config.model_type!r}"
            )
        layers = self.config.num_hidden_layers
        if not -layers - 1 <= self.select_layer <= layers:
            raise InputError(
                f"--mm_vision_select_layer {self.select_layer}: {name} has {layers} layers"
            )
        if not delay_load:
            self.load_model()

    def load_model(self, device_map=None) -> None:
        """Load weights (float32 until `.to(dtype)`) and picture processor; does nothing twice."""
        if self.is_loaded:
            return
        from transformers import CLIPImageProcessorPil, CLIPVisionModel

        # The Pillow backend gives upstream's pixels to the bit; torchvision's does not.
        self.image_processor = CLIPImageProcessorPil.from_pretrained(self.vision_tower_name)
        with _whole_on_every_rank():
            self.vision_tower = CLIPVisionModel.from_pretrained(
                self.vision_tower_name, device_map=device_map, dtype=torch.float32
            )
        self.requires_grad_(False).eval()
        self.is_loaded = True

    def train(self, mode: bool = True) -> CLIPVisionTower:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, 3, H, W) → features (batch, num_patches, hidden_size), in their dtype."""
        outputs = self.vision_tower(
            images.to(device=self.device, dtype=self.dtype), output_hidden_states=True
        )
        features = outputs.hidden_states[self.select_layer]
        if self.select_feature == "patch":
            features = features[:, 1:]
        return features.to(images.dtype)

    def fingerprint(self) -> str:
        """Hex digest of what decides the features: weights, their dtype, and the selection."""
        digest = hashlib.sha256(f"{self.select_layer} {self.select_feature} {self.dtype}".encode())
        for name, tensor in sorted(self.vision_tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Feature vectors per picture, the class token included when it is selected."""
        return self.num_patches_per_side**2 + (self.select_feature == "cls_patch")


@contextlib.contextmanager
def _whole_on_every_rank():
    """ZeRO-3 would cut the tower into shards, but it is no part of the model that gathers them."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def build_vision_tower(config, delay_load: bool = False) -> CLIPVisionTower:
    """The tower that `config.mm_vision_tower` (or the training flag `vision_tower`) names."""
    name = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None)
    if not name:
        raise InputError("no vision tower is named: neither mm_vision_tower nor --vision_tower")
    name = str(Path(name).expanduser()) if str(name).startswith("~") else str(name)
    return CLIPVisionTower(name, args=config, delay_load=delay_load)
